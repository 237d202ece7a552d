//! What planning a hit costs, alone and beside another reader of the same warm image: it shows
//! whether readers write to memory that they share.
//!
//! `cargo bench --bench warm_plan` plans random 4 KiB reads in one thread; in two threads that each
//! have an image of their own, which share nothing; in two that each have an open of one image, as
//! two processes have; and in two that share an open and with it the counters, which is what
//! sharing costs on this machine. The second and the third should be the same. It counts processor
//! time, so that other load does not matter much. Several rounds, one of each in turn; medians and
//! spread. Options after `--`: `--rounds N`, `--plans N`.

use std::path::Path;
use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use vmcache::engine::{Engine, Options, Step};
use vmcache::format::ByteRange;

mod common;

use common::{make_base, make_warm_cache, median, spread};

const IMAGE: u64 = 256 << 20;
const BLOCK: u64 = 4096;

fn main() -> Result<()> {
    let (mut rounds, mut plans) = (9, 5_000_000u64);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            // What cargo itself adds.
            "--bench" => {}
            "--rounds" => rounds = value()?.parse().context("--rounds")?,
            "--plans" => plans = value()?.parse().context("--plans")?,
            _ => bail!("unknown option {argument}; there are --rounds N, --plans N"),
        }
    }
    ensure!(rounds > 0 && plans > 0, "--rounds and --plans start at 1");
    let directory = tempfile::tempdir_in(".")?;
    let base = directory.path().join("base.raw");
    let caches = ["one", "other"].map(|name| directory.path().join(name));
    make_base(&base, IMAGE)?;
    for cache in &caches {
        make_warm_cache(cache, &base, IMAGE)?;
    }
    let [one, other] = &caches;
    let (first, second, elsewhere) = (open(one)?, open(one)?, open(other)?);
    let kinds = [
        ("one reader", vec![Arc::clone(&first)]),
        ("two readers, an image each", vec![Arc::clone(&first), elsewhere]),
        ("two readers, an open each", vec![Arc::clone(&first), second]),
        ("two readers, one open", vec![Arc::clone(&first), first]),
    ];
    let mut nanoseconds = vec![Vec::new(); kinds.len()];
    for _ in 0..rounds {
        for ((_, engines), nanoseconds) in kinds.iter().zip(&mut nanoseconds) {
            nanoseconds.push(measure(engines, plans)?);
        }
    }
    println!("Planning a 4 KiB hit, {plans} plans a reader, median of {rounds} rounds");
    for ((name, _), nanoseconds) in kinds.iter().zip(&nanoseconds) {
        println!("{name:<28}{:>8.1} ns{:>8.1} %", median(nanoseconds), spread(nanoseconds));
    }
    Ok(())
}

fn open(cache: &Path) -> Result<Arc<Engine>> {
    Ok(Arc::new(Engine::open(cache, &Options::default())?))
}

/// Nanoseconds for a plan, the mean over the threads that plan at the same time.
fn measure(engines: &[Arc<Engine>], plans: u64) -> Result<f64> {
    let start = Arc::new(Barrier::new(engines.len()));
    let threads: Vec<_> = engines
        .iter()
        .map(|engine| {
            let (engine, start) = (Arc::clone(engine), Arc::clone(&start));
            thread::spawn(move || {
                let mut random = SmallRng::seed_from_u64(2);
                start.wait();
                let began = processor_time();
                let hits = (0..plans).filter(|_| {
                    let block = random.random_range(0..IMAGE / BLOCK);
                    let plan = engine.plan(ByteRange { start: block * BLOCK, len: BLOCK });
                    plan.iter().all(|part| matches!(part.step, Step::Hit(_)))
                });
                (hits.count() as u64, processor_time() - began)
            })
        })
        .collect();
    let mut sum = 0f64;
    for thread in threads {
        let (hits, took) = thread.join().map_err(|_| anyhow!("a reader panicked"))?;
        ensure!(hits == plans, "{} of {plans} plans were no hits", plans - hits);
        sum += took / plans as f64;
    }
    Ok(sum / engines.len() as f64)
}

/// What this thread has taken of the processors, in nanoseconds.
fn processor_time() -> f64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(f64::NAN, |time| time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64)
}
