//! A published image between a cache and its base: whether it is of that base, and how QEMU is told
//! to open it in the base's place. It is a drive of its own without a device, since the options of
//! another drive take the name of a file but no URL.
//!
//! Used by `boot`.

use std::path::Path;

use anyhow::{Result, bail};
use vmcache::format::{HEADER_MAX, PublishedMark};

use crate::base;
use crate::drive::doubled_commas;
use crate::output::printable;

/// The image's node in QEMU.
const NODE: &str = "vmcache-published";

/// A published image, by a name that means the same everywhere.
#[derive(Debug)]
pub struct Published(String);

impl Published {
    /// A path or URL as QEMU takes it; a relative path starts at the current directory.
    pub fn new(name: &str) -> Result<Self> {
        base::absolute_name(name).map(Published)
    }

    /// Its name, safe to show.
    pub fn shown(&self) -> String {
        printable(&self.0)
    }

    /// The argument of a `-drive` that opens it, in front of the one that uses it.
    pub fn drive(&self) -> String {
        let file = doubled_commas(&self.0);
        format!("if=none,node-name={NODE},read-only=on,format=qcow2,file={file}")
    }

    /// The option of a drive with a cache that puts it below the cache, a comma in front.
    pub fn option() -> String {
        format!(",backing.backing={NODE}")
    }

    /// Whether the image is of a base as this is now: its name and format, its size, and the sample
    /// of its content. Both are read by QEMU.
    pub fn examine(&self, of: &str, format: &str, virtual_size: u64) -> Result<()> {
        let info = base::image_info(self.0.as_ref(), "qcow2")?;
        let names = [&info.full_backing_filename, &info.backing_filename];
        if !names.into_iter().flatten().any(|name| base::is_same(name, Path::new("/"), of)) {
            bail!(
                "it is of '{}', not of '{}'; if both are names of one base, publish it with -b",
                printable(info.backing_filename.as_deref().unwrap_or("no base")),
                printable(of)
            );
        }
        if info.backing_filename_format.as_deref() != Some(format) {
            bail!(
                "it takes the base for {}, not for {format}",
                printable(info.backing_filename_format.as_deref().unwrap_or("no format"))
            );
        }
        if info.virtual_size != virtual_size {
            bail!("it has {} bytes where the base had {virtual_size}", info.virtual_size);
        }
        let start = base::read_blocks(&self.0, "raw", &[(0, HEADER_MAX)])?;
        match start.first().and_then(|start| PublishedMark::find(start)) {
            None => bail!("'vmcache publish' did not make it"),
            Some(PublishedMark { sample: None }) => {
                bail!("it does not say what its base was: nothing was ever read through its cache")
            }
            Some(PublishedMark { sample: Some(sample) }) => {
                if sample != base::sample(of, format, virtual_size)? {
                    bail!("the base is not what it was made from; publish it anew");
                }
            }
        }
        Ok(())
    }
}
