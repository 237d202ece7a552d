//! The checkpoint: what was published since the last one goes into the image's own tables, so that
//! it outlives the live file and any qcow2 reader sees it.
//!
//! # Order
//!
//! 1. Room for the tables to be written is allocated; without it nothing is begun.
//! 2. The published state is read, then the image is synced: the data of all that was read is on
//!    the disk, since it was written before it was published.
//! 3. Refcounts of clusters that are new, sync.
//! 4. L2 entries, sync.
//! 5. The number of checkpoints in the header.
//!
//! Nothing on disk ever refers to what may not be there: a cut between 3 and 4 leaves clusters with
//! a refcount and no reference, leaks, which the next open gives back. An L2 entry lies within one
//! sector and only gains bits, but for those of zeros that were found bad. Whoever holds the lock on byte 402 of the image does this, for all
//! processes. Before it takes the first mark it says so in the live file; when it dies with marks in
//! its hands, the next one looks at everything that is not on disk and does it again.
//!
//! The blocks of the tables count against the quota before they are there: as marked groups, from
//! the taking of the mark on as bytes on their way (see `slot`), and from step 1 on as part of the
//! file.
//!
//! A failed sync means that the kernel may have dropped data that readers were promised: from then
//! on nobody relies on the image, until it is opened anew.
//!
//! Used by `Engine` on close and by `keeper`.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use super::core::Core;
use super::populate;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{HostOffset, L2Entry};
use crate::image::Image;
use crate::live::{LiveFile, Slot};

/// How long a closing process waits for another one's checkpoint.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
const BLOCK: u64 = 4096;

/// Writes a checkpoint if there is anything to write and nobody else is at it. Also for an open that
/// stores nothing itself: what others left is on its way to the disk.
pub fn write(core: &Core, patience: Duration) {
    let due = |live: &LiveFile| live.is_dirty() || live.is_checkpointing();
    let (Some(live), Some(slot)) = (core.active(), core.slot()) else { return };
    if !due(live) {
        return;
    }
    let result = match core.image.lock_checkpoint(patience) {
        Ok(Some(_lock)) => {
            live.enter_checkpoint();
            let written = Checkpoint::collect(live, slot).write(core, live);
            live.leave_checkpoint();
            written
        }
        Ok(None) => Ok(()),
        Err(err) => Err(err),
    };
    if let Err(err) = result {
        core.store_failed(&format_args!("checkpoint failed: {err}"));
    }
}

/// The checkpoint of a process that leaves. Where others stay it does not wait for one of theirs:
/// they will do what is left. And it looks again afterwards, since one of them may have left without,
/// counting on this process.
pub fn last(core: &Core) {
    let others = core.image.is_used().unwrap_or(false);
    write(core, if others { Duration::ZERO } else { CLOSE_PATIENCE });
    write(core, Duration::ZERO);
}

/// What a checkpoint is about to write.
struct Checkpoint<'a> {
    groups: Vec<u64>,
    changes: Vec<Change>,
    tables: Announced<'a>,
}

/// Bytes of tables that are about to be allocated.
struct Announced<'a> {
    slot: &'a Slot,
    bytes: Cell<u64>,
}

impl Announced<'_> {
    fn add(&self, bytes: u64) {
        self.slot.begin_write(bytes);
        self.bytes.set(self.bytes.get() + bytes);
    }

    fn end(&self) {
        self.slot.end_write(self.bytes.take());
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

struct Change {
    cluster: u64,
    entry: L2Entry,
    /// Whether the cluster gets its place on disk only now.
    new_place: bool,
}

impl Change {
    /// Whether the image may show this. Only a live file that somebody tampered with has anything
    /// else, and writing it would reach outside the data area and its refcounts.
    fn is_possible(&self, image: &Image) -> bool {
        let entry = &self.entry;
        entry.host.is_none_or(|host| image.layout().is_data_cluster(host))
            && L2Entry::decode(entry.encode(), image.geometry()).is_ok()
    }
}

impl<'a> Checkpoint<'a> {
    fn collect(live: &LiveFile, slot: &'a Slot) -> Self {
        let tables = Announced { slot, bytes: Cell::new(0) };
        let mut checkpoint = Checkpoint { groups: Vec::new(), changes: Vec::new(), tables };
        for group in live.dirty_groups() {
            checkpoint.tables.add(populate::GROUP_TABLES);
            let Some(clusters) = live.take_dirty(group) else { continue };
            checkpoint.groups.push(clusters.start);
            for cluster in clusters {
                let Some(map_entry) = live.entry(cluster) else { continue };
                let (bits, on_disk) = (map_entry.bits(), map_entry.on_disk());
                if bits != on_disk {
                    // A cluster with zeros alone has no use for its place yet.
                    let host = map_entry.host().filter(|_| bits.data() != 0);
                    let new_place = host.is_some() && on_disk.data() == 0;
                    let entry = L2Entry { host, bits };
                    checkpoint.changes.push(Change { cluster, entry, new_place });
                }
            }
        }
        checkpoint
    }

    fn write(self, core: &Core, live: &LiveFile) -> Result<()> {
        let written = self.write_tables(core, live);
        match &written {
            Ok(()) => populate::settle(core, 0),
            // Still to be done, by whoever comes next.
            Err(_) => self.groups.iter().for_each(|cluster| live.mark_dirty(*cluster)),
        }
        written
    }

    fn write_tables(&self, core: &Core, live: &LiveFile) -> Result<()> {
        let image = &core.image;
        if self.changes.is_empty() {
            return Ok(());
        }
        if let Some(change) = self.changes.iter().find(|change| !change.is_possible(image)) {
            let what = format!("the live file shows {:?}, which cannot be", change.entry);
            core.fail(&what);
            return Err(Error::new(ErrorKind::Damaged, what).on(live.path()));
        }
        let entries = self.entry_runs();
        let refcounts = self.refcount_runs(image);
        let layout = image.layout();
        for run in &entries {
            let bytes = run.len() as u64 * L2Entry::SIZE as u64;
            allocate_blocks(image, layout.l2_entry_offset(run[0].cluster), bytes)?;
        }
        for run in &refcounts {
            let bytes = (run.end - run.start) * 2;
            allocate_blocks(image, layout.refcount_offset(run.start), bytes)?;
        }
        self.tables.end();
        let number = live.begin_checkpoint();
        if live.has_failed() {
            // Then what was collected above may be half of the truth.
            return Ok(());
        }
        sync(core)?;
        for run in &refcounts {
            image.write_refcounts(run.start, run.end - run.start, 1)?;
        }
        if !refcounts.is_empty() {
            sync(core)?;
        }
        for run in &entries {
            let encoded: Vec<L2Entry> = run.iter().map(|change| change.entry).collect();
            image.write_l2_entries(run[0].cluster, &encoded)?;
        }
        image.write_checkpoints(number)?;
        sync(core)?;
        for change in &self.changes {
            if let Some(map_entry) = live.entry(change.cluster) {
                map_entry.set_on_disk(change.entry.bits);
            }
        }
        live.end_checkpoint(number);
        // Only one that wrote something: a mark may be set again after its news were taken along.
        core.counters().checkpoints.add(1);
        Ok(())
    }

    /// The changes in runs of consecutive guest clusters.
    fn entry_runs(&self) -> Vec<&[Change]> {
        self.changes.chunk_by(|one, next| one.cluster + 1 == next.cluster).collect()
    }

    /// The clusters of the file that get a refcount, in runs.
    fn refcount_runs(&self, image: &Image) -> Vec<Range<u64>> {
        let bits = image.geometry().cluster_bits();
        let mut clusters: Vec<u64> = self
            .changes
            .iter()
            .filter(|change| change.new_place)
            .filter_map(|change| change.entry.host)
            .map(|host| host.0 >> bits)
            .collect();
        clusters.sort_unstable();
        clusters
            .chunk_by(|one, next| one + 1 == *next)
            .filter_map(|run| Some(*run.first()?..*run.last()? + 1))
            .collect()
    }
}

/// Allocates the filesystem blocks under some bytes of the tables.
fn allocate_blocks(image: &Image, at: HostOffset, len: u64) -> Result<()> {
    let start = at.0 / BLOCK * BLOCK;
    let end = (at.0 + len).next_multiple_of(BLOCK);
    image.allocate(HostOffset(start), end - start)
}

fn sync(core: &Core) -> Result<()> {
    core.image.sync().inspect_err(|err| core.fail(&err.to_string()))
}
