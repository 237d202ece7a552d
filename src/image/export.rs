//! Publishing: what a cache image holds, copied into a plain qcow2 file that other machines read.
//!
//! Only what is held, each subcluster of it held against its checksum on the way: what does not fit
//! is left out, and the base answers for it. The data of a subcluster does not change once it is
//! stored, so the image may be in use meanwhile.
//!
//! Used by `engine`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Image;
use super::disk::Disk;
use super::identity::BaseFile;
use super::whole::{Replace, make_whole};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Checksum, HostOffset, L2Entry, Published, SUBCLUSTERS, SubclusterBits};

/// Bytes of a table that are written together, the unit of most filesystems.
const PIECE: usize = 4096;

/// What to make of it.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Name of the base as those who read the file give it to QEMU.
    pub backing_file: String,
    /// QEMU's name of the base's format.
    pub backing_format: String,
    /// Permission bits of the file.
    pub mode: u32,
    /// Replace what is there; that keeps another name, the same with `.old` behind it.
    pub force: bool,
}

/// What an exported file has of the guest's disk, in bytes of whole subclusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// As data.
    pub data_bytes: u64,
    /// As zeros.
    pub zero_bytes: u64,
    /// Left out, because it was not what was stored.
    pub left_out_bytes: u64,
}

/// Writes the file. `entries`: what the image holds, by guest cluster. `progress` hears of bytes of
/// clusters done and in all. `confirm` is asked before the file gets its name.
pub fn export(
    image: &Image,
    entries: &BTreeMap<u64, L2Entry>,
    path: &Path,
    options: &ExportOptions,
    progress: impl FnMut(u64, u64),
    confirm: impl FnOnce() -> Result<()>,
) -> Result<Exported> {
    refuse_own_files(image, path, options)?;
    let replace = if options.force { Replace::KeepOld } else { Replace::No };
    make_whole(path, options.mode, replace, |disk| {
        let mut export = Export::new(image, entries, Target { disk, path });
        export.write_data(entries, progress)?;
        export.write_tables(options)?;
        confirm()?;
        Ok(export.done)
    })
}

/// Refuses to write over what the file is made from, or its base.
fn refuse_own_files(image: &Image, path: &Path, options: &ExportOptions) -> Result<()> {
    let same = |file: &Path, what: &str| {
        let identity = |file: &Path| file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
        let is_same = identity(file).is_some_and(|file| identity(path) == Some(file));
        let refusal = || Error::new(ErrorKind::Invalid, what).on(path);
        if is_same { Err(refusal()) } else { Ok(()) }
    };
    same(image.path(), "cannot be published over itself")?;
    let bases = [
        BaseFile::resolve(&image.header().backing_file, image.path()),
        BaseFile::resolve(&options.backing_file, path),
    ];
    bases.iter().flatten().try_for_each(|base| same(base.path(), "it is the base"))
}

/// The file being written.
struct Target<'a> {
    disk: &'a Disk,
    path: &'a Path,
}

impl Target<'_> {
    fn write(&self, bytes: &[u8], at: HostOffset) -> Result<()> {
        self.disk
            .write_all_at(bytes, at.0)
            .map_err(|err| Error::io(&format!("write {} bytes to", bytes.len()), self.path, &err))
    }
}

/// An export under way.
struct Export<'a> {
    image: &'a Image,
    target: Target<'a>,
    layout: Published,
    /// The L2 tables that say something, by their number on the disk.
    l2_tables: BTreeMap<u64, Vec<u8>>,
    /// For each cluster of data whether it came to be used.
    used: Vec<bool>,
    done: Exported,
}

impl<'a> Export<'a> {
    fn new(image: &'a Image, entries: &BTreeMap<u64, L2Entry>, target: Target<'a>) -> Self {
        let geometry = image.geometry();
        let table = vec![0; geometry.cluster_size() as usize];
        let l2_tables: BTreeMap<_, _> = entries
            .keys()
            .map(|cluster| (cluster / geometry.l2_entries(), table.clone()))
            .collect();
        let with_data = entries.values().filter(|entry| entry.bits.data() != 0).count();
        Export {
            image,
            target,
            layout: Published::new(geometry, l2_tables.len() as u64, with_data as u64),
            l2_tables,
            used: Vec::with_capacity(with_data),
            done: Exported::default(),
        }
    }

    /// Copies all data that is sound, cluster by cluster, and notes the entries.
    fn write_data(
        &mut self,
        entries: &BTreeMap<u64, L2Entry>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<()> {
        let geometry = *self.image.geometry();
        let total = entries.len() as u64 * geometry.cluster_size();
        let mut buf = vec![0; geometry.cluster_size() as usize];
        for (done, (cluster, entry)) in (1..).zip(entries) {
            let sound = self.read_sound(*cluster, *entry, &mut buf)?;
            let left_out = entry.bits.present() & !sound.bits.present();
            let mut placed = L2Entry { host: None, ..sound };
            if entry.bits.data() != 0 {
                let at = self.layout.offset(self.layout.data + self.used.len() as u64);
                self.used.push(sound.bits.data() != 0);
                placed.host = Some(at).filter(|_| sound.bits.data() != 0);
                for run in runs(sound.bits.data()) {
                    let bytes = usize::try_from(geometry.subcluster_size()).unwrap_or_default();
                    let part = buf.get(run.start * bytes..run.end * bytes).unwrap_or_default();
                    self.target.write(part, HostOffset(at.0 + (run.start * bytes) as u64))?;
                }
            }
            self.note(*cluster, placed);
            let count = |mask: u32| u64::from(mask.count_ones()) * geometry.subcluster_size();
            self.done.data_bytes += count(sound.bits.data());
            self.done.zero_bytes += count(sound.bits.zero());
            self.done.left_out_bytes += count(left_out);
            progress(done * geometry.cluster_size(), total);
        }
        progress(total, total);
        Ok(())
    }

    /// Reads a cluster's data; the entry without what is not what was stored.
    fn read_sound(&self, cluster: u64, entry: L2Entry, buf: &mut [u8]) -> Result<L2Entry> {
        let size = self.image.geometry().subcluster_size() as usize;
        let first = cluster * u64::from(SUBCLUSTERS);
        let checksums = self.image.read_checksums(first, u64::from(SUBCLUSTERS))?;
        let (mut data, mut zero) = (0, 0);
        for (index, (part, expected)) in (0u32..).zip(buf.chunks_exact_mut(size).zip(checksums)) {
            let bit = 1 << index;
            let at = entry.host.map(|host| host.0 + u64::from(index) * size as u64);
            if entry.bits.zero() & bit != 0 && expected == Checksum::ZERO {
                zero |= bit;
            } else if let Some(at) = at.filter(|_| entry.bits.data() & bit != 0) {
                // What cannot be read is as good as lost.
                let read = self.image.read_or_zero(part, HostOffset(at)).is_ok();
                if read && Checksum::of(first + u64::from(index), part) == expected {
                    data |= bit;
                }
            }
        }
        Ok(L2Entry { host: entry.host, bits: SubclusterBits::new(data, zero) })
    }

    fn note(&mut self, cluster: u64, entry: L2Entry) {
        let entries = self.image.geometry().l2_entries();
        let at = (cluster % entries) as usize * L2Entry::SIZE;
        let table = self.l2_tables.get_mut(&(cluster / entries));
        if let Some(place) = table.and_then(|table| table.get_mut(at..at + L2Entry::SIZE)) {
            place.copy_from_slice(&entry.encode());
        }
    }

    /// Writes all that makes a qcow2 file of the data.
    fn write_tables(&self, options: &ExportOptions) -> Result<()> {
        let layout = &self.layout;
        let base = (options.backing_file.as_str(), options.backing_format.as_str());
        let sample = self.image.read_base()?.sample;
        let header = layout.encode_header(base, self.image.header().cache.uuid, sample)?;
        let refcounts = std::iter::repeat_n(&true, layout.data as usize).chain(&self.used);
        let refcounts: Vec<u8> =
            refcounts.flat_map(|used| u16::from(*used).to_be_bytes()).collect();
        self.target.write(&header, HostOffset(0))?;
        self.target.write(&layout.encode_refcount_table(), layout.refcount_table_offset())?;
        self.target.write(&refcounts, layout.refcounts_offset())?;
        let l1_table = layout.encode_l1_table(self.l2_tables.keys().copied());
        self.target.write(&l1_table, layout.l1_table_offset())?;
        for (index, table) in (0..).zip(self.l2_tables.values()) {
            let at = layout.l2_table_offset(index).0;
            // The rest is a hole.
            let pieces = (0u64..).step_by(PIECE).zip(table.chunks(PIECE));
            for (offset, piece) in pieces.filter(|(_, piece)| piece.iter().any(|byte| *byte != 0)) {
                self.target.write(piece, HostOffset(at + offset))?;
            }
        }
        // The last cluster is there as a whole.
        let end = layout.offset(layout.end).0;
        self.target.disk.set_len(end).map_err(|err| Error::io("extend", self.target.path, &err))
    }
}

/// The runs of bits that are set in a mask.
fn runs(mask: u32) -> impl Iterator<Item = Range<usize>> {
    let is_set = move |index: &usize| mask.checked_shr(*index as u32).unwrap_or(0) & 1 != 0;
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = (at..SUBCLUSTERS as usize).find(is_set)?;
        let end = (start..).find(|index| !is_set(index))?;
        at = end;
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_as_long_as_they_can_be() {
        let found = |mask| runs(mask).map(|run| (run.start, run.end)).collect::<Vec<_>>();
        assert_eq!(found(0), []);
        assert_eq!(found(0b1110_0101), [(0, 1), (2, 3), (5, 8)]);
        assert_eq!(found(1 << 31), [(31, 32)]);
        assert_eq!(found(u32::MAX), [(0, 32)]);
    }
}
