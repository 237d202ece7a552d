//! What the base was when the cache was made, held against what it is now.
//!
//! Used by the command line at creation and by `engine` at every open and while the cache is in use.
//!
//! # What is noticed, and when
//!
//! A mix is an answer in which one byte is of one state of the base and another byte is of another.
//! QEMU itself gives mixes on a base that is written to while it reads. The cache promises that it
//! adds none of its own: it stores bytes of one state only, and it does not serve them beside bytes
//! of another state from the moment on that it can tell the two apart.
//!
//! - *Between two opens*: the size as QEMU sees it; for a regular file the modification time and the
//!   inode; a hash over 13 blocks of 512 bytes, read through QEMU, whatever the base is; and a few
//!   blocks of what is cached, chosen anew by each open, held against the base ([`PROBES`]). The open
//!   that finds a difference serves nothing from the cache. A change that keeps size and times and
//!   that touches neither the 13 blocks nor the ones chosen goes unnoticed by that open; if it touched
//!   a share `f` of what is cached, `n` opens miss it with probability `(1 - f)^(4n)`.
//! - *In use, a base of regular files* ([`BaseWatch`]): size and modification time of the files that
//!   QEMU reads, looked at after each read of the base before anything of it is stored, and every
//!   few seconds. The kernel sets the time before it changes a byte, so nothing of the new state is ever
//!   stored. Until the next look, at most five seconds or the next miss, hits are of the old state.
//!   A time that is set back before the next look hides the change, as it does from anybody. Through a
//!   network mount the times may be as old as its attribute cache.
//! - *In use, any other base* (`nfs://`, NBD, a block device): nothing, until the next open of
//!   the same image; that one stops all others on the node.
//!
//! A file that was deleted or replaced under its name is still what QEMU has open, and goes on being
//! cached for those who have it.
//!
//! What only a reading of the base shows is noted in the image's header, for those who cannot read
//! it (`vmcache info`, `vmcache check`), and taken back by the open that finds the base right again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Access, Image};
use crate::format::{BaseIdentity, HEADER_MAX, Header, PublishedMark, SECTOR};

/// A base that is a file this machine can look at, as opposed to a URL or a `json:` name.
#[derive(Clone, Debug)]
pub struct BaseFile {
    path: PathBuf,
}

impl BaseFile {
    /// Resolves a base's name as qcow2 has it: a relative path starts at the image's directory.
    /// `None` where the name is not a plain path.
    pub fn resolve(name: &str, image: &Path) -> Option<Self> {
        let name = name.strip_prefix("file:").unwrap_or(name);
        // QEMU takes everything up to a colon as a protocol, unless a slash comes first.
        let before = name.split(['/', ':']).next().unwrap_or_default();
        if name.get(before.len()..).is_some_and(|rest| rest.starts_with(':')) {
            return None;
        }
        let directory = image.parent().unwrap_or(Path::new("."));
        Some(BaseFile { path: directory.join(name) })
    }

    /// The path on this machine.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Modification time and inode now, for a regular file whose time says something.
    pub fn local_identity(&self) -> io::Result<Option<(i64, u32, u64)>> {
        local_identity(&self.path)
    }
}

fn local_identity(path: &Path) -> io::Result<Option<(i64, u32, u64)>> {
    let meta = path.metadata()?;
    let tells = meta.is_file() && !is_cache(path) && !is_published(path);
    Ok(tells.then(|| (meta.mtime(), meta.mtime_nsec() as u32, meta.ino())))
}

/// Whether a file is a cache image itself, which is written to all the time and shows the same.
fn is_cache(path: &Path) -> bool {
    Image::open(path, Access::Header).is_ok()
}

/// Whether a file is what a cache image held when it was published, of which there may be another
/// edition at any time that shows the same.
fn is_published(path: &Path) -> bool {
    let mut start = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(HEADER_MAX as u64).read_to_end(&mut start));
    read.is_ok() && PublishedMark::find(&start).is_some()
}

/// The regular files that a base in use consists of, and what they were when it was opened.
#[derive(Debug)]
pub struct BaseWatch {
    files: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    path: PathBuf,
    file: File,
    was: (u64, i64, i64),
}

impl BaseWatch {
    /// Watches those of some files that can be watched.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let watched = |path: PathBuf| {
            // Needs no permission and takes no lock; it stays the same file under any name.
            let flags = libc::O_PATH | libc::O_CLOEXEC;
            let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).ok()?;
            let meta = file.metadata().ok()?;
            let was = stamp(&meta);
            (meta.is_file() && !is_cache(&path)).then_some(Watched { path, file, was })
        };
        BaseWatch { files: paths.into_iter().filter_map(watched).collect() }
    }

    /// Whether there is anything to watch.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// How it shows that one of them was changed, if it does.
    pub fn change(&self) -> Option<String> {
        self.files.iter().find_map(|watched| match watched.file.metadata() {
            Ok(meta) if stamp(&meta) == watched.was => None,
            Ok(_) => Some(format!("the base was modified in use ('{}')", watched.path.display())),
            Err(err) => Some(format!("'{}': {err}", watched.path.display())),
        })
    }
}

fn stamp(meta: &std::fs::Metadata) -> (u64, i64, i64) {
    // Not the time of the last change of anything: labels and owners are changed at each start.
    (meta.len(), meta.mtime(), meta.mtime_nsec())
}

/// What holding the base against its recorded identity showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BaseState {
    /// Nothing speaks against it.
    Same,
    /// It is another one; how it shows.
    Changed(String),
    /// It cannot be looked at from here.
    Unknown,
}

/// Bytes of each sampled block: every open reads all of them, so they are few and small.
const SAMPLE_BLOCK: u64 = 512;
/// How many cached subclusters each open holds against the base.
pub const PROBES: usize = 4;
/// Bytes of each that are read from the base, at the most.
pub const PROBE_BYTES: u64 = 1024;
/// Sampled blocks that are spread over the disk.
const SPREAD: u64 = 8;

/// Takes the sample of a base of `size` bytes: SHA-256 over the blocks that change with nearly
/// everything (the partition table, the superblocks of a filesystem on the whole disk and of one in
/// a first partition at 1 MiB, which hold the time of the last write, and the end, where GPT has
/// its copy) and some in between.
pub fn sample_base(
    size: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<[u8; 32]> {
    let spread = (1..=SPREAD).map(|part| size / (SPREAD + 1) * part / SAMPLE_BLOCK * SAMPLE_BLOCK);
    let ends = [0, 1024, 1 << 20, (1 << 20) + 1024, size.saturating_sub(SAMPLE_BLOCK)];
    let mut hash = Sha256::new();
    for offset in ends.into_iter().chain(spread).filter(|offset| *offset < size) {
        let mut block = vec![0; SAMPLE_BLOCK.min(size - offset) as usize];
        read(&mut block, offset)?;
        hash.update(&block);
    }
    Ok(hash.finalize().into())
}

impl BaseState {
    /// Compares a sample with the one that was noted; without one nothing speaks against it.
    pub fn of_sample(header: &Header, found: [u8; 32]) -> Self {
        match header.cache.base.sample {
            Some(expected) if expected != found => BaseState::Changed(
                "the base's content is not what the cache was made from".to_owned(),
            ),
            _ => BaseState::Same,
        }
    }

    /// What can be said without reading the base: what of its identity the filesystem shows under
    /// the header's name, and what those who read it have noted.
    pub fn of(header: &Header, image: &Path) -> Self {
        match (Self::seen(header, image), header.cache.base.changed) {
            (BaseState::Same | BaseState::Unknown, Some(_)) => BaseState::Changed(
                "the base was not what the cache was made from when it was last read".to_owned(),
            ),
            (seen, _) => seen,
        }
    }

    /// Compares what of the identity can be seen from the filesystem, under the header's name.
    pub fn seen(header: &Header, image: &Path) -> Self {
        let base = BaseFile::resolve(&header.backing_file, image);
        Self::of_file(header, base.as_ref().map(BaseFile::path))
    }

    /// The same for the file that the base is, if it is one.
    pub fn of_file(header: &Header, file: Option<&Path>) -> Self {
        let (Some(path), Some(expected)) = (file, header.cache.base.local) else {
            return BaseState::Unknown;
        };
        match local_identity(path) {
            Ok(Some(found)) => match Self::of_raw_length(header, path) {
                Some(changed) => changed,
                None => Self::compare(expected, found),
            },
            Ok(None) => BaseState::Unknown,
            Err(err) => BaseState::Changed(format!("'{}': {err}", path.display())),
        }
    }

    /// Compares a raw base's length, which says more than its times and cannot be set back.
    fn of_raw_length(header: &Header, path: &Path) -> Option<Self> {
        let length = path.metadata().ok()?.len().checked_next_multiple_of(SECTOR)?;
        let state = (header.backing_format == "raw").then(|| Self::of_size(header, length))?;
        (state != BaseState::Same).then_some(state)
    }

    fn compare(expected: (i64, u32, u64), found: (i64, u32, u64)) -> Self {
        if expected == found {
            return BaseState::Same;
        }
        BaseState::Changed(if expected.2 == found.2 {
            "the base was modified after the cache was made".into()
        } else {
            "the base is another file than the one the cache was made from".into()
        })
    }

    /// Compares the size that the base has in QEMU.
    pub fn of_size(header: &Header, size: u64) -> Self {
        let expected = header.geometry.virtual_size();
        if size == expected {
            return BaseState::Same;
        }
        BaseState::Changed(format!(
            "the base has {size} bytes, the cache was made for {expected} bytes"
        ))
    }
}

/// The identity of a base at creation.
impl From<Option<(i64, u32, u64)>> for BaseIdentity {
    fn from(local: Option<(i64, u32, u64)>) -> Self {
        BaseIdentity { local, ..BaseIdentity::default() }
    }
}
