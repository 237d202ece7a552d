//! What the benchmarks share: a cache image that holds all of a base, and medians.

// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use vmcache::engine::{Engine, Options, Reader};
use vmcache::format::{BaseIdentity, Geometry};
use vmcache::image::{CreateOptions, create};

/// Makes a raw image of random bytes, always the same.
pub fn make_base(path: &Path, size: u64) -> Result<()> {
    let mut random = SmallRng::seed_from_u64(1);
    let mut data = vec![0; 1 << 20];
    let mut file = File::create(path)?;
    for _ in 0..size >> 20 {
        random.fill_bytes(&mut data);
        file.write_all(&data)?;
    }
    // Nothing is to be written back while it is measured.
    Ok(file.sync_all()?)
}

/// Makes an empty cache image for a raw base.
pub fn make_cache(cache: &Path, base: &Path, size: u64) -> Result<()> {
    create(
        cache,
        &CreateOptions {
            backing_file: base.to_str().context("the path is not text")?.to_owned(),
            backing_format: "raw".to_owned(),
            geometry: Geometry::with_cluster_size(128 << 10, size)?,
            quota: None,
            base: BaseIdentity::default(),
            mode: 0o600,
            force: false,
        },
    )?;
    Ok(())
}

/// Makes a cache image and reads all of the base through it.
pub fn make_warm_cache(cache: &Path, base: &Path, size: u64) -> Result<()> {
    make_cache(cache, base, size)?;
    // The queue takes all of it, so that nothing is dropped.
    let options = Options { queue_bytes: size * 2, ..Options::default() };
    let engine = Arc::new(Engine::open(cache, &options)?);
    let base = File::open(base)?;
    let reader = Reader::new(engine, move |buf: &mut [u8], offset| {
        FileExt::read_exact_at(&base, buf, offset)
    });
    let mut data = vec![0; 2 << 20];
    for offset in (0..size).step_by(data.len()) {
        reader.read(&mut data, offset)?;
    }
    Ok(())
}

/// The value below which a share (0 to 1) of the values lies; not a number where there is none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let at = share * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(below), Some(above)) => below + (above - below) * (at - low as f64),
        _ => f64::NAN,
    }
}

/// The middle value.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Half the distance between the least and the greatest, of the median, in percent.
pub fn spread(values: &[f64]) -> f64 {
    (quantile(values, 1.0) - quantile(values, 0.0)) / 2.0 / median(values) * 100.0
}
