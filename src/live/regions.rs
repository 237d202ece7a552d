//! Where the parts of the shared state stand in the live file:
//!
//! ```text
//! identity   one page, written once
//! shared     one page: event, space, checkpoint words, each on a cache line of its own
//! free list  4096 cluster numbers
//! slots      1024 of 256 bytes
//! present    one bit per group of 128 guest clusters: the group's pages are allocated
//! dirty      one bit per group: something was published since the last checkpoint
//! groups     128 map entries (4 KiB), then 128 x 32 claims (16 KiB), for each group
//! ```
//!
//! Everything before the groups is allocated when the file is made; a group is allocated (so that
//! touching it can never raise SIGBUS for want of space) when its first cluster is needed. The
//! groups are an array by guest cluster, so a look-up is one index computation, and the file is
//! sparse, so its size on disk follows the working set.
//!
//! Used by `file`.

use super::claim::Claim;
use super::map::MapEntry;
use super::slot::{SLOTS, Slot};
use super::space::FREE_LIST;
use crate::format::{Geometry, SUBCLUSTERS};

/// Allocation unit and alignment of the regions.
pub const PAGE: u64 = 4096;
/// Guest clusters in a group.
pub const GROUP_CLUSTERS: u64 = 128;

const MAP_BYTES: u64 = GROUP_CLUSTERS * size_of::<MapEntry>() as u64;
const CLAIM_BYTES: u64 = GROUP_CLUSTERS * SUBCLUSTERS as u64 * size_of::<Claim>() as u64;
/// Bytes of a group.
pub const GROUP_BYTES: u64 = MAP_BYTES + CLAIM_BYTES;

/// Offsets of the regions, in bytes from the start of the live file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    pub shared: u64,
    pub free_list: u64,
    pub slots: u64,
    pub present: u64,
    pub dirty: u64,
    pub groups: u64,
    /// Number of groups.
    pub group_count: u64,
    /// Length of the file.
    pub len: u64,
}

impl Regions {
    pub fn new(geometry: &Geometry) -> Self {
        let group_count = geometry.clusters().div_ceil(GROUP_CLUSTERS);
        let bitmap = (group_count.div_ceil(64) * 8).next_multiple_of(PAGE);
        let shared = PAGE;
        let free_list = shared + PAGE;
        let slots = free_list + FREE_LIST as u64 * 8;
        let present = slots + u64::from(SLOTS) * size_of::<Slot>() as u64;
        let dirty = present + bitmap;
        let groups = dirty + bitmap;
        let len = groups + group_count * GROUP_BYTES;
        Regions { shared, free_list, slots, present, dirty, groups, group_count, len }
    }

    /// Offset of a cluster's map entry.
    pub fn entry(&self, cluster: u64) -> u64 {
        self.group(cluster / GROUP_CLUSTERS)
            + cluster % GROUP_CLUSTERS * size_of::<MapEntry>() as u64
    }

    /// Offset of a cluster's claims.
    pub fn claims(&self, cluster: u64) -> u64 {
        self.group(cluster / GROUP_CLUSTERS)
            + MAP_BYTES
            + cluster % GROUP_CLUSTERS * u64::from(SUBCLUSTERS) * size_of::<Claim>() as u64
    }

    /// Offset of a group.
    pub fn group(&self, group: u64) -> u64 {
        self.groups + group * GROUP_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_page_aligned_and_do_not_overlap() {
        let regions = Regions::new(&Geometry::new(17, 1 << 40).unwrap());
        let starts = [
            regions.shared,
            regions.free_list,
            regions.slots,
            regions.present,
            regions.dirty,
            regions.groups,
            regions.len,
        ];
        assert!(starts.iter().all(|start| start % PAGE == 0));
        assert!(starts.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn fixed_part_for_a_tebibyte_stays_below_half_a_mebibyte() {
        let regions = Regions::new(&Geometry::new(17, 1 << 40).unwrap());
        assert!(regions.groups < 512 << 10);
    }
}
