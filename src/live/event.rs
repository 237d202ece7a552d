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
#[cfg_attr(not(loom), repr(transparent))]
pub struct Event {
    word: AtomicU32,
    #[cfg(loom)]
    sleepers: sys::Sleepers,
}

impl Event {
    /// The word to hand to [`Event::wait`]; take it before looking at the state.
    pub fn ticket(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// Wakes all waiters in all processes.
    pub fn ring(&self) {
        self.word.fetch_add(1, Ordering::Release);
        sys::wake_all(self);
    }

    /// Sleeps until the next ring after the ticket was taken, or the timeout; may wake for no
    /// reason.
    pub fn wait(&self, ticket: u32, timeout: Duration) {
        sys::wait(self, ticket, timeout);
    }
}

#[cfg(not(loom))]
mod sys {
    #![allow(unsafe_code)]

    use super::{Duration, Event};

    pub fn wake_all(event: &Event) {
        // SAFETY: the word is a live reference; FUTEX_WAKE only uses its address.
        unsafe {
            libc::syscall(libc::SYS_futex, event.word.as_ptr(), libc::FUTEX_WAKE, libc::c_int::MAX);
        }
    }

    pub fn wait(event: &Event, expected: u32, timeout: Duration) {
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_nsec: timeout.subsec_nanos() as libc::c_long,
        };
        // SAFETY: word and timeout are live references for the whole call; the result does not
        // matter, since a waiter looks at the state again however it woke.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                event.word.as_ptr(),
                libc::FUTEX_WAIT,
                expected,
                &timeout,
            );
        }
    }
}

/// A futex as futex(2) has it, in the model checker's terms: the kernel compares and falls asleep
/// in one step, under a lock that waking takes too. There is no timeout: a wake-up that is lost
/// shows as a deadlock.
#[cfg(loom)]
mod sys {
    use loom::sync::{Condvar, Mutex};

    use super::{Duration, Event, Ordering};

    #[derive(Debug)]
    pub struct Sleepers {
        kernel: Mutex<()>,
        asleep: Condvar,
    }

    impl Default for Sleepers {
        fn default() -> Self {
            Sleepers { kernel: Mutex::new(()), asleep: Condvar::new() }
        }
    }

    pub fn wake_all(event: &Event) {
        let _kernel = event.sleepers.kernel.lock();
        event.sleepers.asleep.notify_all();
    }

    pub fn wait(event: &Event, expected: u32, _timeout: Duration) {
        if let Ok(kernel) = event.sleepers.kernel.lock() {
            if event.word.load(Ordering::Relaxed) == expected {
                drop(event.sleepers.asleep.wait(kernel));
            }
        }
    }
}
