//! The example for OpenNebula (`packaging/examples/opennebula`): its `clone`, run as the front-end runs
//! it. ssh, systemctl and what changes users are replaced by what they would do here; vmcache, qemu-nbd
//! and qemu-img are the real ones.

use std::fs;
use std::process::{Child, Command, Stdio};

use crate::dir::{Dir, MIB, Run, content, library};

const CLONE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/examples/opennebula/clone");

/// A host with two image datastores, on which vmcache was just installed. Only the user vmcache, whom
/// the environment tells, may run `vmcache`.
fn host() -> Dir {
    let dir = Dir::new();
    let made = ["bin", "images", "others", "sockets"];
    made.iter().for_each(|name| fs::create_dir(dir.path(name)).unwrap());
    dir.write("images/4f2a", &content(2 * MIB));
    dir.write("others/4f2a", &content(MIB));
    program(&dir, "vmcache", "[ \"$AS\" = vmcache ] && exec \"$VMCACHE\" \"$@\"");
    program(&dir, "sudo", "shift; exec \"$@\"");
    program(&dir, "runuser", "AS=$2; export AS; shift 3; exec \"$@\"");
    program(&dir, "install", "echo \"$*\" >>installed; shift 7; exec mkdir -p \"$1\"");
    program(&dir, "ssh", "echo \"$1\" >>hosts; shift; exec sh -c \"$*\"");
    program(&dir, "chown", "exit 1");
    program(
        &dir,
        "systemctl",
        "AS=vmcache; export AS; name=${2#vmcache-nbd@}; name=${name%.service}; socket=sockets/$name/nbd.sock\n\
         mkdir sockets/$name 2>/dev/null || exit 0\n\
         vmcache exec qemu-nbd --fork --pid-file=$PWD/pid -r -t -e 0 -k $PWD/$socket \
         --image-opts driver=vmcache,file.filename=$PWD/caches/$name.cache >/dev/null 2>&1",
    );
    dir
}

fn program(dir: &Dir, name: &str, text: &str) {
    dir.write(&format!("bin/{name}"), format!("#!/bin/sh\n{text}\n").as_bytes());
    dir.chmod(&format!("bin/{name}"), 0o755);
}

/// The front-end's call.
fn clone(dir: &Dir, arguments: &[&str]) -> Command {
    let path = format!("{}:{}", dir.text("bin"), std::env::var("PATH").unwrap());
    let mut command = Command::new(CLONE);
    command
        .args(arguments)
        .current_dir(dir.path("."))
        .env("PATH", path)
        .env("VMCACHE", env!("CARGO_BIN_EXE_vmcache"))
        .env("VMCACHE_LIBRARY", library())
        .env("VMCACHE_FORMAT", "raw")
        .env("VMCACHE_CACHES", dir.text("caches"))
        .env("VMCACHE_SOCKETS", dir.text("sockets"));
    command
}

/// What the front-end says for a machine: its disk goes into a directory that is not there yet.
fn arguments(dir: &Dir, machine: usize) -> [String; 4] {
    let disk = dir.text(&format!("system/{machine}/disk.0"));
    [format!("fe:{}", dir.text("images/4f2a")), format!("node1:{disk}"), "42".into(), "1".into()]
}

/// Ends the server.
struct Served<'a>(&'a Dir);

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.0.path("pid")).unwrap();
        assert!(Command::new("kill").arg(pid.trim()).status().unwrap().success());
    }
}

#[test]
fn machines_that_are_cloned_at_once_share_one_cache() {
    let dir = host();
    let start = |machine| -> Child {
        let arguments = arguments(&dir, machine);
        clone(&dir, &arguments.each_ref().map(String::as_str))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let clones: Vec<Child> = (0..4).map(start).collect();
    let ended: Vec<_> = clones.into_iter().map(|clone| clone.wait_with_output().unwrap()).collect();
    let _served = Served(&dir);
    assert!(ended.iter().all(|output| output.status.success()), "{ended:?}");
    let compare = ["compare", "-f", "raw", "-F", "qcow2", "images/4f2a"];
    (0..4).for_each(|machine| {
        let disk = format!("system/{machine}/disk.0");
        dir.qemu("qemu-img", &[&compare[..], &[&disk]].concat()).exits(0);
    });
    let info = dir.vmcache(&["info", "--output=json", "caches/4f2a.cache"]).json();
    assert_eq!(info["cached-bytes"], 2 * MIB);
    assert_eq!(info["backing-filename"], dir.text("images/4f2a"));
    assert_eq!(fs::read_to_string(dir.path("hosts")).unwrap(), "node1\n".repeat(4));
    let made = format!("-d -o vmcache -g vmcache -m 750 {}\n", dir.text("caches"));
    assert_eq!(fs::read_to_string(dir.path("installed")).unwrap(), made.repeat(4));
}

#[test]
fn the_cache_of_another_datastores_image_is_not_taken() {
    let dir = host();
    let first = arguments(&dir, 0);
    Run::of(&mut clone(&dir, &first.each_ref().map(String::as_str))).exits(0);
    let _served = Served(&dir);
    let mut second = arguments(&dir, 1);
    second[0] = format!("fe:{}", dir.text("others/4f2a"));
    let [image, other] = ["images/4f2a", "others/4f2a"].map(|name| dir.text(name));
    Run::of(&mut clone(&dir, &second.each_ref().map(String::as_str)))
        .exits(1)
        .complains(&format!("is of {image} (raw), not of {other} (raw)"));
    assert!(!dir.path("system/1").exists());
}

#[test]
fn a_cache_of_the_image_in_another_format_is_not_taken() {
    let dir = host();
    fs::create_dir(dir.path("caches")).unwrap();
    let made = ["create", "-q", "-b", &dir.text("images/4f2a"), "-F", "raw", "caches/4f2a.cache"];
    dir.vmcache(&made).exits(0);
    let arguments = arguments(&dir, 0);
    Run::of(clone(&dir, &arguments.each_ref().map(String::as_str)).env("VMCACHE_FORMAT", "qcow2"))
        .exits(1)
        .complains("4f2a (raw), not of");
    assert!(!dir.path("system").exists());
}

#[test]
fn what_goes_wrong_is_said_as_opennebula_reads_it() {
    let dir = host();
    let mut arguments = arguments(&dir, 0);
    arguments[0] += ".none";
    Run::of(&mut clone(&dir, &arguments.each_ref().map(String::as_str)))
        .exits(1)
        .complains("ERROR MESSAGE --8<------\nclone: vmcache: could not find base");
    assert!(!dir.path("system").exists());
}
