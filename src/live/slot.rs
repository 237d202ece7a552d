//! Slots: one per open of the image. A slot tells the others that its holder is alive, carries its
//! counters, and gives its claims their name.
//!
//! # Protocol
//!
//! A slot belongs to whoever holds the exclusive open-file-description lock on the byte of the live
//! file with the slot's index. The kernel drops that lock when the holder dies, so a dead owner is
//! seen at once by asking for the lock (`F_OFD_GETLK`), by anybody and without a message from the
//! dead. Only the holder writes `pid`, `generation`, `in_flight` and the counters. `stalled` is set
//! by a waiter that ran into its deadline or found the owner dead, to the generation that let it
//! wait; others then break that generation's claims without waiting; the holder clears it when it is seen to work
//! again. Counters go on from holder to holder, so that their sum over all slots counts since the
//! live file was made. All accesses are `Relaxed`: nothing is published through a slot.

use std::fs::File;

use super::claim::Owner;
use super::file::LiveFile;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::{LockKind, is_held_against, try_lock};

/// Slots in a live file: how many opens of one image can populate it at the same time.
pub const SLOTS: u32 = 1024;

/// A number that only grows.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// Its value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One process's counters, in the units of `vmcache stats`.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Counters {
    /// Read requests.
    pub reads: Counter,
    /// Bytes served from data in the cache.
    pub hit_bytes: Counter,
    /// Bytes served as zeros that the cache knows of.
    pub zero_bytes: Counter,
    /// Bytes served from the base.
    pub miss_bytes: Counter,
    /// Bytes that waited for somebody else's fetch.
    pub waited_bytes: Counter,
    /// Requests to the base.
    pub base_reads: Counter,
    /// Bytes requested from the base.
    pub base_bytes: Counter,
    /// Bytes stored, as data or as zeros.
    pub populated_bytes: Counter,
    /// Bytes fetched but not stored: quota, disk full, queue full.
    pub dropped_bytes: Counter,
    /// Attempts to store that failed.
    pub populate_errors: Counter,
    /// Checkpoints done.
    pub checkpoints: Counter,
    /// Bytes that did not fit their checksums when they were first read.
    pub bad_bytes: Counter,
    /// Bytes of those that were stored anew.
    pub repaired_bytes: Counter,
    reserved: [Counter; 11],
}

/// One slot of the live file, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(C, align(256))]
pub struct Slot {
    pid: AtomicU32,
    generation: AtomicU32,
    stalled: AtomicU32,
    reserved: AtomicU32,
    /// Bytes taken from the quota whose write is not finished.
    in_flight: AtomicU64,
    /// What the holder, and those before it, did.
    pub counters: Counters,
}

impl Slot {
    /// Process id of the holder in its own pid namespace; of the last one where there is none.
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Generation of the holder; zero where there never was one.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Bytes taken from the quota whose write is not finished.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Notes bytes on their way to the file, before they are taken from the quota.
    pub fn begin_write(&self, bytes: u64) {
        self.in_flight.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The end of [`Slot::begin_write`].
    pub fn end_write(&self, bytes: u64) {
        self.in_flight.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether there is no use in waiting for the owner of a claim: it is known to be dead, or it
    /// let somebody wait past the deadline and was not seen since.
    pub fn is_stalled(&self, owner: Owner) -> bool {
        self.stalled.load(Ordering::Relaxed) == owner.generation()
            || Owner::new(owner.slot(), self.generation()) != owner
    }

    /// Notes that this owner is dead or let somebody wait past the deadline.
    pub fn set_stalled(&self, owner: Owner) {
        self.stalled.store(owner.generation(), Ordering::Relaxed);
    }

    /// Notes that the holder works (again). Cheap where nobody thought otherwise.
    pub fn clear_stalled(&self) {
        if self.stalled.load(Ordering::Relaxed) != 0 {
            self.stalled.store(0, Ordering::Relaxed);
        }
    }
}

/// A slot that is this open's own until it is dropped.
#[derive(Debug)]
pub struct SlotGuard {
    owner: Owner,
    file: File,
}

impl SlotGuard {
    /// Takes a free slot of a live file.
    pub fn acquire(live: &LiveFile) -> Result<Self> {
        let file = live.try_clone_file()?;
        for index in 0..SLOTS {
            let locked = try_lock(&file, u64::from(index), LockKind::Exclusive)
                .map_err(|err| Error::io("lock a slot of", live.path(), &err))?;
            if locked {
                let slot = live.slot(index);
                // Zero stands for "nobody" in `stalled`, so no generation is zero.
                let next =
                    Owner::new(index, slot.generation.load(Ordering::Relaxed).wrapping_add(1));
                let generation = next.generation().max(1);
                slot.generation.store(generation, Ordering::Relaxed);
                slot.pid.store(std::process::id(), Ordering::Relaxed);
                slot.stalled.store(0, Ordering::Relaxed);
                slot.in_flight.store(0, Ordering::Relaxed);
                return Ok(SlotGuard { owner: Owner::new(index, generation), file });
            }
        }
        Err(Error::new(ErrorKind::Busy, format!("all {SLOTS} slots are taken")).on(live.path()))
    }

    /// The name under which this slot claims.
    pub fn owner(&self) -> Owner {
        self.owner
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        // The descriptor is shared with the mapping's, so closing it alone would not unlock.
        if let Err(err) = try_lock(&self.file, u64::from(self.owner.slot()), LockKind::Unlocked) {
            log::warn!("could not give slot {} back: {err}", self.owner.slot());
        }
    }
}

/// Whether a slot has a holder other than this open of the file.
pub fn is_held(file: &File, slot: u32) -> bool {
    // Where the question fails, the answer that costs only a deadline.
    is_held_against(file, u64::from(slot), LockKind::Exclusive).unwrap_or(true)
}
