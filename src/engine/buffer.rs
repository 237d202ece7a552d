//! Memory for the base's bytes on their way into the cache: taken before they are read, given back
//! when they are stored or dropped. What an open has under way, in requests to the base and in the
//! queue, is bounded together; where there is no room left a request reads the base straight into
//! the guest's memory, and nothing of that is stored.
//!
//! Used by `Engine`, `populate` and whoever reads the base.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many bytes there may be, and how many are taken.
#[derive(Debug)]
pub struct Room {
    limit: u64,
    /// `Relaxed`: it counts and guards nothing.
    taken: AtomicU64,
}

impl Room {
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Room { limit, taken: AtomicU64::new(0) })
    }

    /// A buffer of zeros; `None` where there is no room or no memory for it.
    pub fn buffer(self: &Arc<Self>, len: u64) -> Option<Buffer> {
        let place = Place { room: Arc::clone(self), len };
        let before = self.taken.fetch_add(len, Ordering::Relaxed);
        if before.saturating_add(len) > self.limit {
            return None;
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(usize::try_from(len).ok()?).ok()?;
        bytes.resize(len as usize, 0);
        Some(Buffer { bytes, _place: place })
    }
}

/// Room that is taken until this is dropped.
#[derive(Debug)]
struct Place {
    room: Arc<Room>,
    len: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.taken.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Bytes of the base on their way into the cache.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    _place: Place,
}

impl Buffer {
    /// Adds zeros up to a length, which is less than a subcluster away.
    pub(super) fn pad(&mut self, len: usize) {
        self.bytes.resize(len, 0);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_take_room_until_they_are_dropped() {
        let room = Room::new(8192);
        let first = room.buffer(4096);
        let second = room.buffer(4096);
        let too_many = room.buffer(1);
        drop(first);
        let again = room.buffer(4096);
        assert_eq!([second.is_some(), too_many.is_some(), again.is_some()], [true, false, true]);
    }

    #[test]
    fn what_was_refused_takes_no_room() {
        let room = Room::new(8192);
        assert!(room.buffer(u64::MAX).is_none());
        assert!(room.buffer(8193).is_none());
        assert!(room.buffer(8192).is_some());
    }
}
