//! Reading all tables of an image and holding them against each other, at a cost that follows what
//! is in them: holes of the sparse file are skipped.
//!
//! Used by `engine` to make a live state from an image, and by `vmcache check`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::Image;
use crate::error::{Error, Result};
use crate::format::{ByteRange, Checksum, Geometry, HostOffset, L2Entry, SUBCLUSTERS};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;
/// Clusters whose checksums are read at once.
const CHECKSUM_WINDOW: u64 = 256;
/// Findings kept in words; the rest is only counted.
const FINDINGS: usize = 20;

/// A run of clusters of the file with a refcount that nothing refers to.
pub type Leak = Range<u64>;

/// What reading all tables showed.
#[derive(Debug, Default)]
pub struct Scan {
    /// The entries that say something, by guest cluster.
    pub entries: BTreeMap<u64, L2Entry>,
    /// Contradictions, the first of them in words.
    pub findings: Vec<String>,
    /// How many contradictions there are.
    pub damages: u64,
    /// Guest clusters whose entries are part of a contradiction.
    pub damaged_clusters: Vec<u64>,
    /// Masks of the subclusters that are not what their checksums say, by guest cluster: the zero
    /// ones, and after [`Scan::verify_data`] those with data.
    pub bad: BTreeMap<u64, u32>,
    /// Clusters of the file with a refcount but no reference.
    pub leaks: Vec<Leak>,
    /// One past the last cluster of the file in use.
    pub end: u64,
}

impl Scan {
    /// Reads all tables of an image, and the checksums of what reads as zeros. Contradictions are findings; an error is a failed read.
    /// `progress` hears of the bytes of L2 tables done and in all.
    pub fn read(image: &Image, mut progress: impl FnMut(u64, u64)) -> Result<Self> {
        let mut scan = Scan { end: image.layout().data, ..Scan::default() };
        scan.read_fixed_tables(image)?;
        scan.read_l2_tables(image, &mut progress)?;
        scan.read_refcounts(image)?;
        scan.verify_zeros(image)?;
        Ok(scan)
    }

    /// Reads all cached data and holds it against its checksums. `progress` hears of bytes of
    /// clusters done and in all.
    pub fn verify_data(&mut self, image: &Image, mut progress: impl FnMut(u64, u64)) -> Result<()> {
        let (size, unit) = (image.geometry().cluster_size(), image.geometry().subcluster_size());
        let with_data = |entry: &L2Entry| entry.host.filter(|_| entry.bits.data() != 0);
        let total = self.entries.values().filter_map(with_data).count() as u64 * size;
        let mut data = vec![0; size as usize];
        let mut done = 0;
        for (cluster, entry) in &self.entries {
            let Some(host) = with_data(entry) else { continue };
            let first = cluster * u64::from(SUBCLUSTERS);
            let expected = image.read_checksums(first, u64::from(SUBCLUSTERS))?;
            for (index, part) in (0u64..).zip(data.chunks_exact_mut(unit as usize)) {
                // What cannot be read is as good as lost; zeros are never stored as data.
                if image.read_or_zero(part, HostOffset(host.0 + index * unit)).is_err() {
                    part.fill(0);
                }
            }
            let found = (first..).zip(data.chunks_exact(unit as usize));
            let bad = (0u32..)
                .zip(found.zip(expected))
                .filter(|(index, _)| entry.bits.data() >> index & 1 != 0)
                .filter(|(_, ((number, data), expected))| Checksum::of(*number, data) != *expected)
                .fold(0, |mask, (index, _)| mask | 1 << index);
            if bad != 0 {
                *self.bad.entry(*cluster).or_default() |= bad;
            }
            done += size;
            progress(done, total);
        }
        progress(total, total);
        Ok(())
    }

    /// Number of subclusters in [`Scan::bad`].
    pub fn bad_subclusters(&self) -> u64 {
        self.bad.values().map(|mask| u64::from(mask.count_ones())).sum()
    }

    /// All that is wrong, leaks apart: contradictions and subclusters in [`Scan::bad`].
    pub fn errors(&self) -> u64 {
        self.damages + self.bad_subclusters()
    }

    /// The first of all that is wrong in words.
    pub fn in_words(&self, geometry: &Geometry) -> Vec<String> {
        let bad = self.bad.iter().map(|(cluster, mask)| {
            let at = cluster << geometry.cluster_bits();
            let count = mask.count_ones();
            format!("guest cluster at {at:#x}: {count} subclusters ({mask:#010x}) are not what was stored")
        });
        self.findings.iter().cloned().chain(bad).take(FINDINGS).collect()
    }

    /// The entry of a guest cluster without what is in [`Scan::bad`].
    pub fn good_entry(&self, cluster: u64, entry: L2Entry) -> L2Entry {
        entry.without(self.bad.get(&cluster).copied().unwrap_or(0))
    }

    /// Clusters of the file below [`Scan::end`] that nothing uses.
    pub fn free_clusters(&self, image: &Image) -> impl Iterator<Item = u64> {
        self.free_runs(image).flatten()
    }

    /// The same in runs.
    pub fn free_runs(&self, image: &Image) -> impl Iterator<Item = Range<u64>> {
        let mut from = image.layout().data;
        let used = self.used(image).into_iter().chain([self.end]);
        used.map(move |cluster| std::mem::replace(&mut from, cluster + 1)..cluster)
            .filter(|run| !run.is_empty())
    }

    /// Number of clusters in [`Scan::leaks`].
    pub fn leaked_clusters(&self) -> u64 {
        self.leaks.iter().map(|leak| leak.end - leak.start).sum()
    }

    fn damage(&mut self, what: String) {
        self.damages += 1;
        if self.findings.len() < FINDINGS {
            self.findings.push(what);
        }
    }

    /// The clusters of the file that entries refer to, in order, each once.
    fn used(&self, image: &Image) -> Vec<u64> {
        let cluster_bits = image.geometry().cluster_bits();
        let hosts = self.entries.values().filter_map(|entry| entry.host);
        let mut used: Vec<u64> = hosts.map(|host| host.0 >> cluster_bits).collect();
        used.sort_unstable();
        used
    }

    /// L1 and refcount table: both are what the layout says, always.
    fn read_fixed_tables(&mut self, image: &Image) -> Result<()> {
        let layout = image.layout();
        let tables = [
            (
                "refcount table",
                layout.refcount_table_offset(),
                layout.encode_whole_refcount_table(),
            ),
            ("L1 table", layout.offset(layout.l1_table), layout.encode_l1_table()),
        ];
        for (name, at, expected) in tables {
            let mut found = vec![0; expected.len()];
            image.read(&mut found, at)?;
            let entries = found.as_chunks::<8>().0.iter().zip(expected.as_chunks::<8>().0);
            for (index, (found, expected)) in entries.enumerate() {
                if found != expected {
                    self.damage(format!(
                        "{name}, entry {index}: {:#x} where a cache image has {:#x}",
                        u64::from_be_bytes(*found),
                        u64::from_be_bytes(*expected)
                    ));
                }
            }
        }
        Ok(())
    }

    fn read_l2_tables(&mut self, image: &Image, progress: &mut impl FnMut(u64, u64)) -> Result<()> {
        let geometry = *image.geometry();
        let layout = *image.layout();
        // QEMU reads tables to their ends, also beyond the end of the disk.
        let tables = layout.l2_table_offset(0).0..layout.l2_table_offset(geometry.l2_tables()).0;
        let mut hosts = BTreeMap::new();
        let total = tables.end - tables.start;
        for piece in data_pieces(image, tables.clone())? {
            let mut bytes = vec![0; piece.len as usize];
            image.read(&mut bytes, HostOffset(piece.start))?;
            let first = (piece.start - tables.start) / 16;
            for (cluster, entry) in (first..).zip(bytes.as_chunks::<16>().0) {
                if *entry != [0; 16] {
                    self.take_entry(image, cluster, *entry, &mut hosts);
                }
            }
            progress(piece.end() - tables.start, total);
        }
        progress(total, total);
        Ok(())
    }

    fn take_entry(
        &mut self,
        image: &Image,
        cluster: u64,
        bytes: [u8; 16],
        hosts: &mut BTreeMap<u64, u64>,
    ) {
        let geometry = image.geometry();
        let refuse = |scan: &mut Self, what: String| {
            scan.damaged_clusters.push(cluster);
            scan.damage(format!("guest cluster {cluster}: {what}"));
        };
        if cluster >= geometry.clusters() {
            return refuse(self, "an L2 entry beyond the end of the disk".into());
        }
        let entry = match L2Entry::decode(bytes, geometry) {
            Ok(entry) => entry,
            Err(err) => return refuse(self, err.to_string()),
        };
        if let Some(host) = entry.host {
            if !image.layout().is_data_cluster(host) {
                return refuse(self, format!("host offset {:#x} is not in the data area", host.0));
            }
            if entry.bits.data() == 0 {
                return refuse(self, format!("host offset {:#x} without data", host.0));
            }
            if let Some(other) = hosts.insert(host.0, cluster) {
                // Whose data it is cannot be told, so neither may keep it.
                self.entries.remove(&other);
                self.damaged_clusters.push(other);
                return refuse(
                    self,
                    format!("host offset {:#x} belongs to guest cluster {other} as well", host.0),
                );
            }
            self.end = self.end.max((host.0 >> geometry.cluster_bits()) + 1);
        }
        self.entries.insert(cluster, entry);
    }

    /// Zero subclusters are nothing but a bit in an entry, so the checksum is all that tells a
    /// flipped one.
    fn verify_zeros(&mut self, image: &Image) -> Result<()> {
        let clusters = image.geometry().clusters();
        let mut window = 0..0;
        let mut checksums = Vec::new();
        for (cluster, entry) in self.entries.iter().filter(|(_, entry)| entry.bits.zero() != 0) {
            if !window.contains(cluster) {
                window = *cluster..(cluster + CHECKSUM_WINDOW).min(clusters);
                let (first, count) = (window.start, window.end - window.start);
                let per_cluster = u64::from(SUBCLUSTERS);
                checksums = image.read_checksums(first * per_cluster, count * per_cluster)?;
            }
            let from = ((cluster - window.start) * u64::from(SUBCLUSTERS)) as usize;
            let bad = (0u32..)
                .zip(checksums.iter().skip(from).take(SUBCLUSTERS as usize))
                .filter(|(_, found)| **found != Checksum::ZERO)
                .fold(0, |mask, (index, _)| mask | 1 << index)
                & entry.bits.zero();
            if bad != 0 {
                self.bad.insert(*cluster, bad);
            }
        }
        Ok(())
    }

    /// Refcounts: one for each table cluster and each data cluster that an entry refers to, none
    /// for any other.
    fn read_refcounts(&mut self, image: &Image) -> Result<()> {
        let layout = *image.layout();
        let area = layout.refcount_block_offset(0).0
            ..layout.refcount_block_offset(layout.refcount_blocks).0;
        let used = self.used(image);
        let mut seen_used = 0;
        let mut wrong = Vec::new();
        for piece in data_pieces(image, area.clone())? {
            let mut bytes = vec![0; piece.len as usize];
            image.read(&mut bytes, HostOffset(piece.start))?;
            let first = (piece.start - area.start) / 2;
            for (cluster, bytes) in (first..).zip(bytes.as_chunks::<2>().0) {
                let refcount = u16::from_be_bytes(*bytes);
                let expected = cluster < layout.checksums || used.binary_search(&cluster).is_ok();
                match (refcount, expected) {
                    (0, false) => {}
                    (1, true) => seen_used += 1,
                    (_, false) => push_run(&mut self.leaks, cluster),
                    (_, true) => wrong.push((cluster, refcount)),
                }
            }
        }
        let missing = layout.checksums + used.len() as u64 - seen_used - wrong.len() as u64;
        for (cluster, refcount) in &wrong {
            self.damage(format!("cluster {cluster} of the file has refcount {refcount}, not 1"));
        }
        if missing != 0 {
            self.damage(format!("{missing} clusters in use have refcount 0"));
        }
        Ok(())
    }
}

fn push_run(runs: &mut Vec<Leak>, cluster: u64) {
    match runs.last_mut() {
        Some(run) if run.end == cluster => run.end += 1,
        _ => runs.push(cluster..cluster + 1),
    }
}

/// The parts of a range of the file that are not holes, cut into pieces that start and end at
/// multiples of 16 bytes from the start of the range.
fn data_pieces(image: &Image, range: Range<u64>) -> Result<Vec<ByteRange>> {
    let file = image.file();
    let failed = |errno: Errno| Error::io("look for data in", image.path(), &errno.into());
    let mut pieces = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let Some(data) = seek(file, at, Whence::SeekData).map_err(failed)? else {
            break;
        };
        if data >= range.end {
            break;
        }
        let hole = seek(file, data, Whence::SeekHole).map_err(failed)?.unwrap_or(range.end);
        // Holes are blocks of the filesystem; entries are not cut by them in practice, but nothing
        // promises that.
        let mut start = data.max(at) - (data.max(at) - range.start) % 16;
        let end = (range.start + (hole - range.start).next_multiple_of(16)).min(range.end);
        while start < end {
            let len = PIECE.min(end - start);
            pieces.push(ByteRange { start, len });
            start += len;
        }
        at = end;
    }
    Ok(pieces)
}

/// Where data or a hole next begins; `None` where there is none before the end of the file.
fn seek(file: &impl AsFd, at: u64, whence: Whence) -> std::result::Result<Option<u64>, Errno> {
    match lseek(file, at as libc::off_t, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        // A filesystem that does not know where its holes are: all is data.
        Err(Errno::EINVAL) => Ok(matches!(whence, Whence::SeekData).then_some(at)),
        Err(errno) => Err(errno),
    }
}
