//! The map: for each guest cluster its place in the image file and the state of its subclusters.
//!
//! # Protocol
//!
//! | word | from | to | by | order |
//! |---|---|---|---|---|
//! | `host` | 0 | offset | anyone who allocated a cluster, once ([`MapEntry::place`]) | `AcqRel` |
//! | `bits` | neither bit | data or zero bit | whoever stored it ([`MapEntry::publish`]) | `Release` |
//! | `on_disk` | older bits | newer bits | the holder of the checkpoint lock | `Relaxed` |
//!
//! `host` and a subcluster's bit never change again while the live file lives, so a reader that has
//! seen a bit may read the file at any later time without a lock. Order: the data is written to the
//! file (its page cache, which all processes share) and `host` is set before the bit is published
//! with `Release`; a reader loads `bits` with `Acquire` before `host`, so it never sees a bit
//! without the place and the data behind it. Two processes may publish the same subcluster, one as
//! data and one as zero, only if the base changed in between; the first one stands, since
//! [`MapEntry::publish`] sets no bit where there is one.
//!
//! Model-checked in `tests/loom.rs`.

use super::sync::{AtomicU64, Ordering};
use crate::format::{HostOffset, L2Entry, SubclusterBits};

/// One guest cluster.
#[derive(Debug, Default)]
#[repr(C)]
pub struct MapEntry {
    host: AtomicU64,
    bits: AtomicU64,
    on_disk: AtomicU64,
    reserved: AtomicU64,
}

impl MapEntry {
    /// The state of the subclusters; what it shows may be read from the place that
    /// [`MapEntry::host`] gives afterwards.
    pub fn bits(&self) -> SubclusterBits {
        SubclusterBits(self.bits.load(Ordering::Acquire))
    }

    /// Where the cluster lies, if it has a place.
    pub fn host(&self) -> Option<HostOffset> {
        let host = self.host.load(Ordering::Acquire);
        (host != 0).then_some(HostOffset(host))
    }

    /// Gives the cluster a place. Where another was faster, that place comes back as the error, and
    /// the caller keeps what it brought.
    pub fn place(&self, host: HostOffset) -> Result<(), HostOffset> {
        self.host
            .compare_exchange(0, host.0, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(HostOffset)
    }

    /// Makes subclusters visible, except those that already are. The data must be in the file.
    /// Returns what was new.
    pub fn publish(&self, new: SubclusterBits) -> SubclusterBits {
        let mut old = self.bits();
        loop {
            let free = !old.present();
            let add = SubclusterBits::new(new.data() & free, new.zero() & free);
            if add.0 == 0 {
                return add;
            }
            match self.bits.compare_exchange_weak(
                old.0,
                old.0 | add.0,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return add,
                Err(now) => old = SubclusterBits(now),
            }
        }
    }

    /// The state of the subclusters that the image's own L2 entry shows.
    pub fn on_disk(&self) -> SubclusterBits {
        SubclusterBits(self.on_disk.load(Ordering::Relaxed))
    }

    /// Notes what the L2 entry shows now. Only under the checkpoint lock.
    pub fn set_on_disk(&self, bits: SubclusterBits) {
        self.on_disk.store(bits.0, Ordering::Relaxed);
    }

    /// Takes over an L2 entry of the image, before anybody else can see this map. `on_disk` is what
    /// the image's own entry shows, which may be more than what is to be trusted.
    pub fn restore(&self, entry: L2Entry, on_disk: SubclusterBits) {
        self.host.store(entry.host.map_or(0, |host| host.0), Ordering::Relaxed);
        self.on_disk.store(on_disk.0, Ordering::Relaxed);
        self.bits.store(entry.bits.0, Ordering::Release);
    }
}
