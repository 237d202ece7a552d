//! The base that a new cache is made for: how large QEMU sees it, and what tells it from another.
//!
//! A raw base that is a file or a block device of this machine is looked at directly. Every other
//! format and protocol QEMU knows better, so `qemu-img info` is asked. And what a base's name means:
//! whether two names are of one base, and whether another machine can do anything with it.
//!
//! Used by `create`, `boot` and `publish`.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use vmcache::format::SECTOR;
use vmcache::image::{self, BaseFile};

use crate::drive;

/// QEMU's program for images.
pub const QEMU_IMG: &str = "qemu-img";
const QEMU_IO: &str = "qemu-io";
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
                refuse_relative_url(name)?;
                examine(file.path(), name, cache)?;
                let bytes = match format {
                    "raw" => size_of_raw(file.path()),
                    _ => image_info(file.path().as_os_str(), format).map(|info| info.virtual_size),
                };
                let bytes = bytes.with_context(|| cannot_use(file.path(), format))?;
                let local =
                    file.local_identity().with_context(|| cannot_use(file.path(), format))?;
                (bytes, local)
            }
            None => {
                let info = image_info(name.as_ref(), format)
                    .with_context(|| cannot_use(Path::new(name), format))?;
                (info.virtual_size, None)
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

/// Refuses a name that means another file wherever QEMU is started.
fn refuse_relative_url(name: &str) -> Result<()> {
    if name.strip_prefix("file:").is_some_and(|path| !path.starts_with('/')) {
        bail!(
            "base '{name}': QEMU would look for it where it is started; leave 'file:' away for a \
             path from the image's directory, or give an absolute one"
        );
    }
    Ok(())
}

/// A base's name that means the same in every directory: a relative path starts at the current one.
pub fn absolute_name(name: &str) -> Result<String> {
    refuse_relative_url(name)?;
    match BaseFile::resolve(name, Path::new("")) {
        // QEMU makes nothing of an empty name, and its message for that is clear enough.
        Some(file) if !name.is_empty() => drive::absolute(file.path()),
        _ => Ok(name.to_owned()),
    }
}

/// Whether two names are of one base: `name` in the header of the file `image`, and an absolute one.
pub fn is_same(name: &str, image: &Path, other: &str) -> bool {
    let path = |name: &str| BaseFile::resolve(name, image).map(|file| file.path().canonicalize());
    match (path(name), path(other)) {
        (Some(Ok(one)), Some(Ok(other))) => one == other,
        _ => name == other,
    }
}

/// Why no other machine finds the base `name` of the file `image` by that name, if that is plain.
pub fn why_local(name: &str, image: &Path) -> Option<String> {
    let Some(file) = BaseFile::resolve(name, image) else {
        let (scheme, rest) = name.split_once(':')?;
        let rest = rest.trim_start_matches('/');
        let host = rest.split(['/', ':', '?']).next().unwrap_or_default();
        let host = host.rsplit('@').next().unwrap_or_default();
        let is_socket = scheme.ends_with("+unix") || rest.starts_with("unix:");
        return if is_socket {
            Some("a socket of this machine".into())
        } else if host == "localhost" || host.starts_with("127.") {
            Some(format!("'{host}' is every machine's name for itself"))
        } else {
            None
        };
    };
    let on_this_machine = File::open(file.path()).is_ok_and(|file| !image::is_remote(&file));
    on_this_machine
        .then(|| format!("'{}' is on a filesystem of this machine", file.path().display()))
}

/// What is of interest in `qemu-img info --output=json`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// The backing file from the current directory, for an image that has one.
    pub full_backing_filename: Option<String>,
    /// The backing file as the image names it.
    pub backing_filename: Option<String>,
    /// QEMU's name of the backing file's format, where the image has one.
    pub backing_filename_format: Option<String>,
}

/// What QEMU sees in an image: a path or URL, in QEMU's format.
pub fn image_info(name: &std::ffi::OsStr, format: &str) -> Result<ImageInfo> {
    let arguments = ["info", "--output=json", "-f", format, "--"];
    let said = qemu_img(Command::new(QEMU_IMG).args(arguments).arg(name))?;
    serde_json::from_slice(&said).context("could not understand the answer of 'qemu-img info'")
}

/// The sample of a base (see `image::sample_base`) of `size` bytes, as QEMU reads it.
pub fn sample(name: &str, format: &str, size: u64) -> Result<[u8; 32]> {
    let mut places = Vec::new();
    let noted = image::sample_base(size, |block, offset| {
        places.push((offset, block.len()));
        Ok(())
    });
    noted?;
    let mut blocks = read_blocks(name, format, &places)?.into_iter();
    let sample = image::sample_base(size, |block, _| {
        blocks
            .next()
            .map(|found| block.copy_from_slice(&found))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    });
    Ok(sample?)
}

/// Bytes of an image, a path or URL in QEMU's format: those at each of some places, so many, a
/// multiple of 16.
pub fn read_blocks(name: &str, format: &str, places: &[(u64, usize)]) -> Result<Vec<Vec<u8>>> {
    let reads = places.iter().map(|(offset, len)| format!("read -v {offset} {len}"));
    let mut command = Command::new(QEMU_IO);
    command.args(["-r", "-f", format]);
    command.args(reads.flat_map(|read| ["-c".to_owned(), read]));
    let said = qemu_tool(command.arg("--").arg(name))?;
    let mut bytes = String::from_utf8_lossy(&said)
        .lines()
        .filter_map(dumped)
        .collect::<Vec<_>>()
        .concat()
        .into_iter();
    let blocks: Vec<Vec<u8>> =
        places.iter().map(|(_, len)| bytes.by_ref().take(*len).collect()).collect();
    let is_whole = blocks.iter().zip(places).all(|(block, (_, len))| block.len() == *len);
    if !is_whole {
        bail!("could not read '{name}': {}", String::from_utf8_lossy(&said).trim());
    }
    Ok(blocks)
}

/// The 16 bytes in a line of what qemu-io's `read -v` prints: the offset, a colon, and two digits for
/// each byte, before what they are as text.
fn dumped(line: &str) -> Option<Vec<u8>> {
    let (offset, rest) = line.split_once(":  ")?;
    u64::from_str_radix(offset, 16).ok()?;
    let digits = rest.get(..16 * 3)?;
    digits.split_ascii_whitespace().map(|byte| u8::from_str_radix(byte, 16).ok()).collect()
}

/// Runs qemu-img and returns what it prints; what it complains of is the error.
pub fn qemu_img(command: &mut Command) -> Result<Vec<u8>> {
    qemu_tool(command)
}

/// The same of qemu-img or qemu-io.
fn qemu_tool(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().display().to_string();
    let done = command.stdin(Stdio::null()).output().map_err(|err| match err.kind() {
        io::ErrorKind::NotFound => anyhow!(
            "{program} is not installed, and without it only a raw base on this machine can be \
             looked at and no overlay be made; install it (Debian: qemu-utils) or put it into PATH"
        ),
        _ => anyhow!("could not run {program}: {err}"),
    })?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        let said = said.trim();
        if said.is_empty() {
            bail!("{program} failed");
        }
        bail!("{said}");
    }
    Ok(done.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_nothing_to_other_machines_are_told() {
        let why = |name| why_local(name, Path::new("/x/cache"));
        let local = [
            "nbd+unix:///disk?socket=/run/s",
            "nbd:unix:/run/s",
            "nfs://127.0.0.1/images/a.raw",
            "nbd://localhost:10809/a",
            "ssh://user@localhost/a.raw",
            "/proc/self/exe",
        ];
        let shared = ["nfs://storage/a.raw", "https://host.example/a.raw", "rbd:pool/a", "json:{}"];
        assert_eq!(local.map(|name| why(name).is_some()), [true; 6]);
        assert_eq!(shared.map(why), [None, None, None, None]);
    }

    #[test]
    fn a_name_is_absolute_or_a_url() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute_name("a.raw").unwrap(), here.join("a.raw").to_str().unwrap());
        assert_eq!(absolute_name("/x/a:b.raw").unwrap(), "/x/a:b.raw");
        assert_eq!(absolute_name("file:/x/a.raw").unwrap(), "/x/a.raw");
        assert_eq!(absolute_name("nfs://storage/a.raw").unwrap(), "nfs://storage/a.raw");
        assert!(absolute_name("file:a.raw").is_err());
    }
}
