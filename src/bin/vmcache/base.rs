//! The base that a new cache is made for: how large QEMU sees it, and what tells it from another.
//!
//! A raw base that is a file or a block device of this machine is looked at directly. Every other
//! format and protocol QEMU knows better, so `qemu-img info` is asked.
//!
//! Used by `create`.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use vmcache::format::SECTOR;
use vmcache::image::BaseFile;

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// A base as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Base {
    /// Bytes in QEMU's eyes.
    pub size: u64,
    /// Modification time and inode of a local file.
    pub local: Option<(i64, u32, u64)>,
}

impl Base {
    /// Looks at the base `name`, in QEMU's format `format`, of the cache image `cache`.
    pub fn probe(name: &str, format: &str, cache: &Path) -> Result<Self> {
        if name.is_empty() {
            bail!("the name of the base is empty; -b takes a path or a URL, as QEMU does");
        }
        if format == "vmcache" {
            bail!(
                "-F vmcache: no QEMU without the driver could read such a base; to chain caches \
                 name the other one with -F qcow2, which it is as well"
            );
        }
        let (bytes, local) = match BaseFile::resolve(name, cache) {
            Some(file) => {
                if name.strip_prefix("file:").is_some_and(|path| !path.starts_with('/')) {
                    bail!(
                        "base '{name}': QEMU would look for it where it is started; leave 'file:' \
                         away for a path from the cache image's directory, or give an absolute one"
                    );
                }
                examine(file.path(), name, cache)?;
                let bytes = match format {
                    "raw" => size_of_raw(file.path()),
                    _ => size_by_qemu(file.path().as_os_str(), format),
                };
                let bytes = bytes.with_context(|| cannot_use(file.path(), format))?;
                let local =
                    file.local_identity().with_context(|| cannot_use(file.path(), format))?;
                (bytes, local)
            }
            None => {
                let bytes = size_by_qemu(name.as_ref(), format)
                    .with_context(|| cannot_use(Path::new(name), format))?;
                (bytes, None)
            }
        };
        if bytes == 0 {
            bail!("base '{name}' is empty: there is nothing to cache");
        }
        let size = bytes
            .checked_next_multiple_of(SECTOR)
            .with_context(|| format!("base '{name}' is too large: {bytes} bytes"))?;
        Ok(Base { size, local })
    }
}

fn cannot_use(path: &Path, format: &str) -> String {
    format!("could not open base '{}' as {format}", path.display())
}

/// Refuses what cannot be a base, in plainer words than QEMU has.
fn examine(path: &Path, name: &str, cache: &Path) -> Result<()> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|err| {
        let mut message = format!("could not find base '{shown}': {err}");
        if Path::new(name).is_relative() && Path::new(name).exists() {
            message.push_str(
                "; a relative name starts at the cache image's directory, as for 'qemu-img \
                 create -b': give the absolute path",
            );
        }
        anyhow!(message)
    })?;
    if meta.is_dir() {
        bail!("base '{shown}' is a directory");
    }
    if !meta.is_file() && !meta.file_type().is_block_device() {
        bail!("base '{shown}' is neither a file nor a block device");
    }
    let itself = |cache: fs::Metadata| (cache.dev(), cache.ino()) == (meta.dev(), meta.ino());
    if fs::metadata(cache).is_ok_and(itself) {
        bail!("base '{shown}' and cache image '{}' are the same file", cache.display());
    }
    Ok(())
}

fn size_of_raw(path: &Path) -> Result<u64> {
    let mut file = File::open(path)?;
    let mut magic = [0; QCOW2_MAGIC.len()];
    if file.read_exact(&mut magic).is_ok() && magic == QCOW2_MAGIC {
        log::warn!(
            "base '{}' looks like a qcow2 image; with -F raw the guest sees the file as it is, \
             header and tables",
            path.display()
        );
    }
    // A block device has no length but this.
    Ok(file.seek(SeekFrom::End(0))?)
}

/// What is of interest in `qemu-img info --output=json`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    virtual_size: u64,
}

fn size_by_qemu(name: &std::ffi::OsStr, format: &str) -> Result<u64> {
    let done = Command::new("qemu-img")
        .args(["info", "--output=json", "-f", format, "--"])
        .arg(name)
        .stdin(Stdio::null())
        .output()
        .map_err(|err| match err.kind() {
            io::ErrorKind::NotFound => anyhow!(
                "qemu-img is not installed, and only a raw base on this machine can be looked at \
                 without it; install it (Debian: qemu-utils) or put it into PATH"
            ),
            _ => anyhow!("could not run qemu-img: {err}"),
        })?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        let said = said.trim();
        bail!("{}", if said.is_empty() { "qemu-img info failed" } else { said });
    }
    let info: ImageInfo = serde_json::from_slice(&done.stdout)
        .context("could not understand the answer of 'qemu-img info'")?;
    Ok(info.virtual_size)
}
