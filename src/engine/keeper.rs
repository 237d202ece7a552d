//! The keeper: a thread that looks every few seconds whether there is something to write into the
//! image's tables, left by this process or by one that died, and writes a checkpoint if so; that
//! tries again to join where that was not possible at opening; and that looks whether the base was
//! changed.
//!
//! Used by `Engine`.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::core::Core;
use super::{checkpoint, join, pool};
use crate::live::LiveFile;

/// What a power cut can cost at the most.
const INTERVAL: Duration = Duration::from_secs(5);
/// How often it is asked whether the last checkpoint is that long ago.
const TICK: Duration = Duration::from_secs(1);
const STACK: usize = 256 << 10;

/// The thread, as long as it is wanted.
#[derive(Debug)]
pub struct Keeper {
    core: Arc<Core>,
    interval: Duration,
    stopping: Arc<(Mutex<bool>, Condvar)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Looks at the usual interval, or another one, if there is anything to look at.
    pub fn new(core: Arc<Core>, interval: Option<Duration>) -> Self {
        let keeper = Keeper {
            core,
            interval: interval.unwrap_or(INTERVAL),
            stopping: Arc::new((Mutex::new(false), Condvar::new())),
            thread: Mutex::new(None),
        };
        if keeper.core.slot().is_some() || keeper.core.may_join_later() {
            keeper.start();
        }
        keeper
    }

    /// Starts the thread if it does not run.
    pub fn start(&self) {
        let mut thread = self.thread.lock();
        if thread.is_none() && !*self.stopping.0.lock() {
            let (core, stopping) = (Arc::clone(&self.core), Arc::clone(&self.stopping));
            let interval = self.interval;
            *thread = pool::start("vmcache-keep", STACK, move || run(&core, &stopping, interval));
        }
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
    // Anybody's last one counts: each process by itself may not live that long.
    let is_due = || core.live().is_some_and(|live| live.since_checkpoint() >= interval);
    // One that is under way: most likely its writer died, and leaves clusters that look leaked.
    if is_due() || core.live().is_some_and(LiveFile::is_checkpointing) {
        checkpoint::write(core, Duration::ZERO);
    }
    let mut looked = Instant::now();
    let mut stop = stopping.lock();
    while !*stop {
        if wake.wait_for(&mut stop, interval.min(TICK)).timed_out() {
            parking_lot::MutexGuard::unlocked(&mut stop, || {
                if looked.elapsed() >= interval {
                    looked = Instant::now();
                    if core.may_join_later() {
                        join::join_late(core);
                    }
                    core.is_base_same();
                }
                if is_due() {
                    checkpoint::write(core, Duration::ZERO);
                }
            });
        }
    }
}
