//! Looking ahead: when a cluster is read piece by piece, the rest of it is held against its checksums
//! in another thread, so that the reads that follow find it seen. That takes a processor about as
//! long as the readers would take for it, so it is for what is going to be read, and not at once: after
//! one read of a cluster a boot does not come back often enough to be worth it, and who reads a cluster
//! in order is at its end before another thread has begun. Only what the page cache has is
//! looked at, up to the first that it lacks (which the kernel then begins to read, 64 KiB at the
//! most), and nothing waits for it. What does not fit its checksum is left to the read that comes to
//! it (`verify`).
//!
//! ```text
//! Idle     -> Queued    look(), which hands a job to the pool when enough clusters wait
//! Queued   -> Running   the job, when it starts
//! Running  -> Idle      the job, when there is no cluster left, also where it panics
//! any      -> Stopped   stop(), which waits for a job that runs; nothing is looked at any more
//! ```
//!
//! All of it under one lock, which is never held while anything is looked at.
//!
//! Used by `Engine`.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use rustix::io::{ReadWriteFlags, preadv2};

use super::core::Core;
use super::pool::Pool;
use super::verify::Check;
use crate::format::{Checksum, HostOffset, SUBCLUSTERS};

/// Clusters that wait to be looked at, at the most; more are left to their readers.
const MOST_WAITING: usize = 256;
/// Clusters looked at together, at the least: waking a thread costs as much as looking at one.
const AT_ONCE: usize = 8;
/// A cluster is read piece by piece when so many times as many of its subclusters are seen as a read
/// has just found unseen. In the recorded boot of the tests 57 clusters are at the most; 721 are read in
/// part at first, most of them for good.
const PIECES: u64 = 4;
/// Bytes read at once, or one subcluster: they stay in the processor's cache.
const PIECE: usize = 64 << 10;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Queued,
    Running,
    Stopped,
}

#[derive(Debug, Default)]
struct State {
    clusters: VecDeque<u64>,
    phase: Phase,
    /// Whether a job runs, also after `stop` was called.
    runs: bool,
}

/// The clusters to be looked at, and whether somebody is at it.
#[derive(Debug)]
pub struct Ahead {
    core: Arc<Core>,
    state: Mutex<State>,
    ended: Condvar,
}

impl Ahead {
    pub fn new(core: Arc<Core>) -> Arc<Self> {
        Arc::new(Ahead { core, state: Mutex::default(), ended: Condvar::new() })
    }

    /// After a check that was sound: looks at the rest of its cluster soon if that is read piece by
    /// piece and not in order, unless there is too much to look at.
    pub fn look(self: &Arc<Self>, check: &Check, pool: &Pool) {
        let cluster = check.first / u64::from(SUBCLUSTERS);
        let seen = self.core.seen.mask(cluster);
        let is_in_order = seen.trailing_ones() == seen.count_ones();
        if is_in_order || u64::from(seen.count_ones()) < PIECES * check.count {
            return;
        }
        let mut state = self.state.lock();
        // Most clusters that wait more than once do so in a row, or among the few before a job.
        let is_known = state.clusters.back() == Some(&cluster)
            || (state.clusters.len() < AT_ONCE && state.clusters.contains(&cluster));
        if state.phase == Phase::Stopped || is_known || state.clusters.len() >= MOST_WAITING {
            return;
        }
        state.clusters.push_back(cluster);
        if state.phase != Phase::Idle || state.clusters.len() < AT_ONCE {
            return;
        }
        state.phase = Phase::Queued;
        drop(state);
        let ahead = Arc::clone(self);
        if !pool.run(Box::new(move || ahead.run())) {
            let mut state = self.state.lock();
            state.clusters.clear();
            if state.phase == Phase::Queued {
                state.phase = Phase::Idle;
            }
        }
    }

    /// Ends it: when this returns nothing is looked at any more.
    pub fn stop(&self) {
        let mut state = self.state.lock();
        state.phase = Phase::Stopped;
        state.clusters.clear();
        while state.runs {
            self.ended.wait(&mut state);
        }
    }

    fn run(&self) {
        {
            let mut state = self.state.lock();
            if state.phase != Phase::Queued {
                return;
            }
            state.phase = Phase::Running;
            state.runs = true;
        }
        let _running = Running(self);
        let mut buf = Vec::new();
        while let Some(cluster) = self.next() {
            look_at(&self.core, cluster, &mut buf);
        }
    }

    fn next(&self) -> Option<u64> {
        let mut state = self.state.lock();
        let next = state.clusters.pop_front();
        if next.is_none() {
            // Under the same lock: whoever adds one from now on starts another job.
            state.end(&self.ended);
        }
        next
    }
}

impl State {
    fn end(&mut self, ended: &Condvar) {
        self.runs = false;
        if self.phase == Phase::Running {
            self.phase = Phase::Idle;
        }
        ended.notify_all();
    }
}

/// A job that runs; where it panics it has ended too.
struct Running<'a>(&'a Ahead);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state.lock().end(&self.0.ended);
        }
    }
}

/// Looks at the data of a cluster that was not seen, as far as the page cache has it and its
/// checksums are known.
fn look_at(core: &Core, cluster: u64, buf: &mut Vec<u8>) {
    let geometry = core.image.geometry();
    let size = geometry.subcluster_size() as usize;
    let entry = core.active().and_then(|live| live.entry(cluster));
    let Some(entry) = entry else { return };
    let unseen = entry.bits().data() & !core.seen.mask(cluster);
    // After the bits, which say that there is one.
    let host = entry.host().filter(|host| core.image.layout().is_data_cluster(*host));
    let Some(host) = host.filter(|_| unseen != 0) else { return };
    let pieces = (PIECE / size).max(1) as u32;
    buf.resize(pieces as usize * size, 0);
    let (mut at, mut sound) = (0, 0);
    while at < SUBCLUSTERS {
        let len = (!(unseen >> at)).trailing_zeros().min(SUBCLUSTERS - at).min(pieces);
        if len == 0 {
            at += 1;
            continue;
        }
        let place = HostOffset(host.0 + u64::from(at) * size as u64);
        let part = buf.get_mut(..len as usize * size).unwrap_or_default();
        let mut slices = [IoSliceMut::new(part)];
        let read = preadv2(core.image.file(), &mut slices, place.0, ReadWriteFlags::NOWAIT);
        if read.ok() != Some(part.len()) {
            break;
        }
        for (subcluster, data) in (at..).zip(part.chunks_exact(size)) {
            let number = cluster * u64::from(SUBCLUSTERS) + u64::from(subcluster);
            if core.known.get(number) == Some(Checksum::of(number, data)) {
                sound |= 1 << subcluster;
            }
        }
        at += len;
    }
    core.seen.add(cluster, sound);
}
