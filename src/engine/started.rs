//! Reads of cached data that the disk is already at: a try that was not to wait has begun them
//! (`RWF_NOWAIT` begins to read what the page cache lacks), so that what is left is to wait for each
//! and to take it. One thread does that for all, in the order in which they were begun: most of them
//! have come by the time it gets there, and nobody is woken for them. A thread for each, as for what
//! has yet to be begun (`pool`), would cost two task switches and two interrupts a read.
//!
//! ```text
//! push()    no server: hands serve() to the pool; else leaves the job to those there are, and sees
//!           to it that somebody watches
//! serve()   takes jobs until there is none
//! watch()   looks every moment. A job that has waited longer than that is behind reads that take
//!           long, or its server has no thread: the watcher becomes one more server, and hands the
//!           watch to the pool. Ends when there was nothing to watch for a while
//! ```
//!
//! Linux begins to read what a try lacks since 5.9; before that each job is the pool's.
//!
//! All of it under one lock, which is not held while a job runs. Where there is a job there is a
//! server, if only one that the pool has no thread for yet: the watcher, which may have the last one,
//! then is that server. Servers leave half of the pool's threads to others.
//!
//! Used by `Engine`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::system::uname;

use super::pool::{Job, MOST_THREADS, Pool, run_caught};

/// How long a job may wait behind others before there is one more server; they come one by one, one
/// each moment.
const MOMENT: Duration = Duration::from_millis(2);
/// Moments without a job after which nobody watches any more.
const LAST_LOOKS: u32 = 16;
/// Servers at the most.
const MOST_SERVERS: usize = MOST_THREADS / 2;

#[derive(Default)]
struct State {
    /// Since when each waits.
    jobs: VecDeque<(Instant, Job)>,
    /// Calls of `serve` that run or were handed to the pool.
    servers: usize,
    is_watched: bool,
}

/// Jobs that wait for what is on its way.
pub struct Started {
    state: Mutex<State>,
    pool: Arc<Pool>,
    /// Whether a try begins to read.
    begins: bool,
}

impl std::fmt::Debug for Started {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        write!(f, "Started({} jobs, {} servers)", state.jobs.len(), state.servers)
    }
}

impl Started {
    pub fn new(pool: Arc<Pool>) -> Arc<Self> {
        let begins = begins_to_read(&uname().release().to_string_lossy());
        Arc::new(Started { state: Mutex::default(), pool, begins })
    }

    /// Runs a job soon, in another thread; `false`, and the job dropped, where none can be had.
    pub fn push(self: &Arc<Self>, job: Job) -> bool {
        if !self.begins {
            return self.pool.run(job);
        }
        let mut state = self.state.lock();
        if state.servers == 0 {
            let started = Arc::clone(self);
            if !self.pool.run(Box::new(move || started.serve())) {
                return false;
            }
            state.servers = 1;
        } else if !state.is_watched {
            self.hand_on_watch(&mut state);
        }
        state.jobs.push_back((Instant::now(), job));
        true
    }

    fn hand_on_watch(self: &Arc<Self>, state: &mut State) {
        let started = Arc::clone(self);
        state.is_watched = self.pool.run(Box::new(move || started.watch()));
    }

    fn serve(&self) {
        while let Some(job) = self.next() {
            run_caught(job);
        }
    }

    /// The next job; `None`, and a server less, where there is none.
    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        let next = state.jobs.pop_front();
        if next.is_none() {
            // Under the same lock: whoever pushes from now on does not count on this one.
            state.servers -= 1;
        }
        next.map(|(_, job)| job)
    }

    fn watch(self: Arc<Self>) {
        let mut looks = 0;
        while looks < LAST_LOOKS {
            thread::sleep(MOMENT);
            let mut state = self.state.lock();
            let waited = state.jobs.front().map(|(since, _)| since.elapsed());
            looks = if waited.is_none() { looks + 1 } else { 0 };
            if looks == LAST_LOOKS {
                state.is_watched = false;
            } else if waited > Some(MOMENT) && state.servers < MOST_SERVERS {
                state.servers += 1;
                self.hand_on_watch(&mut state);
                drop(state);
                return self.serve();
            }
        }
    }
}

/// Whether a kernel of this release begins to read what a try that is not to wait lacks.
fn begins_to_read(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (5, 9)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const HANG: Duration = Duration::from_secs(20);

    fn started() -> Arc<Started> {
        Started::new(Arc::default())
    }

    #[test]
    fn every_job_is_done() {
        let started = started();
        let (done, came) = mpsc::channel();

        for number in 0..1000 {
            let done = done.clone();
            assert!(started.push(Box::new(move || done.send(number).unwrap())));
            if number % 100 == 0 {
                // Also where the last server has just gone.
                thread::sleep(Duration::from_millis(1));
            }
        }

        let mut numbers: Vec<_> =
            (0..1000).map(|_| came.recv_timeout(HANG).expect("a job is not done")).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, Vec::from_iter(0..1000));
    }

    #[test]
    fn jobs_that_take_long_do_not_hold_up_the_others() {
        let started = started();
        let (done, came) = mpsc::channel();
        // Each of these waits for the last job.
        let gates: Vec<_> = (0..5)
            .map(|_| {
                let (open, gate) = mpsc::channel::<()>();
                started.push(Box::new(move || gate.recv_timeout(HANG).unwrap()));
                open
            })
            .collect();

        started.push(Box::new(move || done.send(()).unwrap()));

        came.recv_timeout(HANG).expect("it is held up");
        gates.into_iter().for_each(|open| open.send(()).unwrap());
    }

    #[test]
    fn a_job_after_one_that_is_stuck_for_long_is_done() {
        let started = started();
        let (open, gate) = mpsc::channel::<()>();
        started.push(Box::new(move || gate.recv_timeout(HANG).unwrap()));
        for _ in 0..2 {
            let (done, came) = mpsc::channel();

            started.push(Box::new(move || done.send(()).unwrap()));

            came.recv_timeout(HANG).expect("it is held up");
            // Longer than anybody watches.
            thread::sleep(MOMENT * LAST_LOOKS * 4);
        }
        open.send(()).unwrap();
    }

    #[test]
    fn one_thread_is_enough() {
        let started = Started::new(Arc::new(Pool::of(1)));
        let (done, came) = mpsc::channel();
        // Now and then the watcher has the only thread when a job comes.
        for round in 0..50 {
            for _ in 0..3 {
                let done = done.clone();
                assert!(started.push(Box::new(move || done.send(()).unwrap())));
            }
            for _ in 0..3 {
                came.recv_timeout(HANG).expect("a job is not done");
            }
            thread::sleep(MOMENT * (round % 4));
        }
    }

    #[test]
    fn stuck_jobs_leave_threads_to_others() {
        let pool = Arc::<Pool>::default();
        let started = Started::new(Arc::clone(&pool));
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..2 * MOST_THREADS {
            let gate = Arc::clone(&gate);
            started.push(Box::new(move || _ = gate.lock().recv().unwrap_err()));
        }
        let began = Instant::now();
        while started.state.lock().servers < MOST_SERVERS {
            assert!(began.elapsed() < HANG, "{started:?}");
            thread::yield_now();
        }
        thread::sleep(MOMENT * 8);
        let (done, came) = mpsc::channel();

        pool.run(Box::new(move || done.send(()).unwrap()));

        came.recv_timeout(HANG).expect("it has no thread");
        assert_eq!(started.state.lock().servers, MOST_SERVERS);
        drop(open);
    }

    #[test]
    fn kernels_are_told_apart_by_their_release() {
        let releases = ["5.9.0", "6.1.0-41-amd64", "10.0", "5.8.18", "4.18.0-553.el8", "", "x"];

        let begin = releases.map(begins_to_read);

        assert_eq!(begin, [true, true, true, false, false, false, false]);
    }

    #[test]
    fn where_nothing_is_begun_each_job_has_a_thread() {
        let pool = Arc::<Pool>::default();
        let started =
            Arc::new(Started { state: Mutex::default(), pool: Arc::clone(&pool), begins: false });
        let (open, gate) = mpsc::channel::<()>();
        let (done, came) = mpsc::channel();

        started.push(Box::new(move || gate.recv_timeout(HANG).unwrap()));
        started.push(Box::new(move || done.send(()).unwrap()));

        came.recv_timeout(HANG).expect("it is held up");
        assert_eq!((pool.threads(), started.state.lock().servers), (2, 0));
        open.send(()).unwrap();
    }

    #[test]
    fn a_job_that_panics_is_not_the_last() {
        let started = started();
        let (done, came) = mpsc::channel();

        started.push(Box::new(|| panic!("on purpose")));
        started.push(Box::new(move || done.send(()).unwrap()));

        came.recv_timeout(HANG).expect("the panic ended it");
    }
}
