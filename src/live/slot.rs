//! Slots: one per open of the image. A slot tells the others that its holder is alive, carries its
//! counters, and gives its claims their name.
//!
//! # Protocol
//!
//! A slot belongs to whoever holds the exclusive open-file-description lock on the byte of the live
//! file with the slot's index. The kernel drops that lock when the holder dies, so a dead owner is
//! seen at once by asking for the lock (`F_OFD_GETLK`), by anybody and without a message from the
//! dead.
//!
//! | word | from | to | by |
//! |---|---|---|---|
//! | `state` | any | next generation, not stalled | who has just got the lock ([`Slot::take`]) |
//! | `state` | generation | the same, stalled | a waiter that found this generation dead or late ([`Slot::give_up_on`]) |
//! | `state` | generation, stalled | the same, not stalled | the holder, when it plans again ([`Slot::clear_stalled`]) |
//! | `in_flight`, `pid`, counters | | | the holder |
//!
//! Nobody waits for a generation that is over or marked as stalled; its claims are broken at sight.
//! Generation and mark are one word, and the mark is set by compare-and-swap from the unmarked
//! generation: a waiter that comes late with its verdict on a former holder changes nothing about
//! the present one. A mark of its own that a living holder has not cleared yet costs others a
//! second fetch, no more; it is gone when the holder next plans.
//!
//! Between the lock and [`Slot::take`] a new holder goes under the name of the last one, who then
//! seems alive to a waiter; it asks again a pulse later, and gives up at its deadline in any case.
//!
//! Order: `state` is `Relaxed`. A holder takes its slot before it claims, and claiming releases, so
//! whoever acquires a claim sees the generation that made it, or a later one. `in_flight` grows
//! before the bytes are taken from the quota, which releases it (see `space`), and `end_write`
//! releases what was written and marked before it: whoever settles finds bytes that are taken in
//! `in_flight`, or in the file, or in both.
//!
//! Counters go on from holder to holder, so that their sum over all slots counts since the live
//! file was made.
//!
//! Model-checked in `tests/loom.rs`, with the lock in the checker's own terms.

use std::fs::File;

use super::claim::{Claim, Held, Owner};
use super::file::LiveFile;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::{LockKind, is_held_against, try_lock};

/// Slots in a live file: how many opens of one image can populate it at the same time.
pub const SLOTS: u32 = 1024;

/// In `state` beside the generation: there is no use in waiting for this holder.
const STALLED: u32 = 1 << 31;

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
    /// Bytes read of the base but not stored: quota, disk full, no room in memory.
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
    /// The holder's generation, below 2^20, and [`STALLED`].
    state: AtomicU32,
    reserved: [AtomicU32; 2],
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
        self.state.load(Ordering::Relaxed) & !STALLED
    }

    /// Makes the caller the next holder of this slot, which is number `index`; gives its name. Only
    /// with the slot's lock.
    pub fn take(&self, index: u32, pid: u32) -> Owner {
        let next = Owner::new(index, self.generation().wrapping_add(1)).generation();
        // No generation is zero, which stands for a slot that nobody ever had.
        let me = Owner::new(index, next.max(1));
        self.pid.store(pid, Ordering::Relaxed);
        self.in_flight.store(0, Ordering::Relaxed);
        // Swapped and not stored, which no mark of a former holder can slip behind.
        self.state.swap(me.generation(), Ordering::Relaxed);
        me
    }

    /// Whether an owner that was seen with a claim still is the holder of this slot. `is_held` asks
    /// for the slot's lock.
    pub fn is_alive(&self, owner: Owner, is_held: impl FnOnce() -> bool) -> bool {
        self.generation() == owner.generation() && is_held()
    }

    /// Bytes taken from the quota whose write is not finished.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Notes bytes on their way to the file, before they are taken from the quota.
    pub fn begin_write(&self, bytes: u64) {
        self.in_flight.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The end of [`Slot::begin_write`].
    pub fn end_write(&self, bytes: u64) {
        self.in_flight.fetch_sub(bytes, Ordering::Release);
    }

    /// Whether there is no use in waiting for the owner of a claim: it is known to be dead, or it
    /// let somebody wait past the deadline and was not seen since.
    pub fn is_stalled(&self, owner: Owner) -> bool {
        self.state.load(Ordering::Relaxed) != owner.generation()
    }

    /// Notes that this owner is dead or let somebody wait past the deadline, unless it is a former
    /// holder.
    pub fn set_stalled(&self, owner: Owner) {
        let generation = owner.generation();
        // Where this fails the mark is there, or not needed any more.
        let _ = self.state.compare_exchange(
            generation,
            generation | STALLED,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// Notes that the holder works (again). Cheap where nobody thought otherwise. Only the holder.
    pub fn clear_stalled(&self) {
        if self.state.load(Ordering::Relaxed) & STALLED != 0 {
            self.state.fetch_and(!STALLED, Ordering::Relaxed);
        }
    }

    /// Gives up on the owner of a claim, which is dead or late: all its claims break at the next
    /// look, this one now, if it still is the one that was seen. Returns whether this call freed
    /// it; then the caller has to ring the event.
    #[must_use = "waiters have to be woken"]
    pub fn give_up_on(&self, claim: &Claim, seen: Held) -> bool {
        self.set_stalled(seen.owner());
        claim.break_claim(seen)
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
                let owner = live.slot(index).take(index, std::process::id());
                return Ok(SlotGuard { owner, file });
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

/// Whether a slot has a holder other than this open of the file. A shared lock, which anybody can
/// take who may read the file, makes nobody a holder.
pub fn is_held(file: &File, slot: u32) -> bool {
    // Where the question fails, the answer that costs only a deadline.
    is_held_against(file, u64::from(slot), LockKind::Shared).unwrap_or(true)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn two_slots_never_share_a_cache_line() {
        assert_eq!(align_of::<Slot>() % 64, 0);
        assert_eq!(size_of::<Slot>() % 64, 0);
        assert!(offset_of!(Slot, counters) + size_of::<Counters>() <= size_of::<Slot>());
    }

    #[test]
    fn generations_wrap_around_zero() {
        let slot = Slot::default();
        slot.state.store((1 << 20) - 1, Ordering::Relaxed);
        let owner = slot.take(3, 1);
        assert_eq!(owner, Owner::new(3, 1));
        assert_eq!(slot.generation(), 1);
    }

    #[test]
    fn who_only_reads_the_live_file_cannot_pass_for_a_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (reader, asker) = (file.reopen().unwrap(), file.reopen().unwrap());
        assert!(try_lock(&reader, 3, LockKind::Shared).unwrap());
        assert!(!is_held(&asker, 3));
        assert!(try_lock(&reader, 3, LockKind::Exclusive).unwrap());
        assert!(is_held(&asker, 3));
    }

    #[test]
    fn late_verdict_on_a_former_holder_does_not_touch_the_present_one() {
        let slot = Slot::default();
        let former = slot.take(3, 1);
        let present = slot.take(3, 2);
        slot.set_stalled(present);
        slot.set_stalled(former);
        assert!(slot.is_stalled(present));
        slot.clear_stalled();
        assert!(!slot.is_stalled(present));
        assert!(slot.is_stalled(former));
    }
}
