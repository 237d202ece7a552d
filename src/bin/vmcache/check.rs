//! `vmcache check`: holds the tables of a cache image against each other, its data against the
//! checksums and the base against what it was, with the exit codes of `qemu-img check`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use vmcache::engine::{self, CheckReport};
use vmcache::error::{Error, ErrorKind};
use vmcache::image::{Access, BaseState, Image};

use crate::output::{self, Failure, Format, path_text, printable};
use crate::progress::Progress;

const CLEAN: u8 = 0;
const DAMAGED: u8 = 2;
const LEAKS: u8 = 3;

const LONG_ABOUT: &str = "\
Check all tables of a cache image, all cached data against its checksums, and
whether its base is still the one it was made from.

It can be used while virtual machines run, --repair only when none does.
Repairing drops what is damaged, so that the base answers for it again, and
gives leaked clusters back. It does not help an image whose header is damaged,
or whose base has changed: make a new one with 'vmcache create -f'.";

const EXIT_CODES: &str = "\
Exit status, as of 'qemu-img check':
  0  clean, or put right by --repair
  1  could not check
  2  damaged or stale
  3  leaked clusters and nothing else: they waste space and do no harm, and the
     next use gives them back";

/// Check the tables and the data of a cache image, and its base
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT, after_long_help = EXIT_CODES)]
pub struct Args {
    /// Put right what is wrong. No process may use the image
    #[arg(long)]
    repair: bool,
    /// Show progress on standard error even where that is not a terminal
    #[arg(short = 'p', long)]
    progress: bool,
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    quiet: bool,
    /// How to show what was found
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
    /// The cache image
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
}

/// `vmcache check --output=json`; the names of `qemu-img check` where it has them.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    filename: String,
    format: &'static str,
    check_errors: u64,
    corruptions: u64,
    leaks: u64,
    corruptions_fixed: u64,
    leaks_fixed: u64,
    allocated_clusters: u64,
    total_clusters: u64,
    image_end_offset: u64,
    stale: bool,
    reason: Option<String>,
    findings: Vec<String>,
}

/// Checks an image.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    let (report, fatal) = match checked(args) {
        Ok(report) => (report, None),
        // The answer is known, though not from the tables.
        Err(err) if matches!(err.kind(), ErrorKind::Damaged | ErrorKind::Foreign) => {
            let report = Report {
                filename: path_text(&args.cache),
                format: "vmcache",
                corruptions: 1,
                findings: vec![err.to_string()],
                ..Report::default()
            };
            (report, Some(err))
        }
        Err(err) => return Err(err.into()),
    };
    match (args.output, fatal) {
        (_, fatal) if args.quiet => drop(fatal),
        (Format::Json, _) => output::write_json(out, &report)?,
        (Format::Human, Some(err)) => {
            let message = output::explain(&err.into());
            return Err(Failure { code: DAMAGED, message }.into());
        }
        (Format::Human, None) => write_human(out, args, &report)?,
    }
    Ok(match report {
        Report { stale: true, .. } | Report { corruptions: 1.., .. } => DAMAGED,
        Report { leaks: 1.., .. } => LEAKS,
        _ => CLEAN,
    })
}

/// Checks, repairs where it is wanted, and then checks what that has made of the image.
fn checked(args: &Args) -> Result<Report, Error> {
    let found = check_once(args, args.repair, "Checking")?;
    let geometry = *Image::open(&args.cache, Access::ReadOnly)?.geometry();
    let (errors, leaks) = (found.scan.errors(), found.scan.leaked_clusters());
    let left = match found.repaired {
        true => check_once(args, false, "Checking again")?,
        false => found,
    };
    let (stale, reason) = match left.base {
        BaseState::Changed(how) => (true, Some(how)),
        BaseState::Same | BaseState::Unknown => (false, None),
    };
    Ok(Report {
        filename: path_text(&args.cache),
        format: "vmcache",
        check_errors: 0,
        corruptions: left.scan.errors(),
        leaks: left.scan.leaked_clusters(),
        corruptions_fixed: errors.saturating_sub(left.scan.errors()),
        leaks_fixed: leaks.saturating_sub(left.scan.leaked_clusters()),
        allocated_clusters: left.scan.entries.values().filter(|entry| entry.host.is_some()).count()
            as u64,
        total_clusters: geometry.clusters(),
        image_end_offset: left.scan.end << geometry.cluster_bits(),
        stale,
        reason,
        findings: left.scan.in_words(&geometry),
    })
}

fn check_once(args: &Args, repair: bool, what: &str) -> Result<CheckReport, Error> {
    let mut progress = Progress::new(what, args.progress, args.quiet);
    let report = engine::check(&args.cache, repair, |done, total| progress.show(done, total));
    progress.finish();
    report
}

fn write_human(out: &mut dyn Write, args: &Args, report: &Report) -> Result<()> {
    let cache = args.cache.display();
    for finding in &report.findings {
        writeln!(out, "ERROR {}", printable(finding))?;
    }
    let more = report.corruptions.saturating_sub(report.findings.len() as u64);
    if more != 0 {
        writeln!(out, "... and {more} more")?;
    }
    if report.corruptions_fixed + report.leaks_fixed != 0 {
        writeln!(
            out,
            "Repaired: {} errors, {} leaked clusters.",
            report.corruptions_fixed, report.leaks_fixed
        )?;
    }
    if report.corruptions != 0 {
        writeln!(
            out,
            "{} errors were found on the image. As long as they are there, reads go to the base \
             (those of what is bad, or all where tables are damaged); \
             'vmcache check --repair {cache}' drops what is damaged.",
            report.corruptions
        )?;
    }
    if report.leaks != 0 {
        writeln!(
            out,
            "{} leaked clusters were found on the image. They waste space and do no harm; the next \
             use gives them back.",
            report.leaks
        )?;
    }
    if let Some(reason) = &report.reason {
        writeln!(
            out,
            "The image is stale: {}. Reads go to the base; make a new cache with 'vmcache create \
             -f'.",
            printable(reason)
        )?;
    }
    if report.corruptions == 0 && report.leaks == 0 && !report.stale {
        writeln!(out, "No errors were found on the image.")?;
    }
    let share = 100.0 * report.allocated_clusters as f64 / report.total_clusters.max(1) as f64;
    writeln!(
        out,
        "{}/{} = {share:.2}% clusters allocated",
        report.allocated_clusters, report.total_clusters
    )?;
    Ok(())
}
