//! An open image file: its header, its locks, and every write that happens to it after creation.
//!
//! # Locks
//!
//! All are open-file-description locks on single bytes of the image file:
//!
//! | byte | kind | held by | says |
//! |---|---|---|---|
//! | 100 | shared | every user | QEMU's "consistent read" permission (`block/file-posix.c`) |
//! | 201, 203 | shared | every user | QEMU's "nobody else may write", "... resize" |
//! | 400 | shared | every user of the live state | the live state has users |
//! | 400 | exclusive | who makes a new live state | it has none |
//! | 401 | exclusive | who joins or makes a live state | one at a time |
//! | 402 | exclusive | who writes a checkpoint | one at a time |
//!
//! The first two rows are what a QEMU takes that opens the file for reading as qcow2: a stock QEMU
//! that opens the image for writing is refused while vmcache uses it, and the other way round;
//! readers get along.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use xattr::FileExt as _;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::create::set_final_length;
use super::disk::{Disk, Observer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BaseIdentity, Checksum, Geometry, HEADER_MAX, Header, HostOffset, L2Entry, Layout,
};
use crate::lock::{LockKind, is_held_against, lock_within, try_lock};

const QEMU_PERM_BASE: u64 = 100;
const QEMU_SHARED_BASE: u64 = 200;
const PERM_CONSISTENT_READ: u64 = 0;
const PERM_WRITE: u64 = 1;
const PERM_RESIZE: u64 = 3;
/// Extended attribute of the image file with the path of its live file.
const LIVE_PATH: &str = "user.vmcache.live";
const USE_BYTE: u64 = 400;
const JOIN_BYTE: u64 = 401;
const CHECKPOINT_BYTE: u64 = 402;

/// What an image file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone.
    ReadOnly,
    /// Reading and populating.
    ReadWrite,
    /// Only learning what the header says: nothing is locked, and nothing in it may be used.
    Header,
}

/// How a live state is used, on lock byte 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// With any number of others.
    Shared,
    /// Alone, to make a new one or to repair the image.
    Alone,
}

/// An open cache image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    disk: Disk,
    header: Header,
    layout: Layout,
}

impl Image {
    /// Opens and validates an image and takes the locks that keep writers other than vmcache out.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        Self::open_observed(path, access, None)
    }

    /// The same, with somebody who hears of every change that this open makes to the file.
    #[doc(hidden)]
    pub fn open_observed(
        path: &Path,
        access: Access,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Self> {
        // The real name, so that one image has one live file whatever symlink leads to it.
        let path = path.canonicalize().map_err(|err| Error::io("open", path, &err))?;
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&path)
            .map_err(|err| Error::io("open", &path, &err))?;
        let meta = file.metadata().map_err(|err| Error::io("examine", &path, &err))?;
        if !meta.is_file() {
            return Err(Error::new(ErrorKind::NotACache, "not a regular file").on(&path));
        }
        if access != Access::Header {
            lock_as_qemu_reader(&file, &path)?;
        }
        skip_access_times(&file);
        let header = read_header(&file, &path)?;
        let layout = Layout::new(&header.geometry);
        Ok(Image { path, disk: Disk::new(file, observer), header, layout })
    }

    /// The image file's real name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file still is the one under its name.
    pub fn has_its_name(&self) -> Result<bool> {
        let failed = |err| Error::io("examine", &self.path, &err);
        let open = self.file().metadata().map_err(failed)?;
        match self.path.metadata() {
            Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(err) => Err(failed(err)),
        }
    }

    /// Where the live state of this image is kept.
    pub fn live_path(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".live");
        name.into()
    }

    /// Where a live state of this image may be: under this name, or under another name of the same
    /// file (a hard link), as whoever made it has noted.
    pub fn live_paths(&self) -> Vec<PathBuf> {
        let noted = self.file().get_xattr(LIVE_PATH).ok().flatten();
        let noted = noted.map(|name| PathBuf::from(OsString::from_vec(name)));
        let own = self.live_path();
        let other = noted.filter(|path| *path != own && path.is_absolute());
        std::iter::once(own).chain(other).collect()
    }

    /// Notes on the file itself that its live state is under this name.
    pub fn note_live_path(&self) {
        let name = self.live_path().into_os_string().into_vec();
        if let Err(err) = self.file().set_xattr(LIVE_PATH, &name) {
            // Then other names of the file do not lead to it, and their users pass through.
            log::debug!("could not note the live file on '{}': {err}", self.path.display());
        }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        self.disk.file()
    }

    /// The header, as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Virtual size and cluster size.
    pub fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }

    /// Where everything stands in the file.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Refuses an image that something else has written to.
    pub fn require_trusted(&self) -> Result<()> {
        if self.header.trusted {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Foreign,
            "something other than vmcache has written to this image, nothing in it is trusted; \
             make a new one with 'vmcache create --force'",
        )
        .on(&self.path))
    }

    /// Bytes that the file occupies on its filesystem.
    pub fn occupied(&self) -> io::Result<u64> {
        Ok(self.file().metadata()?.blocks() * 512)
    }

    /// The unit in which the filesystem allocates, at least 4 KiB.
    pub fn allocation_unit(&self) -> io::Result<u64> {
        Ok(self.file().metadata()?.blksize().clamp(4096, 65536))
    }

    /// The number of checkpoints that the header on disk shows now.
    pub fn read_checkpoints(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(&mut bytes, self.header.checkpoints_offset())?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Whether the file is on a filesystem that other machines may write to, where neither the
    /// locks nor shared memory can be relied upon.
    pub fn is_remote(&self) -> bool {
        is_remote(self.file())
    }

    /// Reads `buf.len()` bytes; a shorter file is an error.
    pub fn read(&self, buf: &mut [u8], at: HostOffset) -> Result<()> {
        self.file().read_exact_at(buf, at.0).map_err(|err| {
            Error::io(&format!("read {} bytes at {:#x} of", buf.len(), at.0), &self.path, &err)
        })
    }

    /// Reads `buf.len()` bytes; what lies beyond the end of the file is zero.
    pub fn read_or_zero(&self, buf: &mut [u8], at: HostOffset) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file().read_at(rest, at.0 + done as u64) {
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(read) => done += read,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => {
                    let tried = format!("read {} bytes at {:#x} of", buf.len(), at.0);
                    return Err(Error::io(&tried, &self.path, &err));
                }
            }
        }
        Ok(())
    }

    /// Writes bytes of data or tables.
    pub fn write(&self, buf: &[u8], at: HostOffset) -> Result<()> {
        self.disk.write_all_at(buf, at.0).map_err(|err| {
            Error::io(&format!("write {} bytes at {:#x} of", buf.len(), at.0), &self.path, &err)
        })
    }

    /// Waits until everything written is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.disk.sync_data().map_err(|err| Error::io("sync", &self.path, &err))
    }

    /// Makes sure that writing to a range of the tables cannot fail for want of space.
    pub fn allocate(&self, at: HostOffset, len: u64) -> Result<()> {
        match self.disk.allocate(at.0, len) {
            // A filesystem that cannot promise has to be tried.
            Err(err) if err.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result.map_err(|err| Error::io("allocate tables in", &self.path, &err)),
        }
    }

    /// Gives the blocks under clusters of the file back to the filesystem, and those from `end` on,
    /// where it can do that. All in clusters. The file gets, or keeps, its final length.
    pub fn discard(&self, runs: impl Iterator<Item = Range<u64>>, end: u64) -> Result<()> {
        let failed = |err: io::Error| Error::io("discard clusters of", &self.path, &err);
        set_final_length(&self.disk, &self.layout).map_err(failed)?;
        let runs = runs.chain(std::iter::once(end..self.layout.end).filter(|run| !run.is_empty()));
        for run in runs {
            let (from, to) = (self.layout.offset(run.start).0, self.layout.offset(run.end).0);
            match self.disk.discard(from, to - from) {
                Err(err) if err.raw_os_error() == Some(libc::EOPNOTSUPP) => break,
                result => result.map_err(failed)?,
            }
        }
        Ok(())
    }

    /// Sets the refcount of `count` clusters of the file from `first` on.
    pub fn write_refcounts(&self, first: u64, count: u64, value: u16) -> Result<()> {
        self.write(&value.to_be_bytes().repeat(count as usize), self.layout.refcount_offset(first))
    }

    /// Writes the L2 entries of consecutive guest clusters.
    pub fn write_l2_entries(&self, first: u64, entries: &[L2Entry]) -> Result<()> {
        let bytes: Vec<u8> = entries.iter().flat_map(L2Entry::encode).collect();
        self.write(&bytes, self.layout.l2_entry_offset(first))
    }

    /// Writes the checksums of consecutive subclusters, numbered from the start of the disk.
    pub fn write_checksums(&self, first: u64, checksums: &[Checksum]) -> Result<()> {
        let bytes: Vec<u8> = checksums.iter().flat_map(|sum| sum.encode()).collect();
        self.write(&bytes, self.layout.checksum_offset(first))
    }

    /// Reads the checksums of consecutive subclusters.
    pub fn read_checksums(&self, first: u64, count: u64) -> Result<Vec<Checksum>> {
        let mut bytes = vec![0; count as usize * Checksum::SIZE];
        self.read(&mut bytes, self.layout.checksum_offset(first))?;
        Ok(decode_checksums(&bytes))
    }

    /// Writes the refcount table and the L1 table as they have to be.
    pub fn write_fixed_tables(&self) -> Result<()> {
        let layout = &self.layout;
        self.write(&layout.encode_whole_refcount_table(), layout.refcount_table_offset())?;
        self.write(&layout.encode_l1_table(), layout.offset(layout.l1_table))
    }

    /// Notes in the header on disk what is known of the base: what `update` makes of what it has.
    /// Under the checkpoint lock, or alone: the number of checkpoints is written along.
    pub fn update_base(&self, update: impl FnOnce(BaseIdentity) -> BaseIdentity) -> Result<()> {
        let header = self.read_header()?;
        let (at, bytes) = header.base_note(update(header.cache.base));
        self.write(&bytes, at)
    }

    /// What the header on disk says now of the base.
    pub fn read_base(&self) -> Result<BaseIdentity> {
        Ok(self.read_header()?.cache.base)
    }

    fn read_header(&self) -> Result<Header> {
        read_header(self.file(), &self.path)
    }

    /// Notes the number of checkpoints in the header.
    pub fn write_checkpoints(&self, number: u64) -> Result<()> {
        self.write(&number.to_be_bytes(), self.header.checkpoints_offset())
    }

    /// Makes all live files of this image worthless, whatever name they have: gives the header a
    /// number of checkpoints that none of them knows (the next one they may know is one more than
    /// the last). Only alone. Returns the number.
    pub fn disown_live_files(&self) -> Result<u64> {
        let number = self.read_checkpoints()?.wrapping_add(2);
        self.write_checkpoints(number)?;
        Ok(number)
    }

    /// Announces the use of the live state (lock byte 400), waiting for others up to `patience`;
    /// `false` where they are in the way.
    pub fn lock_use(&self, how: Use, patience: Duration) -> Result<bool> {
        let kind = match how {
            Use::Shared => LockKind::Shared,
            Use::Alone => LockKind::Exclusive,
        };
        lock_within(self.file(), USE_BYTE, kind, patience).map_err(|err| self.lock_error(&err))
    }

    /// The end of [`Image::lock_use`].
    pub fn unlock_use(&self) {
        if let Err(err) = try_lock(self.file(), USE_BYTE, LockKind::Unlocked) {
            log::warn!("could not unlock byte {USE_BYTE} of the image: {err}");
        }
    }

    /// Whether any process uses the live state; for processes that do not.
    pub fn is_used(&self) -> Result<bool> {
        is_held_against(self.file(), USE_BYTE, LockKind::Exclusive)
            .map_err(|err| self.lock_error(&err))
    }

    /// Whether anybody else, a stock QEMU included, has the file open to read it.
    pub fn is_read_by_others(&self) -> Result<bool> {
        is_held_against(self.file(), QEMU_PERM_BASE + PERM_CONSISTENT_READ, LockKind::Exclusive)
            .map_err(|err| self.lock_error(&err))
    }

    /// Enters the section in which live states are joined and made; ends when the guard drops.
    pub fn lock_join(&self, patience: Duration) -> Result<Option<ByteLock<'_>>> {
        self.lock_byte(JOIN_BYTE, patience)
    }

    /// Becomes the one process that writes a checkpoint; ends when the guard drops.
    pub fn lock_checkpoint(&self, patience: Duration) -> Result<Option<ByteLock<'_>>> {
        self.lock_byte(CHECKPOINT_BYTE, patience)
    }

    fn lock_byte(&self, byte: u64, patience: Duration) -> Result<Option<ByteLock<'_>>> {
        lock_within(self.file(), byte, LockKind::Exclusive, patience)
            .map(|locked| locked.then_some(ByteLock { file: self.file(), byte }))
            .map_err(|err| self.lock_error(&err))
    }

    fn lock_error(&self, err: &io::Error) -> Error {
        Error::io("lock", &self.path, err)
    }
}

fn read_header(file: &File, path: &Path) -> Result<Header> {
    let len = file.metadata().map_err(|err| Error::io("examine", path, &err))?.len();
    let mut bytes = vec![0; HEADER_MAX.min(len as usize)];
    file.read_exact_at(&mut bytes, 0).map_err(|err| Error::io("read", path, &err))?;
    Header::decode(&bytes, len).map_err(|err| err.on(path))
}

/// Checksums from their bytes in the file.
pub fn decode_checksums(bytes: &[u8]) -> Vec<Checksum> {
    bytes.as_chunks().0.iter().map(|bytes| Checksum::decode(*bytes)).collect()
}

/// An exclusive lock on one byte, dropped with this value.
#[derive(Debug)]
pub struct ByteLock<'a> {
    file: &'a File,
    byte: u64,
}

impl Drop for ByteLock<'_> {
    fn drop(&mut self) {
        if let Err(err) = try_lock(self.file, self.byte, LockKind::Unlocked) {
            log::warn!("could not unlock byte {} of the image: {err}", self.byte);
        }
    }
}

/// Keeps reads from looking after the file's access time, which costs each hit some per cent. Only
/// the owner may ask for that (open(2), O_NOATIME); for others it stays as it is.
fn skip_access_times(file: &File) {
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    let asked = flags.and_then(|now| fcntl(file, FcntlArg::F_SETFL(now | OFlag::O_NOATIME)));
    if let Err(errno) = asked {
        log::debug!("reads of the image keep its access time: {errno}");
    }
}

/// Takes QEMU's locks of a reader and holds the others' against them, as `raw_check_lock_bytes` in
/// `block/file-posix.c` does.
fn lock_as_qemu_reader(file: &File, path: &Path) -> Result<()> {
    let io_error = |err| Error::io("lock", path, &err);
    let wanted = [
        QEMU_PERM_BASE + PERM_CONSISTENT_READ,
        QEMU_SHARED_BASE + PERM_WRITE,
        QEMU_SHARED_BASE + PERM_RESIZE,
    ];
    for byte in wanted {
        // Nobody takes these bytes exclusively for longer than a probe.
        if !lock_within(file, byte, LockKind::Shared, Duration::from_millis(100))
            .map_err(io_error)?
        {
            return Err(Error::new(ErrorKind::Busy, "locked by another program").on(path));
        }
    }
    let against = [
        (QEMU_PERM_BASE + PERM_WRITE, "is open for writing in another program"),
        (QEMU_PERM_BASE + PERM_RESIZE, "is being resized by another program"),
        (QEMU_SHARED_BASE + PERM_CONSISTENT_READ, "is in exclusive use by another program"),
    ];
    for (byte, what) in against {
        if is_held_against(file, byte, LockKind::Exclusive).map_err(io_error)? {
            return Err(Error::new(ErrorKind::Busy, what).on(path));
        }
    }
    Ok(())
}

/// Whether some program has an image file, of whatever format, open for writing: what QEMU does not
/// allow to two.
pub fn is_open_for_writing(path: &Path) -> Result<bool> {
    let failed = |tried: &'static str| move |err: io::Error| Error::io(tried, path, &err);
    let file = File::open(path).map_err(failed("open"))?;
    is_held_against(&file, QEMU_PERM_BASE + PERM_WRITE, LockKind::Exclusive).map_err(failed("lock"))
}

/// Whether a file or directory lies on a network or cluster filesystem, by the magic number that statfs(2) gives.
pub fn is_remote(file: &impl AsFd) -> bool {
    const REMOTE: [i64; 13] = [
        0x6969,      // NFS
        0x517b,      // SMB
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2
        0x5346_414f, // AFS
        0x00c3_6400, // Ceph
        0x0102_1997, // 9p
        0x6573_5546, // FUSE, which may be anything
        0x7375_7245, // Coda
        0x7461_636f, // OCFS2
        0x0116_1970, // GFS2
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
    ];
    nix::sys::statfs::fstatfs(file)
        .map(|stat| REMOTE.contains(&stat.filesystem_type().0))
        // Who cannot say is not trusted with shared memory.
        .unwrap_or(true)
}
