//! The header cluster: qcow2's version 3 header, its extensions and the backing file name, written
//! once at creation and checked field by field at every open (sections "Header" and "Header
//! extensions").
//!
//! Used by `image`.

use super::checksum::crc32c;
use super::extension::{
    CACHE_EXTENSION, CACHE_EXTENSION_LEN, CACHE_EXTENSION_USED, CHECKPOINTS_AT, HEADER_CRC_AT,
    Reader,
};
use super::layout::REFCOUNT_ORDER;
use super::published::PUBLISHED_EXTENSION;
use super::{BaseIdentity, CacheExtension, Geometry, HostOffset, Layout};
use crate::error::{Error, ErrorKind, Result};

/// The header and everything that belongs to it fit into the smallest cluster.
pub const HEADER_MAX: usize = 16 << 10;

const MAGIC: u32 = 0x5146_49fb;
const HEADER_LENGTH: u32 = 112;
const HEADER_LENGTH_AT: usize = 100;
const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 2;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// Set as long as only vmcache has written the file. QEMU clears autoclear bits that it does not
/// know when it opens an image for writing.
const AUTOCLEAR_VMCACHE_BIT: u8 = 63;
/// QEMU's limit on the length of a backing file name.
const BACKING_FILE_MAX: usize = 1023;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_LEN: usize = 46;
const FEATURE_AUTOCLEAR: u8 = 2;
const FEATURE_INCOMPATIBLE: u8 = 0;

/// A cache image's header, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Virtual size and cluster size.
    pub geometry: Geometry,
    /// Name of the base, as a user would give it to QEMU.
    pub backing_file: String,
    /// QEMU's name of the base's format.
    pub backing_format: String,
    /// What vmcache keeps in its own extension.
    pub cache: CacheExtension,
    /// Whether only vmcache has written the file since its creation. Where this is false nothing
    /// else in the file may be relied upon.
    pub trusted: bool,
    cache_at: usize,
}

impl Header {
    /// The header of a new image.
    pub fn new(
        geometry: Geometry,
        backing_file: &str,
        backing_format: &str,
        cache: CacheExtension,
    ) -> Result<Self> {
        check_base_name(backing_file, backing_format)?;
        Ok(Header {
            geometry,
            backing_file: backing_file.to_owned(),
            backing_format: backing_format.to_owned(),
            cache,
            trusted: true,
            cache_at: HEADER_LENGTH as usize + 8,
        })
    }

    /// Host offset of the eight bytes that hold the number of checkpoints.
    pub fn checkpoints_offset(&self) -> HostOffset {
        HostOffset((self.cache_at + CHECKPOINTS_AT) as u64)
    }

    /// What to write, and where, to note in the header what is known of the base: a part of one
    /// sector. It has the number of checkpoints in it, as it is in this header.
    pub fn base_note(&self, base: BaseIdentity) -> (HostOffset, Vec<u8>) {
        let cache = CacheExtension { base, ..self.cache.clone() };
        let bytes = Header { cache, ..self.clone() }.encode();
        let end = self.cache_at + CACHE_EXTENSION_USED;
        let noted = bytes.get(self.cache_at..end).unwrap_or_default();
        (HostOffset(self.cache_at as u64), noted.to_vec())
    }

    /// The bytes at the start of the file.
    pub fn encode(&self) -> Vec<u8> {
        let layout = Layout::new(&self.geometry);
        let mut tail = Vec::new();
        // Ours comes first, so that its place does not depend on any name.
        push_extension(&mut tail, CACHE_EXTENSION, &self.cache.encode());
        let tables = Tables {
            l1: layout.offset(layout.l1_table),
            refcounts: layout.refcount_table_offset(),
            refcount_clusters: layout.refcount_table_clusters,
        };
        let base = (self.backing_file.as_str(), self.backing_format.as_str());
        let autoclear = u64::from(self.trusted) << AUTOCLEAR_VMCACHE_BIT;
        let mut bytes = encode(&self.geometry, &tables, base, autoclear, tail);
        seal(&mut bytes, self.cache_at);
        bytes
    }

    /// Reads and checks the start of a file of `file_len` bytes. `bytes` holds its first
    /// [`HEADER_MAX`] bytes, or all of a shorter file.
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Self> {
        let not_ours = |what: String| Err(Error::new(ErrorKind::NotACache, what));
        let unsupported = |what: String| Err(Error::new(ErrorKind::Unsupported, what));
        let damaged = |what: String| Err(Error::new(ErrorKind::Damaged, what));

        let mut reader = Reader(bytes);
        if bytes.len() < 8 || reader.u32()? != MAGIC {
            return not_ours("not a qcow2 file".into());
        }
        let version = reader.u32()?;
        if version != 3 {
            return unsupported(format!("qcow2 version {version}; a cache image has version 3"));
        }
        let backing_at = reader.u64()?;
        let backing_len = reader.u32()? as usize;
        let cluster_bits = reader.u32()?;
        let virtual_size = reader.u64()?;
        let encryption = reader.u32()?;
        let l1_size = u64::from(reader.u32()?);
        let l1_at = reader.u64()?;
        let refcount_table_at = reader.u64()?;
        let refcount_table_clusters = u64::from(reader.u32()?);
        let snapshots = reader.u32()?;
        let _snapshots_at = reader.u64()?;
        let incompatible = reader.u64()?;
        let _compatible = reader.u64()?;
        let autoclear = reader.u64()?;
        let refcount_order = reader.u32()?;
        let header_length = reader.u32()? as usize;

        if incompatible & INCOMPATIBLE_DIRTY != 0 {
            return damaged("the dirty bit is set, which vmcache never does".into());
        }
        if incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return damaged("it is marked corrupt".into());
        }
        let unknown = incompatible & !INCOMPATIBLE_EXTENDED_L2;
        if unknown != 0 {
            return unsupported(format!("unknown incompatible feature bits {unknown:#x}"));
        }
        if header_length < 104 || !header_length.is_multiple_of(8) || header_length > HEADER_MAX {
            return damaged(format!("header length of {header_length} bytes"));
        }
        let extensions = Extensions::read(bytes, header_length)?;
        let Some((cache, cache_at)) = extensions.cache else {
            return not_ours(
                "a qcow2 file, but not a cache image: it lacks vmcache's header extension".into(),
            );
        };
        if incompatible & INCOMPATIBLE_EXTENDED_L2 == 0 {
            return damaged("a cache image has extended L2 entries, this file has not".into());
        }
        if encryption != 0 || snapshots != 0 {
            return unsupported("encryption and snapshots have no place in a cache image".into());
        }
        if refcount_order != REFCOUNT_ORDER {
            return unsupported(format!("refcounts of 2^{refcount_order} bits; 16 are supported"));
        }
        let geometry = Geometry::new(cluster_bits, virtual_size)?;
        let backing_file = backing_name(bytes, backing_at, backing_len)?;
        let Some(backing_format) = extensions.backing_format else {
            return damaged("the backing format extension is missing".into());
        };
        let trusted = autoclear >> AUTOCLEAR_VMCACHE_BIT & 1 != 0;
        if trusted {
            let tables = [
                Table { name: "L1 table", at: l1_at, len: l1_size * 8 },
                Table {
                    name: "refcount table",
                    at: refcount_table_at,
                    len: refcount_table_clusters.saturating_mul(geometry.cluster_size()),
                },
            ];
            check_tables(&geometry, &tables, l1_size, refcount_table_clusters, file_len)?;
            // Last, since it says the least.
            let header = bytes.get(..backing_at as usize + backing_len).unwrap_or_default();
            let noted = header.get(cache_at + HEADER_CRC_AT..).and_then(<[u8]>::first_chunk);
            if noted != Some(&header_crc(header, cache_at).to_be_bytes()) {
                return damaged(
                    "the header is not what vmcache wrote: its checksum differs".into(),
                );
            }
        }
        Ok(Header { geometry, backing_file, backing_format, cache, trusted, cache_at })
    }
}

/// Checks the name of a base and of its format against what qcow2 can hold.
pub(super) fn check_base_name(backing_file: &str, backing_format: &str) -> Result<()> {
    let invalid = |what: String| Err(Error::new(ErrorKind::Invalid, what));
    if backing_file.is_empty() {
        return invalid("the name of the base is empty".into());
    }
    if backing_file.len() > BACKING_FILE_MAX {
        return invalid(format!(
            "the name of the base has {} bytes; qcow2 allows {BACKING_FILE_MAX}",
            backing_file.len()
        ));
    }
    if backing_format.is_empty() || backing_format.len() > 15 {
        return invalid(format!("'{backing_format}' is not a QEMU format name"));
    }
    Ok(())
}

/// Where the tables are that a header points at.
pub(super) struct Tables {
    pub l1: HostOffset,
    pub refcounts: HostOffset,
    pub refcount_clusters: u64,
}

/// The header of a qcow2 file with extended L2 entries, with some extensions of ours in front of
/// those that every one has. `base`: the backing file's name and format.
pub(super) fn encode(
    geometry: &Geometry,
    tables: &Tables,
    base: (&str, &str),
    autoclear: u64,
    extensions: Vec<u8>,
) -> Vec<u8> {
    let mut tail = extensions;
    push_extension(&mut tail, EXTENSION_BACKING_FORMAT, base.1.as_bytes());
    let mut names = feature_name(FEATURE_INCOMPATIBLE, 4, "extended L2 entries");
    names.extend(feature_name(FEATURE_AUTOCLEAR, AUTOCLEAR_VMCACHE_BIT, "vmcache"));
    push_extension(&mut tail, EXTENSION_FEATURE_NAMES, &names);
    push_extension(&mut tail, EXTENSION_END, &[]);
    let backing_at = u64::from(HEADER_LENGTH) + tail.len() as u64;

    let mut bytes = Vec::with_capacity(backing_at as usize + base.0.len());
    bytes.extend(MAGIC.to_be_bytes());
    bytes.extend(3u32.to_be_bytes());
    bytes.extend(backing_at.to_be_bytes());
    bytes.extend((base.0.len() as u32).to_be_bytes());
    bytes.extend(geometry.cluster_bits().to_be_bytes());
    bytes.extend(geometry.virtual_size().to_be_bytes());
    bytes.extend(0u32.to_be_bytes()); // no encryption
    bytes.extend((geometry.l2_tables() as u32).to_be_bytes());
    bytes.extend(tables.l1.0.to_be_bytes());
    bytes.extend(tables.refcounts.0.to_be_bytes());
    bytes.extend((tables.refcount_clusters as u32).to_be_bytes());
    bytes.extend(0u32.to_be_bytes()); // no snapshots
    bytes.extend(0u64.to_be_bytes());
    bytes.extend(INCOMPATIBLE_EXTENDED_L2.to_be_bytes());
    bytes.extend(0u64.to_be_bytes()); // no compatible features
    bytes.extend(autoclear.to_be_bytes());
    bytes.extend(REFCOUNT_ORDER.to_be_bytes());
    bytes.extend(HEADER_LENGTH.to_be_bytes());
    bytes.extend([0; 8]); // compression type: deflate, unused
    bytes.extend(tail);
    bytes.extend(base.0.as_bytes());
    bytes
}

/// What the header of a published image ([`super::Published`]) says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedMark {
    /// The sample of the base that it was made from, where that was known.
    pub sample: Option<[u8; 32]>,
}

impl PublishedMark {
    /// From the first [`HEADER_MAX`] bytes of a file; `None` where it is no published image.
    pub fn find(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let start = [MAGIC, 3].map(|word| reader.u32().is_ok_and(|found| found == word));
        let length = reader.bytes(HEADER_LENGTH_AT - 8).and_then(|_| reader.u32()).ok()?;
        let extensions = Extensions::read(bytes, length as usize).ok()?;
        extensions.published.filter(|_| start == [true; 2])
    }
}

/// Puts the CRC of a whole header into it.
pub(super) fn seal(header: &mut [u8], cache_at: usize) {
    let crc = header_crc(header, cache_at);
    let place = header.get_mut(cache_at + HEADER_CRC_AT..).and_then(<[u8]>::first_chunk_mut);
    if let Some(place) = place {
        *place = crc.to_be_bytes();
    }
}

/// CRC32C over the header up to the end of the backing file name, without what is rewritten in place
/// and without itself.
fn header_crc(bytes: &[u8], cache_at: usize) -> u32 {
    let (crc, checkpoints) = (cache_at + HEADER_CRC_AT, cache_at + CHECKPOINTS_AT);
    let parts = [0..crc, crc + 4..checkpoints, checkpoints + 8..bytes.len()];
    let zeros: [&[u8]; 3] = [&[], &[0; 4], &[0; 8]];
    let pieces = zeros.into_iter().zip(parts);
    crc32c(pieces.flat_map(|(zeros, part)| [zeros, bytes.get(part).unwrap_or_default()]))
}

/// A table that the header points at.
struct Table {
    name: &'static str,
    at: u64,
    len: u64,
}

/// Holds the header's pointers against the file and against the one layout they can have.
fn check_tables(
    geometry: &Geometry,
    tables: &[Table; 2],
    l1_size: u64,
    refcount_table_clusters: u64,
    file_len: u64,
) -> Result<()> {
    let damaged = |what: String| Err(Error::new(ErrorKind::Damaged, what));
    let cluster = geometry.cluster_size();
    for Table { name, at, len } in tables {
        if at % cluster != 0 {
            return damaged(format!("{name} offset {at:#x} is not aligned to a cluster"));
        }
        if *at == 0 {
            return damaged(format!("{name} offset 0 overlaps the header"));
        }
        if at.checked_add(*len).is_none_or(|end| end > file_len) {
            return damaged(format!(
                "{name} at {at:#x} with {len} bytes ends beyond the file of {file_len} bytes"
            ));
        }
    }
    let [l1, refcounts] = tables;
    if l1.at < refcounts.at + refcounts.len && refcounts.at < l1.at + l1.len {
        return damaged("the L1 table and the refcount table overlap".into());
    }
    let layout = Layout::new(geometry);
    let expected = [
        (l1.name, l1.at, layout.offset(layout.l1_table).0),
        (refcounts.name, refcounts.at, layout.refcount_table_offset().0),
        ("number of L1 entries", l1_size, geometry.l2_tables()),
        ("clusters of the refcount table", refcount_table_clusters, layout.refcount_table_clusters),
    ];
    for (name, found, expected) in expected {
        if found != expected {
            return damaged(format!("{name}: {found:#x} where a cache image has {expected:#x}"));
        }
    }
    let tables_end = layout.offset(layout.data).0;
    if file_len < tables_end {
        return damaged(format!(
            "the file is truncated: {file_len} bytes, its tables alone end at {tables_end}"
        ));
    }
    Ok(())
}

fn backing_name(bytes: &[u8], at: u64, len: usize) -> Result<String> {
    let damaged = |what: &str| Error::new(ErrorKind::Damaged, what);
    if len == 0 || len > BACKING_FILE_MAX {
        return Err(damaged("the backing file name is missing or too long"));
    }
    let name = usize::try_from(at)
        .ok()
        .filter(|at| *at >= HEADER_LENGTH as usize - 8)
        .and_then(|at| bytes.get(at..at.checked_add(len)?))
        .ok_or_else(|| damaged("the backing file name lies outside the header"))?;
    match std::str::from_utf8(name) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err(damaged("the backing file name is not text")),
    }
}

/// The header extensions that matter here; others are passed over, as the specification demands.
struct Extensions {
    cache: Option<(CacheExtension, usize)>,
    backing_format: Option<String>,
    published: Option<PublishedMark>,
}

impl Extensions {
    fn read(bytes: &[u8], header_length: usize) -> Result<Self> {
        let mut found = Extensions { cache: None, backing_format: None, published: None };
        let mut reader = Reader(bytes);
        reader.bytes(header_length)?;
        loop {
            let kind = reader.u32()?;
            let len = reader.u32()? as usize;
            let at = bytes.len() - reader.0.len();
            let data = reader.bytes(len)?;
            match kind {
                EXTENSION_END => return Ok(found),
                CACHE_EXTENSION if len != CACHE_EXTENSION_LEN => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("vmcache header extension of {len} bytes, 128 expected"),
                    ));
                }
                CACHE_EXTENSION => found.cache = Some((CacheExtension::decode(data)?, at)),
                PUBLISHED_EXTENSION => {
                    let sample = data.get(16..).and_then(|sample| sample.try_into().ok());
                    found.published = Some(PublishedMark { sample });
                }
                EXTENSION_BACKING_FORMAT => {
                    let name = std::str::from_utf8(data)
                        .ok()
                        .filter(|name| (1..16).contains(&name.len()) && !name.contains('\0'));
                    found.backing_format = Some(
                        name.ok_or_else(|| {
                            Error::new(ErrorKind::Damaged, "the backing format is not a name")
                        })?
                        .to_owned(),
                    );
                }
                _ => {}
            }
            reader.bytes(len.next_multiple_of(8) - len)?;
        }
    }
}

pub(super) fn push_extension(to: &mut Vec<u8>, kind: u32, data: &[u8]) {
    to.extend(kind.to_be_bytes());
    to.extend((data.len() as u32).to_be_bytes());
    to.extend(data);
    to.resize(to.len().next_multiple_of(8), 0);
}

/// An entry of the feature name table (section "Feature name table").
fn feature_name(kind: u8, bit: u8, name: &str) -> Vec<u8> {
    let mut entry = vec![kind, bit];
    entry.extend(name.as_bytes());
    entry.resize(2 + FEATURE_NAME_LEN, 0);
    entry
}
