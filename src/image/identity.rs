//! What the base was when the cache was made, held against what it is now.
//!
//! Used by the command line at creation and by `engine` at every open.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::format::{BaseIdentity, Header, SECTOR};

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

    /// Modification time and inode now, for a regular file.
    pub fn local_identity(&self) -> io::Result<Option<(i64, u32, u64)>> {
        local_identity(&self.path)
    }
}

fn local_identity(path: &Path) -> io::Result<Option<(i64, u32, u64)>> {
    let meta = path.metadata()?;
    Ok(meta.is_file().then(|| (meta.mtime(), meta.mtime_nsec() as u32, meta.ino())))
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

    /// Compares what of the identity can be seen from the filesystem, under the header's name.
    pub fn of(header: &Header, image: &Path) -> Self {
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
        BaseIdentity { local, sample: None }
    }
}
