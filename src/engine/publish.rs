//! Publishing a cache for other machines, while it is in use or not: what it holds now, also what no
//! checkpoint has seen yet, goes into a plain qcow2 file (`image::export`). Takes no slot, and no
//! lock that would hold anybody up.
//!
//! Used by the command line.

use std::collections::BTreeMap;
use std::path::Path;

use super::status::open_live;
use crate::error::{Error, ErrorKind, Result};
use crate::format::L2Entry;
use crate::image::{self, BaseState, ExportOptions, Exported, Image, Scan};

/// Publishes an open cache image. `progress` hears of bytes of clusters done and in all.
///
/// Refused where the image contradicts itself, was written to by something else, or has another base
/// than it was made from: other machines have nothing to hold a published image against.
pub fn publish(
    image: &Image,
    to: &Path,
    options: &ExportOptions,
    progress: impl FnMut(u64, u64),
) -> Result<Exported> {
    image.require_trusted()?;
    require_base(image)?;
    let entries = held(image)?;
    // Again at the end: what was found out about the base meanwhile holds for what was copied.
    image::export(image, &entries, to, options, progress, || require_base(image))
}

/// Refuses a cache whose base is known to be another one.
fn require_base(image: &Image) -> Result<()> {
    let mut header = image.header().clone();
    header.cache.base = image.read_base()?;
    match BaseState::of(&header, image.path()) {
        BaseState::Same | BaseState::Unknown => Ok(()),
        BaseState::Changed(how) => Err(Error::new(
            ErrorKind::Stale,
            format!("stale: {how}; make a new cache with 'vmcache create -f'"),
        )
        .on(image.path())),
    }
}

/// What the image holds, by guest cluster.
fn held(image: &Image) -> Result<BTreeMap<u64, L2Entry>> {
    let entries = match open_live(image)? {
        Some(live) => live
            .known_clusters()
            .filter_map(|cluster| {
                let entry = live.entry(cluster)?;
                // In this order: what is published has its place.
                let bits = entry.bits();
                Some((cluster, L2Entry { host: entry.host(), bits }))
            })
            .collect(),
        None => {
            let scan = Scan::read(image, |_, _| {})?;
            if let Some(finding) = scan.findings.into_iter().next() {
                let what = format!("{finding}; 'vmcache check --repair' drops what is damaged");
                return Err(Error::new(ErrorKind::Damaged, what).on(image.path()));
            }
            scan.entries
        }
    };
    Ok(entries.into_iter().filter(|(_, entry)| entry.bits.present() != 0).collect())
}
