//! The one way by which an image file is changed: every write, sync, allocation, discard and change
//! of length goes through a [`Disk`]. Reads do not; they use the file itself.
//!
//! A disk may have an [`Observer`], which hears of each operation in its place in time and may
//! refuse or shorten it. That is how tests learn what a power cut can leave and how they make
//! system calls fail; outside of tests there is none.
//!
//! Used by the rest of `image`.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::fallocate::{FallocateFlags, fallocate};

/// A change of the image file, one system call. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Bytes are written.
    Write {
        /// From here on.
        at: u64,
        /// What is written.
        bytes: &'a [u8],
    },
    /// What was written is brought to the disk.
    Sync,
    /// Blocks are allocated under a range; its content stays.
    Allocate {
        /// Start of the range.
        at: u64,
        /// Its length.
        len: u64,
    },
    /// The blocks of a range are given back; it reads as zeros.
    Discard {
        /// Start of the range.
        at: u64,
        /// Its length.
        len: u64,
    },
    /// The file gets this length.
    SetLength(u64),
}

/// Hears of every change of an image file, from whatever thread makes it.
pub trait Observer: Debug + Send + Sync {
    /// An operation is about to be done. Returns how many bytes of a write to do now; what is left
    /// comes as another one. An error is what the operation fails with instead of being done.
    fn before(&self, operation: Operation<'_>) -> io::Result<usize>;

    /// The operation that this thread announced was done, without an error.
    fn after(&self, operation: Operation<'_>);
}

/// An image file, for changes.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    observer: Option<Arc<dyn Observer>>,
}

impl Disk {
    pub fn new(file: File, observer: Option<Arc<dyn Observer>>) -> Self {
        Disk { file, observer }
    }

    /// The file, for reads and locks.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes all of the bytes from an offset on.
    pub fn write_all_at(&self, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut written = 0;
            self.perform(Operation::Write { at, bytes }, |most| {
                let now = bytes.get(..most).unwrap_or(bytes);
                written = self.file.write_at(now, at)?;
                Ok(())
            })?;
            match bytes.get(written..) {
                Some(rest) if written != 0 => bytes = rest,
                _ => return Err(io::ErrorKind::WriteZero.into()),
            }
            at += written as u64;
        }
        Ok(())
    }

    /// Brings everything written to the disk.
    pub fn sync_data(&self) -> io::Result<()> {
        self.perform(Operation::Sync, |_| self.file.sync_data())
    }

    /// The same for the file's times, owner and mode.
    pub fn sync_all(&self) -> io::Result<()> {
        self.perform(Operation::Sync, |_| self.file.sync_all())
    }

    /// Allocates the blocks under a range.
    pub fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.perform(Operation::Allocate { at, len }, |_| fallocate(&self.file, how, at, len))
    }

    /// Gives the blocks of a range back.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.perform(Operation::Discard { at, len }, |_| fallocate(&self.file, how, at, len))
    }

    /// Gives the file a length.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.perform(Operation::SetLength(len), |_| self.file.set_len(len))
    }

    /// Does an operation, again where a signal came in between. `perform` gets the number of bytes
    /// that a write may have.
    fn perform(
        &self,
        operation: Operation<'_>,
        mut perform: impl FnMut(usize) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let done = match &self.observer {
                None => perform(usize::MAX),
                Some(observer) => observer
                    .before(operation)
                    .and_then(&mut perform)
                    .inspect(|()| observer.after(operation)),
            };
            match done {
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests;
