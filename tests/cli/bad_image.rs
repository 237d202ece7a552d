//! Files that are not cache images, or damaged ones: a clear message, an exit code, and nothing
//! changed on disk.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::dir::{CACHE, Dir, KIB, MIB};

// Offsets in the header, docs/interop/qcow2.txt.
const VERSION: u64 = 4;
const BACKING_FILE_OFFSET: u64 = 8;
const BACKING_FILE_SIZE: u64 = 16;
const CLUSTER_BITS: u64 = 20;
const SIZE: u64 = 24;
const L1_SIZE: u64 = 36;
const L1_TABLE_OFFSET: u64 = 40;
const REFCOUNT_TABLE_OFFSET: u64 = 48;
const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
const INCOMPATIBLE_FEATURES: u64 = 72;
const HEADER_LENGTH: u64 = 100;

const COULD_NOT: i32 = 1;
const DAMAGED: i32 = 2;

/// A cache image with other bytes in its header.
fn with_header(at: u64, bytes: &[u8]) -> Dir {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, at, bytes);
    dir
}

#[test]
fn a_missing_image_is_refused() {
    Dir::new().is_refused(CACHE, COULD_NOT, "could not open 'cache.qcow2': No such file");
}

#[test]
fn a_file_that_is_not_a_qcow2_is_refused() {
    Dir::with_base(MIB).is_refused("base.raw", COULD_NOT, "not a qcow2 file");
}

#[test]
fn an_empty_file_is_refused() {
    Dir::with_base(0).is_refused("base.raw", COULD_NOT, "not a qcow2 file");
}

#[test]
fn a_qcow2_that_vmcache_did_not_make_is_refused() {
    let dir = Dir::new();
    dir.qemu("qemu-img", &["create", "-f", "qcow2", "other.qcow2", "10M"]).exits(0);
    dir.is_refused("other.qcow2", COULD_NOT, "not a cache image");
}

#[test]
fn a_directory_is_refused() {
    let dir = Dir::new();
    fs::create_dir(dir.path(CACHE)).unwrap();
    dir.refuses(&["info", CACHE], COULD_NOT, "not a regular file");
    dir.refuses(&["check", CACHE], COULD_NOT, "not a regular file");
    dir.refuses(&["check", "--repair", CACHE], COULD_NOT, "irectory");
    dir.refuses(&["stats", CACHE], COULD_NOT, "not a regular file");
    dir.refuses(&["drive", CACHE], COULD_NOT, "not a regular file");
}

#[test]
fn a_device_is_refused() {
    Dir::new().is_refused("/dev/null", COULD_NOT, "not a regular file");
}

#[test]
fn a_pipe_is_refused_without_waiting_for_a_writer() {
    let dir = Dir::new();
    Command::new("mkfifo").arg(dir.path(CACHE)).status().unwrap();
    dir.is_refused(CACHE, COULD_NOT, "not a regular file");
}

#[test]
fn an_image_that_may_not_be_read_is_refused() {
    let dir = Dir::with_cache(MIB);
    dir.chmod(CACHE, 0o000);
    let before = dir.contents();
    dir.vmcache_as_nobody(&["info", CACHE]).exits(1).complains("Permission denied");
    dir.vmcache_as_nobody(&["check", CACHE]).exits(1).complains("Permission denied");
    dir.vmcache_as_nobody(&["stats", CACHE]).exits(1).complains("Permission denied");
    assert_eq!(dir.contents(), before);
}

#[test]
fn an_image_that_may_not_be_written_is_checked_but_not_repaired() {
    let dir = Dir::with_full_cache(MIB);
    dir.chmod("base.raw", 0o644);
    dir.chmod(CACHE, 0o444);
    let before = dir.contents();
    dir.vmcache_as_nobody(&["check", CACHE]).exits(0);
    dir.vmcache_as_nobody(&["check", "--repair", CACHE]).exits(1).complains("Permission denied");
    assert_eq!(dir.contents(), before);
}

#[test]
fn an_image_cut_within_its_header_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    dir.set_len(CACHE, 100);
    dir.is_refused(CACHE, DAMAGED, "truncated");
}

#[test]
fn an_image_cut_within_its_extensions_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    dir.set_len(CACHE, 200);
    dir.is_refused(CACHE, DAMAGED, "truncated");
}

#[test]
fn an_image_cut_within_its_tables_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    dir.set_len(CACHE, dir.first_data_cluster() - 16 * KIB);
    dir.is_refused(CACHE, DAMAGED, "delete it and make a new one with 'vmcache create'");
}

#[test]
fn an_image_cut_within_its_data_is_damaged() {
    let dir = Dir::with_full_cache(MIB);
    dir.set_len(CACHE, dir.first_data_cluster() + 16 * KIB);
    let before = dir.contents();
    dir.vmcache(&["check", CACHE]).exits(DAMAGED).prints("are not what was stored");
    assert_eq!(dir.contents(), before);
}

#[test]
fn version_2_is_refused() {
    with_header(VERSION, &2u32.to_be_bytes()).is_refused(CACHE, COULD_NOT, "qcow2 version 2");
}

#[test]
fn version_4_is_refused() {
    with_header(VERSION, &4u32.to_be_bytes()).is_refused(CACHE, COULD_NOT, "qcow2 version 4");
}

#[test]
fn an_unknown_incompatible_feature_is_refused() {
    let dir = with_header(INCOMPATIBLE_FEATURES, &(1u64 << 40 | 1 << 4).to_be_bytes());
    dir.is_refused(CACHE, COULD_NOT, "unknown incompatible feature bits 0x10000000000");
}

#[test]
fn an_external_data_file_is_refused() {
    let dir = with_header(INCOMPATIBLE_FEATURES, &(1u64 << 2 | 1 << 4).to_be_bytes());
    dir.is_refused(CACHE, COULD_NOT, "unknown incompatible feature bits 0x4");
}

#[test]
fn an_image_without_extended_l2_entries_is_refused() {
    let dir = with_header(INCOMPATIBLE_FEATURES, &0u64.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "a cache image has extended L2 entries");
}

#[test]
fn an_image_marked_dirty_is_refused() {
    let dir = with_header(INCOMPATIBLE_FEATURES, &(1u64 | 1 << 4).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "dirty bit");
}

#[test]
fn an_image_marked_corrupt_is_refused() {
    let dir = with_header(INCOMPATIBLE_FEATURES, &(2u64 | 1 << 4).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "marked corrupt");
}

#[test]
fn a_nonsense_cluster_size_is_refused() {
    let dir = with_header(CLUSTER_BITS, &60u32.to_be_bytes());
    dir.is_refused(CACHE, COULD_NOT, "cluster size of 2^60 bytes");
}

#[test]
fn a_virtual_size_of_zero_is_refused() {
    let dir = with_header(SIZE, &0u64.to_be_bytes());
    dir.is_refused(CACHE, COULD_NOT, "virtual size of 0 bytes");
}

#[test]
fn a_virtual_size_beyond_the_format_is_refused() {
    let dir = with_header(SIZE, &(u64::MAX - 511).to_be_bytes());
    dir.is_refused(CACHE, COULD_NOT, "too large");
}

#[test]
fn a_virtual_size_that_does_not_fit_the_tables_is_refused() {
    let dir = with_header(SIZE, &(1u64 << 40).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "L1");
}

#[test]
fn a_header_length_beyond_the_file_is_refused() {
    let dir = with_header(HEADER_LENGTH, &0xffff_fff8u32.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "header length");
}

#[test]
fn a_backing_file_name_outside_the_header_is_refused() {
    let dir = with_header(BACKING_FILE_OFFSET, &u64::MAX.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "the backing file name lies outside the header");
}

#[test]
fn a_backing_file_name_that_is_too_long_is_refused() {
    let dir = with_header(BACKING_FILE_SIZE, &u32::MAX.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "missing or too long");
}

#[test]
fn an_l1_table_beyond_the_file_is_refused() {
    let dir = with_header(L1_TABLE_OFFSET, &(1u64 << 50).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "L1 table at 0x4000000000000");
}

#[test]
fn an_l1_table_at_the_end_of_the_number_space_is_refused() {
    let dir = with_header(L1_TABLE_OFFSET, &(u64::MAX << 14).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "ends beyond the file");
}

#[test]
fn an_l1_table_that_is_not_aligned_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    let layout = dir.layout();
    let at = layout.offset(layout.l1_table).0 + 512;
    dir.poke(CACHE, L1_TABLE_OFFSET, &at.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "L1 table offset");
}

#[test]
fn an_l1_table_over_the_header_is_refused() {
    let dir = with_header(L1_TABLE_OFFSET, &0u64.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "L1 table offset 0 overlaps the header");
}

#[test]
fn an_l1_table_over_the_refcount_table_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    let at = dir.layout().refcount_table_offset().0;
    dir.poke(CACHE, L1_TABLE_OFFSET, &at.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "the L1 table and the refcount table overlap");
}

#[test]
fn an_l1_table_somewhere_else_is_refused() {
    let dir = Dir::with_full_cache(MIB);
    dir.poke(CACHE, L1_TABLE_OFFSET, &dir.first_data_cluster().to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "where a cache image has");
}

#[test]
fn an_l1_table_of_another_length_is_refused() {
    let dir = with_header(L1_SIZE, &2u32.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "number of L1 entries");
}

#[test]
fn a_refcount_table_beyond_the_file_is_refused() {
    let dir = with_header(REFCOUNT_TABLE_OFFSET, &(1u64 << 50).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "refcount table at 0x4000000000000");
}

#[test]
fn a_refcount_table_that_is_not_aligned_is_refused() {
    let dir = with_header(REFCOUNT_TABLE_OFFSET, &(16 * KIB + 8).to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "refcount table offset 0x4008 is not aligned to a cluster");
}

#[test]
fn a_refcount_table_over_the_header_is_refused() {
    let dir = with_header(REFCOUNT_TABLE_OFFSET, &0u64.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "refcount table offset 0 overlaps the header");
}

#[test]
fn a_refcount_table_of_nonsense_length_is_refused() {
    let dir = with_header(REFCOUNT_TABLE_CLUSTERS, &u32::MAX.to_be_bytes());
    dir.is_refused(CACHE, DAMAGED, "refcount table");
}

#[test]
fn random_bytes_after_the_magic_are_refused() {
    let dir = Dir::with_full_cache(MIB);
    let noise = (0u32..4000).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes());
    dir.poke(CACHE, 4, &noise.collect::<Vec<u8>>());
    dir.is_refused(CACHE, COULD_NOT, "qcow2 version 0");
}

#[test]
fn random_damage_anywhere_in_the_tables_never_makes_a_crash() {
    let dir = Dir::with_full_cache(MIB);
    let sound = fs::read(dir.path(CACHE)).unwrap();
    let tables = 4..dir.first_data_cluster();
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..100 {
        dir.write(CACHE, &sound);
        let at = rng.random_range(tables.clone());
        dir.poke(CACHE, at, &rng.random::<[u8; 8]>());
        let at = rng.random_range(4..300);
        dir.poke(CACHE, at, &rng.random::<[u8; 1]>());
        let codes = [&["check", CACHE][..], &["check", "--repair", CACHE], &["info", CACHE]]
            .map(|arguments| dir.vmcache(arguments).code);
        assert!(codes.iter().all(|code| (0..=3).contains(code)), "{codes:?}");
    }
}

#[test]
fn the_message_names_the_file() {
    let dir = with_header(VERSION, &2u32.to_be_bytes());
    let name = fs::canonicalize(dir.path(CACHE)).unwrap();
    dir.vmcache(&["info", CACHE]).exits(1).complains(OsStr::to_str(name.as_ref()).unwrap());
}

#[test]
fn a_stock_qemu_that_has_written_to_the_image_makes_it_worthless() {
    let dir = Dir::with_full_cache(MIB);
    dir.qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 4k", CACHE]).exits(0);
    let before = dir.contents();
    dir.vmcache(&["info", CACHE]).exits(0).prints("state: damaged (");
    dir.vmcache(&["check", CACHE])
        .exits(DAMAGED)
        .complains("something other than vmcache has written to this image");
    dir.vmcache(&["check", "--repair", CACHE]).exits(DAMAGED).complains("vmcache create --force");
    dir.vmcache(&["drive", CACHE]).exits(1).complains("vmcache create --force");
    assert_eq!(dir.contents(), before);
}
