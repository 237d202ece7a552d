//! Threads for work that may block: reading cached data that the page cache does not hold, making
//! room in the live file. They are started when there is work for one more, up to a limit, and end
//! when there was none for a while, so an idle disk costs no thread.
//!
//! Used by `Engine`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

/// As many requests as QEMU's own thread pool would have under way at once.
const MOST_THREADS: usize = 64;
const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 128 << 10;

/// Something to do in a thread that may block.
pub type Job = Box<dyn FnOnce() + Send>;

/// An elastic pool of threads.
#[derive(Debug)]
pub struct Pool {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Receiver<Job>,
    threads: AtomicUsize,
    /// Jobs that were handed over and not finished.
    unfinished: AtomicUsize,
}

impl Default for Pool {
    fn default() -> Self {
        let (jobs, queue) = unbounded();
        let (threads, unfinished) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Pool { jobs, shared: Arc::new(Shared { queue, threads, unfinished }) }
    }
}

impl Pool {
    /// Runs a job soon, in another thread; `false`, and the job dropped, where none can be had.
    pub fn run(&self, job: Job) -> bool {
        let threads = self.shared.threads.load(Ordering::Relaxed);
        let unfinished = self.shared.unfinished.fetch_add(1, Ordering::Relaxed) + 1;
        let started = unfinished > threads && threads < MOST_THREADS && self.start();
        // The receiver lives in `shared`, so sending only fails with the pool itself.
        if (threads > 0 || started) && self.jobs.send(job).is_ok() {
            return true;
        }
        self.shared.unfinished.fetch_sub(1, Ordering::Relaxed);
        false
    }

    fn start(&self) -> bool {
        let shared = Arc::clone(&self.shared);
        shared.threads.fetch_add(1, Ordering::Relaxed);
        let started = spawn("vmcache-io", STACK, move || shared.work());
        if !started {
            self.shared.threads.fetch_sub(1, Ordering::Relaxed);
        }
        started
    }
}

impl Shared {
    fn work(&self) {
        loop {
            match self.queue.recv_timeout(IDLE) {
                Ok(job) => {
                    job();
                    self.unfinished.fetch_sub(1, Ordering::Relaxed);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    self.threads.fetch_sub(1, Ordering::SeqCst);
                    // A job that came between the timeout and the line above counted on this
                    // thread.
                    if self.queue.is_empty() {
                        return;
                    }
                    self.threads.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        self.threads.fetch_sub(1, Ordering::Relaxed);
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
    if blocked {
        if let Err(err) = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None) {
            log::warn!("could not restore the signal mask: {err}");
        }
    }
    started.map_err(|err| log::warn!("could not start thread {name}: {err}")).ok()
}
