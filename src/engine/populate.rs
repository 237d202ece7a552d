//! Storing what was fetched, and anew what was found bad: one thread per engine behind a queue, whose
//! memory is bounded (see `buffer`). It finds a place, takes the bytes out of the quota, writes the data and its
//! checksums into the image and publishes it; the claims go with the fetch when it is dropped, after
//! publishing.
//!
//! A request never waits for this: where there is no room in memory or storing fails, the bytes are
//! counted as dropped and the next reader fetches them again.
//!
//! Used by `Engine`.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use super::buffer::Buffer;
use super::core::Core;
use super::plan::Fetch;
use super::pool;
use super::verify::Check;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Checksum, HostOffset, SUBCLUSTERS, SubclusterBits};
use crate::image::Image;
use crate::live::slot::{SLOTS, Slot};
use crate::live::{LiveFile, MapEntry};

const STACK: usize = 256 << 10;
/// Bytes of tables that the first data in a group of clusters adds: a block of L2 entries and,
/// seldom, one of refcounts.
pub const GROUP_TABLES: u64 = 4096;
/// Bytes of checksums that are allocated together, and the guest clusters that they belong to.
const CHECKSUM_BLOCK: u64 = 4096;
const CHECKSUM_CLUSTERS: u64 = CHECKSUM_BLOCK / (SUBCLUSTERS as u64 * Checksum::SIZE as u64);

/// How often the account is settled before the quota counts as reached.
const SETTLE_TRIES: u32 = 3;

/// The checksums of a cluster's subclusters.
type Checksums = [Checksum; SUBCLUSTERS as usize];

/// The queue and the thread behind it.
#[derive(Debug)]
pub struct Populator {
    core: Arc<Core>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    queue: Option<Sender<(Work, Buffer)>>,
    thread: Option<JoinHandle<()>>,
    stopped: bool,
}

impl Populator {
    pub fn new(core: Arc<Core>) -> Self {
        Populator { core, state: Mutex::default() }
    }

    /// Queues bytes to be stored, or drops them.
    pub fn push(&self, fetch: Fetch, data: Buffer) {
        let bytes = data.len() as u64;
        if !self.push_work(Work::Store(fetch), data) {
            self.core.counters().dropped_bytes.add(bytes);
        }
    }

    /// Queues a repair, or forgets it: it is found again when it is read next.
    pub fn push_repair(&self, check: Check, base: Buffer) {
        self.push_work(Work::Repair(check), base);
    }

    fn push_work(&self, work: Work, data: Buffer) -> bool {
        self.queue().is_some_and(|queue| queue.send((work, data)).is_ok())
    }

    fn queue(&self) -> Option<Sender<(Work, Buffer)>> {
        let mut state = self.state.lock();
        if state.queue.is_none() && !state.stopped {
            let (sender, receiver) = unbounded();
            let core = Arc::clone(&self.core);
            state.thread = pool::start("vmcache-fill", STACK, move || run(&core, &receiver));
            state.queue = state.thread.is_some().then_some(sender);
        }
        state.queue.clone()
    }

    /// Stores what is queued and ends the thread.
    pub fn stop(&self) {
        let thread = {
            let mut state = self.state.lock();
            state.stopped = true;
            state.queue = None;
            state.thread.take()
        };
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the populating thread panicked");
        }
    }
}

/// What to do with bytes of the base.
#[derive(Debug)]
enum Work {
    Store(Fetch),
    Repair(Check),
}

fn run(core: &Core, queue: &Receiver<(Work, Buffer)>) {
    for (work, mut data) in queue {
        let bytes = data.len() as u64;
        let counters = core.counters();
        core.set_storing(true);
        let result = match &work {
            // Nothing of a changed base may get into the image. It was read before this look.
            _ if !core.is_base_same() => {
                counters.dropped_bytes.add(bytes);
                Ok(0)
            }
            Work::Store(fetch) => store(core, fetch, &mut data).inspect(|stored| {
                counters.populated_bytes.add(*stored);
                counters.dropped_bytes.add(bytes.saturating_sub(*stored));
            }),
            Work::Repair(check) => repair(core, check, &mut data).inspect(|repaired| {
                counters.repaired_bytes.add(*repaired);
            }),
        };
        if let Err(err) = result {
            core.store_failed(&err);
            counters.dropped_bytes.add(bytes);
        }
        core.set_storing(false);
        // Claims first, so that waiters do not wait for the memory.
        drop(work);
        drop(data);
    }
}

/// Rewrites what a check found bad; returns how many bytes that were.
fn repair(core: &Core, check: &Check, base: &mut Buffer) -> Result<u64> {
    let Some(store) = Store::new(core) else { return Ok(0) };
    check.repair(base, |data, place| store.rewrite(data, place))
}

/// Stores the bytes of a fetch; returns how many of them the cache holds afterwards.
fn store(core: &Core, fetch: &Fetch, data: &mut Buffer) -> Result<u64> {
    let Some(store) = Store::new(core) else { return Ok(0) };
    let subcluster_size = core.image.geometry().subcluster_size();
    let length = data.len() as u64;
    let (first, count) = fetch.subclusters();
    // Beyond the end of the disk there is nothing, which a subcluster stores as zeros.
    data.pad((count * subcluster_size) as usize);

    let mut stored = 0;
    let mut rest: &[u8] = data;
    let mut at = first;
    while at < first + count {
        let cluster = at / u64::from(SUBCLUSTERS);
        let start = (at % u64::from(SUBCLUSTERS)) as u32;
        let len = (first + count - at).min(u64::from(SUBCLUSTERS - start));
        let (here, after) = rest.split_at((len * subcluster_size) as usize);
        stored += store.store_cluster(cluster, start, here)? * subcluster_size;
        rest = after;
        at += len;
    }
    Ok(stored.min(length))
}

struct Store<'a> {
    core: &'a Core,
    live: &'a LiveFile,
    slot: &'a Slot,
    image: &'a Image,
}

impl<'a> Store<'a> {
    /// Where the cache is in use and this open stores.
    fn new(core: &'a Core) -> Option<Self> {
        Some(Store { core, live: core.active()?, slot: core.slot()?, image: &core.image })
    }

    /// Writes data in the place of what was there, which may have become a hole; whether the quota
    /// had room for it.
    fn rewrite(&self, data: &[u8], place: HostOffset) -> Result<bool> {
        let bytes = data.len() as u64;
        let taken = self.take(0, bytes, bytes);
        let fits = taken == bytes || self.image.header().cache.quota.is_none();
        let written = if fits && !self.live.has_failed() {
            self.image.write(data, place).map(|()| true)
        } else {
            Ok(false)
        };
        self.slot.end_write(taken);
        written
    }

    /// Stores subclusters of one cluster from `start` on; returns how many are there afterwards.
    fn store_cluster(&self, cluster: u64, start: u32, data: &[u8]) -> Result<u64> {
        let size = self.image.geometry().subcluster_size() as usize;
        let Some(entry) = self.live.entry(cluster) else { return Ok(0) };
        let (mut full, mut zero) = (0u32, 0u32);
        let mut checksums = [Checksum::ZERO; SUBCLUSTERS as usize];
        let number = cluster * u64::from(SUBCLUSTERS);
        for ((index, bytes), checksum) in
            (start..).zip(data.chunks_exact(size)).zip(checksums.iter_mut().skip(start as usize))
        {
            if is_zero(bytes) {
                zero |= 1 << index;
            } else {
                full |= 1 << index;
                *checksum = Checksum::of(number + u64::from(index), bytes);
            }
        }
        let given = full | zero;
        let present = entry.bits().present();
        zero &= !present;
        full &= !present;
        if zero != 0 {
            self.publish_zeros(cluster, entry, zero, &checksums)?;
        }
        if full != 0 {
            self.write(cluster, entry, start, full, data, &checksums)?;
        }
        Ok(u64::from((entry.bits().present() & given).count_ones()))
    }

    /// Publishes zero subclusters (a mask), if the quota allows the tables that say so.
    fn publish_zeros(
        &self,
        cluster: u64,
        entry: &MapEntry,
        zero: u32,
        checksums: &Checksums,
    ) -> Result<()> {
        let tables = self.tables_for(cluster, entry);
        let taken = if tables == 0 { 0 } else { self.take(0, tables, tables) };
        let mut written = Ok(());
        if taken == tables {
            written = self.write_checksums(cluster, zero, checksums);
        }
        if taken == tables && written.is_ok() {
            entry.publish(SubclusterBits::new(0, zero));
            self.live.mark_dirty(cluster);
        }
        self.slot.end_write(taken);
        written
    }

    /// Writes and publishes data subclusters (a mask), as many as the quota allows.
    fn write(
        &self,
        cluster: u64,
        entry: &MapEntry,
        start: u32,
        wanted: u32,
        data: &[u8],
        checksums: &Checksums,
    ) -> Result<()> {
        let Some((mask, reserved)) = self.reserve(cluster, entry, wanted)? else { return Ok(()) };
        let written = self.place(entry).and_then(|host| {
            let size = self.image.geometry().subcluster_size();
            if self.live.has_failed() {
                // The place may be none, or the quota may be.
                return Err(no_place());
            }
            for run in runs(mask) {
                let from = (u64::from(run.start - start) * size) as usize;
                let bytes = data.get(from..from + (run.len() as u64 * size) as usize);
                let place = HostOffset(host.0 + u64::from(run.start) * size);
                self.image.write(bytes.unwrap_or_default(), place)?;
            }
            self.write_checksums(cluster, mask, checksums)?;
            // What another was faster with is not ours to vouch for.
            let published = entry.publish(SubclusterBits::new(mask, 0));
            self.core.seen.add(cluster, published.data());
            self.live.mark_dirty(cluster);
            Ok(())
        });
        // Not before the mark is set, which counts for the tables from here on. After an error the
        // bytes stay taken, though not all were written, until they are settled.
        self.slot.end_write(reserved);
        log::trace!("stored {mask:#010x} of cluster {cluster}");
        written
    }

    /// Writes the checksums of some subclusters (a mask).
    fn write_checksums(&self, cluster: u64, mask: u32, checksums: &Checksums) -> Result<()> {
        let number = cluster * u64::from(SUBCLUSTERS);
        for run in runs(mask) {
            let run_checksums = checksums.get(run.start as usize..run.end as usize);
            self.image.write_checksums(
                number + u64::from(run.start),
                run_checksums.unwrap_or_default(),
            )?;
        }
        Ok(())
    }

    /// The place of a cluster, found now if it has none.
    fn place(&self, entry: &MapEntry) -> Result<HostOffset> {
        let layout = self.image.layout();
        if let Some(host) = entry.host() {
            return if layout.is_data_cluster(host) { Ok(host) } else { Err(no_place()) };
        }
        let spare = self.core.spare.lock().pop();
        let number = spare
            .or_else(|| self.live.space().take_cluster(self.live.free_list()))
            .ok_or_else(no_place)?;
        let host = layout.offset(number);
        if !layout.is_data_cluster(host) {
            return Err(no_place());
        }
        let Err(other) = entry.place(host) else { return Ok(host) };
        self.core.spare.lock().push(number);
        if layout.is_data_cluster(other) { Ok(other) } else { Err(no_place()) }
    }

    /// Takes the bytes of subclusters out of the quota. Gives those that fit, and what was taken;
    /// the caller owes [`Slot::end_write`]. `None` where nothing fits.
    fn reserve(&self, cluster: u64, entry: &MapEntry, wanted: u32) -> Result<Option<(u32, u64)>> {
        if self.image.header().cache.quota.is_none() {
            return Ok(Some((wanted, 0)));
        }
        let failed = |err| Error::io("examine", self.image.path(), &err);
        let unit = self.image.allocation_unit().map_err(failed)?;
        let grain = self.image.geometry().subcluster_size().max(unit);
        let per_grain = (grain >> self.image.geometry().subcluster_bits()).min(32) as u32;
        let grains: Vec<u32> = (0..32 / per_grain)
            .map(|index| (u32::MAX >> (32 - per_grain)) << (index * per_grain) & wanted)
            .filter(|mask| *mask != 0)
            .collect();
        // The filesystem's own tables count as well: some bytes for each run.
        let runs = u64::from((wanted & !(wanted << 1)).count_ones());
        let overhead = 64 * runs + self.tables_for(cluster, entry);
        let got = self.take(overhead, grains.len() as u64 * grain, grain);
        let fits = got.saturating_sub(overhead) / grain;
        let mask = grains.iter().take(fits as usize).fold(0, |mask, grain| mask | grain);
        Ok((mask != 0).then_some((mask, got)))
    }

    /// Bytes of tables that have to be allocated when something is published in a cluster, as far as
    /// nothing else has accounted for them: those that the next checkpoint writes, and the block of
    /// checksums.
    fn tables_for(&self, cluster: u64, entry: &MapEntry) -> u64 {
        if self.image.header().cache.quota.is_none() {
            return 0;
        }
        let new = entry.on_disk().present() == 0 && !self.live.is_marked(cluster);
        let tables = if new { GROUP_TABLES } else { 0 };
        let first = cluster / CHECKSUM_CLUSTERS * CHECKSUM_CLUSTERS;
        let mut around =
            (first..first + CHECKSUM_CLUSTERS).filter_map(|near| self.live.entry(near));
        let has_block = around.any(|entry| entry.bits().present() != 0);
        tables + if has_block { 0 } else { CHECKSUM_BLOCK }
    }

    /// Takes up to `bytes` in multiples of `unit`, and `overhead`, out of the quota. Gives what it
    /// got, which the caller owes [`Slot::end_write`].
    fn take(&self, overhead: u64, bytes: u64, unit: u64) -> u64 {
        let Some(quota) = self.image.header().cache.quota else { return 0 };
        let space = self.live.space();
        let limit = quota.saturating_sub(slack(quota));
        let wanted = overhead + bytes;
        // Announced before it is taken, so that whoever settles meanwhile sees it.
        self.slot.begin_write(wanted);
        let mut got = space.reserve(overhead, bytes, unit, limit);
        if got != Some(wanted) {
            if let Some(partly) = got {
                space.give_back(partly);
            }
            // Somebody else may take in between, and then settling changes nothing.
            for _ in 0..SETTLE_TRIES {
                settle(self.core, wanted);
                got = space.reserve(overhead, bytes, unit, limit);
                if got == Some(wanted) {
                    break;
                }
                if let Some(partly) = got {
                    space.give_back(partly);
                }
            }
            if got != Some(wanted) {
                got = space.reserve(overhead, bytes, unit, limit);
            }
        }
        self.slot.end_write(wanted - got.unwrap_or(0));
        if got != Some(wanted) && !self.live.has_failed() && !space.set_full(true) {
            log::warn!(
                "{}: the quota of {quota} bytes is reached; the rest is read from the base",
                self.image.path().display()
            );
        }
        got.unwrap_or(0)
    }
}

/// What is kept free below the quota for tables of the filesystem that show late.
fn slack(quota: u64) -> u64 {
    (quota / 256).max(64 << 10)
}

/// Puts the account of used bytes right from what the file occupies. `own` bytes were announced by
/// the caller and are not taken yet.
pub fn settle(core: &Core, own: u64) {
    let Some(live) = core.active() else { return };
    live.space().settle(|| {
        // In this order: a write that ends in between is counted twice, never not at all.
        let in_flight = (0..SLOTS)
            .map(|index| (index, live.slot(index).in_flight()))
            .filter(|(index, bytes)| *bytes != 0 && core.is_slot_held(*index))
            .fold(0, |sum: u64, (_, bytes)| sum.saturating_add(bytes))
            .saturating_sub(own);
        let tables = live.dirty_groups().count() as u64 * GROUP_TABLES;
        let occupied = core.image.occupied().ok()?;
        Some(occupied.saturating_add(in_flight).saturating_add(tables))
    });
}

fn no_place() -> Error {
    Error::new(ErrorKind::Full, "the image has no cluster left")
}

/// The runs of ones in a mask.
fn runs(mask: u32) -> impl Iterator<Item = Range<u32>> {
    let mut left = mask;
    std::iter::from_fn(move || {
        let first = (left != 0).then(|| left.trailing_zeros())?;
        let len = (!(left >> first)).trailing_zeros();
        left &= !(u32::MAX >> (u32::BITS - len) << first);
        Some(first..first + len)
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}

/// Whether the quota leaves no room for even one more subcluster.
pub fn is_used_up(image: &Image, used: u64) -> bool {
    image.header().cache.quota.is_some_and(|quota| {
        let least = image.geometry().subcluster_size().max(4096) + GROUP_TABLES + CHECKSUM_BLOCK;
        used + least > quota.saturating_sub(slack(quota))
    })
}
