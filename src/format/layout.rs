//! Where everything stands in the file. A cache image has one fixed order of clusters that follows
//! from its geometry alone:
//!
//! ```text
//! header | refcount table | refcount blocks | L1 table | L2 tables | checksums | data clusters ...
//!    1   |      few       |    for the largest file it can become    | 128 bytes | one
//!                                                                      per guest cluster
//! ```
//!
//! All tables are there from the start, as holes of a sparse file where they are still zero. So
//! neither the L1 nor the refcount table is ever written again, a checkpoint has two steps
//! (refcounts, then L2 entries), and a header that points anywhere else is damaged.
//!
//! Used by `image` to create and to validate.

use super::checksum::Checksum;
use super::geometry::{Geometry, HostOffset, SUBCLUSTERS};

/// Bits of a refcount are 2^4 = 16, the format's default.
pub const REFCOUNT_ORDER: u32 = 4;
/// Bytes of a refcount.
pub(super) const REFCOUNT_BYTES: u64 = 2;
const CHECKSUM_BYTES: u64 = Checksum::SIZE as u64;

/// "Bit 63: refcount is exactly one" of an L1 entry.
pub(super) const COPIED: u64 = 1 << 63;

/// The clusters of an image file by purpose, all numbers in clusters from the start of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    cluster_bits: u32,
    /// Clusters of the refcount table, which starts at cluster 1.
    pub refcount_table_clusters: u64,
    /// Refcount blocks, one cluster each.
    pub refcount_blocks: u64,
    /// First cluster of the L1 table.
    pub l1_table: u64,
    /// First cluster of the L2 tables.
    pub l2_tables: u64,
    /// First cluster of the checksums, and one past the last cluster with a refcount that an empty
    /// image has.
    pub checksums: u64,
    /// First cluster of the data area.
    pub data: u64,
    /// One past the last cluster that the file can ever have.
    pub end: u64,
}

impl Layout {
    /// The layout for a geometry.
    pub fn new(geometry: &Geometry) -> Self {
        let cluster = geometry.cluster_size();
        let l1_clusters = (geometry.l2_tables() * 8).div_ceil(cluster);
        let checksum_bytes = geometry.clusters() * u64::from(SUBCLUSTERS) * CHECKSUM_BYTES;
        let checksum_clusters = checksum_bytes.div_ceil(cluster);
        let without_refcounts =
            1 + l1_clusters + geometry.l2_tables() + checksum_clusters + geometry.clusters();
        let mut blocks = 1u64;
        loop {
            let table = (blocks * 8).div_ceil(cluster);
            let end = without_refcounts + table + blocks;
            let needed = end.div_ceil(cluster / REFCOUNT_BYTES);
            if needed <= blocks {
                let l1_table = 1 + table + blocks;
                let l2_tables = l1_table + l1_clusters;
                let checksums = l2_tables + geometry.l2_tables();
                return Layout {
                    cluster_bits: geometry.cluster_bits(),
                    refcount_table_clusters: table,
                    refcount_blocks: blocks,
                    l1_table,
                    l2_tables,
                    checksums,
                    data: checksums + checksum_clusters,
                    end,
                };
            }
            blocks = needed;
        }
    }

    /// Host offset of a cluster of the file.
    pub fn offset(&self, cluster: u64) -> HostOffset {
        HostOffset(cluster << self.cluster_bits)
    }

    /// Host offset of the refcount table.
    pub fn refcount_table_offset(&self) -> HostOffset {
        self.offset(1)
    }

    /// Host offset of a refcount block.
    pub fn refcount_block_offset(&self, block: u64) -> HostOffset {
        self.offset(1 + self.refcount_table_clusters + block)
    }

    /// Host offset of the refcount of a cluster of the file.
    pub fn refcount_offset(&self, cluster: u64) -> HostOffset {
        // The blocks lie one behind the other, so the refcounts form one array.
        HostOffset(self.refcount_block_offset(0).0 + cluster * REFCOUNT_BYTES)
    }

    /// Host offset of an L2 table.
    pub fn l2_table_offset(&self, table: u64) -> HostOffset {
        self.offset(self.l2_tables + table)
    }

    /// Host offset of the L2 entry of a guest cluster.
    pub fn l2_entry_offset(&self, guest_cluster: u64) -> HostOffset {
        // Likewise one array, since every table is full of entries.
        HostOffset(self.l2_table_offset(0).0 + guest_cluster * super::L2Entry::SIZE as u64)
    }

    /// Host offset of the checksum of a subcluster, numbered from the start of the disk.
    pub fn checksum_offset(&self, subcluster: u64) -> HostOffset {
        HostOffset(self.offset(self.checksums).0 + subcluster * CHECKSUM_BYTES)
    }

    /// The refcount table: each block's offset, big-endian.
    pub fn encode_refcount_table(&self) -> Vec<u8> {
        (0..self.refcount_blocks)
            .flat_map(|block| self.refcount_block_offset(block).0.to_be_bytes())
            .collect()
    }

    /// The same up to the end of the table's last cluster, which is as far as QEMU reads it.
    pub fn encode_whole_refcount_table(&self) -> Vec<u8> {
        let mut table = self.encode_refcount_table();
        table.resize((self.refcount_table_clusters as usize) << self.cluster_bits, 0);
        table
    }

    /// The L1 table: each L2 table's offset with the COPIED flag, big-endian.
    pub fn encode_l1_table(&self) -> Vec<u8> {
        (0..self.checksums - self.l2_tables)
            .flat_map(|table| (self.l2_table_offset(table).0 | COPIED).to_be_bytes())
            .collect()
    }

    /// Whether a cluster of data may lie at this host offset.
    pub fn is_data_cluster(&self, host: HostOffset) -> bool {
        host.0.is_multiple_of(1 << self.cluster_bits)
            && (self.offset(self.data).0..self.offset(self.end).0).contains(&host.0)
    }
}
