//! `vmcache publish`: what a cache image holds, as a compact qcow2 file for other machines.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use vmcache::engine;
use vmcache::format::Header;
use vmcache::image::{Access, BaseFile, ExportOptions, Image};

use crate::base::{self, Base};
use crate::create::parse_mode;
use crate::drive;
use crate::output::{self, Format, path_text, printable};
use crate::progress::Progress;
use crate::size::human;

const LONG_ABOUT: &str = "\
Put what a cache image holds on the storage node, for machines without it.

DEST becomes a plain qcow2 file that has the cached data and nothing else, and
the base behind it: any QEMU reads it, and 'vmcache boot --published' puts it
between a new machine's empty cache and the base. Best in the storage node's
memory: a tmpfs that is exported over NFS.

The cache may be in use. All data is held against its checksums; what does not
fit is left out. DEST appears in one step, complete and synced, or not at all.";

const EXAMPLES: &str = "\
Examples:
  vmcache publish debian12.cache /mnt/storage/ram/debian12.qcow2
  vmcache publish -b debian12.raw -F raw debian12.cache /export/debian12.qcow2
  vmcache publish -f --output=json debian12.cache /mnt/storage/ram/debian12.qcow2

Machines that read DEST over NFS go on reading the file they opened. With -f it
keeps the name DEST.old until the next 'publish -f'; delete that when they have
ended. NFS does not keep a file without a name, and their reads would fail.

DEST names the base as the cache does, so that must be a name that all machines
have for it. A path of this machine or a socket is refused: give the name with -b.";

/// Put what a cache image holds on the storage node, for machines without it
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// The base by the name that other machines have for it (default: as the cache names it). A
    /// relative path starts at the directory of DEST, there as here
    #[arg(short = 'b', value_name = "BASE")]
    base: Option<String>,
    /// QEMU's name of the base's format (default: as the cache has it)
    #[arg(short = 'F', value_name = "FMT", requires = "base")]
    format: Option<String>,
    /// Replace DEST where it exists; the old one keeps the name DEST.old
    #[arg(short, long)]
    force: bool,
    /// Permission bits of DEST, less what umask takes away
    #[arg(long, value_name = "OCTAL", default_value = "0644", value_parser = parse_mode)]
    mode: u32,
    /// Show progress on standard error even where that is not a terminal
    #[arg(short = 'p', long)]
    progress: bool,
    /// Say nothing where all is well
    #[arg(short, long)]
    quiet: bool,
    /// How to show what was published
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
    /// The cache image
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
    /// The file to make
    #[arg(value_name = "DEST")]
    dest: PathBuf,
}

/// `vmcache publish --output=json`. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    cached_bytes: u64,
    zero_bytes: u64,
    left_out_bytes: u64,
    actual_size: u64,
    backing_filename: String,
    backing_filename_format: String,
}

/// Publishes an image.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    if args.dest.to_str().is_some_and(|dest| dest.contains("://")) {
        bail!(
            "'{}' is a URL: DEST is a path on this machine, as in a directory of the storage node \
             that is mounted here",
            args.dest.display()
        );
    }
    let image = Image::open(&args.cache, Access::ReadOnly)?;
    let header = image.header();
    let options = ExportOptions {
        backing_file: base_name(args, &image)?,
        backing_format: args.format.as_ref().unwrap_or(&header.backing_format).clone(),
        mode: args.mode,
        force: args.force,
    };
    if args.base.is_some() {
        examine_base(args, &options, header)?;
    }
    let mut progress = Progress::new("Publishing", args.progress, args.quiet);
    let exported =
        engine::publish(&image, &args.dest, &options, |done, total| progress.show(done, total));
    progress.finish();
    let exported = exported?;
    if exported.data_bytes + exported.zero_bytes == 0 {
        log::warn!("'{}' holds nothing yet: boot something through it first", args.cache.display());
    }
    let report = Report {
        filename: path_text(&args.dest),
        format: "qcow2",
        virtual_size: header.geometry.virtual_size(),
        cached_bytes: exported.data_bytes,
        zero_bytes: exported.zero_bytes,
        left_out_bytes: exported.left_out_bytes,
        actual_size: occupied(&args.dest)?,
        backing_filename: options.backing_file,
        backing_filename_format: options.backing_format,
    };
    match args.output {
        _ if args.quiet => {}
        Format::Json => output::write_json(out, &report)?,
        Format::Human => write_human(out, args, &report)?,
    }
    Ok(0)
}

/// The base by the name that other machines shall find it under.
fn base_name(args: &Args, image: &Image) -> Result<String> {
    if let Some(name) = &args.base {
        return Ok(name.clone());
    }
    let name = &image.header().backing_file;
    if let Some(why) = base::why_local(name, image.path()) {
        bail!(
            "the cache's base '{}' cannot be found by other machines under that name ({why}); give \
             the one they have for it with -b, as nfs://STORAGE/IMAGE",
            printable(name)
        );
    }
    match BaseFile::resolve(name, image.path()) {
        // It would mean another file in another directory.
        Some(file) => drive::absolute(file.path()),
        None => Ok(name.clone()),
    }
}

/// Holds a base that the user named against the cache's as far as this machine can see it.
fn examine_base(args: &Args, options: &ExportOptions, header: &Header) -> Result<()> {
    let name = &options.backing_file;
    let (shown, expected) = (printable(name), header.geometry.virtual_size());
    match Base::probe(name, &options.backing_format, &args.dest) {
        Ok(base) if base.size == expected => Ok(()),
        Ok(base) => bail!(
            "base '{shown}' has {} bytes, the cache is of one with {expected} bytes",
            base.size
        ),
        // Where this machine has it the others will find the same wrong with it.
        Err(err)
            if BaseFile::resolve(name, &args.dest).is_some_and(|file| file.path().exists()) =>
        {
            Err(err)
        }
        Err(err) => {
            log::warn!("{err:#}; if other machines find it, all is well");
            Ok(())
        }
    }
}

fn occupied(path: &Path) -> Result<u64> {
    let meta =
        path.metadata().with_context(|| format!("could not examine '{}'", path.display()))?;
    Ok(meta.blocks() * 512)
}

fn write_human(out: &mut dyn Write, args: &Args, report: &Report) -> Result<()> {
    writeln!(
        out,
        "Published '{}' as '{}' for base '{}' ({}): {} of data, {} of zeros, occupying {}",
        args.cache.display(),
        args.dest.display(),
        printable(&report.backing_filename),
        printable(&report.backing_filename_format),
        human(report.cached_bytes),
        human(report.zero_bytes),
        human(report.actual_size),
    )?;
    if report.left_out_bytes != 0 {
        let left_out = human(report.left_out_bytes);
        writeln!(out, "Left out, because it was not what was stored: {left_out}")?;
    }
    Ok(())
}
