//! `vmcache check`: its exit codes, and that --repair puts right what it finds, QEMU agreeing.

use std::fs;

use crate::dir::{CACHE, Dir, KIB, LIVE, MIB};

/// "Bit 63: refcount is exactly one".
const COPIED: u64 = 1 << 63;

/// A full cache image of 1 MiB whose guest cluster 3 has this L2 entry: the first half as it is
/// given, the second as it was, all 32 subclusters data.
fn with_l2_entry(descriptor: u64) -> Dir {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0, &descriptor.to_be_bytes());
    dir
}

/// Where the data of guest cluster 0 lies, or of one after it.
fn data_cluster(dir: &Dir, index: u64) -> u64 {
    let layout = dir.layout();
    layout.offset(layout.data + index).0
}

/// Asserts that check finds this damage and changes nothing, and that --repair puts it right.
#[track_caller]
fn is_found_and_repaired(dir: &Dir, message: &str) {
    let before = dir.contents();
    dir.vmcache(&["check", CACHE]).exits(2).prints(message).prints("reads go to the base");
    assert_eq!(dir.contents(), before);
    dir.vmcache(&["info", CACHE]).exits(0).prints("state: damaged");
    dir.vmcache(&["check", "--repair", CACHE]).exits(0).prints("Repaired: ");
    dir.vmcache(&["check", CACHE]).exits(0).prints("No errors were found");
    dir.is_sound_to_qemu();
}

#[test]
fn an_empty_image_is_clean() {
    Dir::with_cache(MIB)
        .vmcache(&["check", CACHE])
        .exits(0)
        .prints("No errors were found on the image.")
        .prints("0/64 = 0.00% clusters allocated");
}

#[test]
fn a_full_image_is_clean() {
    let dir = Dir::with_full_cache(MIB);
    dir.vmcache(&["check", CACHE]).exits(0).prints("64/64 = 100.00% clusters allocated");
    dir.is_sound_to_qemu();
}

#[test]
fn checking_a_clean_image_changes_nothing_with_repair_either() {
    let dir = Dir::with_full_cache(MIB);
    let before = dir.contents();
    dir.vmcache(&["check", CACHE]).exits(0);
    dir.vmcache(&["check", "--repair", CACHE]).exits(0);
    assert_eq!(dir.contents(), before);
}

#[test]
fn an_l2_entry_beyond_the_largest_file_is_damage() {
    let dir = with_l2_entry(1 << 50 | COPIED);
    is_found_and_repaired(&dir, "host offset 0x4000000000000 is not in the data area");
}

#[test]
fn an_l2_entry_in_the_tables_is_damage() {
    is_found_and_repaired(&with_l2_entry(16 << 10 | COPIED), "is not in the data area");
}

#[test]
fn an_l2_entry_that_is_not_aligned_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    let descriptor = (data_cluster(&dir, 3) + 512) | COPIED;
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0, &descriptor.to_be_bytes());
    is_found_and_repaired(&dir, "not aligned to a cluster");
}

#[test]
fn two_l2_entries_with_one_host_cluster_are_damage() {
    let dir = Dir::with_full_cache(MIB);
    let descriptor = data_cluster(&dir, 0) | COPIED;
    dir.poke(CACHE, dir.layout().l2_entry_offset(1).0, &descriptor.to_be_bytes());
    dir.poke(CACHE, dir.layout().l2_entry_offset(2).0, &descriptor.to_be_bytes());
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0, &descriptor.to_be_bytes());
    is_found_and_repaired(&dir, "belongs to guest cluster");
}

#[test]
fn a_compressed_cluster_is_damage() {
    is_found_and_repaired(&with_l2_entry(1 << 62), "is a compressed cluster");
}

#[test]
fn data_without_a_host_cluster_is_damage() {
    is_found_and_repaired(&with_l2_entry(0), "has data but no host offset");
}

#[test]
fn a_subcluster_both_data_and_zero_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0 + 8, &u64::MAX.to_be_bytes());
    is_found_and_repaired(&dir, "both data and zero");
}

#[test]
fn a_used_cluster_without_a_refcount_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    let layout = dir.layout();
    dir.poke(CACHE, layout.refcount_offset(layout.data).0, &[0, 0]);
    is_found_and_repaired(&dir, "has refcount 0, not 1");
}

#[test]
fn a_refcount_of_two_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    let layout = dir.layout();
    dir.poke(CACHE, layout.refcount_offset(layout.data).0, &[0, 2]);
    is_found_and_repaired(&dir, "has refcount 2, not 1");
}

#[test]
fn used_clusters_in_a_hole_of_the_refcounts_are_damage() {
    let dir = Dir::with_full_cache(MIB);
    let at = dir.layout().refcount_offset(0).0;
    dir.punch_hole(CACHE, at, 16 * KIB);
    is_found_and_repaired(&dir, "clusters in use have refcount 0");
}

#[test]
fn a_table_without_a_refcount_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().refcount_offset(0).0, &[0, 0]);
    is_found_and_repaired(&dir, "cluster 0 of the file has refcount 0");
}

#[test]
fn an_l1_entry_that_points_elsewhere_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    let layout = dir.layout();
    let elsewhere = data_cluster(&dir, 0) | COPIED;
    dir.poke(CACHE, layout.offset(layout.l1_table).0, &elsewhere.to_be_bytes());
    is_found_and_repaired(&dir, "L1 table, entry 0");
}

#[test]
fn a_refcount_table_entry_that_is_not_aligned_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().refcount_table_offset().0, &(32 * KIB + 1).to_be_bytes());
    is_found_and_repaired(&dir, "refcount table, entry 0");
}

#[test]
fn a_refcount_table_entry_beyond_the_file_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().refcount_table_offset().0, &(1u64 << 50).to_be_bytes());
    is_found_and_repaired(&dir, "refcount table, entry 0");
}

#[test]
fn a_refcount_table_entry_after_the_last_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    let after = dir.layout().refcount_table_offset().0 + 8 * dir.layout().refcount_blocks;
    dir.poke(CACHE, after, &1u64.to_be_bytes());
    is_found_and_repaired(&dir, "refcount table, entry 1: 0x1 where a cache image has 0x0");
}

#[test]
fn an_l2_entry_after_the_end_of_the_disk_is_damage() {
    let dir = Dir::with_full_cache(MIB);
    let after = dir.layout().l2_entry_offset(dir.geometry().clusters()).0;
    dir.poke(CACHE, after, &(data_cluster(&dir, 3) | COPIED).to_be_bytes());
    is_found_and_repaired(&dir, "an L2 entry beyond the end of the disk");
}

#[test]
fn more_damage_than_anybody_reads_is_counted() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().l2_entry_offset(0).0, &[0xff; 64 * 16]);
    is_found_and_repaired(&dir, "more");
}

/// A cache image that was filled and whose guest clusters from 32 on were forgotten.
fn with_leaks() -> Dir {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, dir.layout().l2_entry_offset(32).0, &[0; 32 * 16]);
    dir
}

#[test]
fn leaks_alone_have_an_exit_code_of_their_own() {
    let dir = with_leaks();
    let before = dir.contents();
    dir.vmcache(&["check", CACHE]).exits(3).prints("32 leaked clusters were found on the image.");
    assert_eq!(dir.contents(), before);
    dir.qemu("qemu-img", &["check", "-f", "qcow2", CACHE]).exits(3);
}

#[test]
fn repair_gives_leaked_clusters_back() {
    let dir = with_leaks();
    dir.vmcache(&["check", "--repair", CACHE])
        .exits(0)
        .prints("Repaired: 0 errors, 32 leaked clusters.");
    dir.vmcache(&["check", CACHE]).exits(0).prints("32/64 = 50.00% clusters allocated");
    dir.is_sound_to_qemu();
}

#[test]
fn refcounts_of_clusters_that_the_file_can_never_have_are_leaks() {
    let dir = Dir::with_full_cache(MIB);
    let after = dir.layout().refcount_offset(dir.layout().end).0;
    dir.poke(CACHE, after, &[0, 1, 0, 1]);
    dir.vmcache(&["check", CACHE]).exits(3).prints("2 leaked clusters");
    dir.vmcache(&["check", "--repair", CACHE]).exits(0);
    dir.is_sound_to_qemu();
}

#[test]
fn damage_counts_more_than_leaks() {
    let dir = with_leaks();
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0, &(1u64 << 62).to_be_bytes());
    dir.vmcache(&["check", CACHE]).exits(2).prints("leaked clusters").prints("ERROR ");
    dir.vmcache(&["check", "--repair", CACHE]).exits(0);
    dir.is_sound_to_qemu();
}

/// Asserts that the image is stale for this reason, whatever is tried with it.
#[track_caller]
fn is_stale(dir: &Dir, reason: &str) {
    let before = dir.contents();
    dir.vmcache(&["check", CACHE]).exits(2).prints("The image is stale: ").prints(reason);
    dir.vmcache(&["check", "--repair", CACHE]).exits(2).prints("vmcache create -f");
    dir.vmcache(&["info", CACHE]).exits(0).prints("state: stale (").prints(reason);
    dir.vmcache(&["drive", CACHE]).exits(0).complains("is stale, reads will go to the base");
    assert_eq!(dir.contents(), before);
}

#[test]
fn a_base_of_another_size_makes_the_image_stale() {
    let dir = Dir::with_full_cache(MIB);
    dir.set_len("base.raw", 2 * MIB);
    is_stale(&dir, "the base has 2097152 bytes, the cache was made for 1048576 bytes");
}

#[test]
fn a_base_of_another_size_makes_the_image_stale_though_its_time_was_set_back() {
    let dir = Dir::with_full_cache(MIB);
    let modified = fs::metadata(dir.path("base.raw")).unwrap().modified().unwrap();
    dir.set_len("base.raw", 2 * MIB);
    let file = fs::File::options().append(true).open(dir.path("base.raw")).unwrap();
    file.set_modified(modified).unwrap();
    is_stale(&dir, "the base has 2097152 bytes");
}

#[test]
fn a_base_that_was_modified_makes_the_image_stale() {
    let dir = Dir::with_full_cache(MIB);
    dir.touch("base.raw");
    is_stale(&dir, "the base was modified after the cache was made");
}

#[test]
fn a_base_that_was_replaced_makes_the_image_stale() {
    let dir = Dir::with_full_cache(MIB);
    fs::copy(dir.path("base.raw"), dir.path("new.raw")).unwrap();
    fs::rename(dir.path("new.raw"), dir.path("base.raw")).unwrap();
    is_stale(&dir, "the base is another file than the one the cache was made from");
}

#[test]
fn a_base_that_is_gone_makes_the_image_stale() {
    let dir = Dir::with_full_cache(MIB);
    fs::remove_file(dir.path("base.raw")).unwrap();
    is_stale(&dir, "No such file");
}

#[test]
fn an_image_in_use_is_checked_but_not_repaired() {
    let dir = Dir::with_cache(MIB);
    let engine = dir.open();
    dir.read(&engine, MIB);
    dir.vmcache(&["check", CACHE]).exits(0);
    dir.vmcache(&["check", "--repair", CACHE]).exits(1).complains("in use");
    dir.close(engine);
}

#[test]
fn repair_drops_the_live_state_that_was_made_from_damaged_tables() {
    let dir = Dir::with_full_cache(MIB);
    dir.close(dir.open());
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0, &(1u64 << 62).to_be_bytes());
    dir.vmcache(&["check", "--repair", CACHE]).exits(0);
    assert!(!dir.path(LIVE).exists());
    dir.is_sound_to_qemu();
}

#[test]
fn json_has_the_keys_of_qemu_img_check() {
    let report = with_leaks().vmcache(&["check", "--output=json", CACHE]).exits(3).json();
    assert_eq!(report["filename"], CACHE);
    assert_eq!(report["format"], "vmcache");
    assert_eq!(report["check-errors"], 0);
    assert_eq!(report["corruptions"], 0);
    assert_eq!(report["leaks"], 32);
    assert_eq!(report["allocated-clusters"], 32);
    assert_eq!(report["total-clusters"], 64);
    assert_eq!(report["stale"], false);
}

#[test]
fn json_says_what_was_fixed() {
    let dir = with_leaks();
    dir.poke(CACHE, dir.layout().l2_entry_offset(3).0, &(1u64 << 62).to_be_bytes());
    let report = dir.vmcache(&["check", "--repair", "--output=json", CACHE]).exits(0).json();
    assert_eq!(report["corruptions"], 0);
    assert_eq!(report["corruptions-fixed"], 1);
    // The cluster of the entry that was dropped is one more, found on the way.
    assert!(report["leaks-fixed"].as_u64() >= Some(32), "{report}");
}

#[test]
fn json_says_so_when_the_header_is_damaged() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, 40, &[0xff; 8]);
    let report = dir.vmcache(&["check", "--output=json", CACHE]).exits(2).json();
    assert_eq!(report["corruptions"], 1);
    assert!(report["findings"][0].as_str().unwrap().contains("L1 table"), "{report}");
}

#[test]
fn progress_is_shown_where_it_is_asked_for() {
    let dir = Dir::with_full_cache(MIB);
    dir.vmcache(&["check", "-p", CACHE]).exits(0).complains("(100 %)");
    assert_eq!(dir.vmcache(&["check", CACHE]).exits(0).stderr, "");
}

#[test]
fn quiet_leaves_it_to_the_exit_code() {
    let run = with_leaks().vmcache(&["check", "-q", CACHE]).exits(3);
    assert_eq!(run.stdout + &run.stderr, "");
}
