//! Putting an image right after a scan: dropping what is damaged and giving leaked clusters back.
//! Only for whoever uses the image alone.
//!
//! Used by `engine` when it makes a live state (leaks, unused clusters), and by `vmcache check --repair`.

use super::{Image, Scan};
use crate::error::Result;
use crate::format::L2Entry;

/// Gives clusters back that have a refcount and no reference.
pub fn free_leaks(image: &Image, scan: &Scan) -> Result<()> {
    for leak in &scan.leaks {
        image.write_refcounts(leak.start, leak.end - leak.start, 0)?;
    }
    if scan.leaks.is_empty() { Ok(()) } else { image.sync() }
}

/// Gives the blocks of clusters back that nothing refers to: what was written before a power cut
/// and did not make it into the tables. Where that fails they only take room.
pub fn discard_unused(image: &Image, scan: &Scan) {
    if let Err(err) = image.discard(scan.free_runs(image), scan.end) {
        log::warn!("{err}; what they occupy counts against the quota");
    }
}

/// Makes an image consistent again. Wrong refcounts are written anew and leaked clusters given
/// back. Where an L2 entry is damaged all of them are dropped: what damaged one may have turned
/// another into one that looks sound and names somebody else's data, and a cache can be filled
/// again.
pub fn repair(image: &Image, scan: &Scan) -> Result<()> {
    image.write_fixed_tables()?;
    let dropped = !scan.damaged_clusters.is_empty();
    if dropped {
        let entries = scan.entries.keys().chain(&scan.damaged_clusters);
        for cluster in entries {
            image.write_l2_entries(*cluster, &[L2Entry::default()])?;
        }
    }
    // No entry may be left without a refcount, whichever of the two reaches the disk first.
    image.sync()?;
    image.write_refcounts(0, image.layout().data, 1)?;
    for host in scan.entries.values().filter(|_| !dropped).filter_map(|entry| entry.host) {
        image.write_refcounts(host.0 >> image.geometry().cluster_bits(), 1, 1)?;
    }
    image.sync()?;
    // What was dropped just now is a leak only a new scan knows of.
    free_leaks(image, &Scan::read(image, |_, _| {})?)
}
