//! Buffers for what is looked at before the guest gets it. Each thread keeps one, since making and
//! clearing a buffer costs as much as looking at what is in it.
//!
//! Used by `io`.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

/// Bytes of the buffer that a thread keeps, at the most.
const KEPT_MAX: usize = 128 << 10;

thread_local! {
    static KEPT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

// Neither may become part of a function that a coroutine leaves and enters again in another thread:
// the compiler could keep the place of the first thread's buffer.

/// The buffer of this thread, which has none until it is put back.
#[inline(never)]
fn take_kept() -> Vec<u8> {
    // A second one at the same time, or one in a thread that ends, finds none.
    KEPT.try_with(Cell::take).unwrap_or_default()
}

/// Puts a buffer back, into whatever thread this is.
#[inline(never)]
fn keep(bytes: Vec<u8>) {
    // In a thread that ends it is freed.
    let _ = KEPT.try_with(|kept| kept.set(bytes));
}

/// Bytes of whatever was in them before.
pub(super) struct Scratch {
    bytes: Vec<u8>,
    len: usize,
}

impl Scratch {
    /// `None` where there is no memory for it.
    pub(super) fn new(len: usize) -> Option<Self> {
        let mut bytes = take_kept();
        if bytes.len() < len {
            bytes.try_reserve_exact(len - bytes.len()).ok()?;
            bytes.resize(len, 0);
        }
        Some(Scratch { bytes, len })
    }
}

impl Deref for Scratch {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.bytes.len() <= KEPT_MAX {
            keep(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_asked_for_whatever_the_one_kept_has() {
        drop(Scratch::new(8192));

        let lengths = [4096, 65536, 1 << 20, 512].map(|len| Scratch::new(len).unwrap().len());

        assert_eq!(lengths, [4096, 65536, 1 << 20, 512]);
    }

    #[test]
    fn two_buffers_at_once_are_two() {
        let (mut one, mut two) = (Scratch::new(16).unwrap(), Scratch::new(16).unwrap());

        one.fill(1);
        two.fill(2);

        assert_eq!((&one[..], &two[..]), (&[1; 16][..], &[2; 16][..]));
    }

    #[test]
    fn no_memory_is_no_panic() {
        assert!(Scratch::new(usize::MAX).is_none());
    }
}
