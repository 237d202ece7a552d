//! `vmcache info` and `vmcache stats`: what they say of an image, at rest and in use.

use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::dir::{CACHE, Dir, KIB, LIVE, MIB};

const INFO_KEYS: [&str; 14] = [
    "filename",
    "format",
    "virtual-size",
    "cluster-size",
    "subcluster-size",
    "quota",
    "cached-bytes",
    "zero-bytes",
    "actual-size",
    "uuid",
    "backing-filename",
    "backing-filename-format",
    "state",
    "processes",
];

const STATS_KEYS: [&str; 12] = [
    "reads",
    "hit-bytes",
    "zero-bytes",
    "miss-bytes",
    "waited-bytes",
    "base-reads",
    "base-bytes",
    "populated-bytes",
    "dropped-bytes",
    "populate-errors",
    "checkpoints",
    "processes",
];

fn info(dir: &Dir) -> Value {
    dir.vmcache(&["info", "--output=json", CACHE]).exits(0).json()
}

fn stats(dir: &Dir) -> Value {
    dir.vmcache(&["stats", "--output=json", CACHE]).exits(0).json()
}

#[track_caller]
fn has_keys(value: &Value, keys: &[&str]) {
    let missing: Vec<_> = keys.iter().filter(|key| value.get(key).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?} missing in {value}");
}

/// Asks until the answer suits, since populating happens behind the reads.
#[track_caller]
fn eventually(ask: impl Fn() -> Value, suits: impl Fn(&Value) -> bool) -> Value {
    (0..500)
        .map(|_| ask())
        .find(|answer| {
            std::thread::sleep(Duration::from_millis(10));
            suits(answer)
        })
        .unwrap()
}

#[test]
fn info_has_the_keys_of_the_contract() {
    has_keys(&info(&Dir::with_cache(MIB)), &INFO_KEYS);
}

#[test]
fn stats_has_the_keys_of_the_contract() {
    has_keys(&stats(&Dir::with_cache(MIB)), &STATS_KEYS);
}

#[test]
fn info_of_an_empty_image() {
    let info = info(&Dir::with_cache(MIB));
    assert_eq!(info["filename"], CACHE);
    assert_eq!(info["format"], "vmcache");
    assert_eq!(info["virtual-size"], MIB);
    assert_eq!(info["cluster-size"], 16 * KIB);
    assert_eq!(info["subcluster-size"], 512);
    assert_eq!(info["quota"], Value::Null);
    assert_eq!(info["cached-bytes"], 0);
    assert_eq!(info["zero-bytes"], 0);
    assert_eq!(info["backing-filename"], "base.raw");
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["state"], "empty");
    assert_eq!(info["reason"], Value::Null);
    assert_eq!(info["processes"], 0);
    assert_eq!(info["process-list"], Value::Array(Vec::new()));
}

#[test]
fn info_counts_what_is_cached() {
    let info = info(&Dir::with_full_cache(MIB));
    assert_eq!(info["cached-bytes"], MIB);
    assert_eq!(info["zero-bytes"], 0);
    assert_eq!(info["state"], "filling");
    assert!(info["actual-size"].as_u64() >= Some(MIB), "{info}");
}

#[test]
fn info_counts_zeros_by_themselves() {
    let dir = Dir::new();
    dir.set_len("base.raw", MIB);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    dir.fill(MIB);
    let info = info(&dir);
    assert_eq!(info["cached-bytes"], 0);
    assert_eq!(info["zero-bytes"], MIB);
}

#[test]
fn a_full_image_of_a_disk_that_ends_within_a_subcluster_holds_the_disk_and_no_more() {
    let dir = Dir::with_base(MIB + 512);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    dir.fill(MIB + 512);
    assert_eq!(info(&dir)["cached-bytes"], MIB + 512);
}

#[test]
fn info_is_the_same_through_a_link() {
    let dir = Dir::with_full_cache(MIB);
    symlink(CACHE, dir.path("link")).unwrap();
    let through_link = dir.vmcache(&["info", "--output=json", "link"]).exits(0).json();
    assert_eq!(through_link["uuid"], info(&dir)["uuid"]);
    assert_eq!(through_link["state"], "filling");
}

#[test]
fn info_for_people_names_sizes_and_base() {
    Dir::with_cache(MIB)
        .vmcache(&["info", CACHE])
        .exits(0)
        .prints("virtual size: 1 MiB (1048576 bytes)")
        .prints("cluster size: 16 KiB (subclusters of 512 bytes)")
        .prints("backing file: base.raw\n")
        .prints("state: empty\n");
}

#[test]
fn info_shows_an_image_in_use_and_who_uses_it() {
    let dir = Dir::with_cache(MIB);
    let engine = dir.open();
    dir.read(&engine, MIB);
    let info = eventually(|| info(&dir), |info| info["cached-bytes"] == MIB);
    assert_eq!(info["processes"], 1);
    assert_eq!(info["process-list"][0]["pid"], std::process::id());
    assert_eq!(info["process-list"][0]["reads"], 1);
    dir.close(engine);
}

#[test]
fn stats_counts_misses_and_then_hits() {
    let dir = Dir::with_cache(MIB);
    let engine = dir.open();
    dir.read(&engine, MIB);
    let cold = eventually(|| stats(&dir), |stats| stats["populated-bytes"] == MIB);
    dir.read(&engine, MIB);
    let warm = stats(&dir);
    assert_eq!((&cold["reads"], &cold["base-bytes"]), (&1.into(), &MIB.into()));
    assert_eq!((&warm["reads"], &warm["base-bytes"]), (&2.into(), &MIB.into()));
    assert_eq!((&warm["miss-bytes"], &warm["hit-bytes"]), (&MIB.into(), &MIB.into()));
    dir.close(engine);
}

#[test]
fn stats_keeps_counting_what_ended_processes_did() {
    let dir = Dir::with_cache(MIB);
    let engine = dir.open();
    dir.read(&engine, MIB);
    dir.close(engine);
    let stats = eventually(|| stats(&dir), |stats| stats["processes"] == 0);
    assert_eq!(stats["reads"], 1);
    assert!(stats["checkpoints"].as_u64() >= Some(1), "{stats}");
}

#[test]
fn stats_for_people_shows_the_hit_rate() {
    let dir = Dir::with_cache(MIB);
    let engine = dir.open();
    dir.read(&engine, MIB);
    eventually(|| stats(&dir), |stats| stats["populated-bytes"] == MIB);
    dir.read(&engine, MIB);
    dir.vmcache(&["stats", CACHE]).exits(0).prints("hit rate: 50.0 %").prints("processes: 1");
    dir.close(engine);
}

#[test]
fn looking_at_an_image_changes_nothing() {
    let dir = Dir::with_full_cache(MIB);
    let before = dir.contents();
    dir.vmcache(&["info", CACHE]).exits(0);
    dir.vmcache(&["stats", CACHE]).exits(0);
    dir.vmcache(&["drive", CACHE]).exits(0);
    assert_eq!(dir.contents(), before);
}

#[test]
fn a_live_file_of_something_else_is_not_believed() {
    let dir = Dir::with_full_cache(MIB);
    dir.write(LIVE, &[0x55; 100_000]);
    assert_eq!(info(&dir)["cached-bytes"], MIB);
}

#[test]
fn an_image_open_for_writing_in_qemu_is_left_alone() {
    let dir = Dir::with_cache(MIB);
    let mut writer = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", &dir.text(CACHE)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its prompt says that the image is open.
    writer.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    let run = dir.vmcache(&["info", CACHE]);
    drop(writer.stdin.take());
    writer.wait().unwrap();
    run.exits(1).complains("another program");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let dir = Dir::with_cache(MIB);
    let mut child = dir
        .command(&["info", CACHE])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let dir = Dir::with_cache(MIB);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = dir.command(&["info", CACHE]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("could not write to standard output"), "{message}");
}

#[test]
fn control_characters_in_a_base_name_do_not_reach_the_terminal() {
    let dir = Dir::with_base(MIB);
    std::fs::rename(dir.path("base.raw"), dir.path("b\x1b[2Jase")).unwrap();
    dir.vmcache(&["create", "-b", "b\x1b[2Jase", "-F", "raw", CACHE]).exits(0);
    let run = dir.vmcache(&["info", CACHE]).exits(0);
    assert!(!run.stdout.contains('\x1b'), "{run:?}");
}
