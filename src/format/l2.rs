//! One extended L2 entry: where a guest cluster lies in the file and which of its 32 subclusters
//! are data, zero, or left to the base (section "Extended L2 Entries").
//!
//! Used by `image` to read and write tables, and by `live`, whose map keeps the same two bitmaps.

use super::geometry::{Geometry, HostOffset};
use crate::error::{Error, ErrorKind, Result};

/// "Bit 63: refcount is exactly one".
const COPIED: u64 = 1 << 63;
/// "Bit 62: compressed cluster"; never written by vmcache.
const COMPRESSED: u64 = 1 << 62;
/// Bits 9 to 55 hold the host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The state of a cluster's 32 subclusters, as the second half of an extended L2 entry has it:
/// low word allocated, high word reads as zeros, neither bit for what the base holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubclusterBits(pub u64);

impl SubclusterBits {
    /// From one mask of data subclusters and one of zero subclusters.
    pub fn new(data: u32, zero: u32) -> Self {
        SubclusterBits(u64::from(data) | u64::from(zero) << 32)
    }

    /// Mask of the subclusters that hold data.
    pub fn data(self) -> u32 {
        (self.0 & u64::from(u32::MAX)) as u32
    }

    /// Mask of the subclusters that read as zeros.
    pub fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Mask of the subclusters that the cache answers for.
    pub fn present(self) -> u32 {
        self.data() | self.zero()
    }
}

/// An extended L2 entry of a cache image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry {
    /// Where the cluster's data lies, if it has a place.
    pub host: Option<HostOffset>,
    /// The state of its subclusters.
    pub bits: SubclusterBits,
}

impl L2Entry {
    /// Size of an entry in the table.
    pub const SIZE: usize = 16;

    /// The entry without some subclusters (a mask), and without its place where no data is left.
    pub fn without(self, subclusters: u32) -> Self {
        let (data, zero) = (self.bits.data() & !subclusters, self.bits.zero() & !subclusters);
        let host = self.host.filter(|_| data != 0);
        L2Entry { host, bits: SubclusterBits::new(data, zero) }
    }

    /// The entry's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let descriptor = self.host.map_or(0, |host| host.0 | COPIED);
        let mut bytes = [0; Self::SIZE];
        let (first, second) = bytes.split_at_mut(8);
        first.copy_from_slice(&descriptor.to_be_bytes());
        second.copy_from_slice(&self.bits.0.to_be_bytes());
        bytes
    }

    /// Reads an entry and refuses what vmcache never writes: compressed clusters, unknown bits,
    /// an unaligned offset, data without a place, a subcluster both data and zero.
    pub fn decode(bytes: [u8; Self::SIZE], geometry: &Geometry) -> Result<Self> {
        let word = |part: &[u8]| part.iter().fold(0u64, |acc, b| acc << 8 | u64::from(*b));
        let (first, second) = bytes.split_at(8);
        let (descriptor, bits) = (word(first), SubclusterBits(word(second)));
        let damaged = |what: &str| {
            Error::new(
                ErrorKind::Damaged,
                format!("L2 entry {descriptor:#018x} {:#018x} {what}", bits.0),
            )
        };
        if descriptor & COMPRESSED != 0 {
            return Err(damaged("is a compressed cluster"));
        }
        if descriptor & !(COPIED | OFFSET_MASK) != 0 {
            return Err(damaged("has reserved bits set"));
        }
        let offset = descriptor & OFFSET_MASK;
        if !offset.is_multiple_of(geometry.cluster_size()) {
            return Err(damaged("has a host offset that is not aligned to a cluster"));
        }
        let copied = descriptor & COPIED != 0;
        if copied != (offset != 0) {
            return Err(damaged("has a COPIED flag that contradicts its host offset"));
        }
        if bits.data() & bits.zero() != 0 {
            return Err(damaged("has a subcluster that is both data and zero"));
        }
        if offset == 0 && bits.data() != 0 {
            return Err(damaged("has data but no host offset"));
        }
        Ok(L2Entry { host: (offset != 0).then_some(HostOffset(offset)), bits })
    }
}
