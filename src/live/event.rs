//! The event: one futex word in the shared file on which the waiters of all processes sleep.
//!
//! # Protocol
//!
//! A waiter reads the word ([`Event::ticket`]), then looks at what it waits for, then sleeps with
//! the word it read ([`Event::wait`]). Whoever frees a marked claim adds one to the word and wakes
//! everybody ([`Event::ring`]). If the ring comes between the waiter's look and its sleep, the
//! kernel finds another word and does not let it sleep: no wake-up is lost (futex(2)).

use std::time::Duration;

use super::sync::{AtomicU32, Ordering};

/// A futex word.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Event(AtomicU32);

impl Event {
    /// The word to hand to [`Event::wait`]; take it before looking at the state.
    pub fn ticket(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Wakes all waiters in all processes.
    pub fn ring(&self) {
        self.0.fetch_add(1, Ordering::Release);
        sys::wake_all(&self.0);
    }

    /// Sleeps until the next ring after the ticket was taken, or the timeout; may wake for no
    /// reason.
    pub fn wait(&self, ticket: u32, timeout: Duration) {
        sys::wait(&self.0, ticket, timeout);
    }
}

#[cfg(not(loom))]
mod sys {
    #![allow(unsafe_code)]

    use super::{AtomicU32, Duration};

    pub fn wake_all(word: &AtomicU32) {
        // SAFETY: the word is a live reference; FUTEX_WAKE only uses its address.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, libc::c_int::MAX);
        }
    }

    pub fn wait(word: &AtomicU32, expected: u32, timeout: Duration) {
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_nsec: timeout.subsec_nanos() as libc::c_long,
        };
        // SAFETY: word and timeout are live references for the whole call; the result does not
        // matter, since a waiter looks at the state again however it woke.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &timeout);
        }
    }
}

/// Under loom a thread that would sleep yields instead: the checker then runs the others first,
/// and reports a deadlock where nobody can go on.
#[cfg(loom)]
mod sys {
    use super::{AtomicU32, Duration};
    use crate::live::sync::Ordering;

    pub fn wake_all(_word: &AtomicU32) {}

    pub fn wait(word: &AtomicU32, expected: u32, _timeout: Duration) {
        while word.load(Ordering::Acquire) == expected {
            loom::thread::yield_now();
        }
    }
}
