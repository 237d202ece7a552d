//! What the targets share: a base that costs no memory, cache images in a directory of their own,
//! and reading through the engine while holding everything it says against what it may say.
//!
//! Files lie in `TMPDIR`, which scripts/fuzz puts in memory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use tempfile::TempDir;
use vmcache::engine::{Engine, Options, Part, Reader, Step};
use vmcache::format::{BaseIdentity, ByteRange, Checksum, Geometry, HEADER_MAX, Header, Layout};
use vmcache::image::{CreateOptions, create};

/// Bytes read in one request.
const PIECE: u64 = 64 << 10;

/// A reader of [`base`].
pub type BaseReader = Reader<fn(&mut [u8], u64) -> io::Result<()>>;

/// What the base holds, again and again.
static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let words = 0..REPEAT as u64 / 8;
    let word = |index: u64| match (index >> 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) {
        run if run >> 62 == 0 => 0,
        run => (run ^ index).wrapping_mul(0xd6e8_feb8_6659_fd93) | 1,
    };
    words.flat_map(|index| word(index).to_le_bytes()).collect()
});
const REPEAT: usize = 4 << 20;

/// Fills a buffer with what the base holds from an offset on: data and zeros in runs of 2 KiB.
pub fn base(buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut at = offset as usize % REPEAT;
    let mut rest = buf;
    while !rest.is_empty() {
        let (here, after) = rest.split_at_mut(rest.len().min(REPEAT - at));
        here.copy_from_slice(&CONTENT[at..at + here.len()]);
        (rest, at) = (after, 0);
    }
    Ok(())
}

/// A cache image in a directory of its own.
pub struct Cache {
    _dir: TempDir,
    pub path: PathBuf,
    pub geometry: Geometry,
    pub layout: Layout,
}

impl Cache {
    /// An empty one.
    pub fn new(geometry: Geometry, quota: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let options = CreateOptions {
            backing_file: "base.raw".into(),
            backing_format: "raw".into(),
            geometry,
            quota,
            base: BaseIdentity::default(),
            mode: 0o600,
            force: false,
        };
        create(&path, &options).unwrap();
        Cache { _dir: dir, path, geometry, layout: Layout::new(&geometry) }
    }

    /// One that holds the first half of the base.
    pub fn half_full(geometry: Geometry) -> Self {
        let cache = Cache::new(geometry, None);
        let reader = cache.reader().unwrap();
        read_as_base(&reader, ByteRange { start: 0, len: geometry.virtual_size() / 2 });
        reader.engine().close();
        cache
    }

    pub fn live_path(&self) -> PathBuf {
        self.path.with_extension("live")
    }

    pub fn reader(&self) -> vmcache::error::Result<BaseReader> {
        self.open(&Options::default())
    }

    /// One that adds nothing to the cache.
    pub fn reader_of_what_is_cached(&self) -> vmcache::error::Result<BaseReader> {
        self.open(&Options { populate: false, ..Options::default() })
    }

    fn open(&self, options: &Options) -> vmcache::error::Result<BaseReader> {
        let engine = Engine::open(&self.path, options)?;
        Ok(Reader::new(Arc::new(engine), base))
    }

    /// The bytes in front of the L2 tables, which never change after creation, but for the number of
    /// checkpoints and the refcounts. As the header has it that the file shows now; nothing where
    /// that is refused.
    pub fn fixed_tables(&self) -> Vec<Vec<u8>> {
        let file = File::open(&self.path).unwrap();
        let start = read_up_to(&file, 0, HEADER_MAX);
        let Ok(header) = Header::decode(&start, self.file_len()) else { return Vec::new() };
        let checkpoints = header.checkpoints_offset().0;
        let layout = Layout::new(&header.geometry);
        let areas = [
            (0, checkpoints),
            (checkpoints + 8, HEADER_MAX as u64),
            (layout.refcount_table_offset().0, layout.refcount_block_offset(0).0),
            (layout.offset(layout.l1_table).0, layout.offset(layout.l2_tables).0),
        ];
        areas.iter().map(|(start, end)| read_up_to(&file, *start, (end - start) as usize)).collect()
    }

    pub fn file_len(&self) -> u64 {
        fs::metadata(&self.path).unwrap().len()
    }
}

fn read_up_to(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let read = file.read_at(&mut bytes, at).unwrap();
    bytes.truncate(read);
    bytes
}

/// The pieces of a file that are not zero, to write it again elsewhere.
pub struct Template {
    pub len: u64,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Template {
    pub fn of(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for (at, block) in (0..).step_by(4096).zip(bytes.chunks(4096)) {
            match pieces.last_mut() {
                _ if *block == [0; 4096] => {}
                Some((start, piece)) if *start + piece.len() as u64 == at => piece.extend(block),
                _ => pieces.push((at, block.to_vec())),
            }
        }
        Template { len: bytes.len() as u64, pieces }
    }

    /// Makes a file what this was made from.
    pub fn write(&self, file: &File) {
        file.set_len(self.len).unwrap();
        for (at, piece) in &self.pieces {
            file.write_all_at(piece, *at).unwrap();
        }
    }
}

/// Holds a plan against the layout: all bytes of the range, hits in the data area alone.
pub fn check_plan(engine: &Engine, layout: &Layout, range: ByteRange) {
    let area = layout.offset(layout.data).0..=layout.offset(layout.end).0;
    let mut at = range.start;
    for Part { guest, step } in engine.plan(range) {
        assert_eq!(guest.start, at, "a plan with a gap");
        at = guest.end();
        if let Step::Hit(host) = step {
            assert!(area.contains(&host.0) && area.contains(&(host.0 + guest.len)), "{host:?}");
        }
    }
    assert_eq!(at, range.end(), "a plan that is too short");
}

/// Reads a range, which starts with a subcluster, of a cache that somebody prepared. No read fails,
/// and all bytes are as the base has them. `may_be` is asked about each subcluster of which that is
/// not so, by its number from the start of the disk, with what it seems to hold.
pub fn read_prepared(reader: &BaseReader, range: ByteRange, may_be: impl Fn(u64, &[u8]) -> bool) {
    let size = reader.engine().header().geometry.subcluster_size();
    let used = reader.engine().is_active();
    let mut at = range.start;
    while at < range.end() {
        let len = PIECE.min(range.end() - at);
        // What nobody wrote to must not pass for what was read.
        let mut found = vec![0xa5; len as usize];
        let mut expected = vec![0; len as usize];
        reader.read(&mut found, at).unwrap();
        base(&mut expected, at).unwrap();
        let parts = found.chunks(size as usize).zip(expected.chunks(size as usize));
        for (number, (found, expected)) in (at / size..).zip(parts) {
            assert!(
                found == expected || used && may_be(number, found),
                "subcluster {number} of {size} bytes is not what the base has"
            );
        }
        at += len;
    }
}

/// Reads a range that has to be as the base has it, whatever lies in its way.
pub fn read_as_base(reader: &BaseReader, range: ByteRange) {
    let mut at = range.start;
    while at < range.end() {
        let len = PIECE.min(range.end() - at);
        let mut found = vec![0xa5; len as usize];
        let mut expected = vec![0; len as usize];
        reader.read(&mut found, at).unwrap();
        base(&mut expected, at).unwrap();
        assert!(found == expected, "wrong bytes within {at}..{}", at + len);
        at += len;
    }
}

/// The checksums of an image's subclusters, as somebody prepared them. A CRC is no signature: who
/// can write the image can write one that fits.
pub struct Checksums {
    first: u64,
    subcluster_size: usize,
    values: Vec<Checksum>,
}

impl Checksums {
    /// Those of a range, as they are in the file now.
    pub fn read(engine: &Engine, range: ByteRange) -> Self {
        let size = engine.header().geometry.subcluster_size();
        let (first, end) = (range.start / size, range.end().div_ceil(size));
        // An image that was left aside may be too short to have any.
        let values = engine.image().read_checksums(first, end - first).unwrap_or_default();
        Checksums { first, subcluster_size: size as usize, values }
    }

    /// Whether they say that a subcluster holds these bytes.
    pub fn vouch_for(&self, number: u64, bytes: &[u8]) -> bool {
        let mut whole = bytes.to_vec();
        whole.resize(self.subcluster_size, 0);
        let value = self.values.get((number - self.first) as usize);
        let is_zero = whole.iter().all(|byte| *byte == 0);
        value.is_some_and(|value| {
            *value == Checksum::of(number, &whole) || is_zero && *value == Checksum::ZERO
        })
    }
}

/// The type of vmcache's header extension, where its CRC stands in it, and its number of
/// checkpoints, which the CRC leaves out.
const EXTENSION: u32 = 0x766d_6363;
const HEADER_CRC_AT: usize = 44;
const CHECKPOINTS_AT: usize = 88;

/// Gives a header, the start of a file, the CRC that it has to have; without vmcache's extension, or
/// without a name of the base, it stays as it is.
pub fn seal(bytes: &mut [u8]) {
    let _ = try_seal(bytes);
}

fn try_seal(bytes: &mut [u8]) -> Option<()> {
    let u32_at = |bytes: &[u8], at: usize| {
        Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?) as usize)
    };
    let name_at = u64::from_be_bytes(*bytes.get(8..)?.first_chunk()?) as usize;
    let end = name_at.checked_add(u32_at(bytes, 16)?)?;
    let mut at = u32_at(bytes, 100)?;
    while u32_at(bytes, at)? != EXTENSION as usize {
        at = at.checked_add(8 + u32_at(bytes, at + 4)?)?.checked_next_multiple_of(8)?;
    }
    let data = at + 8;
    let mut covered = bytes.get(..end)?.to_vec();
    covered.get_mut(data + HEADER_CRC_AT..)?.first_chunk_mut::<4>()?.fill(0);
    covered.get_mut(data + CHECKPOINTS_AT..)?.first_chunk_mut::<8>()?.fill(0);
    *bytes.get_mut(data + HEADER_CRC_AT..)?.first_chunk_mut()? =
        crc_fast::crc32_iscsi(&covered).to_be_bytes();
    Some(())
}
