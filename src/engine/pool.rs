//! Threads for work that may block: reading cached data that the page cache does not hold, making
//! room in the live file. They are started when there is work for one more, up to a limit, and end
//! when there was none for a while, so an idle disk costs no thread.
//!
//! Used by `Engine` and what it hands the pool to.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// As many requests as QEMU's own thread pool would have under way at once.
pub const MOST_THREADS: usize = 64;
const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 128 << 10;

/// Something to do in a thread that may block.
pub type Job = Box<dyn FnOnce() + Send>;

/// An elastic pool of threads. What is queued when it is dropped is still done.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    most_threads: usize,
}

impl Default for Pool {
    fn default() -> Self {
        Pool { shared: Arc::default(), most_threads: MOST_THREADS }
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    came: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    /// Threads that wait for a job and that no job was meant for yet.
    idle: usize,
    closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "State({} jobs, {} of {} threads idle)",
            self.queue.len(),
            self.idle,
            self.threads
        )
    }
}

impl Pool {
    /// Runs a job soon, in another thread; `false`, and the job dropped, where none can be had.
    pub fn run(&self, job: Job) -> bool {
        let mut state = self.shared.state.lock();
        if state.queue.len() >= state.idle && state.threads < self.most_threads {
            let shared = Arc::clone(&self.shared);
            let started = spawn("vmcache-io", STACK, move || shared.work());
            state.threads += usize::from(started);
        }
        if state.threads == 0 {
            return false;
        }
        state.queue.push_back(job);
        drop(state);
        self.shared.came.notify_one();
        true
    }

    /// A pool of so many threads at the most.
    #[cfg(test)]
    pub fn of(most_threads: usize) -> Self {
        Pool { shared: Arc::default(), most_threads }
    }

    /// The threads there are.
    #[cfg(test)]
    pub fn threads(&self) -> usize {
        self.shared.state.lock().threads
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.came.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        while let Some(job) = self.next() {
            run_caught(job);
        }
    }

    /// The next job; `None`, and the thread is no longer counted, when there was none for a while
    /// or there will be none any more.
    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        state.idle += 1;
        let mut waited = false;
        let job = loop {
            let job = state.queue.pop_front();
            if job.is_some() || state.closed || waited {
                break job;
            }
            waited = self.came.wait_for(&mut state, IDLE).timed_out();
        };
        state.idle -= 1;
        state.threads -= usize::from(job.is_none());
        job
    }
}

/// Runs a job: one that panics costs its request, not the thread that others count on.
pub fn run_caught(job: Job) {
    if panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
        log::error!("a job panicked");
    }
}

/// Starts a detached thread that takes no signals: those belong to the host program.
pub fn spawn(name: &str, stack: usize, body: impl FnOnce() + Send + 'static) -> bool {
    start(name, stack, body).is_some()
}

/// Starts a thread that takes no signals; `None` where the system has none left.
pub fn start(
    name: &str,
    stack: usize,
    body: impl FnOnce() + Send + 'static,
) -> Option<thread::JoinHandle<()>> {
    use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
    let mut before = SigSet::empty();
    // Blocked here, inherited there, so that there is no moment in between.
    let blocked =
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before)).is_ok();
    let started = thread::Builder::new().name(name.into()).stack_size(stack).spawn(body);
    if blocked && let Err(err) = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None) {
        log::warn!("could not restore the signal mask: {err}");
    }
    started.map_err(|err| complain(name, &err)).ok()
}

/// Says that a thread could not be had: once, since the next try follows with the next read.
fn complain(name: &str, err: &std::io::Error) {
    static COMPLAINED: AtomicBool = AtomicBool::new(false);
    let level = match COMPLAINED.swap(true, Ordering::Relaxed) {
        false => log::Level::Warn,
        true => log::Level::Debug,
    };
    log::log!(level, "could not start thread {name}: {err}");
}
