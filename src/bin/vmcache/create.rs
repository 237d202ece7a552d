//! `vmcache create`: a new, empty cache image for a base.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use vmcache::format::Geometry;
use vmcache::image::{self, Access, CreateOptions, Image};

use crate::base::Base;
use crate::options::Options;
use crate::output::printable;
use crate::size;

const LONG_ABOUT: &str = "\
Make an empty cache image for a base.

The image is a sparse qcow2 file of a few tens of KiB at first, whatever the
size of the base, and grows with what virtual machines read. Make one for each
base image on each machine, on a local filesystem.";

const EXAMPLES: &str = "\
Examples:
  vmcache create -b nfs://storage/images/debian12.raw -F raw debian12.cache
  vmcache create -b /mnt/images/win11.qcow2 -F qcow2 -o quota=8G win11.cache
  vmcache create -b nbd://storage/debian12 -F raw debian12.cache

The base must be there, since the cache takes its size. It is looked at with
qemu-img, unless it is raw and on this machine. A base that has changed needs a
new cache: 'vmcache create -f'.";

/// Make an empty cache image for a base
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// The base image: a path or URL as QEMU takes it. A relative path starts at the directory of
    /// CACHE, as for 'qemu-img create -b'
    #[arg(short = 'b', value_name = "BASE")]
    base: String,
    /// QEMU's name of the base's format: raw, qcow2, ...
    #[arg(short = 'F', value_name = "FMT")]
    format: String,
    #[command(flatten)]
    new: NewCache,
    /// Replace CACHE where it exists. Machines that use the old one keep it until they end
    #[arg(short, long)]
    force: bool,
    /// Say nothing where all is well
    #[arg(short, long)]
    quiet: bool,
    /// The cache image to make
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
}

/// What a cache image is made with, for whoever makes one.
#[derive(Debug, clap::Args)]
pub struct NewCache {
    /// quota=SIZE: what the cache image may occupy, metadata included (default: no limit).
    /// cluster_size=SIZE: a power of two from 16K to 2M (default: 128K); a 32nd of it is the least
    /// that is fetched and stored. SIZE is 200M, 1.5G, ...; -o can be given again
    #[arg(short = 'o', value_name = "NAME=VALUE,...")]
    options: Vec<String>,
    /// Permission bits of the cache image, less what umask takes away. All who may write it may
    /// add to the cache and are trusted with what others read from it
    #[arg(long, value_name = "OCTAL", default_value = "0600", value_parser = parse_mode)]
    mode: u32,
}

impl NewCache {
    /// What `-o` says.
    pub fn options(&self) -> Result<Options> {
        Options::parse(&self.options)
    }

    /// Makes a cache image for a base, which is looked at; returns the base's size.
    pub fn make(&self, cache: &Path, base: &str, format: &str, force: bool) -> Result<u64> {
        let options = self.options()?;
        let found = Base::probe(base, format, cache)?;
        image::create(
            cache,
            &CreateOptions {
                backing_file: base.to_owned(),
                backing_format: format.to_owned(),
                geometry: Geometry::with_cluster_size(options.cluster_size, found.size)?,
                quota: options.quota,
                base: found.local.into(),
                mode: self.mode,
                force,
            },
        )?;
        Ok(found.size)
    }
}

/// Makes the image.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    let options = args.new.options()?;
    examine_target(args)?;
    let size = args.new.make(&args.cache, &args.base, &args.format, args.force)?;
    warn_if_remote(args);
    if !args.quiet {
        writeln!(
            out,
            "Created '{}' for base '{}' ({}): {}, clusters of {}, {}",
            args.cache.display(),
            printable(&args.base),
            args.format,
            size::human(size),
            size::human(options.cluster_size),
            options
                .quota
                .map_or("no quota".into(), |quota| format!("quota {}", size::human(quota))),
        )?;
    }
    Ok(0)
}

/// Refuses targets that even --force does not replace.
fn examine_target(args: &Args) -> Result<()> {
    let shown = args.cache.display();
    let Ok(meta) = fs::symlink_metadata(&args.cache) else {
        let directory = match args.cache.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => return Ok(()),
        };
        if !directory.is_dir() {
            bail!("could not create '{shown}': there is no directory '{}'", directory.display());
        }
        return Ok(());
    };
    if meta.is_dir() {
        bail!("could not create '{shown}': it is a directory; give the name of a file in it");
    }
    if args.force && !meta.is_file() && !meta.is_symlink() {
        bail!("could not replace '{shown}': it is not a regular file");
    }
    Ok(())
}

fn warn_if_remote(args: &Args) {
    match Image::open(&args.cache, Access::ReadOnly) {
        Ok(image) if image.is_remote() => log::warn!(
            "'{}' is on a network filesystem, where a cache is read but nothing is added to it; \
             put it on a local one",
            args.cache.display()
        ),
        // A mode without permission to read is the user's choice.
        _ => {}
    }
}

/// Reads permission bits.
pub fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "permission bits are an octal number from 0 to 0777".into())
}
