//! `--help` and `--version`: they teach, and what they show is so.

use std::collections::BTreeSet;

use crate::dir::{CACHE, Dir, MIB};

const COMMANDS: [&str; 9] =
    ["create", "info", "check", "stats", "drive", "exec", "boot", "publish", "completions"];

#[test]
fn the_version_is_the_packages() {
    let run = Dir::new().vmcache(&["--version"]).exits(0);
    assert_eq!(run.stdout, format!("vmcache {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_shows_the_shortest_path_exit_codes_and_environment() {
    Dir::new()
        .vmcache(&["--help"])
        .exits(0)
        .prints("vmcache create -b nfs://")
        .prints("qemu-img create -f qcow2 -b nfs://")
        .prints("vmcache exec qemu-system-x86_64")
        .prints("Exit status:")
        .prints("VMCACHE_LOG")
        .prints("VMCACHE_LIBRARY");
}

#[test]
fn every_subcommand_explains_itself() {
    let dir = Dir::new();
    let help = |command| dir.vmcache(&[command, "--help"]).exits(0);
    help("create").prints("cluster_size=SIZE").prints("Examples:");
    help("info").prints("filling");
    help("check").prints("Exit status").prints("leaked");
    help("stats").prints("watch vmcache stats");
    help("drive").prints("unmodified QEMU").prints("libvirt");
    help("exec").prints("LD_PRELOAD").prints("127");
    help("completions").prints("bash");
    help("boot").prints("/var/lib/vmcache/NAME.qcow2").prints("--published");
    help("publish").prints("DEST.old").prints("Examples:");
}

#[test]
fn no_line_of_help_is_wider_than_100_columns() {
    let dir = Dir::new();
    let helps = COMMANDS.map(|command| dir.vmcache(&[command, "--help"]).stdout);
    let all = dir.vmcache(&["--help"]).stdout + &helps.concat();
    assert_eq!(all.lines().filter(|line| line.chars().count() > 100).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn the_log_can_be_turned_up_and_does_not_mix_with_the_output() {
    let run = Dir::new().vmcache_with("VMCACHE_LOG", "trace", &["--version"]).exits(0);
    assert!(run.stdout.starts_with("vmcache "), "{run:?}");
}

#[test]
fn completions_know_every_subcommand_and_option() {
    let dir = Dir::new();
    let options = COMMANDS.map(|command| dir.vmcache(&[command, "-h"]).stdout).concat();
    let words = options
        .split_whitespace()
        .filter(|word| word.starts_with("--"))
        .map(|option| option.trim_end_matches(',').split('\'').next().unwrap());
    let script = dir.vmcache(&["completions", "bash"]).exits(0).stdout;
    let missing: Vec<_> =
        COMMANDS.into_iter().chain(words).filter(|word| !script.contains(word)).collect();
    assert_eq!(missing, [""; 0]);
}

#[test]
fn bash_completes_a_subcommand_and_the_values_of_an_option() {
    let dir = Dir::new();
    let script = dir.vmcache(&["completions", "bash"]).exits(0).stdout;
    dir.write("vmcache.bash", script.as_bytes());
    let complete = "source ./vmcache.bash
        COMP_WORDS=(vmcache dr) COMP_CWORD=1
        _vmcache vmcache dr vmcache; echo ${COMPREPLY[*]}
        COMP_WORDS=(vmcache drive --as lib) COMP_CWORD=3
        _vmcache vmcache lib --as; echo ${COMPREPLY[*]}";
    let run = dir.qemu("bash", &["-c", complete]).exits(0);
    assert_eq!(run.stdout, "drive\nlibvirt libvirt-nbd\n");
}

/// The manual page without the marks of its language.
fn manual() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/man/vmcache.1");
    std::fs::read_to_string(path).unwrap().replace("\\-", "-")
}

#[test]
fn the_manual_page_has_every_key_of_the_json_forms() {
    let dir = Dir::with_cache(MIB);
    let publish = ["publish", "--output=json", "-b", "base.raw", CACHE, "published"];
    let published = dir.vmcache(&publish).json();
    let manual = manual();
    let keys: BTreeSet<String> = ["info", "check", "stats"]
        .map(|command| dir.vmcache(&[command, "--output=json", CACHE]).json())
        .iter()
        .chain([&published])
        .flat_map(|json| json.as_object().unwrap().keys().cloned())
        .collect();
    assert_eq!(keys.iter().filter(|key| !manual.contains(*key)).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn the_manual_page_has_every_option() {
    let dir = Dir::new();
    let helps = COMMANDS.map(|command| dir.vmcache(&[command, "-h"]).stdout).concat();
    let manual = manual();
    let missing: Vec<_> = helps
        .split_whitespace()
        .filter(|word| word.starts_with("--") && *word != "--help" && !word.contains('\''))
        .filter(|option| !manual.contains(option.trim_end_matches(',')))
        .collect();
    assert_eq!(missing, [""; 0]);
}
