//! A published image: what a cache image holds, as a plain qcow2 file that is never written to again.
//!
//! ```text
//! header | refcount table | refcount blocks | L1 table | L2 tables | data clusters
//!    1   |            for this file         |          | those with entries, in order of the disk
//! ```
//!
//! Unlike a cache image ([`super::Layout`]) it has no room for more: only the L2 tables that say
//! something, one cluster for each guest cluster with data, and no checksums. A cluster's subclusters
//! without data are holes of the sparse file.
//!
//! An extension of our own marks it as a copy of what its base holds, so that a cache whose base it
//! is takes another edition of it for the same base. Its data is the [UUID](super::CacheExtension) of
//! the cache image (16 bytes) and, where that knows it, the sample of the base (32 bytes, see
//! `image::identity`), by which whoever puts the image before a base tells whether it is still of that.
//!
//! Used by `image`.

use super::geometry::{Geometry, HostOffset};
use super::header::{Tables, check_base_name, encode, push_extension};
use super::layout::{COPIED, REFCOUNT_BYTES};
use crate::error::Result;

/// Type of the extension in the header ("vmcp").
pub(super) const PUBLISHED_EXTENSION: u32 = 0x766d_6370;

/// Where everything stands in a published image; numbers in clusters from the start of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    geometry: Geometry,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_table: u64,
    l2_tables: u64,
    /// First cluster of the data.
    pub data: u64,
    /// One past the last cluster of the file.
    pub end: u64,
}

impl Published {
    /// The layout of a file with so many L2 tables and clusters of data.
    pub fn new(geometry: &Geometry, l2_tables: u64, data_clusters: u64) -> Self {
        let cluster = geometry.cluster_size();
        let l1_clusters = (geometry.l2_tables() * 8).div_ceil(cluster);
        let without_refcounts = 1 + l1_clusters + l2_tables + data_clusters;
        let (mut table, mut blocks) = (1, 1);
        loop {
            let end = without_refcounts + table + blocks;
            let needed = end.div_ceil(cluster / REFCOUNT_BYTES);
            if needed <= blocks {
                let l1_table = 1 + table + blocks;
                let first_l2_table = l1_table + l1_clusters;
                return Published {
                    geometry: *geometry,
                    refcount_table_clusters: table,
                    refcount_blocks: blocks,
                    l1_table,
                    l2_tables: first_l2_table,
                    data: first_l2_table + l2_tables,
                    end,
                };
            }
            blocks = needed;
            table = (blocks * 8).div_ceil(cluster);
        }
    }

    /// Host offset of a cluster of the file.
    pub fn offset(&self, cluster: u64) -> HostOffset {
        HostOffset(cluster << self.geometry.cluster_bits())
    }

    /// Host offset of the refcounts, one after the other.
    pub fn refcounts_offset(&self) -> HostOffset {
        self.offset(1 + self.refcount_table_clusters)
    }

    /// Host offset of the L1 table.
    pub fn l1_table_offset(&self) -> HostOffset {
        self.offset(self.l1_table)
    }

    /// Host offset of the `index`th of the L2 tables that are there.
    pub fn l2_table_offset(&self, index: u64) -> HostOffset {
        self.offset(self.l2_tables + index)
    }

    /// Host offset of the refcount table.
    pub fn refcount_table_offset(&self) -> HostOffset {
        self.offset(1)
    }

    /// The refcount table: each block's offset, big-endian.
    pub fn encode_refcount_table(&self) -> Vec<u8> {
        let first = 1 + self.refcount_table_clusters;
        (first..first + self.refcount_blocks)
            .flat_map(|block| self.offset(block).0.to_be_bytes())
            .collect()
    }

    /// The L1 table, for the L2 tables that are there: their numbers on the disk, in order.
    pub fn encode_l1_table(&self, tables: impl Iterator<Item = u64>) -> Vec<u8> {
        let mut l1 = vec![0; self.geometry.l2_tables() as usize];
        for (index, table) in (0..).zip(tables) {
            if let Some(entry) = l1.get_mut(table as usize) {
                *entry = self.l2_table_offset(index).0 | COPIED;
            }
        }
        l1.into_iter().flat_map(u64::to_be_bytes).collect()
    }

    /// The header, for a backing file's name and format, and the cache image of this UUID whose base
    /// has this sample.
    pub fn encode_header(
        &self,
        base: (&str, &str),
        uuid: [u8; 16],
        sample: Option<[u8; 32]>,
    ) -> Result<Vec<u8>> {
        check_base_name(base.0, base.1)?;
        let tables = Tables {
            l1: self.l1_table_offset(),
            refcounts: self.refcount_table_offset(),
            refcount_clusters: self.refcount_table_clusters,
        };
        let mut ours = Vec::new();
        let data: Vec<u8> = uuid.into_iter().chain(sample.into_iter().flatten()).collect();
        push_extension(&mut ours, PUBLISHED_EXTENSION, &data);
        Ok(encode(&self.geometry, &tables, base, 0, ours))
    }
}
