//! `vmcache publish`: a copy for other machines, with QEMU's own tools as the judge of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use vmcache::engine::Reader;

use crate::dir::{CACHE, Dir, KIB, LIVE, MIB, content};

/// Publishes the cache with the base by its path here.
fn publish(dir: &Dir, options: &[&str]) -> Value {
    let base = dir.text("base.raw");
    let arguments = ["publish", "--output=json", "-b", &base, CACHE, "published"];
    dir.vmcache(&[&arguments[..], options].concat()).exits(0).json()
}

/// QEMU finds nothing wrong with a published image and the base's bytes in it.
#[track_caller]
fn is_sound(dir: &Dir, name: &str) {
    dir.qemu("qemu-img", &["check", "-f", "qcow2", name]).exits(0).prints("No errors");
    dir.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "base.raw", name])
        .exits(0)
        .prints("Images are identical.");
}

/// What of the disk an image holds itself, by qemu-img.
fn held(dir: &Dir, name: &str) -> u64 {
    let map = dir.qemu("qemu-img", &["map", "--output=json", "-f", "qcow2", name]).exits(0).json();
    let own = |extent: &&Value| extent["depth"] == 0;
    let extents = map.as_array().unwrap().iter().filter(own);
    extents.map(|extent| extent["length"].as_u64().unwrap()).sum()
}

#[test]
fn what_is_cached_and_nothing_else_is_in_it() {
    let dir = Dir::with_cache(4 * MIB);
    dir.fill(MIB + 512);
    let report = publish(&dir, &[]);
    assert_eq!(report["cached-bytes"], MIB + 512);
    assert_eq!(report["left-out-bytes"], 0);
    assert_eq!(report["virtual-size"], 4 * MIB);
    assert_eq!(held(&dir, "published"), MIB + 512);
    is_sound(&dir, "published");
}

#[test]
fn it_occupies_little_more_than_its_data() {
    let dir = Dir::with_base(64 * MIB);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    let engine = dir.open();
    // One block of 4 KiB in each of many clusters.
    let content = content(64 * MIB);
    let base = move |buf: &mut [u8], at: u64| -> std::io::Result<()> {
        buf.copy_from_slice(&content[at as usize..at as usize + buf.len()]);
        Ok(())
    };
    let reader = Reader::new(Arc::clone(&engine), base);
    let mut block = [0; 4096];
    (0..64).for_each(|number| reader.read(&mut block, number * MIB).unwrap());
    drop(reader);
    dir.close(engine);
    let report = publish(&dir, &[]);
    assert_eq!(report["cached-bytes"], 64 * 4 * KIB);
    assert!(dir.occupied("published") <= 64 * 4 * KIB + 64 * KIB, "{report}");
    is_sound(&dir, "published");
}

#[test]
fn what_no_checkpoint_has_seen_yet_is_in_it() {
    let dir = Dir::with_cache(4 * MIB);
    let engine = dir.open();
    dir.read(&engine, 2 * MIB);
    // Storing happens behind a read.
    let cached = || dir.vmcache(&["info", "--output=json", CACHE]).json()["cached-bytes"].as_u64();
    while cached() != Some(2 * MIB) {
        thread::sleep(Duration::from_millis(1));
    }
    let report = publish(&dir, &[]);
    dir.close(engine);
    assert_eq!(report["cached-bytes"], 2 * MIB);
    is_sound(&dir, "published");
}

#[test]
fn zeros_take_no_room() {
    let dir = Dir::new();
    dir.write("base.raw", &[vec![0; MIB as usize], content(MIB)].concat());
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    dir.fill(2 * MIB);
    let report = publish(&dir, &[]);
    assert_eq!(report["zero-bytes"], MIB);
    assert_eq!(report["cached-bytes"], MIB);
    assert!(dir.occupied("published") <= MIB + 512 * KIB, "{report}");
    is_sound(&dir, "published");
}

#[test]
fn a_disk_that_is_no_whole_number_of_clusters_is_sound() {
    let dir = Dir::with_full_cache(3 * MIB + 512);
    publish(&dir, &[]);
    is_sound(&dir, "published");
}

#[test]
fn clusters_of_2_mib_are_sound() {
    let dir = Dir::with_base(5 * MIB);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", "-o", "cluster_size=2M", CACHE])
        .exits(0);
    dir.fill(5 * MIB);
    publish(&dir, &[]);
    is_sound(&dir, "published");
}

#[test]
fn an_empty_cache_gives_an_empty_image_and_a_warning() {
    let dir = Dir::with_cache(MIB);
    dir.vmcache(&["publish", "-b", "base.raw", CACHE, "published"])
        .exits(0)
        .complains("holds nothing yet");
    assert_eq!(held(&dir, "published"), 0);
    is_sound(&dir, "published");
}

#[test]
fn bad_data_is_left_out() {
    let dir = Dir::with_full_cache(2 * MIB);
    dir.poke(CACHE, dir.first_data_cluster() + 1000, &[0xee; 4]);
    let report = publish(&dir, &[]);
    assert_eq!(report["left-out-bytes"], 512);
    assert_eq!(report["cached-bytes"], 2 * MIB - 512);
    is_sound(&dir, "published");
}

#[test]
fn it_can_be_read_by_everybody_unless_the_mode_says_otherwise() {
    let dir = Dir::with_full_cache(MIB);
    publish(&dir, &[]);
    publish(&dir, &["-f", "--mode", "0600"]);
    let mode = |name| fs::metadata(dir.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("published.old"), mode("published")), (0o644, 0o600));
}

#[test]
fn what_is_there_is_not_replaced() {
    let dir = Dir::with_full_cache(MIB);
    dir.write("published", b"mine");
    dir.refuses(&["publish", "-b", "base.raw", CACHE, "published"], 1, "'published' exists");
}

#[test]
fn a_cache_is_not_published_over_its_base() {
    let dir = Dir::with_full_cache(MIB);
    dir.refuses(&["publish", "-f", "-b", "base.raw", CACHE, "base.raw"], 1, "the same file");
    dir.refuses(&["publish", "-f", "-b", "/there/a.raw", CACHE, "base.raw"], 1, "it is the base");
    assert_eq!(dir.names("."), ["base.raw", CACHE]);
}

#[test]
fn a_base_that_cannot_be_opened_as_its_format_is_refused_where_it_is() {
    let dir = Dir::with_full_cache(MIB);
    let options = ["publish", "-b", "base.raw", "-F", "bogus", CACHE, "published"];
    dir.refuses(&options, 1, "could not open base");
}

#[test]
fn a_url_is_no_place_to_publish_to() {
    let dir = Dir::with_full_cache(MIB);
    dir.refuses(
        &["publish", CACHE, "nfs://storage/ram/a.qcow2"],
        1,
        "DEST is a path on this machine",
    );
}

#[test]
fn a_cache_is_not_published_over_itself() {
    let dir = Dir::with_full_cache(MIB);
    let message = "cannot be published over itself";
    dir.refuses(&["publish", "-f", "-b", "base.raw", CACHE, CACHE], 1, message);
}

#[test]
fn who_has_the_old_edition_open_keeps_it_under_another_name() {
    let dir = Dir::with_cache(2 * MIB);
    dir.fill(MIB);
    publish(&dir, &[]);
    dir.fill(2 * MIB);
    publish(&dir, &["-f"]);
    assert_eq!(dir.names("."), ["base.raw", CACHE, "published", "published.old"]);
    assert_eq!((held(&dir, "published.old"), held(&dir, "published")), (MIB, 2 * MIB));
    is_sound(&dir, "published");
    is_sound(&dir, "published.old");
}

#[test]
fn a_new_edition_is_no_other_base_for_a_cache_on_it() {
    let dir = Dir::with_full_cache(MIB);
    publish(&dir, &[]);
    dir.vmcache(&["create", "-b", "published", "-F", "qcow2", "second"]).exits(0);
    publish(&dir, &["-f"]);
    let second = format!("driver=vmcache,file.filename={}", dir.text("second"));
    dir.vmcache_with_library(&[
        "exec",
        "qemu-io",
        "--image-opts",
        &second,
        "-r",
        "-c",
        "read 0 1M",
    ])
    .exits(0);
    let info = dir.vmcache(&["info", "--output=json", "second"]).json();
    assert_eq!((&info["state"], &info["cached-bytes"]), (&"filling".into(), &MIB.into()));
}

#[test]
fn a_base_that_others_cannot_find_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    let message = "cannot be found by other machines under that name";
    dir.refuses(&["publish", CACHE, "published"], 1, message);
}

#[test]
fn a_relative_base_starts_at_the_directory_of_what_is_published() {
    let dir = Dir::with_full_cache(MIB);
    fs::create_dir(dir.path("export")).unwrap();
    dir.vmcache(&["publish", "-b", "../base.raw", "-F", "raw", CACHE, "export/published"]).exits(0);
    is_sound(&dir, "export/published");
}

#[test]
fn a_base_of_another_size_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    dir.write("other.raw", &[1; 4096]);
    let message = "has 4096 bytes, the cache is of one with 1048576 bytes";
    dir.refuses(&["publish", "-b", "other.raw", CACHE, "published"], 1, message);
}

#[test]
fn a_base_that_is_not_to_be_seen_from_here_is_taken_with_a_warning() {
    let dir = Dir::with_full_cache(MIB);
    dir.vmcache(&["publish", "-b", "/there/base.raw", CACHE, "published"])
        .exits(0)
        .complains("could not find base '/there/base.raw'")
        .complains("if other machines find it, all is well");
    let info = dir.qemu("qemu-img", &["info", "--output=json", "published"]).json();
    assert_eq!(info["backing-filename"], "/there/base.raw");
}

#[test]
fn a_stale_cache_is_not_published() {
    let dir = Dir::with_full_cache(MIB);
    dir.touch("base.raw");
    dir.refuses(&["publish", "-b", "base.raw", CACHE, "published"], 1, "stale");
}

#[test]
fn a_damaged_cache_is_not_published() {
    let dir = Dir::with_full_cache(MIB);
    let layout = dir.layout();
    dir.poke(CACHE, layout.l2_entry_offset(0).0, &[0xff; 16]);
    dir.refuses(&["publish", "-b", "base.raw", CACHE, "published"], 1, "check --repair");
}

#[test]
fn a_cache_that_something_else_has_written_to_is_not_published() {
    let dir = Dir::with_full_cache(MIB);
    dir.qemu("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", CACHE]).exits(0);
    let message = "something other than vmcache has written";
    dir.refuses(&["publish", "-b", "base.raw", CACHE, "published"], 1, message);
}

#[test]
fn nowhere_is_no_place_to_publish_to() {
    let dir = Dir::with_full_cache(MIB);
    let message = "could not create 'no/published': No such file";
    dir.refuses(&["publish", "-b", "/base.raw", CACHE, "no/published"], 1, message);
}

#[test]
fn killed_at_any_moment_it_leaves_all_or_nothing() {
    let dir = Dir::with_full_cache(16 * MIB);
    for millis in 0..40 {
        let mut child = dir
            .command(&["publish", "-q", "-b", "base.raw", CACHE, "published"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(millis * 2));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut left = dir.names(".");
        left.retain(|name| !["base.raw", CACHE, LIVE].contains(&name.as_str()));
        left.iter().for_each(|name| is_sound(&dir, name));
        assert!(left.is_empty() || left == ["published"], "{left:?}");
        left.iter().for_each(|name| fs::remove_file(dir.path(name)).unwrap());
    }
}

#[test]
fn progress_is_shown_where_it_is_asked_for() {
    let dir = Dir::with_full_cache(MIB);
    dir.vmcache(&["publish", "-p", "-b", "base.raw", CACHE, "published"])
        .exits(0)
        .prints("Published 'cache.qcow2' as 'published' for base 'base.raw' (raw): 1 MiB of data")
        .complains("(100 %)");
}

#[test]
fn quiet_says_nothing() {
    let dir = Dir::with_full_cache(MIB);
    let run = dir.vmcache(&["publish", "-q", "-b", "base.raw", CACHE, "published"]).exits(0);
    assert_eq!(run.stdout + &run.stderr, "");
}
