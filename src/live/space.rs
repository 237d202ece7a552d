//! Space in the image file: which cluster to hand out next, and how much the quota still allows.
//!
//! # Protocol
//!
//! A data cluster is handed out by taking the next entry of the free list, a list that is written
//! before anybody else can see the live file and only ever consumed, by adding one to
//! `free_taken`; and when that is used up, by adding one to `next`. Neither ever goes back, so no
//! cluster is handed out twice (a compare-and-swap on `next` keeps it within the file's layout).
//! What a process was handed and did not use it keeps for its next need; what it takes to the grave
//! is found again when the state is next made from the image. A cluster that was handed out has no
//! refcount on disk and no reference, so it is no leak.
//!
//! `used` is an upper bound of what the image file occupies: bytes are added before they are
//! written and put right from the file's block count by [`Space::settle`], at checkpoints and when
//! the quota seems reached. The word also counts its own changes, so that settling sees whether
//! anything was taken since it began, even where others settled in between and the sum is the same
//! again.
//!
//! Order: taking bytes releases and settling acquires, so whoever settles an account that has some
//! bytes in it also sees that they were announced (see `slot`). All else is `Relaxed`.
//!
//! Model-checked in `tests/loom.rs`.

use super::sync::{AtomicU32, AtomicU64, Ordering};

/// Entries of the free list.
pub const FREE_LIST: usize = 4096;

/// Bits of `used` that are bytes, enough for 256 TiB; those above count the changes.
const BYTES: u64 = (1 << 48) - 1;
const CHANGE: u64 = BYTES + 1;

/// What `used` becomes when it changes to another number of bytes.
fn changed(word: u64, bytes: u64) -> u64 {
    (word & !BYTES).wrapping_add(CHANGE) | bytes.min(BYTES)
}

/// Allocation and quota.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Space {
    next: AtomicU64,
    end: AtomicU64,
    /// Bytes, and a count of changes: see [`changed`].
    used: AtomicU64,
    full: AtomicU32,
    free_taken: AtomicU32,
    free_len: AtomicU32,
    reserved: [AtomicU32; 5],
}

impl Space {
    /// Sets the start: next cluster and end of the data area (in clusters), bytes occupied, and
    /// how many entries of the free list are filled. Before anybody else can see the live file.
    pub fn restore(&self, next: u64, end: u64, used: u64, free_len: usize) {
        self.next.store(next, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.used.store(used.min(BYTES), Ordering::Relaxed);
        self.full.store(0, Ordering::Relaxed);
        self.free_taken.store(0, Ordering::Relaxed);
        self.free_len.store(free_len.min(FREE_LIST) as u32, Ordering::Relaxed);
    }

    /// Hands out a cluster of the file by number, or `None` when its layout is used up.
    pub fn take_cluster(&self, free_list: &[AtomicU64]) -> Option<u64> {
        let free_len = self.free_len.load(Ordering::Relaxed).min(FREE_LIST as u32);
        let taken = self
            .free_taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (taken < free_len).then_some(taken + 1)
            })
            .ok();
        if let Some(index) = taken {
            return free_list.get(index as usize).map(|entry| entry.load(Ordering::Relaxed));
        }
        let end = self.end.load(Ordering::Relaxed);
        self.next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                (next < end).then_some(next + 1)
            })
            .ok()
    }

    /// Takes up to `bytes` out of the quota, in whole multiples of `unit` beyond `overhead`;
    /// returns what it got, `overhead` included, or `None`.
    pub fn reserve(&self, overhead: u64, bytes: u64, unit: u64, limit: u64) -> Option<u64> {
        let mut got = 0;
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                let left = limit.min(BYTES).checked_sub(word & BYTES)?.checked_sub(overhead)?;
                let whole = bytes.min(left / unit * unit);
                got = overhead + whole;
                (whole > 0).then(|| changed(word, (word & BYTES) + got))
            })
            .ok()
            .map(|_| got)
    }

    /// Gives bytes back that were reserved and not needed.
    pub fn give_back(&self, bytes: u64) {
        // It never fails: the change is always one.
        let _ = self.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
            Some(changed(word, (word & BYTES).saturating_sub(bytes)))
        });
    }

    /// Upper bound of the bytes that the file occupies.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed) & BYTES
    }

    /// Puts the bound right: `measure` says what the file and all writes under way can occupy.
    /// Nothing changes where somebody reserved meanwhile.
    pub fn settle(&self, measure: impl FnOnce() -> Option<u64>) {
        let before = self.used.load(Ordering::Acquire);
        if let Some(measured) = measure() {
            // Where this fails the account is left too high, for the next one to settle.
            let _ = self.used.compare_exchange(
                before,
                changed(before, measured),
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
        }
    }

    /// Whether something could not be stored for want of quota.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed) != 0
    }

    /// Notes whether the quota is used up; returns what it was before.
    pub fn set_full(&self, full: bool) -> bool {
        self.full.swap(u32::from(full), Ordering::Relaxed) != 0
    }
}
