//! `vmcache info`: what a cache image is for, what it holds and who uses it.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use vmcache::engine::Status;
use vmcache::image::BaseFile;

use crate::output::{self, Format, Process, path_text, printable};
use crate::size::{human, human_exact};

const LONG_ABOUT: &str = "\
Show what a cache image is for, what it holds and who uses it, also while machines run.

The state is one of
  empty    nothing is cached yet
  filling  something is cached, and there is room for more
  full     the quota is reached; what is cached is served, nothing is added
  stale    the base is not what the cache was made from; reads go to the base
  damaged  the image contradicts itself, or something other than vmcache has
           written to it; reads go to the base";

/// Show what a cache image is for, what it holds and who uses it
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT)]
pub struct Args {
    /// How to show it
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
    /// The cache image
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
}

/// `vmcache info --output=json`. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info<'a> {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    cluster_size: u64,
    subcluster_size: u64,
    quota: Option<u64>,
    cached_bytes: u64,
    zero_bytes: u64,
    actual_size: u64,
    uuid: String,
    backing_filename: &'a str,
    backing_filename_format: &'a str,
    full_backing_filename: String,
    state: &'static str,
    reason: Option<&'a str>,
    processes: usize,
    process_list: Vec<Process<'a>>,
}

/// Shows an image.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    let status = Status::read(&args.cache)?;
    let header = &status.header;
    let info = Info {
        filename: path_text(&args.cache),
        format: "vmcache",
        virtual_size: header.geometry.virtual_size(),
        cluster_size: header.geometry.cluster_size(),
        subcluster_size: header.geometry.subcluster_size(),
        quota: header.cache.quota,
        cached_bytes: status.cached_bytes,
        zero_bytes: status.zero_bytes,
        actual_size: status.actual_size,
        uuid: uuid::Uuid::from_bytes(header.cache.uuid).hyphenated().to_string(),
        backing_filename: &header.backing_file,
        backing_filename_format: &header.backing_format,
        full_backing_filename: BaseFile::resolve(&header.backing_file, &args.cache)
            .map_or(header.backing_file.clone(), |base| path_text(base.path())),
        state: status.state.name(),
        reason: status.reason.as_deref(),
        processes: status.processes.len(),
        process_list: Process::list(&status.processes),
    };
    match args.output {
        Format::Json => output::write_json(out, &info)?,
        Format::Human => write_human(out, &info)?,
    }
    Ok(0)
}

fn write_human(out: &mut dyn Write, info: &Info<'_>) -> Result<()> {
    let backing = printable(info.backing_filename);
    let full = printable(&info.full_backing_filename);
    writeln!(out, "image: {}", printable(&info.filename))?;
    writeln!(out, "file format: {}", info.format)?;
    writeln!(out, "virtual size: {}", human_exact(info.virtual_size))?;
    writeln!(out, "disk size: {}", human(info.actual_size))?;
    writeln!(
        out,
        "cluster size: {} (subclusters of {})",
        human(info.cluster_size),
        human(info.subcluster_size)
    )?;
    writeln!(out, "quota: {}", info.quota.map_or("none".into(), human))?;
    writeln!(
        out,
        "cached: {} of data, {} of zeros",
        human(info.cached_bytes),
        human(info.zero_bytes)
    )?;
    match info.reason {
        Some(reason) => writeln!(out, "state: {} ({})", info.state, printable(reason))?,
        None => writeln!(out, "state: {}", info.state)?,
    }
    match full == backing {
        true => writeln!(out, "backing file: {backing}")?,
        false => writeln!(out, "backing file: {backing} (actual path: {full})")?,
    }
    writeln!(out, "backing file format: {}", printable(info.backing_filename_format))?;
    writeln!(out, "uuid: {}", info.uuid)?;
    writeln!(out, "processes: {}", info.processes)?;
    Ok(())
}
