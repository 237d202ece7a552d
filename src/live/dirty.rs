//! Marks: for each group of guest clusters, whether something was published in it since the last
//! checkpoint.
//!
//! # Protocol
//!
//! Whoever published marks afterwards ([`Marks::mark`]); the checkpoint takes the mark and then
//! reads what is published ([`Marks::take`]). Both have a fence between the two steps, so that one
//! of them sees the other: either the checkpoint sees what was published, or the publisher sees
//! that the mark is gone and sets it again. So nothing published is ever without a mark and without
//! a checkpoint that has it.
//!
//! A process that dies in the middle of a checkpoint takes marks with it. The checkpoint's word in
//! the live file then still says that one is under way, and the next one looks at everything.
//!
//! Model-checked in `tests/loom.rs`.

use super::sync::{AtomicU64, Ordering, fence};

/// The marks of 64 groups.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Marks(AtomicU64);

impl Marks {
    /// Sets the mark of a group (below 64). After publishing.
    pub fn mark(&self, group: u32) {
        fence(Ordering::SeqCst);
        // Read first: the line stays shared while a burst of fills goes to the same group.
        if !self.has(group) {
            self.0.fetch_or(1 << group, Ordering::Relaxed);
        }
    }

    /// Takes the mark of a group off; whether it had one. Before reading what is published.
    pub fn take(&self, group: u32) -> bool {
        let taken =
            self.has(group) && self.0.fetch_and(!(1 << group), Ordering::Relaxed) >> group & 1 != 0;
        fence(Ordering::SeqCst);
        taken
    }

    /// Whether a group has a mark.
    pub fn has(&self, group: u32) -> bool {
        self.0.load(Ordering::Relaxed) >> group & 1 != 0
    }
}
