//! Command lines that make no sense, and bases that are not there: each a clear message, an exit
//! code, and nothing changed on disk.

use std::fs;
use std::os::unix::fs::symlink;

use crate::dir::{CACHE, Dir, MIB};

/// `create` with these options after the base.
fn refuses_options(options: &[&str], code: i32, message: &str) {
    let dir = Dir::with_base(MIB);
    let arguments = [&["create", "-b", "base.raw", "-F", "raw"], options, &[CACHE]].concat();
    dir.refuses(&arguments, code, message);
}

const NO_SIZE: &str = "is not a size; give a number of bytes, or one with K, M, G or T";
const CLUSTER_SIZES: &str = "the cluster size is a power of two from 16K to 2M";

#[test]
fn a_size_of_words_is_refused() {
    refuses_options(&["-o", "quota=abc"], 1, NO_SIZE);
}

#[test]
fn a_negative_size_is_refused() {
    refuses_options(&["-o", "quota=-1"], 1, NO_SIZE);
}

#[test]
fn an_empty_size_is_refused() {
    refuses_options(&["-o", "quota="], 1, NO_SIZE);
}

#[test]
fn an_unknown_unit_is_refused() {
    refuses_options(&["-o", "quota=5X"], 1, NO_SIZE);
}

#[test]
fn a_size_beyond_64_bits_is_refused() {
    refuses_options(&["-o", "quota=99999999999999999999"], 1, "too large");
}

#[test]
fn a_size_beyond_64_bits_with_its_unit_is_refused() {
    refuses_options(&["-o", "quota=8589934592G"], 1, "too large");
}

#[test]
fn a_quota_of_zero_is_refused() {
    refuses_options(&["-o", "quota=0"], 1, "leave it out for no limit");
}

#[test]
fn a_quota_too_small_for_the_tables_is_refused_with_the_least() {
    refuses_options(&["-o", "quota=64K"], 1, "this image needs at least");
}

#[test]
fn a_cluster_size_of_zero_is_refused() {
    refuses_options(&["-o", "cluster_size=0"], 1, CLUSTER_SIZES);
}

#[test]
fn a_cluster_size_that_is_no_power_of_two_is_refused() {
    refuses_options(&["-o", "cluster_size=100K"], 1, CLUSTER_SIZES);
}

#[test]
fn a_cluster_size_below_16_kib_is_refused() {
    refuses_options(&["-o", "cluster_size=8K"], 1, CLUSTER_SIZES);
}

#[test]
fn a_cluster_size_above_2_mib_is_refused() {
    refuses_options(&["-o", "cluster_size=4M"], 1, CLUSTER_SIZES);
}

#[test]
fn an_unknown_option_is_refused_with_those_there_are() {
    refuses_options(
        &["-o", "preallocation=full"],
        1,
        "unknown option 'preallocation'; the options are quota=SIZE and cluster_size=SIZE",
    );
}

#[test]
fn an_option_without_a_value_is_refused() {
    refuses_options(&["-o", "quota"], 1, "'quota' is not of the form name=value");
}

#[test]
fn an_option_given_twice_is_refused() {
    refuses_options(&["-o", "quota=1G,quota=2G"], 1, "quota is given twice");
}

#[test]
fn an_option_given_twice_in_two_arguments_is_refused() {
    refuses_options(&["-o", "quota=1G", "-o", "quota=1G"], 1, "quota is given twice");
}

#[test]
fn a_mode_that_is_not_octal_is_refused() {
    refuses_options(&["--mode", "0689"], 2, "octal number from 0 to 0777");
}

#[test]
fn a_mode_beyond_permission_bits_is_refused() {
    refuses_options(&["--mode", "4755"], 2, "octal number from 0 to 0777");
}

#[test]
fn a_size_after_the_name_is_refused() {
    let dir = Dir::with_base(MIB);
    dir.refuses(&["create", "-b", "base.raw", "-F", "raw", CACHE, "10G"], 2, "unexpected argument");
}

#[test]
fn a_missing_base_argument_is_refused() {
    Dir::with_base(MIB).refuses(&["create", "-F", "raw", CACHE], 2, "-b <BASE>");
}

#[test]
fn a_missing_format_argument_is_refused() {
    Dir::with_base(MIB).refuses(&["create", "-b", "base.raw", CACHE], 2, "-F <FMT>");
}

#[test]
fn an_unknown_subcommand_is_refused() {
    Dir::new().refuses(&["convert"], 2, "unrecognized subcommand");
}

#[test]
fn no_subcommand_is_refused_with_the_list() {
    Dir::new().refuses(&[], 2, "create");
}

#[test]
fn an_unknown_output_form_is_refused() {
    Dir::with_cache(MIB).refuses(&["info", "--output=xml", CACHE], 2, "[possible values: human");
}

#[test]
fn a_wrong_command_line_of_check_does_not_pass_for_a_damaged_image() {
    Dir::with_cache(MIB).refuses(&["check", "--fix", CACHE], 1, "unexpected argument");
}

/// `create` with this base and format.
fn refuses_base(dir: &Dir, base: &str, format: &str, message: &str) {
    dir.refuses(&["create", "-b", base, "-F", format, CACHE], 1, message);
}

#[test]
fn a_missing_raw_base_is_refused() {
    let message = "could not find base 'none.raw': No such file";
    refuses_base(&Dir::new(), "none.raw", "raw", message);
}

#[test]
fn a_missing_qcow2_base_is_refused() {
    let message = "could not find base 'none.qcow2': No such file";
    refuses_base(&Dir::new(), "none.qcow2", "qcow2", message);
}

#[test]
fn a_base_that_is_there_but_not_from_the_caches_directory_is_refused_with_advice() {
    let dir = Dir::with_base(MIB);
    fs::create_dir(dir.path("caches")).unwrap();
    let arguments = ["create", "-b", "base.raw", "-F", "raw", "caches/cache.qcow2"];
    dir.refuses(&arguments, 1, "a relative name starts at the cache image's directory");
}

#[test]
fn a_base_that_does_not_answer_is_refused_in_qemus_words() {
    let dir = Dir::new();
    let url = format!("nbd+unix:///?socket={}", dir.text("nobody-listens"));
    refuses_base(&dir, &url, "raw", "Failed to connect to");
}

#[test]
fn a_base_that_is_a_directory_is_refused() {
    let dir = Dir::new();
    fs::create_dir(dir.path("base")).unwrap();
    refuses_base(&dir, "base", "raw", "base 'base' is a directory");
}

#[test]
fn a_base_that_is_a_device_without_blocks_is_refused() {
    refuses_base(&Dir::new(), "/dev/null", "raw", "neither a file nor a block device");
}

#[test]
fn an_empty_base_is_refused() {
    let dir = Dir::with_base(0);
    refuses_base(&dir, "base.raw", "raw", "base 'base.raw' is empty: there is nothing to cache");
}

#[test]
fn an_empty_qcow2_base_is_refused() {
    let dir = Dir::new();
    dir.qemu("qemu-img", &["create", "-f", "qcow2", "base.qcow2", "0"]).exits(0);
    refuses_base(&dir, "base.qcow2", "qcow2", "base 'base.qcow2' is empty");
}

#[test]
fn a_base_without_a_name_is_refused() {
    refuses_base(&Dir::new(), "", "raw", "the name of the base is empty");
}

#[test]
fn a_base_relative_to_wherever_qemu_starts_is_refused() {
    refuses_base(&Dir::with_base(MIB), "file:base.raw", "raw", "leave 'file:' away");
}

#[test]
fn a_base_with_too_long_a_name_is_refused() {
    let name = format!("{}base.raw", "./".repeat(520));
    refuses_base(&Dir::with_base(MIB), &name, "raw", "qcow2 allows 1023");
}

#[test]
fn a_format_that_qemu_does_not_know_is_refused() {
    refuses_base(&Dir::with_base(MIB), "base.raw", "nonsense", "Unknown driver 'nonsense'");
}

#[test]
fn a_base_of_another_format_is_refused() {
    refuses_base(&Dir::with_base(MIB), "base.raw", "qcow2", "Image is not in qcow2 format");
}

#[test]
fn the_drivers_own_name_as_the_format_is_refused_with_advice() {
    refuses_base(&Dir::with_base(MIB), "base.raw", "vmcache", "name the other one with -F qcow2");
}

#[test]
fn a_base_that_only_qemu_can_look_at_needs_qemu_img() {
    let dir = Dir::with_base(MIB);
    let before = dir.contents();
    let arguments = ["create", "-b", "base.raw", "-F", "qcow2", CACHE];
    dir.vmcache_with("PATH", "/nonexistent", &arguments)
        .exits(1)
        .complains("qemu-img is not installed");
    assert_eq!(dir.contents(), before);
}

#[test]
fn a_cache_is_not_its_own_base() {
    let dir = Dir::with_cache(MIB);
    let arguments = ["create", "--force", "-b", CACHE, "-F", "raw", CACHE];
    dir.refuses(&arguments, 1, "are the same file");
}

#[test]
fn a_cache_is_not_its_own_base_under_another_name() {
    let dir = Dir::with_cache(MIB);
    symlink(dir.path(CACHE), dir.path("other")).unwrap();
    let arguments = ["create", "--force", "-b", "other", "-F", "qcow2", CACHE];
    dir.refuses(&arguments, 1, "are the same file");
}

const CREATE: [&str; 6] = ["create", "-b", "base.raw", "-F", "raw", CACHE];

#[test]
fn an_existing_target_is_refused() {
    Dir::with_cache(MIB).refuses(&CREATE, 1, "exists; choose another name, or --force");
}

#[test]
fn an_existing_target_that_is_something_else_is_refused() {
    let dir = Dir::with_base(MIB);
    dir.write(CACHE, b"precious");
    dir.refuses(&CREATE, 1, "exists; choose another name, or --force");
}

#[test]
fn a_dangling_link_in_the_place_of_the_target_is_refused() {
    let dir = Dir::with_base(MIB);
    symlink("nowhere", dir.path(CACHE)).unwrap();
    dir.refuses(&CREATE, 1, "exists; choose another name, or --force");
}

#[test]
fn a_directory_in_the_place_of_the_target_is_refused_even_with_force() {
    let dir = Dir::with_base(MIB);
    fs::create_dir(dir.path(CACHE)).unwrap();
    let message = "it is a directory; give the name of a file in it";
    dir.refuses(&CREATE, 1, message);
    dir.refuses(&[&CREATE[..], &["--force"]].concat(), 1, message);
}

#[test]
fn force_does_not_replace_devices() {
    let dir = Dir::with_base(MIB);
    let base = dir.text("base.raw");
    let arguments = ["create", "--force", "-b", &base, "-F", "raw", "/dev/null"];
    dir.refuses(&arguments, 1, "it is not a regular file");
}

#[test]
fn a_target_in_a_directory_that_is_not_there_is_refused() {
    let dir = Dir::with_base(MIB);
    let base = dir.text("base.raw");
    let arguments = ["create", "-b", &base, "-F", "raw", "none/cache.qcow2"];
    dir.refuses(&arguments, 1, "there is no directory 'none'");
}

#[test]
fn a_target_where_nothing_may_be_written_is_refused() {
    let dir = Dir::with_base(MIB);
    dir.chmod("base.raw", 0o644);
    dir.chmod(".", 0o555);
    let before = dir.contents();
    dir.vmcache_as_nobody(&CREATE)
        .exits(1)
        .complains("could not create 'cache.qcow2': Permission denied");
    assert_eq!(dir.contents(), before);
}

#[test]
fn a_raw_base_that_may_not_be_read_is_refused() {
    let dir = Dir::with_base(MIB);
    dir.chmod(".", 0o777);
    dir.chmod("base.raw", 0o000);
    let before = dir.contents();
    dir.vmcache_as_nobody(&CREATE)
        .exits(1)
        .complains("could not open base 'base.raw' as raw: Permission denied");
    assert_eq!(dir.contents(), before);
}

#[test]
fn a_qcow2_base_that_may_not_be_read_is_refused() {
    let dir = Dir::with_cache(MIB);
    dir.chmod(".", 0o777);
    dir.chmod(CACHE, 0o000);
    let before = dir.contents();
    dir.vmcache_as_nobody(&["create", "-b", CACHE, "-F", "qcow2", "second.qcow2"])
        .exits(1)
        .complains("Permission denied");
    assert_eq!(dir.contents(), before);
}
