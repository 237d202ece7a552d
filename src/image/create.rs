//! Creating an image: the whole file is written and synced under another name and appears under
//! its own in one step, so that nobody ever opens half of it and an existing file is never touched.
//!
//! Used by the command line.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BaseIdentity, CacheExtension, Geometry, HEADER_MAX, Header, Layout};

/// Least quota beyond the metadata: below this a cache is of no use.
const SMALLEST_DATA: u64 = 1 << 20;

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Name of the base as QEMU takes it.
    pub backing_file: String,
    /// QEMU's name of the base's format.
    pub backing_format: String,
    /// Virtual size and cluster size.
    pub geometry: Geometry,
    /// Bytes that the image may occupy.
    pub quota: Option<u64>,
    /// What the base is now.
    pub base: BaseIdentity,
    /// Permission bits of the file.
    pub mode: u32,
    /// Replace what is there.
    pub force: bool,
}

/// Creates an empty cache image.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let layout = Layout::new(&options.geometry);
    let uuid = uuid::Uuid::new_v4();
    let cache = CacheExtension {
        quota: options.quota,
        uuid: uuid.into_bytes(),
        base: options.base,
        checkpoints: 0,
    };
    let header =
        Header::new(options.geometry, &options.backing_file, &options.backing_format, cache)?;
    if let Some(quota) = options.quota {
        let least = metadata_bytes(&layout) + SMALLEST_DATA;
        if quota < least {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("quota={quota} is too small; this image needs at least {least} bytes"),
            ));
        }
    }
    if !options.force && path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", uuid.simple()));
    let made_at = PathBuf::from(name);
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(options.mode)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(&made_at)
        // The name that the user gave tells him more than ours.
        .map_err(|err| Error::io("create", path, &err))
        .and_then(|file| {
            write_tables(&Disk::new(file, None), &header, &layout)
                .map_err(|err| Error::io("write", path, &err))
        })
        .and_then(|()| rename(&made_at, path, options.force));
    if made.is_err() {
        // Nothing to add to the error that is on its way.
        let _ = std::fs::remove_file(&made_at);
    }
    made
}

/// Bytes that the tables of an empty image occupy at the most.
fn metadata_bytes(layout: &Layout) -> u64 {
    let l1_entries = layout.checksums - layout.l2_tables;
    let refcounts = layout.checksums * 2;
    [HEADER_MAX as u64, layout.refcount_blocks * 8, refcounts, l1_entries * 8]
        .iter()
        .map(|bytes| bytes.next_multiple_of(4096))
        .sum()
}

fn write_tables(disk: &Disk, header: &Header, layout: &Layout) -> std::io::Result<()> {
    disk.set_len(layout.offset(layout.data).0)?;
    set_final_length(disk, layout)?;
    disk.write_all_at(&header.encode(), 0)?;
    disk.write_all_at(&layout.encode_refcount_table(), layout.refcount_table_offset().0)?;
    let refcounts = 1u16.to_be_bytes().repeat(layout.checksums as usize);
    disk.write_all_at(&refcounts, layout.refcount_offset(0).0)?;
    disk.write_all_at(&layout.encode_l1_table(), layout.offset(layout.l1_table).0)?;
    // A power cut must not leave a name without its contents behind.
    disk.sync_all()
}

/// Gives a file the length that it can ever have, in holes. A QEMU without the library that has the
/// image open takes what it sees later beyond the length it saw first for zeros.
pub(super) fn set_final_length(disk: &Disk, layout: &Layout) -> std::io::Result<()> {
    match disk.set_len(layout.offset(layout.end).0) {
        // More than the filesystem allows to one file: its tables fit, and most data may.
        Err(err) if err.raw_os_error() == Some(libc::EFBIG) => Ok(()),
        result => result,
    }
}

fn rename(from: &Path, to: &Path, replace: bool) -> Result<()> {
    let failed = |err: std::io::Error| Error::io("create", to, &err);
    if replace {
        return std::fs::rename(from, to).map_err(failed);
    }
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EEXIST) => Err(exists(to)),
        // Filesystems without the flag have links, or nothing that would help.
        Err(Errno::EINVAL) => {
            std::fs::hard_link(from, to).and_then(|()| std::fs::remove_file(from)).map_err(failed)
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

fn exists(path: &Path) -> Error {
    Error::new(
        ErrorKind::Exists,
        format!("'{}' exists; choose another name, or --force to replace it", path.display()),
    )
}
