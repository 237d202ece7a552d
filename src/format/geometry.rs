//! Sizes and offsets: newtypes that keep guest and host offsets apart, and the arithmetic that
//! follows from an image's virtual size and cluster size.
//!
//! Used by everything that names a place in the guest's disk or in the image file.

use crate::error::{Error, ErrorKind, Result};

/// Subclusters in a cluster when L2 entries are extended (section "Extended L2 Entries").
pub const SUBCLUSTERS: u32 = 32;

/// Smallest supported cluster: with 32 subclusters of 512 B.
const MIN_CLUSTER_BITS: u32 = 14;
/// Largest cluster that QEMU opens.
const MAX_CLUSTER_BITS: u32 = 21;
/// QEMU refuses L1 tables above 32 MiB (`QCOW_MAX_L1_SIZE`), eight bytes an entry.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
/// Largest disk, 1 PiB.
const MAX_VIRTUAL_SIZE: u64 = 1 << 50;
/// QEMU counts in 512-byte sectors, so a disk is a whole number of them.
pub const SECTOR: u64 = 512;

/// A byte offset in the disk that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte offset in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// A run of bytes in the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Virtual size and cluster size of an image, validated, and what follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    virtual_size: u64,
}

impl Geometry {
    /// Checks the two numbers against what the format and QEMU allow.
    pub fn new(cluster_bits: u32, virtual_size: u64) -> Result<Self> {
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("cluster size of 2^{cluster_bits} bytes; supported are 16 KiB to 2 MiB"),
            ));
        }
        if virtual_size == 0 || !virtual_size.is_multiple_of(SECTOR) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("virtual size of {virtual_size} bytes is not a positive multiple of 512"),
            ));
        }
        let geometry = Geometry { cluster_bits, virtual_size };
        if virtual_size.div_ceil(geometry.l2_span()) > MAX_L1_ENTRIES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "virtual size of {virtual_size} bytes is too large for clusters of {} bytes; \
                     use a larger cluster_size",
                    geometry.cluster_size()
                ),
            ));
        }
        // Far beyond any disk; what matters is that every host offset fits into an L2 entry.
        if virtual_size > MAX_VIRTUAL_SIZE {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("virtual size of {virtual_size} bytes; at most 2^50 are supported"),
            ));
        }
        Ok(geometry)
    }

    /// From a cluster size in bytes, as a user gives it.
    pub fn with_cluster_size(cluster_size: u64, virtual_size: u64) -> Result<Self> {
        if !cluster_size.is_power_of_two() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("cluster_size={cluster_size} is not a power of two from 16K to 2M"),
            ));
        }
        Geometry::new(cluster_size.trailing_zeros(), virtual_size)
    }

    /// log2 of the cluster size.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the subcluster size.
    pub fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - SUBCLUSTERS.trailing_zeros()
    }

    /// Bytes in a subcluster.
    pub fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Bytes in the guest's disk.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Clusters in the guest's disk, the last one perhaps in part.
    pub fn clusters(&self) -> u64 {
        self.virtual_size.div_ceil(self.cluster_size())
    }

    /// Extended entries (16 bytes each) in one L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / 16
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_span(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L2 tables that the whole disk needs, one L1 entry each.
    pub fn l2_tables(&self) -> u64 {
        self.virtual_size.div_ceil(self.l2_span())
    }

    /// The cluster that holds a guest offset.
    pub fn cluster_of(&self, offset: GuestOffset) -> u64 {
        offset.0 >> self.cluster_bits
    }

    /// The subcluster, numbered from the start of the disk, that holds a guest offset.
    pub fn subcluster_of(&self, offset: GuestOffset) -> u64 {
        offset.0 >> self.subcluster_bits()
    }

    /// The bytes of `count` subclusters from `first` on, cut at the end of the disk.
    pub fn subcluster_range(&self, first: u64, count: u64) -> ByteRange {
        let start = first << self.subcluster_bits();
        let end = ((first + count) << self.subcluster_bits()).min(self.virtual_size);
        ByteRange { start, len: end.saturating_sub(start) }
    }
}
