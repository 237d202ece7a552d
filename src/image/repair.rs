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
        log::info!("{err}; what they occupy counts against the quota");
    }
}

/// Makes an image consistent again: entries that are part of a contradiction are dropped, and what
/// is not what its checksum says; wrong refcounts are written anew, leaked clusters given back. What
/// is kept is no more trusted than before: its checksums are looked at when it is read.
pub fn repair(image: &Image, scan: &Scan) -> Result<()> {
    image.write_fixed_tables()?;
    for cluster in &scan.damaged_clusters {
        image.write_l2_entries(*cluster, &[L2Entry::default()])?;
    }
    let kept = || scan.entries.iter().map(|(cluster, entry)| scan.good_entry(*cluster, *entry));
    for ((cluster, before), entry) in scan.entries.iter().zip(kept()) {
        if entry != *before {
            image.write_l2_entries(*cluster, &[entry])?;
        }
    }
    // No entry may be left without a refcount, whichever of the two reaches the disk first.
    image.sync()?;
    image.write_refcounts(0, image.layout().checksums, 1)?;
    for host in kept().filter_map(|entry| entry.host) {
        image.write_refcounts(host.0 >> image.geometry().cluster_bits(), 1, 1)?;
    }
    image.sync()?;
    // What was dropped just now is a leak only a new scan knows of.
    free_leaks(image, &Scan::read(image, |_, _| {})?)
}
