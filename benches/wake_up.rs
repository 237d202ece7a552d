//! How long a reader that waits for another process's fetch sleeps on after there is nothing more
//! to wait for.
//!
//! `cargo bench --bench wake_up` runs two processes on one image. One claims a subcluster; the
//! other waits for it; the first stores it, or gives it up; both note CLOCK_MONOTONIC:
//!
//! - "given up": from just before the claim is let go to the waiter's call-back. That is the
//!   wake-up itself.
//! - "stored": from just before the fetched bytes are handed to the engine to the waiter's
//!   call-back. The bytes are queued, written and published in between, so it is more than the time
//!   from publication on.
//!
//! First with nothing else running, then beside one busy loop for each processor. Options after
//! `--`: `--rounds N`, `--json FILE`, `--strict` (exit with an error where a wake-up without other
//! load takes more than 200 microseconds in the median or a millisecond in the 99th percentile).

use std::io::{BufRead, BufReader, Read, Write, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use crossbeam::channel::bounded;
use nix::time::{ClockId, clock_gettime};
use vmcache::engine::{Engine, Fetch, Options, Plan, Step, Ticket};
use vmcache::format::ByteRange;

mod common;

use common::{make_cache, quantile};

const IMAGE: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// How long the waiter is left alone before it is woken: it sleeps by then.
const ASLEEP: Duration = Duration::from_millis(1);
const KINDS: [&str; 2] = ["given up", "stored"];
const LOADS: [&str; 2] = ["idle", "busy"];

struct Settings {
    rounds: usize,
    json: Option<PathBuf>,
    strict: bool,
}

fn main() -> Result<()> {
    let mut settings = Settings { rounds: 2000, json: None, strict: false };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            // What cargo itself adds.
            "--bench" => {}
            // What this program starts itself with.
            "--wait-on" => return wait_for_owner(Path::new(&value()?)),
            "--spin" => return spin(),
            "--rounds" => settings.rounds = value()?.parse().context("--rounds")?,
            "--json" => settings.json = Some(value()?.into()),
            "--strict" => settings.strict = true,
            _ => {
                bail!("unknown option {argument}; there are --rounds N, --json FILE, --strict")
            }
        }
    }
    let most = (IMAGE / BLOCK) as usize / LOADS.len() / KINDS.len();
    ensure!((1..=most).contains(&settings.rounds), "--rounds takes 1 to {most}");
    measure(&settings)
}

fn measure(settings: &Settings) -> Result<()> {
    let directory = tempfile::tempdir_in(".")?;
    let cache = directory.path().join("cache.qcow2");
    make_cache(&cache, &directory.path().join("base.raw"), IMAGE)?;
    let engine = Engine::open(&cache, &Options::default())?;
    let mut waiter = Waiter::start(&cache)?;
    let mut blocks = (0..IMAGE / BLOCK).map(|block| block * BLOCK);
    let mut rows = Vec::new();
    for load in LOADS {
        let _busy = if load == "busy" { Busy::start()? } else { Busy(Vec::new()) };
        let mut micros = KINDS.map(|_| Vec::new());
        for _ in 0..settings.rounds {
            for (kind, micros) in micros.iter_mut().enumerate() {
                let offset = blocks.next().context("the image is too small")?;
                micros.push(round(&engine, &mut waiter, offset, kind == 1)?);
            }
        }
        rows.extend(KINDS.into_iter().zip(micros).map(|(kind, micros)| (load, kind, micros)));
    }
    print(settings, &rows);
    if let Some(path) = &settings.json {
        write_json(path, &rows)?;
    }
    let late = rows.iter().any(|(load, kind, micros)| {
        *load == "idle"
            && *kind == KINDS[0]
            && (quantile(micros, 0.5) > 200.0 || quantile(micros, 0.99) > 1000.0)
    });
    ensure!(!(late && settings.strict), "waking up takes too long");
    Ok(())
}

/// One wait: claims a block, lets the other process wait for it and wakes it; gives microseconds.
fn round(engine: &Engine, waiter: &mut Waiter, offset: u64, store: bool) -> Result<f64> {
    let fetch = claim(engine, offset)?;
    let said = waiter.ask(offset)?;
    ensure!(said == "waiting", "the other process did not wait but said: {said}");
    std::thread::sleep(ASLEEP);
    let mut data = engine.buffer(fetch.range()).context("no room in memory")?;
    data.fill(1);
    let from = now()?;
    if store {
        engine.fill(fetch, data, Duration::ZERO);
    } else {
        drop(fetch);
    }
    let woken: u64 = waiter.line()?.parse().context("the time of the wake-up")?;
    Ok(woken.saturating_sub(from) as f64 / 1000.0)
}

/// Plans a block until it is this open's to fetch.
fn claim(engine: &Engine, offset: u64) -> Result<Fetch> {
    for _ in 0..10 {
        match plan(engine, offset).pop().map(|part| part.step) {
            Some(Step::Fetch(fetch)) => return Ok(fetch),
            Some(Step::Wait(ticket)) => wait(engine, ticket).map(drop)?,
            other => bail!("nothing to fetch at {offset}: {other:?}"),
        }
    }
    bail!("somebody else has {offset}")
}

fn plan(engine: &Engine, offset: u64) -> Plan {
    engine.plan(ByteRange { start: offset, len: BLOCK })
}

/// Waits; gives the time at which it was over, `None` where there was nothing to wait for.
fn wait(engine: &Engine, ticket: Ticket) -> Result<Option<u64>> {
    let (wake, woken) = bounded(1);
    let waits = engine.wait(ticket, move || {
        let at = now();
        // Nobody listens any more where the other end has given up.
        let _ = wake.send(at);
    });
    waits.then(|| woken.recv().context("the engine forgot a waiter")?).transpose()
}

/// CLOCK_MONOTONIC in nanoseconds, which is the same in all processes.
fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// The other process: waits for what its input names, a block a line, and says when it was woken.
fn wait_for_owner(cache: &Path) -> Result<()> {
    let engine = Engine::open(cache, &Options::default())?;
    let mut out = stdout().lock();
    for line in stdin().lock().lines() {
        let offset: u64 = line?.parse().context("an offset")?;
        let ticket = match plan(&engine, offset).pop().map(|part| part.step) {
            Some(Step::Wait(ticket)) => ticket,
            other => bail!("nobody to wait for at {offset}: {other:?}"),
        };
        let (wake, woken) = bounded(1);
        let waits = engine.wait(ticket, move || {
            let at = now();
            // The receiver is there until this was sent.
            let _ = wake.send(at);
        });
        writeln!(out, "{}", if waits { "waiting" } else { "free already" })?;
        out.flush()?;
        let woken = woken.recv().context("the engine forgot a waiter")??;
        writeln!(out, "{woken}")?;
        out.flush()?;
    }
    Ok(())
}

struct Waiter {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Waiter {
    fn start(cache: &Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--wait-on")
            .arg(cache)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Waiter { child, input, output })
    }

    fn ask(&mut self, offset: u64) -> Result<String> {
        writeln!(self.input.as_mut().context("no input")?, "{offset}")?;
        self.line()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the other process ended early");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.input = None;
        let _ = self.child.wait();
    }
}

/// Processes that do nothing as fast as they can, until this is dropped.
struct Busy(Vec<Child>);

impl Busy {
    fn start() -> Result<Self> {
        let count = std::thread::available_parallelism()?.get();
        let mut busy = Busy(Vec::new());
        for _ in 0..count {
            let spin = Command::new(std::env::current_exe()?)
                .arg("--spin")
                .stdin(Stdio::piped())
                .spawn()?;
            busy.0.push(spin);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// Spins until whoever started this is gone or closes the pipe.
fn spin() -> Result<()> {
    std::thread::spawn(|| {
        loop {
            std::hint::spin_loop();
        }
    });
    stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn print(settings: &Settings, rows: &[(&str, &str, Vec<f64>)]) {
    println!("Wake-up of a waiter in another process, microseconds, {} rounds", settings.rounds);
    println!("{:<16}{:>9}{:>9}{:>9}{:>9}", "", "median", "p90", "p99", "max");
    for (load, kind, micros) in rows {
        let [half, most, nearly, all] = [0.5, 0.9, 0.99, 1.0].map(|share| quantile(micros, share));
        println!("{:<16}{half:>9.1}{most:>9.1}{nearly:>9.1}{all:>9.1}", format!("{load}, {kind}"));
    }
}

fn write_json(path: &Path, rows: &[(&str, &str, Vec<f64>)]) -> Result<()> {
    let rows: Vec<_> = rows
        .iter()
        .map(|(load, kind, micros)| {
            serde_json::json!({ "load": load, "wake-up": kind, "microseconds": micros })
        })
        .collect();
    let report = serde_json::json!({ "results": rows });
    Ok(std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?)
}
