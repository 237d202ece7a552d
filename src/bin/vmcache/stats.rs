//! `vmcache stats`: what the users of a cache image did, read from the live state they share.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use vmcache::engine::Status;

use crate::output::{self, Counters, Format, Process};
use crate::size::human;

const LONG_ABOUT: &str = "\
Show what the users of a cache image did, while they run and without disturbing them.

Numbers count from the first use of the image since this machine was started,
over all processes, running or gone. Each running process by itself stands in
process-list of the JSON form.";

const EXAMPLES: &str = "\
Examples:
  vmcache stats debian12.cache
  watch vmcache stats debian12.cache
  vmcache stats --output=json debian12.cache | jq '.[\"base-bytes\"]'";

/// Show what the users of a cache image did, while they run
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// How to show it
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
    /// The cache image
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
}

/// `vmcache stats --output=json`. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Stats<'a> {
    #[serde(flatten)]
    totals: Counters<'a>,
    processes: usize,
    process_list: Vec<Process<'a>>,
}

/// Shows the counters of an image.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    let status = Status::read(&args.cache)?;
    let stats = Stats {
        totals: Counters(&status.totals),
        processes: status.processes.len(),
        process_list: Process::list(&status.processes),
    };
    match args.output {
        Format::Json => output::write_json(out, &stats)?,
        Format::Human => write_human(out, &stats)?,
    }
    Ok(0)
}

fn write_human(out: &mut dyn Write, stats: &Stats<'_>) -> Result<()> {
    let totals = |name| stats.totals.get(name);
    let (hit, zero, miss) = (totals("hit-bytes"), totals("zero-bytes"), totals("miss-bytes"));
    writeln!(out, "reads: {}", totals("reads"))?;
    writeln!(out, "served from the cache: {} of data, {} of zeros", human(hit), human(zero))?;
    writeln!(out, "served from the base: {}", human(miss))?;
    match hit_rate(hit + zero, miss) {
        Some(rate) => writeln!(out, "hit rate: {rate:.1} %")?,
        None => writeln!(out, "hit rate: none, nothing was read")?,
    }
    writeln!(out, "waited for another's fetch: {}", human(totals("waited-bytes")))?;
    writeln!(
        out,
        "asked of the base: {} in {} reads",
        human(totals("base-bytes")),
        totals("base-reads")
    )?;
    writeln!(
        out,
        "stored: {}; not stored for want of room: {}; failed attempts: {}",
        human(totals("populated-bytes")),
        human(totals("dropped-bytes")),
        totals("populate-errors")
    )?;
    writeln!(
        out,
        "found bad: {}; stored anew: {}",
        human(totals("bad-bytes")),
        human(totals("repaired-bytes"))
    )?;
    writeln!(out, "checkpoints: {}", totals("checkpoints"))?;
    writeln!(out, "processes: {}", stats.processes)?;
    Ok(())
}

/// Share of the bytes that the cache answered for, in percent.
fn hit_rate(hit: u64, miss: u64) -> Option<f64> {
    let all = hit.checked_add(miss).filter(|all| *all != 0)?;
    Some(100.0 * hit as f64 / all as f64)
}
