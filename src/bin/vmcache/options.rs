//! The `-o name=value,...` of `vmcache create` and `boot`, which may be given several times.
//!
//! Used by `create`.

use anyhow::{Context, Result, bail};

use crate::size;

/// Clusters of 128 KiB have subclusters of 4 KiB, the guest's page and block size.
const DEFAULT_CLUSTER_SIZE: u64 = 128 << 10;
/// What the format and QEMU allow with extended L2 entries that have whole sectors.
const CLUSTER_SIZES: std::ops::RangeInclusive<u64> = 16 << 10..=2 << 20;

/// What `-o` can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes that the image file may occupy; no limit where it is not given.
    pub quota: Option<u64>,
    /// Bytes in a cluster.
    pub cluster_size: u64,
}

impl Options {
    /// Reads all `-o` arguments of a command line.
    pub fn parse(arguments: &[String]) -> Result<Self> {
        let (mut quota, mut cluster_size) = (None, None);
        for option in arguments.iter().flat_map(|argument| argument.split(',')) {
            let (name, value) = option.split_once('=').with_context(|| {
                format!("-o: '{option}' is not of the form name=value; {KNOWN}")
            })?;
            let (place, read): (_, fn(&str) -> Result<u64>) = match name {
                "quota" => (&mut quota, read_quota),
                "cluster_size" => (&mut cluster_size, read_cluster_size),
                _ => bail!("-o: unknown option '{name}'; {KNOWN}"),
            };
            if place.is_some() {
                bail!("-o: {name} is given twice");
            }
            *place = Some(read(value).with_context(|| format!("-o: {name}={value}"))?);
        }
        Ok(Options { quota, cluster_size: cluster_size.unwrap_or(DEFAULT_CLUSTER_SIZE) })
    }
}

const KNOWN: &str = "the options are quota=SIZE and cluster_size=SIZE";

fn read_quota(value: &str) -> Result<u64> {
    match size::parse(value)? {
        0 => bail!("a quota of nothing holds nothing; leave it out for no limit"),
        bytes => Ok(bytes),
    }
}

fn read_cluster_size(value: &str) -> Result<u64> {
    let bytes = size::parse(value)?;
    if !bytes.is_power_of_two() || !CLUSTER_SIZES.contains(&bytes) {
        bail!("the cluster size is a power of two from 16K to 2M");
    }
    Ok(bytes)
}
