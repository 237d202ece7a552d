//! The driver's options and what opening can run into: each a clear error, nothing changed.

use std::fs;

use crate::lab::{Base, Lab, Over};
use crate::process::{Output, Tool};

fn open(options: &str) -> Output {
    Tool::driver("qemu-io").args(["-r", "--image-opts", options, "-c", "read 0 64k"]).run()
}

#[test]
fn an_unknown_option_is_an_error_that_names_it() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let refused = open(&format!("{},speed=high", cache.options())).failure();
    assert!(refused.stderr.contains("speed"), "{refused:?}");
}

#[test]
fn a_wrong_value_of_populate_is_an_error_that_names_the_right_ones() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let refused = open(&format!("{},populate=maybe", cache.options())).failure();
    assert!(refused.stderr.contains("populate=maybe: it can be on or off"), "{refused:?}");
}

#[test]
fn a_wrong_value_of_base_changed_is_an_error_that_names_the_right_ones() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let refused = open(&format!("{},base-changed=ignore", cache.options())).failure();
    let wanted = "base-changed=ignore: it can be bypass or refuse";
    assert!(refused.stderr.contains(wanted), "{refused:?}");
}

#[test]
fn a_populate_queue_that_is_no_size_is_an_error() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let refused = open(&format!("{},populate-queue=much", cache.options())).failure();
    assert!(refused.stderr.contains("'much' is not a size"), "{refused:?}");
}

#[test]
fn a_populate_queue_without_room_for_one_fetch_is_an_error_that_says_how_much_it_takes() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let refused = open(&format!("{},populate-queue=1M", cache.options())).failure();
    assert!(refused.stderr.contains("the least is 2097152"), "{refused:?}");
}

/// Reads 16 MiB in eight requests at once; returns the bytes that were not stored for want of room.
fn dropped_of_eight_reads_at_once(option: &str) -> u64 {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(vec![7; 16 << 20], "raw", Over::File), "");
    let reads = (0..8).flat_map(|number| ["-c".into(), format!("aio_read -q {}M 2M", number * 2)]);
    let reads: Vec<String> = reads.collect();
    let options = format!("{}{option}", cache.options());
    Tool::driver("qemu-io").args(["-r", "--image-opts", &options]).args(reads).run().success();
    cache.assert_sound();
    cache.stats().get("dropped-bytes")
}

#[test]
fn what_finds_no_room_in_a_small_populate_queue_is_read_and_not_stored() {
    assert!(dropped_of_eight_reads_at_once(",populate-queue=2M") >= 2 << 20);
}

#[test]
fn eight_large_reads_at_once_have_room_in_the_usual_populate_queue() {
    assert_eq!(dropped_of_eight_reads_at_once(""), 0);
}

#[test]
fn populate_off_serves_the_base_and_stores_nothing() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve_options(&format!("{},populate=off", cache.options()));
    server.assert_serves(&cache.base.content);
    server.stop();
    assert_eq!(cache.info("state"), "empty");
    assert_eq!(cache.stats().get("checkpoints"), 0);
    cache.assert_sound();
}

#[test]
fn populate_off_serves_what_is_cached() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let filling = lab.serve(&cache);
    filling.assert_serves(&cache.base.content);
    filling.stop();
    let before = cache.stats();
    let server = lab.serve_options(&format!("{},populate=off", cache.options()));
    server.assert_serves(&cache.base.content);
    server.stop();
    assert_eq!(cache.stats().since(&before, "base-reads"), 0);
}

#[test]
fn the_option_backing_overrides_the_base_that_the_header_names() {
    let lab = Lab::new();
    let base = lab.base();
    let cache = lab.cache(&base, "");
    let moved = lab.path("moved.raw");
    fs::rename(&base.file, &moved).expect("the base moves");
    let elsewhere = format!("backing.driver=raw,backing.file.filename={}", moved.display());
    let server = lab.serve_options(&format!("{},{elsewhere}", cache.options()));
    server.assert_serves(&base.content);
    server.stop();
    assert!(cache.info_number("cached-bytes") > 0);
}

#[test]
fn a_missing_base_is_an_error_that_names_it() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    fs::remove_file(&cache.base.file).expect("a base");
    let refused = open(&cache.options()).failure();
    assert!(refused.stderr.contains(&cache.base.name), "{refused:?}");
    assert!(refused.stderr.contains("No such file"), "{refused:?}");
}

#[test]
fn a_missing_cache_is_an_error_that_names_it() {
    let refused = open("driver=vmcache,file.filename=/nonexistent/cache.qcow2").failure();
    assert!(refused.stderr.contains("/nonexistent/cache.qcow2"), "{refused:?}");
}

#[test]
fn no_file_at_all_is_an_error() {
    let refused = open("driver=vmcache").failure();
    assert!(refused.stderr.contains("file"), "{refused:?}");
}

#[test]
fn an_ordinary_qcow2_is_an_error_that_says_what_it_is_not() {
    let lab = Lab::new();
    let plain = lab.path("plain.qcow2").display().to_string();
    Tool::stock("qemu-img").args(["create", "-q", "-f", "qcow2", &plain, "1M"]).run().success();
    let before = fs::read(&plain).expect("the image");
    let refused = open(&format!("driver=vmcache,file.filename={plain}")).failure();
    assert!(refused.stderr.contains(&plain), "{refused:?}");
    assert!(refused.stderr.contains("vmcache"), "{refused:?}");
    assert_eq!(fs::read(&plain).expect("the image"), before);
}

#[test]
fn a_cache_that_is_not_a_local_file_is_an_error_that_says_so() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let exported = cache.path.display().to_string();
    let server =
        crate::lab::Server::start(&lab, Tool::stock("qemu-nbd"), &["-r", "-f", "raw", &exported]);
    let socket = server.socket().display();
    let refused = open(&format!(
        "driver=vmcache,file.driver=nbd,file.server.type=unix,file.server.path={socket}"
    ))
    .failure();
    assert!(refused.stderr.contains("file"), "{refused:?}");
    server.stop();
}

#[test]
fn an_unwritable_cache_is_used_as_it_is() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let filling = lab.serve(&cache);
    filling.connect().read_and_compare(&cache.base.content, [(0, 1 << 20)]).expect("a read");
    filling.stop();
    let kept = cache.info_number("cached-bytes");
    set_immutable(&cache.path, "+i");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    set_immutable(&cache.path, "-i");
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert_eq!(cache.info_number("cached-bytes"), kept);
    cache.assert_sound();
}

/// What keeps even root from writing.
fn set_immutable(path: &std::path::Path, how: &str) {
    let done = std::process::Command::new("chattr").arg(how).arg(path).status().expect("chattr");
    assert!(done.success());
}

#[test]
fn an_odd_size_of_the_base_is_rounded_as_qemu_does() {
    let lab = Lab::new();
    let path = lab.path("odd.raw");
    fs::write(&path, vec![7; 1000]).expect("a base");
    let mut content = vec![7; 1000];
    content.resize(1024, 0);
    let name = path.display().to_string();
    let base = Base::at(name, "raw", content, path);
    let cache = lab.cache(&base, "");
    let server = lab.serve(&cache);
    server.assert_serves(&base.content);
    server.assert_serves(&base.content);
    server.stop();
    assert_eq!(cache.stats().get("base-reads"), 1);
    cache.assert_sound();
}
