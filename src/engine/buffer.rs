//! Memory for the base's bytes on their way into the cache: taken before they are read, given back
//! when they are stored or dropped. What an open has under way, in requests to the base and in the
//! queue, is bounded together; where there is no room left a request reads the base straight into
//! the guest's memory, and nothing of that is stored.
//!
//! Used by `Engine`, `populate` and whoever reads the base.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

/// From this size on a buffer is a mapping of its own. One thread allocates and another frees, and
/// what the allocator keeps of that for itself would stay with an idle machine.
const MAPPED: usize = 128 << 10;

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

    /// A buffer of `len` zeros that can be padded up to `capacity`; `None` where there is no room or
    /// no memory for it.
    pub fn buffer(self: &Arc<Self>, len: usize, capacity: usize) -> Option<Buffer> {
        let capacity = capacity.max(len);
        let place = Place::take(self, capacity as u64)?;
        let memory = if capacity >= MAPPED {
            Memory::Mapped(MmapMut::map_anon(capacity).ok()?)
        } else {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(capacity).ok()?;
            bytes.resize(capacity, 0);
            Memory::Allocated(bytes)
        };
        Some(Buffer { memory, len, _place: place })
    }
}

/// Room that is taken until this is dropped.
#[derive(Debug)]
struct Place {
    room: Arc<Room>,
    len: u64,
}

impl Place {
    fn take(room: &Arc<Room>, len: u64) -> Option<Self> {
        let with = |taken: u64| taken.checked_add(len).filter(|taken| *taken <= room.limit);
        room.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with).ok()?;
        Some(Place { room: Arc::clone(room), len })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.taken.fetch_sub(self.len, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Memory {
    Allocated(Vec<u8>),
    Mapped(MmapMut),
}

/// Bytes of the base on their way into the cache.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
    _place: Place,
}

impl Buffer {
    /// Adds zeros up to a length within the capacity it was made with.
    pub(super) fn pad(&mut self, len: usize) {
        self.len = len;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let bytes: &[u8] = match &self.memory {
            Memory::Allocated(bytes) => bytes,
            Memory::Mapped(bytes) => bytes,
        };
        bytes.get(..self.len).unwrap_or(bytes)
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes: &mut [u8] = match &mut self.memory {
            Memory::Allocated(bytes) => bytes,
            Memory::Mapped(bytes) => bytes,
        };
        let len = self.len.min(bytes.len());
        &mut bytes[..len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_take_room_until_they_are_dropped() {
        let room = Room::new(8192);
        let first = room.buffer(4096, 4096);
        let second = room.buffer(100, 4096);
        let too_many = room.buffer(1, 1);
        drop(first);
        let again = room.buffer(4096, 4096);
        assert_eq!([second.is_some(), too_many.is_some(), again.is_some()], [true, false, true]);
    }

    #[test]
    fn what_was_refused_takes_no_room() {
        let room = Room::new(8192);
        assert!(room.buffer(usize::MAX, 0).is_none());
        assert!(room.buffer(8193, 8193).is_none());
        assert!(room.buffer(8192, 8192).is_some());
    }

    #[test]
    fn small_and_large_buffers_are_padded_with_zeros() {
        let room = Room::new(8 << 20);
        for len in [1000, 2 << 20] {
            let mut buffer = room.buffer(len, len + 24).unwrap();
            buffer.fill(7);
            buffer.pad(len + 24);
            assert_eq!(buffer.len(), len + 24);
            assert!(buffer[..len].iter().all(|byte| *byte == 7));
            assert_eq!(buffer[len..], [0; 24]);
        }
    }
}
