//! A write beyond the process's file size limit (`RLIMIT_FSIZE`) comes with SIGXFSZ, which ends a
//! program that does not expect it. The engine's own threads take no signals, so the write fails
//! there with EFBIG and storing is given up; what is written in a thread of the caller's, at opening
//! and closing, needs the same.
//!
//! Used by `Engine`.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Keeps SIGXFSZ from this thread until it is dropped, in the same thread.
#[derive(Debug)]
pub struct NoFileSizeSignal {
    blocked: bool,
}

impl NoFileSizeSignal {
    pub fn new() -> Self {
        let free = SigSet::thread_get_mask().is_ok_and(|mask| !mask.contains(Signal::SIGXFSZ));
        NoFileSizeSignal { blocked: free && set().thread_block().is_ok() }
    }
}

impl Drop for NoFileSizeSignal {
    fn drop(&mut self) {
        if !self.blocked {
            return;
        }
        // What came meanwhile is taken; where it cannot be, it must not come later either.
        if let Ok(pending) =
            SignalFd::with_flags(&set(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        {
            while let Ok(Some(_)) = pending.read_signal() {}
            if let Err(err) = set().thread_unblock() {
                log::debug!("SIGXFSZ stays blocked in this thread: {err}");
            }
        }
    }
}

fn set() -> SigSet {
    SigSet::from(Signal::SIGXFSZ)
}
