//! Cached data that is no longer what was stored: QEMU's programs serve the base's bytes, and the
//! cache is whole again afterwards.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use rand::Rng;
use vmcache::image::{Access, Image, Scan};

use crate::lab::{Cache, Lab, Over, noise};
use crate::process::Tool;
use crate::settings::random;

const FLIPS: usize = 1000;

/// Changes bytes at random places of the cached data, and of its checksums.
fn flip(cache: &Cache) {
    let image = Image::open(&cache.path, Access::ReadOnly).expect("a cache");
    let entries = Scan::read(&image, |_, _| {}).expect("its tables").entries;
    let hosts: Vec<u64> = entries.values().filter_map(|entry| Some(entry.host?.0)).collect();
    let cluster = image.geometry().cluster_size();
    let checksums = image.layout().checksum_offset(0).0;
    let mut random = random("flips");
    let file = OpenOptions::new().read(true).write(true).open(&cache.path).expect("a cache");
    for turn in 0..FLIPS {
        let data = hosts[random.random_range(0..hosts.len())] + random.random_range(0..cluster);
        let checksum = checksums + random.random_range(0..entries.len() as u64 * 128);
        let at = if turn % 50 == 0 { checksum } else { data };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        file.write_all_at(&[byte[0] ^ random.random_range(1..=255u8)], at).expect("a byte");
    }
}

fn are_healed_by_reading(options: &str, over: Over) {
    let lab = Lab::new();
    let base = lab.base_of(noise(24 << 20), "raw", over);
    let cache = lab.cache(&base, options);
    let first = lab.serve(&cache);
    first.assert_serves(&base.content);
    first.stop();
    flip(&cache);

    let server = lab.serve(&cache);
    server.assert_serves(&base.content);
    let said = server.stop();

    assert_eq!(said.warnings().len(), 1, "{said:?}");
    let stats = cache.stats();
    assert!(stats.get("bad-bytes") > 0);
    assert_eq!(stats.get("repaired-bytes"), stats.get("bad-bytes"));
    cache.assert_sound();
    Tool::vmcache().arg("check").arg(&cache.path).run().success();
}

#[test]
fn thousand_flipped_bytes_are_healed_by_reading() {
    are_healed_by_reading("", Over::File);
}

#[test]
fn thousand_flipped_bytes_with_the_smallest_clusters_are_healed_by_reading() {
    are_healed_by_reading("cluster_size=16K", Over::File);
}

#[test]
fn thousand_flipped_bytes_with_the_largest_clusters_are_healed_by_reading() {
    are_healed_by_reading("cluster_size=2M", Over::Nbd);
}
