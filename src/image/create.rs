//! Creating an image: the whole file appears in one step, so that nobody ever opens half of it, and
//! of several who create it at once one succeeds. An existing file is not touched.
//!
//! Used by the command line.

use std::path::Path;

use super::disk::Disk;
use super::whole::{Replace, make_whole};
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
    let cache = CacheExtension {
        quota: options.quota,
        uuid: uuid::Uuid::new_v4().into_bytes(),
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
    let replace = if options.force { Replace::Yes } else { Replace::No };
    make_whole(path, options.mode, replace, |disk| {
        write_tables(disk, &header, &layout).map_err(|err| Error::io("write", path, &err))
    })
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
    disk.write_all_at(&layout.encode_l1_table(), layout.offset(layout.l1_table).0)
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
