//! Open-file-description locks on single bytes, the only locks that cross processes here. They
//! belong to the open file, not to the process (fcntl(2), "Open file description locks"): two
//! opens in one process exclude each other like two processes, and the kernel drops them when the
//! last descriptor is closed, so that a killed owner never holds anybody up.
//!
//! Used by `image` (QEMU's lock bytes and our own) and `live` (slots); uses only the system.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// How a byte is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Any number of holders; needs a readable descriptor.
    Shared,
    /// One holder; needs a writable descriptor.
    Exclusive,
    /// Not at all.
    Unlocked,
}

impl LockKind {
    fn flock(self, byte: u64) -> libc::flock {
        libc::flock {
            l_type: match self {
                LockKind::Shared => libc::F_RDLCK,
                LockKind::Exclusive => libc::F_WRLCK,
                LockKind::Unlocked => libc::F_UNLCK,
            } as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: byte as libc::off_t,
            l_len: 1,
            l_pid: 0,
        }
    }
}

/// Locks a byte, or changes or drops this descriptor's lock on it, without waiting. `false` where
/// another holder is in the way.
pub fn try_lock(file: &impl AsFd, byte: u64, kind: LockKind) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&kind.flock(byte))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks a byte, waiting for other holders up to `patience`; `false` where that was not enough.
/// For opening and closing only: it sleeps between tries.
pub fn lock_within(
    file: &impl AsFd,
    byte: u64,
    kind: LockKind,
    patience: Duration,
) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        if try_lock(file, byte, kind)? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether somebody else holds a lock on the byte that would refuse `kind` to this descriptor.
pub fn is_held_against(file: &impl AsFd, byte: u64, kind: LockKind) -> io::Result<bool> {
    let mut query = kind.flock(byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut query))?;
    Ok(query.l_type != libc::F_UNLCK as libc::c_short)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_opens() -> (std::fs::File, std::fs::File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        (file.reopen().unwrap(), file.reopen().unwrap())
    }

    #[test]
    fn two_opens_in_one_process_exclude_each_other() {
        let (one, other) = two_opens();
        assert!(try_lock(&one, 7, LockKind::Exclusive).unwrap());
        assert!(!try_lock(&other, 7, LockKind::Shared).unwrap());
        assert!(is_held_against(&other, 7, LockKind::Shared).unwrap());
        assert!(!is_held_against(&one, 7, LockKind::Shared).unwrap());
    }

    #[test]
    fn closing_the_file_drops_the_lock() {
        let (one, other) = two_opens();
        assert!(try_lock(&one, 7, LockKind::Exclusive).unwrap());
        drop(one);
        assert!(try_lock(&other, 7, LockKind::Exclusive).unwrap());
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let (one, other) = two_opens();
        assert!(try_lock(&one, 7, LockKind::Shared).unwrap());
        let patience = Duration::from_millis(5);
        assert!(!lock_within(&other, 7, LockKind::Exclusive, patience).unwrap());
    }
}
