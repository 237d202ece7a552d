//! Where a node keeps its caches and the machines' own files unless it is told otherwise, and by
//! which names: `/var/cache/vmcache` and `/var/lib/vmcache` for root, the directories of the XDG base
//! directory specification for everybody else.
//!
//! Used by `boot`.

use std::env;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

/// The directory in each of them that is ours.
const OURS: &str = "vmcache";
/// Bytes of a hash that tell bases of the same file name apart.
const HASH_BYTES: usize = 6;
/// Most characters of a base's own name in that of its cache.
const STEM_MAX: usize = 80;

/// The directory of cache images.
pub fn caches() -> Result<PathBuf> {
    CACHES.find(geteuid().is_root(), |name| env::var_os(name))
}

/// The directory of overlays.
pub fn overlays() -> Result<PathBuf> {
    OVERLAYS.find(geteuid().is_root(), |name| env::var_os(name))
}

const CACHES: Place = Place {
    of_root: "/var/cache",
    variable: "XDG_CACHE_HOME",
    in_home: ".cache",
    option: "--cache",
};

const OVERLAYS: Place = Place {
    of_root: "/var/lib",
    variable: "XDG_STATE_HOME",
    in_home: ".local/state",
    option: "--overlay",
};

/// Where files of one kind are.
struct Place {
    of_root: &'static str,
    variable: &'static str,
    in_home: &'static str,
    option: &'static str,
}

impl Place {
    fn find(&self, is_root: bool, value: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
        if is_root {
            return Ok(Path::new(self.of_root).join(OURS));
        }
        // The specification says to ignore relative ones.
        let path = |name: &str| value(name).map(PathBuf::from).filter(|path| path.is_absolute());
        path(self.variable)
            .or_else(|| path("HOME").map(|home| home.join(self.in_home)))
            .map(|directory| directory.join(OURS))
            .with_context(|| {
                format!("neither {} nor HOME is set; say where with {}", self.variable, self.option)
            })
    }
}

/// The file name of the cache of a base: readable, and another one for each name and format.
pub fn cache_name(base: &str, format: &str) -> String {
    let path = base.split(['?', '#']).next().unwrap_or_default();
    let last = path.trim_end_matches('/').rsplit(['/', ':']).next().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let stem: String = last.trim_start_matches('.').chars().map(plain).take(STEM_MAX).collect();
    let stem = if stem.is_empty() { "base" } else { stem.as_str() };
    let hash = Sha256::new().chain_update(format).chain_update([0]).chain_update(base).finalize();
    let hash: String = hash.iter().take(HASH_BYTES).map(|byte| format!("{byte:02x}")).collect();
    format!("{stem}-{hash}.cache")
}

/// Makes a directory, and those above it, where it is not there; only its owner may write to it.
pub fn make(directory: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .with_context(|| format!("could not make the directory '{}'", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(place: &Place, is_root: bool, variables: &[(&str, &str)]) -> Result<PathBuf> {
        let named = |name: &str| variables.iter().find(|(known, _)| *known == name);
        place.find(is_root, |name| named(name).map(|(_, value)| value.into()))
    }

    #[test]
    fn root_has_the_directories_of_the_system() {
        let home = [("HOME", "/root"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(found(&CACHES, true, &home).unwrap(), Path::new("/var/cache/vmcache"));
        assert_eq!(found(&OVERLAYS, true, &home).unwrap(), Path::new("/var/lib/vmcache"));
    }

    #[test]
    fn others_have_directories_of_their_own() {
        let home = [("HOME", "/home/a"), ("XDG_STATE_HOME", "relative")];
        let own = [("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(found(&CACHES, false, &home).unwrap(), Path::new("/home/a/.cache/vmcache"));
        assert_eq!(
            found(&OVERLAYS, false, &home).unwrap(),
            Path::new("/home/a/.local/state/vmcache")
        );
        assert_eq!(found(&CACHES, false, &own).unwrap(), Path::new("/x/vmcache"));
    }

    #[test]
    fn who_has_no_home_is_asked_for_a_place() {
        let message = found(&OVERLAYS, false, &[]).unwrap_err().to_string();
        assert!(message.contains("--overlay"), "{message}");
    }

    #[test]
    fn a_cache_is_named_after_its_base() {
        let name = cache_name("nfs://storage/images/debian12.raw", "raw");
        assert!(name.starts_with("debian12.raw-") && name.ends_with(".cache"), "{name}");
        assert_eq!(name.len(), "debian12.raw-".len() + 2 * HASH_BYTES + ".cache".len());
    }

    #[test]
    fn bases_of_other_places_and_formats_have_other_caches() {
        let name = cache_name("nfs://storage/a/disk.qcow2", "qcow2");
        assert_ne!(name, cache_name("nfs://storage/b/disk.qcow2", "qcow2"));
        assert_ne!(name, cache_name("nfs://storage/a/disk.qcow2", "raw"));
    }

    #[test]
    fn every_name_of_a_base_gives_a_file_name() {
        let names =
            ["nbd+unix:///?socket=/run/a b", "json:{\"driver\":\"null-co\"}", "/x/..", "ä/é"];
        let names = names.map(|name| cache_name(name, "raw"));
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        assert_eq!(names.clone().map(|name| name.chars().all(good)), [true; 4], "{names:?}");
        assert!(names[0].starts_with("base-") && names[2].starts_with("base-"), "{names:?}");
    }
}
