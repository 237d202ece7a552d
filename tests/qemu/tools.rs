//! `qemu-img` with the driver, plain QEMU with the cache as a backing file, and programs that are
//! not QEMU.

use serde::Deserialize;

use crate::lab::{Base, DISK, Lab, Server};
use crate::process::Tool;
use crate::settings::LIBRARY;

/// An extent in `qemu-img map --output=json`.
#[derive(Deserialize)]
struct Extent {
    start: u64,
    length: u64,
    depth: u64,
    zero: bool,
    data: bool,
}

fn map(options: &str) -> Vec<Extent> {
    let said =
        Tool::driver("qemu-img").args(["map", "--output=json", "--image-opts", options]).run();
    serde_json::from_str(&said.success().stdout).expect("JSON")
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[test]
fn map_shows_what_is_cached_and_what_is_not() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let reading = lab.serve(&cache);
    let half = 8 << 20;
    reading.connect().read_and_compare(&cache.base.content, [(0, half)]).expect("a read");
    reading.stop();
    let half = u64::from(half);

    let extents = map(&cache.options());
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), DISK as u64);
    let (cached, rest): (Vec<_>, Vec<_>) =
        extents.into_iter().partition(|extent| extent.depth == 0);
    assert!(cached.iter().all(|extent| extent.start + extent.length <= half));
    assert!(rest.iter().all(|extent| extent.start >= half));
    assert_eq!(cached.iter().map(|extent| extent.length).sum::<u64>(), half);
    for extent in cached {
        let bytes = &cache.base.content[extent.start as usize..][..extent.length as usize];
        assert_eq!(extent.zero, is_zero(bytes) && !extent.data);
        assert_ne!(extent.data, extent.zero);
    }
}

#[test]
fn convert_through_the_driver_gives_the_base() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    for round in 0..2 {
        let copy = lab.path(&format!("copy{round}.raw"));
        Tool::driver("qemu-img")
            .args(["convert", "-O", "raw", "--image-opts", &cache.options()])
            .arg(&copy)
            .run()
            .success();
        assert!(std::fs::read(&copy).expect("a copy") == *cache.base.content);
    }
    cache.assert_sound();
}

#[test]
fn info_through_the_driver_opens_the_chain() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let said = Tool::driver("qemu-img").args(["info", "--image-opts", &cache.options()]).run();
    let said = said.success();
    assert!(said.stdout.contains("file format: vmcache"), "{said:?}");
    assert!(said.stdout.contains(&format!("backing file: {}", cache.base.name)), "{said:?}");
}

#[test]
fn compare_through_the_driver_finds_no_difference() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let base = format!("driver=raw,file.filename={}", cache.base.name);
    for _ in 0..2 {
        Tool::driver("qemu-img")
            .args(["compare", "--image-opts", &base, &cache.options()])
            .run()
            .success();
    }
    cache.assert_sound();
}

#[test]
fn a_plain_qemu_reads_the_cache_as_the_qcow2_that_it_is() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let filling = lab.serve(&cache);
    filling.connect().read_and_compare(&cache.base.content, [(77, 5 << 20)]).expect("a read");
    filling.stop();
    let image = cache.path.display().to_string();
    let plain = Server::start(&lab, Tool::stock("qemu-nbd"), &["-r", "-f", "qcow2", &image]);
    plain.assert_serves(&cache.base.content);
    plain.stop();
}

#[test]
fn a_cache_of_a_cache_serves_the_base() {
    let lab = Lab::new();
    let far = lab.cache(&lab.base(), "cluster_size=64K");
    let rack = lab.serve(&far);
    let name = format!("nbd+unix:///?socket={}", rack.socket().display());
    let (content, file) = (far.base.content.to_vec(), far.path.clone());
    let base = Base::at(name, "raw", content, file);
    let near = lab.cache(&base, "");
    for _ in 0..2 {
        let server = lab.serve(&near);
        server.assert_serves(&base.content);
        server.stop();
    }
    near.assert_sound();
    rack.stop();
    assert_eq!(near.stats().get("base-bytes"), DISK as u64);
    // Less, since NBD tells where the disk is known to be zero.
    assert!(far.stats().get("base-bytes") <= DISK as u64);
    far.assert_sound();
}

#[test]
fn programs_that_are_not_qemu_notice_nothing() {
    for words in [vec!["sh", "-c", "exit 0"], vec!["timeout", "5", "true"], vec!["ls", "/"]] {
        let done = std::process::Command::new(words[0])
            .args(&words[1..])
            .env("LD_PRELOAD", &*LIBRARY)
            .output()
            .expect("a program");
        assert!(done.status.success());
        assert_eq!(String::from_utf8_lossy(&done.stderr), "");
    }
}

#[test]
fn exec_finds_the_library_by_itself() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let done = Tool::vmcache()
        .args(["exec", "qemu-io", "-r", "--image-opts", &cache.options(), "-c", "read 0 1M"])
        .run()
        .success();
    assert!(done.stdout.contains("read 1048576/1048576"), "{done:?}");
}

#[test]
fn a_qemu_that_uses_no_vmcache_image_says_nothing() {
    let lab = Lab::new();
    let base = lab.base();
    let done = Tool::driver("qemu-img").args(["info", "-f", "raw", &base.name]).run().success();
    assert_eq!(done.stderr, "");
}
