//! `vmcache boot`: from a base to a machine. Its place takes a shell script, to which the arguments
//! are QEMU's and which reads and writes the disk with the real qemu-io.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use crate::dir::{Dir, KIB, MIB, Run, library};

/// Takes the disk out of QEMU's arguments and does with it what the variable DO says.
const MACHINE: &str = r#"#!/bin/sh
echo "arguments: $*"
while [ "$1" != -drive ]; do shift; done
exec qemu-io --image-opts "${2#if=virtio,}" -c "${DO:-read 0 1M}"
"#;

/// A base that QEMU's tools can tell in one number, and the machine.
fn node() -> Dir {
    let dir = Dir::new();
    dir.write("base.raw", &vec![0x11; 2 * MIB as usize]);
    dir.write("machine", MACHINE.as_bytes());
    dir.chmod("machine", 0o755);
    dir
}

const PLACES: [&str; 6] = ["--cache", "caches/", "--overlay", "vm1.qcow2", "--qemu", "./machine"];

/// Boots vm1 with some options in front of everything else, and what the machine does.
fn boot_and(dir: &Dir, todo: &str, options: &[&str]) -> Run {
    let arguments = [&["boot", "-b", "base.raw", "-F", "raw"], &PLACES[..], options].concat();
    Run::of(&mut machine(dir, todo, &arguments))
}

fn boot(dir: &Dir, options: &[&str]) -> Run {
    boot_and(dir, "read -P 0x11 0 1M", options)
}

fn machine(dir: &Dir, todo: &str, arguments: &[&str]) -> Command {
    let mut command = dir.command(arguments);
    command.env("VMCACHE_LIBRARY", library()).env("DO", todo);
    command
}

/// The one cache image in `caches`.
fn cache(dir: &Dir) -> String {
    let mut names = dir.names("caches");
    names.retain(|name| name.ends_with(".cache"));
    assert_eq!(names.len(), 1, "{names:?}");
    format!("caches/{}", names.concat())
}

#[test]
fn the_first_start_makes_the_cache_and_the_overlay() {
    let dir = node();
    boot(&dir, &["vm1"])
        .exits(0)
        .prints("arguments: -name guest=vm1 -drive if=virtio,driver=qcow2,")
        .prints("read 1048576/1048576")
        .complains(".cache' made")
        .complains("vm1.qcow2' made");
    let info = dir.vmcache(&["info", "--output=json", &cache(&dir)]).json();
    assert_eq!(info["backing-filename"], dir.text("base.raw"));
    assert_eq!(info["cached-bytes"], MIB);
    let overlay = dir.qemu("qemu-img", &["info", "--output=json", "vm1.qcow2"]).json();
    assert_eq!(overlay["backing-filename"], dir.text("base.raw"));
    assert_eq!(overlay["virtual-size"], 2 * MIB);
}

#[test]
fn the_next_start_finds_both_as_they_were_left() {
    let dir = node();
    boot_and(&dir, "write -P 0x22 0 64k", &["vm1"]).exits(0);
    boot_and(&dir, "read 0 2M", &["vm1"]).exits(0);
    fs::remove_file(dir.path(&(cache(&dir) + ".live"))).unwrap();
    boot_and(&dir, "read -P 0x22 0 64k", &["vm1"])
        .exits(0)
        .complains(".cache' is there")
        .complains("vm1.qcow2' is there");
    boot_and(&dir, "read -P 0x11 64k 1M", &["vm1"]).exits(0);
    let stats = dir.vmcache(&["stats", "--output=json", &cache(&dir)]).json();
    // What an open holds against the base is no read of the machine's.
    assert_eq!(stats["base-bytes"], 0);
}

#[test]
fn twenty_at_once_make_one_cache() {
    let dir = node();
    // qemu-img is asked for the size of such a base, which takes long enough for several of them to
    // find that there is no cache.
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"];
    dir.qemu("qemu-img", &convert).exits(0);
    let start = |number: usize| -> Child {
        let (name, overlay) = (format!("vm{number}"), format!("vm{number}.qcow2"));
        let arguments = ["boot", "-b", "base.qcow2", "-F", "qcow2", "--cache", "caches/"];
        let own = ["--overlay", &overlay, "--qemu", "./machine", &name];
        machine(&dir, "read -P 0x11 0 2M", &[&arguments[..], &own].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<Child> = (0..20).map(start).collect();
    let outputs: Vec<_> =
        children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let said: Vec<_> =
        outputs.iter().map(|output| String::from_utf8_lossy(&output.stderr)).collect();
    assert!(outputs.iter().all(|output| output.status.success()), "{said:?}");
    assert_eq!(said.iter().filter(|said| said.contains(".cache' made")).count(), 1, "{said:?}");
    let cache = cache(&dir);
    assert_eq!(dir.names("caches"), [&cache[7..], &(cache[7..].to_owned() + ".live")]);
    dir.qemu("qemu-img", &["check", "-f", "qcow2", &cache]).exits(0);
    dir.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "base.raw", &cache]).exits(0);
}

#[test]
fn the_overlay_belongs_to_its_maker_alone() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    let mode = fs::metadata(dir.path("vm1.qcow2")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn nothing_but_overlay_and_cache_is_left_behind() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    assert_eq!(dir.names("."), ["base.raw", "caches", "machine", "vm1.qcow2"]);
    assert_eq!(dir.names("caches").len(), 2);
}

#[test]
fn options_of_create_are_for_the_cache_that_is_made() {
    let dir = node();
    boot(&dir, &["-o", "quota=3M,cluster_size=64K", "--mode", "0640", "vm1"]).exits(0);
    let info = dir.vmcache(&["info", "--output=json", &cache(&dir)]).json();
    assert_eq!(info["quota"], 3 * MIB);
    assert_eq!(info["cluster-size"], 64 * KIB);
    let mode = fs::metadata(dir.path(&cache(&dir))).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn a_cache_that_is_there_keeps_its_quota_and_says_so() {
    let dir = node();
    boot(&dir, &["-o", "quota=3M", "vm1"]).exits(0);
    boot(&dir, &["-o", "quota=4M", "vm1"]).exits(0).complains("is there with a quota of 3 MiB");
}

#[test]
fn quiet_leaves_the_output_to_qemu() {
    let dir = node();
    assert_eq!(boot(&dir, &["-q", "vm1"]).exits(0).stderr, "");
}

#[test]
fn arguments_after_two_dashes_are_qemus() {
    let dir = node();
    boot(&dir, &["vm1", "--", "-m", "1G", "-b", "x y"]).exits(0).prints(" -m 1G -b x y\n");
}

#[test]
fn the_exit_code_is_qemus_own() {
    let dir = node();
    boot_and(&dir, "read -P 0x33 0 1M", &["vm1"]).exits(1).prints("Pattern verification failed");
}

#[test]
fn a_dry_run_prints_a_command_for_the_shell_and_makes_nothing() {
    let dir = node();
    let before = dir.contents();
    let run = boot(&dir, &["--id", "d0", "--dry-run", "vm1", "--", "-append", "a b"]).exits(0);
    assert_eq!(dir.contents(), before);
    let library = fs::canonicalize(library()).unwrap();
    assert!(run.stdout.starts_with(&format!("LD_PRELOAD={} ./machine", library.display())));
    run.prints(" -drive if=none,id=d0,driver=qcow2,").prints(" -append 'a b'\n");
}

#[test]
fn a_cache_can_be_named_and_have_been_made_by_hand() {
    let dir = node();
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", "mine"]).exits(0);
    boot(&dir, &["vm1"]).exits(0);
    let arguments = ["boot", "-b", "base.raw", "-F", "raw", "--cache", "mine", "--overlay"];
    let rest = ["vm1.qcow2", "--qemu", "./machine", "vm1"];
    dir.vmcache_with_library(&[&arguments[..], &rest].concat()).exits(0);
    assert_eq!(dir.vmcache(&["info", "--output=json", "mine"]).json()["cached-bytes"], MIB);
}

/// Boots with other options than usual, which is refused and changes nothing.
fn refused(dir: &Dir, options: &[&str], code: i32, message: &str) {
    let before = dir.contents();
    dir.vmcache_with_library(&[&["boot", "--qemu", "./machine"], options].concat())
        .exits(code)
        .complains(message);
    assert_eq!(dir.contents(), before);
}

#[test]
fn a_cache_of_another_base_is_refused() {
    let dir = node();
    dir.write("other.raw", &[1; 4096]);
    dir.vmcache(&["create", "-b", "other.raw", "-F", "raw", "other.cache"]).exits(0);
    let options = ["-b", "base.raw", "-F", "raw", "--cache", "other.cache"];
    refused(&dir, &[&options[..], &["vm1"]].concat(), 1, "is a cache of base 'other.raw' (raw)");
}

#[test]
fn an_overlay_of_another_base_is_refused() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    dir.write("other.raw", &[1; 4096]);
    let create = ["create", "-q", "-f", "qcow2", "-b", "other.raw", "-F", "raw", "vm2.qcow2"];
    dir.qemu("qemu-img", &create).exits(0);
    let options = ["-b", "base.raw", "-F", "raw", "--cache", "caches", "--overlay", "vm2.qcow2"];
    let message = "is on base 'other.raw', not on";
    refused(&dir, &[&options[..], &["vm2"]].concat(), 1, message);
}

#[test]
fn an_overlay_without_a_base_is_refused() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    dir.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "vm2.qcow2", "2M"]).exits(0);
    let options = ["-b", "base.raw", "-F", "raw", "--cache", "caches", "--overlay", "vm2.qcow2"];
    refused(&dir, &[&options[..], &["vm2"]].concat(), 1, "is no overlay");
}

#[test]
fn an_overlay_in_use_is_refused() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    let mut user = Command::new("qemu-io")
        .args(["-f", "qcow2", "vm1.qcow2"])
        .current_dir(dir.path("."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It answers when it has opened the file.
    let mut answer = [0];
    std::io::Write::write_all(user.stdin.as_mut().unwrap(), b"read 0 512\n").unwrap();
    std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut answer).unwrap();
    let options = ["-b", "base.raw", "-F", "raw", "--cache", "caches", "--overlay", "vm1.qcow2"];
    let message = "is in use: does the virtual machine 'vm1' run?";
    refused(&dir, &[&options[..], &["vm1"]].concat(), 1, message);
    drop(user.stdin.take());
    user.wait().unwrap();
}

#[test]
fn a_qemu_that_is_not_there_is_127() {
    let dir = node();
    let options = ["-b", "base.raw", "-F", "raw", "--cache", "c", "--overlay", "o", "--qemu", "no"];
    dir.vmcache_with_library(&[&["boot"], &options[..], &["vm1"]].concat()).exits(127).complains(
        "QEMU is not installed, or its name is another one (--qemu): could not run 'no'",
    );
}

#[test]
fn without_the_library_it_is_125() {
    let dir = node();
    let options = ["-b", "base.raw", "-F", "raw", "--cache", "c", "--overlay", "o", "vm1"];
    dir.vmcache_with("VMCACHE_LIBRARY", "/nonexistent.so", &[&["boot"], &options[..]].concat())
        .exits(125)
        .complains("could not use the driver library '/nonexistent.so'");
}

#[test]
fn a_base_that_is_not_there_is_refused() {
    let dir = node();
    let options = ["-b", "none.raw", "-F", "raw", "--cache", ".", "--overlay", "vm1.qcow2", "vm1"];
    refused(&dir, &options, 1, "could not find base");
}

#[test]
fn a_base_by_a_relative_url_is_refused() {
    let dir = node();
    let options = ["-b", "file:base.raw", "-F", "raw", "--cache", ".", "vm1"];
    refused(&dir, &options, 1, "QEMU would look for it where it is started");
}

#[test]
fn names_that_make_no_file_name_are_refused() {
    let dir = node();
    let options = |name| ["-b", "base.raw", "-F", "raw", "--cache", ".", name];
    refused(&dir, &options("../vm1"), 2, "a name has at most 64 letters");
    refused(&dir, &options(".vm1"), 2, "a name has at most 64 letters");
    refused(&dir, &options("vm,1"), 2, "a name has at most 64 letters");
}

#[test]
fn a_stale_cache_is_used_no_more_and_named() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    dir.write("base.raw", &vec![0x44; 2 * MIB as usize]);
    dir.touch("base.raw");
    boot_and(&dir, "read -P 0x44 0 1M", &["vm1"]).exits(0).complains("is stale");
}

/// A node whose cache was published, and whose base has other bytes in one block since, that no sample
/// has: who reads the old ones has them from what was published. Its machine is a QEMU without a guest.
fn published() -> Dir {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    dir.vmcache(&["publish", "-b", &dir.text("base.raw"), &cache(&dir), "published"]).exits(0);
    fs::remove_dir_all(dir.path("caches")).unwrap();
    let mut base = fs::read(dir.path("base.raw")).unwrap();
    base[BLOCK.clone()].fill(0x55);
    dir.write("base.raw", &base);
    let machine = "#!/bin/sh\nprintf 'qemu-io d0 \"%s\"\\nquit\\n' \"$DO\" | exec qemu-system-x86_64 \
                   -M none -display none -monitor stdio \"$@\"\n";
    dir.write("machine", machine.as_bytes());
    dir
}

/// The block that changed.
const BLOCK: std::ops::Range<usize> = 8192..12288;

/// Boots that machine; its disk holds `pattern` in that block.
fn holds(dir: &Dir, pattern: &str, options: &[&str]) -> Run {
    let todo = format!("read -P {pattern} {} {}", BLOCK.start, BLOCK.len());
    let run = boot_and(dir, &todo, &[&["--id", "d0"], options].concat());
    let run = run.exits(0).prints("read 4096/4096 bytes");
    assert!(!run.stdout.contains("verification failed"), "{run:?}");
    run
}

#[test]
fn what_was_published_is_read_before_the_base() {
    let dir = published();
    holds(&dir, "0x11", &["--published", "published", "vm1"]).complains("before the base");
}

#[test]
fn what_was_published_of_another_state_of_the_base_is_not_read() {
    let dir = published();
    dir.write("base.raw", &vec![0x55; 2 * MIB as usize]);
    holds(&dir, "0x55", &["--published", "published", "vm1"])
        .complains("is not used: the base is not what it was made from");
}

#[test]
fn what_something_else_made_is_not_read_as_published() {
    let dir = published();
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &dir.text("base.raw"), "other"];
    dir.qemu("qemu-img", &create).exits(0);
    holds(&dir, "0x55", &["--published", "other", "vm1"])
        .complains("other' is not used: 'vmcache publish' did not make it");
}

#[test]
fn what_was_published_for_another_format_of_the_base_is_not_read() {
    let dir = published();
    let rebase =
        ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &dir.text("base.raw"), "published"];
    dir.qemu("qemu-img", &rebase).exits(0);
    holds(&dir, "0x55", &["--published", "published", "vm1"])
        .complains("is not used: it takes the base for qcow2, not for raw");
}

#[test]
fn a_new_overlay_of_a_larger_base_has_its_size() {
    let dir = node();
    boot(&dir, &["vm1"]).exits(0);
    dir.write("base.raw", &vec![0x44; 4 * MIB as usize]);
    fs::remove_file(dir.path("vm1.qcow2")).unwrap();
    boot_and(&dir, "read -P 0x44 3M 1M", &["vm1"]).exits(0).complains("is stale");
    let info = dir.qemu("qemu-img", &["info", "--output=json", "vm1.qcow2"]).json();
    assert_eq!(info["virtual-size"], 4 * MIB);
}

#[test]
fn an_overlay_that_is_a_link_to_nothing_is_refused() {
    let dir = node();
    std::os::unix::fs::symlink("/nowhere/vm1.qcow2", dir.path("vm1.qcow2")).unwrap();
    boot(&dir, &["vm1"]).exits(1).complains("a symbolic link to nothing");
}

#[test]
fn without_what_was_published_the_base_is_read() {
    let dir = published();
    let options = ["--published", "nothing", "vm1"];
    holds(&dir, "0x55", &options).complains("nothing' is not used: ");
}

#[test]
fn what_was_published_of_another_base_is_not_read() {
    let dir = published();
    fs::rename(dir.path("base.raw"), dir.path("other.raw")).unwrap();
    let options = ["-b", "other.raw", "-F", "raw", "--published", "published", "--id", "d0"];
    let places = ["--cache", "caches/", "--overlay", "vm2.qcow2", "--qemu", "./machine", "vm2"];
    let arguments = [&["boot"], &options[..], &places].concat();
    let run = Run::of(&mut machine(&dir, "read -P 0x55 8192 4096", &arguments)).exits(0);
    assert!(!run.stdout.contains("verification failed"), "{run:?}");
    run.complains(&format!("is not used: it is of '{}'", dir.text("base.raw")));
}
