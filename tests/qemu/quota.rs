//! No room: the quota, the cache's filesystem, the live file's filesystem. Reads never suffer.

use std::fs;

use crate::lab::{DISK, Lab, Over, anywhere, content};
use crate::mounts::with_tmpfs;
use crate::settings::random;

fn the_file_never_occupies_more_than_its_quota(cluster_size: &str, quota: u64) {
    let lab = Lab::new();
    let base = lab.base_of(content(3 * DISK), "raw", Over::File);
    let cache = lab.cache(&base, &format!("quota={quota},cluster_size={cluster_size}"));
    let server = lab.serve(&cache);
    let most = cache.most_occupied_during(|| {
        let reads = anywhere(random("quota"), base.content.len()).take(600);
        server.connect().read_and_compare(&base.content, reads).expect("reads");
        server.assert_serves(&base.content);
    });
    let said = server.stop();
    assert!(most.max(cache.occupied()) <= quota, "{most} bytes of {quota}");
    assert!(most > quota / 10 * 9, "only {most} bytes of {quota} were used");
    assert_eq!(cache.info("state"), "full");
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    cache.assert_sound();
    assert!(cache.occupied() <= quota);
}

#[test]
fn a_quota_of_20_mb_is_never_exceeded() {
    the_file_never_occupies_more_than_its_quota("128K", 20_000_000);
}

#[test]
fn a_quota_is_never_exceeded_by_the_smallest_clusters() {
    the_file_never_occupies_more_than_its_quota("16K", 20_000_000);
}

#[test]
fn a_quota_is_never_exceeded_by_the_largest_clusters() {
    the_file_never_occupies_more_than_its_quota("2M", 20_000_000);
}

#[test]
fn a_full_cache_serves_what_it_has_and_stays_within_its_quota() {
    let lab = Lab::new();
    let base = lab.base();
    let cache = lab.cache(&base, "quota=8M");
    let first = lab.serve(&cache);
    first.assert_serves(&base.content);
    first.stop();
    let before = cache.stats();

    let second = lab.serve(&cache);
    second.assert_serves(&base.content);
    second.stop();
    let after = cache.stats();
    assert!(after.since(&before, "hit-bytes") > 6 << 20);
    assert!(cache.occupied() <= 8 << 20);
    assert_eq!(cache.info("state"), "full");
    cache.assert_sound();
}

#[test]
fn a_full_filesystem_costs_one_line_and_no_read() {
    let lab = Lab::new();
    let base = lab.base();
    let small = lab.path("small");
    fs::create_dir(&small).expect("a directory");
    with_tmpfs(&small, 6 << 20, || {
        let cache = lab.cache_at(small.join("cache.qcow2"), &base, "");
        let server = lab.serve(&cache);
        let reads = anywhere(random("full"), base.content.len()).take(300);
        server.connect().read_and_compare(&base.content, reads).expect("reads");
        server.assert_serves(&base.content);
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains("No space left on device"), "{said:?}");
        assert!(cache.stats().get("populate-errors") > 0);
        cache.assert_sound();
    });
}

#[test]
fn a_full_filesystem_that_has_room_again_is_used_again() {
    let lab = Lab::new();
    let base = lab.base();
    let small = lab.path("small");
    fs::create_dir(&small).expect("a directory");
    with_tmpfs(&small, 64 << 20, || {
        let cache = lab.cache_at(small.join("cache.qcow2"), &base, "");
        let ballast = small.join("ballast");
        fs::write(&ballast, vec![1; 52 << 20]).expect("ballast");
        let server = lab.serve(&cache);
        server.assert_serves(&base.content);
        fs::remove_file(&ballast).expect("the ballast is there");
        let everything = base.content.len() as u64;
        crate::process::eventually("the cache takes the rest", || {
            server.assert_serves(&base.content);
            let known = cache.info_number("cached-bytes") + cache.info_number("zero-bytes");
            known >= everything
        });
        server.stop();
        cache.assert_sound();
    });
}

#[test]
fn no_room_for_a_live_file_costs_one_line_and_no_read() {
    let lab = Lab::new();
    let base = lab.base();
    let small = lab.path("small");
    fs::create_dir(&small).expect("a directory");
    with_tmpfs(&small, 4 << 20, || {
        let cache = lab.cache_at(small.join("cache.qcow2"), &base, "");
        // Writes what fits.
        let _ = fs::write(small.join("ballast"), vec![1; 5 << 20]);
        let server = lab.serve(&cache);
        server.assert_serves(&base.content);
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        cache.assert_sound();
    });
}
