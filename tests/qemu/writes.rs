//! The node is read-only: opening it for writing says what to do instead, and what it says works.

use crate::lab::{Cache, DISK, Lab};
use crate::process::Tool;

fn checksum(cache: &Cache) -> u64 {
    let bytes = std::fs::read(&cache.base.file).expect("the base");
    bytes.iter().fold(0, |sum: u64, byte| sum.rotate_left(5) ^ u64::from(*byte))
}

/// An overlay whose header names the base, as options that put the cache in between.
fn overlay(lab: &Lab, cache: &Cache) -> String {
    let overlay = lab.path("overlay.qcow2");
    Tool::stock("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", cache.base.format, "-b", &cache.base.name])
        .arg(&overlay)
        .run()
        .success();
    let (overlay, cache) = (overlay.display(), cache.path.display());
    format!(
        "driver=qcow2,file.filename={overlay},\
         backing.driver=vmcache,backing.file.filename={cache}"
    )
}

#[test]
fn opening_for_writing_is_refused_with_the_way_out() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let refused = Tool::driver("qemu-io").args(["--image-opts", &cache.options()]).run().failure();
    assert!(refused.stderr.contains("vmcache is read-only"), "{refused:?}");
    assert!(refused.stderr.contains("overlay"), "{refused:?}");
    assert!(refused.stderr.contains("snapshot=on"), "{refused:?}");
}

#[test]
fn reopening_for_writing_is_refused() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let done = Tool::driver("qemu-io")
        .args(["-r", "--image-opts", &cache.options()])
        .args(["-c", "reopen -w", "-c", "read 0 64k"])
        .run();
    assert!(done.stderr.contains("read-only"), "{done:?}");
    assert!(done.stdout.contains("read 65536/65536"), "{done:?}");
    cache.assert_sound();
}

#[test]
fn a_snapshot_takes_the_writes() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let before = checksum(&cache);
    let done = Tool::driver("qemu-io")
        .args(["-s", "--image-opts", &cache.options()])
        .args(["-c", "write -P 0x5a 1000k 64k", "-c", "read -P 0x5a 1000k 64k"])
        .run()
        .success();
    assert!(!done.stdout.contains("verification failed"), "{done:?}");
    assert_eq!(checksum(&cache), before);
    cache.assert_sound();
}

#[test]
fn an_overlay_takes_the_writes_and_base_and_cache_stay_as_they_are() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let before = checksum(&cache);
    let options = overlay(&lab, &cache);
    let done = Tool::driver("qemu-io")
        .args(["--image-opts", &options])
        .args(["-c", "write -P 0x5a 1000k 64k", "-c", "read -P 0x5a 1000k 64k"])
        .run()
        .success();
    assert!(!done.stdout.contains("verification failed"), "{done:?}");

    let mut expected = cache.base.content.to_vec();
    expected[1000 << 10..1064 << 10].fill(0x5a);
    let server = lab.serve_options(&options);
    server.assert_serves(&expected);
    server.stop();
    assert_eq!(checksum(&cache), before);
    assert!(cache.info_number("cached-bytes") > 0);
    cache.assert_sound();
}

#[test]
fn an_overlay_reads_every_byte_of_a_disk_through_the_cache_once() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let options = overlay(&lab, &cache);
    for _ in 0..2 {
        let server = lab.serve_options(&options);
        server.assert_serves(&cache.base.content);
        server.stop();
    }
    let stats = cache.stats();
    assert_eq!(stats.get("base-bytes"), DISK as u64);
    assert!(stats.get("hit-bytes") + stats.get("zero-bytes") >= DISK as u64);
    cache.assert_sound();
}

#[test]
fn committing_an_overlay_into_the_cache_is_refused() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let options = overlay(&lab, &cache);
    Tool::driver("qemu-io")
        .args(["--image-opts", &options, "-c", "write -P 0x5a 0 64k"])
        .run()
        .success();
    Tool::driver("qemu-img").args(["commit", "--image-opts", &options]).run().failure();
    cache.assert_sound();
}
