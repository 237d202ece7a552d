//! The keeper: a thread that looks every few seconds whether there is something to write into the
//! image's tables, left by this process or by one that died, and writes a checkpoint if so; and that
//! tries again to join where that was not possible at opening.
//!
//! Used by `Engine`.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::core::Core;
use super::{checkpoint, join, pool};
use crate::live::LiveFile;

/// What a power cut can cost at the most.
const INTERVAL: Duration = Duration::from_secs(5);
const STACK: usize = 256 << 10;

/// The thread, as long as it is wanted.
#[derive(Debug)]
pub struct Keeper {
    stopping: Arc<(Mutex<bool>, Condvar)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Looks at the usual interval, or another one.
    pub fn start(core: Arc<Core>, interval: Option<Duration>) -> Self {
        let stopping = Arc::new((Mutex::new(false), Condvar::new()));
        let thread = if core.populates() || core.may_join_later() {
            let stopping = Arc::clone(&stopping);
            pool::start("vmcache-keep", STACK, move || {
                run(&core, &stopping, interval.unwrap_or(INTERVAL));
            })
        } else {
            None
        };
        Keeper { stopping, thread: Mutex::new(thread) }
    }

    /// Ends the thread, after the checkpoint it may be writing.
    pub fn stop(&self) {
        *self.stopping.0.lock() = true;
        self.stopping.1.notify_all();
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the checkpointing thread panicked");
        }
    }
}

fn run(core: &Core, (stopping, wake): &(Mutex<bool>, Condvar), interval: Duration) {
    if core.live().is_some_and(LiveFile::is_checkpointing) {
        // Most likely its writer died, and leaves clusters that look leaked.
        checkpoint::write(core, Duration::ZERO);
    }
    let mut stop = stopping.lock();
    while !*stop {
        if wake.wait_for(&mut stop, interval).timed_out() {
            parking_lot::MutexGuard::unlocked(&mut stop, || {
                if core.may_join_later() {
                    join::join_late(core);
                }
                checkpoint::write(core, Duration::ZERO);
            });
        }
    }
}
