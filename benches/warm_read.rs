//! Warm reads side by side: what one unmodified QEMU makes of 4 KiB random reads whose data is in
//! the page cache, through raw (threads and io_uring), qcow2 (io_uring) and vmcache. Once with each
//! block read once, so that vmcache looks at the checksum of each, and once with the same blocks
//! read again and again. Raw reads the data clusters of the cache image itself: how fast a page is
//! copied depends on where in memory it is, by more than drivers differ.
//!
//! `cargo bench --bench warm_read` runs `qemu-img bench` on each in turn, several rounds, and prints
//! medians, their spread, and how many times vmcache's figure is of the others'. Options after
//! `--`: `--rounds N`, `--json FILE`. `QEMU_IMG` names another qemu-img.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

mod common;

use common::{make_base, make_warm_cache, median, spread};

const IMAGE: u64 = 512 << 20;
const DEPTHS: [u32; 3] = [1, 16, 64];
const BLOCK: u64 = 4096;

/// Reads in an order that no read-ahead guesses: one every so many blocks, round and round.
struct Load {
    name: &'static str,
    stride: u64,
    reads: u64,
}

const LOADS: [Load; 2] = [
    // An odd stride comes to every block before it comes to one again.
    Load { name: "each block once", stride: 251 * BLOCK, reads: IMAGE / BLOCK },
    // This one comes to every fourth block, and to each of them eight times.
    Load { name: "blocks read eight times", stride: 252 * BLOCK, reads: 2 * IMAGE / BLOCK },
];

struct Candidate {
    name: &'static str,
    arguments: Vec<OsString>,
    preload: bool,
}

struct Settings {
    rounds: usize,
    json: Option<PathBuf>,
    qemu_img: OsString,
    library: PathBuf,
}

fn main() -> Result<()> {
    let settings = settings()?;
    let directory = tempfile::tempdir_in(".")?;
    let candidates = prepare(directory.path(), &settings)?;
    let mut results = Vec::new();
    for load in &LOADS {
        for depth in DEPTHS {
            let mut seconds = vec![Vec::new(); candidates.len()];
            for _ in 0..settings.rounds {
                for (candidate, seconds) in candidates.iter().zip(&mut seconds) {
                    seconds.push(run(&settings, candidate, load, depth)?.as_secs_f64());
                }
            }
            results.push((load, depth, seconds));
        }
    }
    print(&settings, &candidates, &results);
    match &settings.json {
        Some(path) => write_json(path, &candidates, &results),
        None => Ok(()),
    }
}

fn settings() -> Result<Settings> {
    let mut settings = Settings {
        rounds: 5,
        json: None,
        qemu_img: std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into()),
        library: library()?,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            // What cargo itself adds.
            "--bench" => {}
            "--rounds" => settings.rounds = value()?.parse().context("--rounds")?,
            "--json" => settings.json = Some(value()?.into()),
            _ => bail!("unknown option {argument}; there are --rounds N, --json FILE"),
        }
    }
    ensure!(settings.rounds > 0, "--rounds starts at 1");
    Ok(settings)
}

/// The library that belongs to this build.
fn library() -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("libvmcache.so"))
        .find(|path| path.exists())
        .context("libvmcache.so is not beside this benchmark; run it with cargo bench")
}

/// Makes the images, all with the same random data, all of it in the page cache.
fn prepare(directory: &Path, settings: &Settings) -> Result<Vec<Candidate>> {
    let raw = directory.join("base.raw");
    let qcow2 = directory.join("base.qcow2");
    let cache = directory.join("cache.qcow2");
    make_base(&raw, IMAGE)?;
    let convert = Command::new(&settings.qemu_img)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status()
        .with_context(|| format!("could not run {}", settings.qemu_img.display()))?;
    ensure!(convert.success(), "qemu-img convert failed");
    File::open(&qcow2)?.sync_all()?;
    make_warm_cache(&cache, &raw, IMAGE)?;
    for path in [&qcow2, &cache] {
        std::fs::read(path)?;
    }
    // The data clusters are the last of the file.
    let offset = std::fs::metadata(&cache)?.len() - IMAGE;
    let raw = format!("driver=raw,offset={offset},size={IMAGE},file.driver=file");
    let image = |driver: &str, path: &Path, aio: &str| {
        let mut image = OsString::from(format!("{driver},file.filename="));
        image.push(path);
        vec!["-i".into(), aio.into(), "--image-opts".into(), image]
    };
    let candidate = |name, arguments, preload| Candidate { name, arguments, preload };
    Ok(vec![
        candidate("raw threads", image(&raw, &cache, "threads"), false),
        candidate("raw io_uring", image(&raw, &cache, "io_uring"), false),
        candidate("qcow2 io_uring", image("driver=qcow2", &qcow2, "io_uring"), false),
        candidate("vmcache", image("driver=vmcache", &cache, "threads"), true),
    ])
}

fn run(settings: &Settings, candidate: &Candidate, load: &Load, depth: u32) -> Result<Duration> {
    // QEMU 10.0's io_uring submits the next request from within the completion of the last one; a
    // long row of immediate completions overruns the usual 8 MiB of stack. All get more.
    let mut command = Command::new("prlimit");
    command
        .arg("--stack=unlimited")
        .arg(&settings.qemu_img)
        .arg("bench")
        .args(["-s", &BLOCK.to_string(), "-S", &load.stride.to_string()])
        .args(["-c", &load.reads.to_string(), "-d", &depth.to_string()])
        .args(&candidate.arguments);
    if candidate.preload {
        command.env("LD_PRELOAD", &settings.library);
    }
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "qemu-img bench on {} failed ({}): {}",
        candidate.name,
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text.split_whitespace()
        .rev()
        .find_map(|word| word.parse().ok())
        .map(Duration::from_secs_f64)
        .with_context(|| format!("qemu-img bench printed no time: {text}"))
}

/// What one load at one depth took, by candidate and round.
type Measured = (&'static Load, u32, Vec<Vec<f64>>);

fn print(settings: &Settings, candidates: &[Candidate], results: &[Measured]) {
    println!("4 KiB random reads, page-cached, median of {} rounds", settings.rounds);
    for (load, depth, seconds) in results {
        if *depth == DEPTHS[0] {
            println!("{}, {} reads a run:", load.name, load.reads);
            println!(
                "{:>5}  {:<16}{:>12}{:>9}{:>20}",
                "depth", "", "IOPS", "spread", "vmcache is times"
            );
        }
        let ours = seconds.last().map_or(f64::NAN, |seconds| median(seconds));
        for (candidate, seconds) in candidates.iter().zip(seconds) {
            println!(
                "{depth:>5}  {:<16}{:>12.0}{:>7.1} %{:>20.2}",
                candidate.name,
                load.reads as f64 / median(seconds),
                spread(seconds),
                median(seconds) / ours,
            );
        }
    }
}

fn write_json(path: &Path, candidates: &[Candidate], results: &[Measured]) -> Result<()> {
    let rows: Vec<_> = results
        .iter()
        .flat_map(|(load, depth, all)| {
            candidates.iter().zip(all).map(move |(candidate, seconds)| {
                serde_json::json!({
                    "load": load.name,
                    "reads": load.reads,
                    "depth": depth,
                    "driver": candidate.name,
                    "seconds": seconds,
                    "iops": load.reads as f64 / median(seconds),
                })
            })
        })
        .collect();
    let report = serde_json::json!({ "block-size": BLOCK, "results": rows });
    Ok(std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?)
}
