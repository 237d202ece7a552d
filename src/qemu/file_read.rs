//! Reading the image file into memory of a request: what can be had without waiting for the disk,
//! and, in another thread, the rest.
//!
//! Used by `io`.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::os::fd::RawFd;

use libc::iovec;
use smallvec::SmallVec;

/// A positive errno value.
pub(super) type Errno = c_int;
pub(super) type IoVec = SmallVec<[iovec; 8]>;

/// Beside the errno values: the file ends before the bytes that were asked for, which it does only
/// where somebody cut it off.
pub(super) const END_OF_FILE: Errno = Errno::MAX;

/// Bytes of a vector.
pub(super) fn len(iov: &[iovec]) -> usize {
    iov.iter().map(|element| element.iov_len).sum()
}

/// Reads what can be had without waiting for the disk; returns how many bytes of the vector that
/// were, from its start.
///
/// # Safety
/// The memory must be good for writing.
pub(super) unsafe fn read_now(fd: RawFd, iov: &[iovec], at: u64) -> Result<usize, Errno> {
    // SAFETY: as promised by the caller.
    match unsafe { read(fd, iov, at, libc::RWF_NOWAIT) } {
        // Linux 5.9 and 5.10 say that it is the end now and then though it is not (preadv2(2), BUGS).
        Err(libc::EAGAIN | END_OF_FILE) => Ok(0),
        read => read,
    }
}

/// What is still to be read from a file, and where to.
#[derive(Clone)]
pub(super) struct Rest {
    iov: IoVec,
    at: u64,
    fd: RawFd,
}

// SAFETY: addresses of memory of a request, which is good for any thread until the request
// completes; the request waits for the thread.
unsafe impl Send for Rest {}

impl Rest {
    /// What is left of a vector once its first bytes are there.
    pub(super) fn after(read: usize, fd: RawFd, iov: &[iovec], at: u64) -> Self {
        let mut rest = Rest { iov: IoVec::from_slice(iov), at, fd };
        rest.take(read);
        rest
    }

    /// Bytes that are left.
    pub(super) fn len(&self) -> usize {
        len(&self.iov)
    }

    /// Reads all of it, waiting for the disk.
    ///
    /// # Safety
    /// The memory must be good for writing.
    pub(super) unsafe fn read_all(&mut self) -> Result<(), Errno> {
        while !self.iov.is_empty() {
            // SAFETY: as promised by the caller.
            let read = unsafe { read(self.fd, &self.iov, self.at, 0) }?;
            self.take(read);
        }
        Ok(())
    }

    /// Takes what was read off the front.
    fn take(&mut self, read: usize) {
        self.at += read as u64;
        let mut left = read;
        let whole = self
            .iov
            .iter()
            .take_while(|element| {
                let taken = element.iov_len <= left;
                left -= if taken { element.iov_len } else { 0 };
                taken
            })
            .count();
        self.iov.drain(..whole);
        if let Some(first) = self.iov.first_mut() {
            first.iov_base = first.iov_base.wrapping_byte_add(left);
            first.iov_len -= left;
        }
    }
}

/// One system call; returns how many bytes it read.
///
/// # Safety
/// The memory must be good for writing.
unsafe fn read(fd: RawFd, iov: &[iovec], at: u64, flags: c_int) -> Result<usize, Errno> {
    let count = iov.len().min(libc::UIO_MAXIOV as usize) as c_int;
    loop {
        // SAFETY: as promised by the caller; the array has `count` elements.
        match unsafe { libc::preadv2(fd, iov.as_ptr(), count, at as libc::off_t, flags) } {
            0 => return Err(END_OF_FILE),
            read @ 1.. => return Ok(read as usize),
            _ => match io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
                libc::EINTR => {}
                errno => return Err(errno),
            },
        }
    }
}
