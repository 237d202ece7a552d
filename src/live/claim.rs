//! Claims: one word per subcluster that says who is fetching it, so that the others wait for it.
//!
//! # Protocol
//!
//! ```text
//!            try_claim                mark_waiting
//!   free ----------------> held(owner) ----------> held(owner, waiters)
//!    ^                        |                         |
//!    |   release by its owner |                         |  ... and the event is rung
//!    +------------------------+-------------------------+
//!    |   break_claim by a waiter: owner dead, stalled or past the deadline
//!    +--------------------------------------------------------------------
//! ```
//!
//! Every step is one compare-and-swap from the word that was seen, so a claim has one owner at a
//! time. A claim is permission to fetch without others doing the same, no more: an owner whose
//! claim was broken may still publish, since that is idempotent (see `map`), and its release finds
//! another word and does nothing.
//!
//! An owner is a slot and the generation of its holder. A word left behind by a dead process names
//! a generation that is over; nobody has to clean up after it. Generations wrap after a million
//! joins of one slot; a word that old and by chance equal only costs its waiters the deadline.
//!
//! Order: releasing (`Release`) comes after publishing; claiming (`Acquire`) comes before a second
//! look at the map. So whoever claims a word that was released with success finds the data and does
//! not fetch again. Waiters mark the word first and then look again before they sleep; the owner
//! swaps the word and, where it was marked, rings the event: no wake-up is lost.
//!
//! Model-checked in `tests/loom.rs`.

use super::sync::{AtomicU32, Ordering};

const HELD: u32 = 1 << 31;
const WAITERS: u32 = 1 << 30;
const SLOT_SHIFT: u32 = 20;
const SLOT_MASK: u32 = 0x3ff;
const GENERATION_MASK: u32 = (1 << SLOT_SHIFT) - 1;

/// Who holds a claim: a slot in one generation. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u32);

impl Owner {
    /// The owner that stands for a slot (below 1024) held in a generation (its low 20 bits count).
    pub fn new(slot: u32, generation: u32) -> Self {
        Owner(HELD | (slot & SLOT_MASK) << SLOT_SHIFT | generation & GENERATION_MASK)
    }

    /// Index of the slot.
    pub fn slot(self) -> u32 {
        self.0 >> SLOT_SHIFT & SLOT_MASK
    }

    /// Low 20 bits of the slot's generation.
    pub fn generation(self) -> u32 {
        self.0 & GENERATION_MASK
    }
}

/// A claim word as it was seen, held by somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held(u32);

impl Held {
    /// Who holds it.
    pub fn owner(self) -> Owner {
        Owner(self.0 & !WAITERS)
    }

    /// Whether its owner will ring the event when it lets go.
    pub fn is_waited_for(self) -> bool {
        self.0 & WAITERS != 0
    }
}

/// The claim word of one subcluster.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Claim(AtomicU32);

impl Claim {
    /// Claims the subcluster, or tells who has it.
    pub fn try_claim(&self, me: Owner) -> Result<(), Held> {
        self.0
            .compare_exchange(0, me.0, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(Held)
    }

    /// Who holds it, if anybody does.
    pub fn holder(&self) -> Option<Held> {
        let word = self.0.load(Ordering::Acquire);
        (word != 0).then_some(Held(word))
    }

    /// Asks the holder to ring the event when it lets go. `None` where it already has; otherwise
    /// the word to wait on, which may have passed to another owner meanwhile.
    pub fn mark_waiting(&self) -> Option<Held> {
        let mut word = self.0.load(Ordering::Acquire);
        while word != 0 && word & WAITERS == 0 {
            match self.0.compare_exchange_weak(
                word,
                word | WAITERS,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(Held(word | WAITERS)),
                Err(now) => word = now,
            }
        }
        (word != 0).then_some(Held(word))
    }

    /// Lets go of a claim, if it still is the caller's. Returns whether somebody waits for that,
    /// in which case the caller has to ring the event.
    #[must_use = "waiters have to be woken"]
    pub fn release(&self, me: Owner) -> bool {
        let mut word = self.0.load(Ordering::Relaxed);
        while Held(word).owner() == me {
            match self.0.compare_exchange_weak(word, 0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return word & WAITERS != 0,
                Err(now) => word = now,
            }
        }
        false
    }

    /// Frees a claim whose owner is dead or too slow, if it still is the one that was seen. Returns
    /// whether this call freed it; then the caller has to ring the event.
    #[must_use = "waiters have to be woken"]
    pub fn break_claim(&self, seen: Held) -> bool {
        self.0.compare_exchange(seen.0, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}
