//! Waiting for claims that others hold, in this process or another: one thread that sleeps on the
//! live file's event while there is anything to wait for.
//!
//! A wait ends when the claim is free or has passed to another owner, when the owner is dead (its
//! slot's lock is gone; asked before the wait begins and every few milliseconds after), or at the
//! deadline, after which the owner counts as stalled and nobody waits for it any more. In the last
//! two cases the claim is broken, except this process's own, which is alive for certain. Whoever waited then plans again and finds the data, or claims
//! itself.
//!
//! No wake-up is lost: a waiter marks the claim before it joins the list, so its owner rings the
//! event; and the thread takes the event's ticket before it looks at the list.
//!
//! Readers of one image are often on the same way and wait for one block after the other. So after
//! the last wait the thread stays with the event until the next ring, or a few milliseconds: a wait
//! that comes meanwhile need not wake it first.
//!
//! Used by `Engine`.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::core::Core;
use super::pool;
use crate::live::claim::{Claim, Held, Owner};

/// How often the owners are asked for a sign of life while somebody waits for them.
const PULSE: Duration = Duration::from_millis(10);
/// How long the thread outlives the last wait.
const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 128 << 10;

type Wake = Box<dyn FnOnce() + Send>;

/// The waits of one engine.
#[derive(Debug)]
pub struct Waiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    core: Arc<Core>,
    state: Mutex<State>,
    came: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waits: Vec<Wait>,
    thread: Option<JoinHandle<()>>,
    running: bool,
    stopping: bool,
}

struct Wait {
    cluster: u64,
    subcluster: u32,
    owner: Owner,
    deadline: Instant,
    wake: Wake,
}

impl std::fmt::Debug for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wait({}/{} on {:?})", self.cluster, self.subcluster, self.owner)
    }
}

impl Waiter {
    pub fn new(core: Arc<Core>) -> Self {
        Waiter { shared: Arc::new(Shared { core, state: Mutex::default(), came: Condvar::new() }) }
    }

    /// Calls `wake` when the claim on a subcluster may be free; `false` where it is already.
    pub fn wait(&self, cluster: u64, subcluster: u32, wake: Wake) -> bool {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        if state.stopping {
            return false;
        }
        let Some(held) = shared.claim(cluster, subcluster).and_then(Claim::mark_waiting) else {
            return false;
        };
        let owner = held.owner();
        if !shared.core.is_alive(owner) {
            shared.give_up_on(cluster, subcluster, held);
            return false;
        }
        if !state.running {
            let body = Arc::clone(shared);
            state.thread = pool::start("vmcache-wait", STACK, move || body.run());
            state.running = state.thread.is_some();
            if !state.running {
                // Without a thread nobody would ever wake up: break the claim and go on.
                if shared.claim(cluster, subcluster).is_some_and(|claim| claim.break_claim(held)) {
                    shared.ring();
                }
                return false;
            }
        }
        let deadline = Instant::now() + shared.core.patience();
        state.waits.push(Wait { cluster, subcluster, owner, deadline, wake });
        shared.came.notify_one();
        true
    }

    /// Ends all waits and the thread.
    pub fn stop(&self) {
        let thread = {
            let mut state = self.shared.state.lock();
            state.stopping = true;
            state.thread.take()
        };
        // Without a thread nobody sleeps, and the live file may be one to be read alone.
        let Some(thread) = thread else { return };
        self.shared.came.notify_one();
        self.shared.ring();
        if thread.join().is_err() {
            log::error!("the waiting thread panicked");
        }
    }
}

/// What is left to do when the thread panics: nobody may be left waiting for it.
struct Panicked<'a>(&'a Shared);

impl Drop for Panicked<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let left = {
            let mut state = self.0.state.lock();
            state.running = false;
            std::mem::take(&mut state.waits)
        };
        for wait in left {
            (wait.wake)();
        }
    }
}

impl Shared {
    fn claim(&self, cluster: u64, subcluster: u32) -> Option<&Claim> {
        self.core.live()?.claims(cluster)?.get(subcluster as usize)
    }

    fn ring(&self) {
        if let Some(live) = self.core.live() {
            live.event().ring();
        }
    }

    fn run(&self) {
        let _panicked = Panicked(self);
        let mut next_pulse = Instant::now();
        let mut stay = false;
        loop {
            // Anew each time, which lets SIGBUS through should somebody have blocked it.
            let Some(live) = self.core.live() else { return };
            let ticket = live.event().ticket();
            let mut state = self.state.lock();
            if state.waits.is_empty() && !state.stopping && stay {
                drop(state);
                live.event().wait(ticket, PULSE);
                stay = false;
                continue;
            }
            if state.waits.is_empty() && !state.stopping {
                let timed_out = self.came.wait_for(&mut state, IDLE).timed_out();
                if timed_out && state.waits.is_empty() && !state.stopping {
                    state.running = false;
                    return;
                }
                next_pulse = Instant::now() + PULSE;
                continue;
            }
            let now = Instant::now();
            let pulse = now >= next_pulse;
            if pulse {
                next_pulse = now + PULSE;
            }
            let everybody = state.stopping;
            let over: Vec<Wait> = state
                .waits
                .extract_if(.., |wait| everybody || self.is_over(wait, now, pulse))
                .collect();
            drop(state);
            let woken = !over.is_empty();
            stay |= woken;
            for wait in over {
                (wait.wake)();
            }
            if everybody {
                return;
            }
            if !woken {
                live.event().wait(ticket, next_pulse.saturating_duration_since(now).min(PULSE));
            }
        }
    }

    /// Whether there is nothing to wait for any more; breaks the claim of an owner that is dead or
    /// late.
    fn is_over(&self, wait: &Wait, now: Instant, pulse: bool) -> bool {
        let Some(claim) = self.claim(wait.cluster, wait.subcluster) else { return true };
        // Without the mark it was let go and made again, and nobody would ring for it.
        let same = |held: &Held| held.owner() == wait.owner && held.is_waited_for();
        let Some(held) = claim.holder().filter(same) else { return true };
        let late = now >= wait.deadline;
        let dead = pulse && !self.core.is_alive(wait.owner);
        if (late && !self.is_own(wait.owner)) || dead {
            self.give_up_on(wait.cluster, wait.subcluster, held);
        }
        late || dead
    }

    fn is_own(&self, owner: Owner) -> bool {
        self.core.owner() == Some(owner)
    }

    /// Breaks the claim of an owner that is dead or late.
    fn give_up_on(&self, cluster: u64, subcluster: u32, held: Held) {
        log::debug!("{:?} is dead or late with {cluster}/{subcluster}", held.owner());
        if let (Some(live), Some(claim)) = (self.core.live(), self.claim(cluster, subcluster))
            && live.slot(held.owner().slot()).give_up_on(claim, held)
        {
            live.event().ring();
        }
    }
}
