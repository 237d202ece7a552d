//! What the environment says about this run; see the crate's head.
//!
//! Used by `process`, `lab` and tests with something random.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use rand::SeedableRng;
use rand::rngs::StdRng;

/// The command line that was built with these tests.
pub const VMCACHE: &str = env!("CARGO_BIN_EXE_vmcache");

/// Words in front of every QEMU program.
pub static PREFIX: LazyLock<Vec<String>> = LazyLock::new(|| {
    text("VMCACHE_TEST_QEMU").unwrap_or_default().split_whitespace().map(str::to_owned).collect()
});

/// The library to preload.
pub static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = text("VMCACHE_TEST_LIBRARY")
        .map_or_else(|| Path::new(VMCACHE).with_file_name("libvmcache.so"), PathBuf::from);
    path.canonicalize().unwrap_or_else(|err| {
        panic!("{}: {err}; build it with 'cargo build --release' first", path.display())
    })
});

/// A QEMU that has the driver in its own tree.
pub struct Patched {
    /// The directory it was built in.
    pub programs: PathBuf,
    /// The directory where its module finds the library.
    pub library: PathBuf,
}

/// The QEMU to run instead of an unmodified one, if there is one.
pub static PATCHED: LazyLock<Option<Patched>> = LazyLock::new(|| {
    let programs = PathBuf::from(text("VMCACHE_TEST_PATCHED")?);
    let library = text("VMCACHE_TEST_PATCHED_LIBRARY").expect("VMCACHE_TEST_PATCHED_LIBRARY");
    Some(Patched { programs, library: library.into() })
});

/// The seed of everything random.
pub static SEED: LazyLock<u64> = LazyLock::new(|| {
    let seed = number("VMCACHE_TEST_SEED").unwrap_or_else(|| rand::random_range(0..1 << 32));
    println!("VMCACHE_TEST_SEED={seed}");
    seed
});

/// A source of random numbers for a purpose: the same for the same seed.
pub fn random(purpose: &str) -> StdRng {
    let purpose = purpose.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
    StdRng::seed_from_u64(*SEED ^ purpose)
}

/// A variable that is set and not empty.
pub fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// A variable that holds a number.
pub fn number(name: &str) -> Option<u64> {
    text(name).map(|value| value.parse().unwrap_or_else(|err| panic!("{name}={value}: {err}")))
}
