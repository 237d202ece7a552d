//! `vmcache drive`: arguments that QEMU and libvirt take.

use std::fs;

use serde_json::json;

use crate::dir::{CACHE, Dir, MIB};

fn overlay(dir: &Dir, name: &str) {
    dir.qemu("qemu-img", &["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", name]).exits(0);
}

#[test]
fn a_cache_alone_is_a_drive_that_forgets() {
    let dir = Dir::with_cache(MIB);
    let run = dir.vmcache(&["drive", CACHE]).exits(0);
    let cache = dir.text(CACHE);
    assert_eq!(run.stdout, format!("if=virtio,driver=vmcache,file.filename={cache},snapshot=on\n"));
    assert_eq!(run.stderr, "");
}

#[test]
fn an_overlay_is_a_drive_with_the_cache_behind_it() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "vm.qcow2");
    let run = dir.vmcache(&["drive", "--overlay", "vm.qcow2", CACHE]).exits(0);
    let (cache, vm) = (dir.text(CACHE), dir.text("vm.qcow2"));
    assert_eq!(
        run.stdout,
        format!(
            "if=virtio,driver=qcow2,file.filename={vm},backing.driver=vmcache,\
             backing.file.filename={cache}\n"
        )
    );
    assert_eq!(run.stderr, "");
}

#[test]
fn commas_are_doubled_and_spaces_kept() {
    let dir = Dir::with_cache(MIB);
    fs::rename(dir.path(CACHE), dir.path("a, b,c.qcow2")).unwrap();
    overlay(&dir, "v, m.qcow2");
    let run = dir.vmcache(&["drive", "--overlay", "v, m.qcow2", "a, b,c.qcow2"]).exits(0);
    assert!(run.stdout.contains("/v,, m.qcow2,backing.driver="), "{run:?}");
    assert!(run.stdout.ends_with("/a,, b,,c.qcow2\n"), "{run:?}");
}

#[test]
fn an_id_is_for_a_device_of_ones_own() {
    let dir = Dir::with_cache(MIB);
    let run = dir.vmcache(&["drive", "--id", "disk0", CACHE]).exits(0);
    assert!(run.stdout.starts_with("if=none,id=disk0,driver=vmcache,"), "{run:?}");
}

#[test]
fn an_id_that_qemu_would_not_take_is_refused() {
    let dir = Dir::with_cache(MIB);
    dir.refuses(&["drive", "--id", "0,x=y", CACHE], 2, "starting with a letter");
}

#[test]
fn blockdev_is_json_on_one_line() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "v, m.qcow2");
    let run =
        dir.vmcache(&["drive", "--as=blockdev", "--id=d0", "--overlay=v, m.qcow2", CACHE]).exits(0);
    assert_eq!(run.stdout.lines().count(), 1);
    assert_eq!(
        run.json(),
        json!({
            "driver": "qcow2",
            "node-name": "d0",
            "file": { "driver": "file", "filename": dir.text("v, m.qcow2") },
            "backing": {
                "driver": "vmcache",
                "read-only": true,
                "file": { "driver": "file", "filename": dir.text(CACHE) },
            },
        })
    );
}

#[test]
fn blockdev_of_a_cache_alone_is_read_only() {
    let dir = Dir::with_cache(MIB);
    assert_eq!(
        dir.vmcache(&["drive", "--as=blockdev", CACHE]).exits(0).json(),
        json!({
            "driver": "vmcache",
            "node-name": "vmcache0",
            "read-only": true,
            "file": { "driver": "file", "filename": dir.text(CACHE) },
        })
    );
}

#[test]
fn libvirt_gets_arguments_with_names_escaped_for_xml() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "a&b'<c>.qcow2");
    let run = dir.vmcache(&["drive", "--as=libvirt", "--overlay", "a&b'<c>.qcow2", CACHE]).exits(0);
    assert!(run.stdout.starts_with("<qemu:commandline xmlns:qemu='http://libvirt.org/"), "{run:?}");
    let vm = dir.text("a&amp;b&apos;&lt;c&gt;.qcow2");
    run.prints("<qemu:arg value='-drive'/>")
        .prints(&format!("if=none,id=vmcache0,driver=qcow2,file.filename={vm},"))
        .prints("<qemu:arg value='virtio-blk-pci,drive=vmcache0,addr=0x10'/>");
}

#[test]
fn an_overlay_that_is_not_there_yet_gets_the_command_that_makes_it() {
    let dir = Dir::with_cache(MIB);
    let base = fs::canonicalize(dir.path("base.raw")).unwrap();
    let make = format!("qemu-img create -f qcow2 -b {} -F raw 'v m.qcow2'", base.display());
    dir.vmcache(&["drive", "--overlay", "v m.qcow2", CACHE]).exits(0).complains(&make);
    assert!(!dir.path("v m.qcow2").exists());
}

#[test]
fn an_overlay_on_the_cache_is_refused_with_the_way_out() {
    let dir = Dir::with_cache(MIB);
    let create = ["create", "-f", "qcow2", "-b", CACHE, "-F", "qcow2", "vm.qcow2"];
    dir.qemu("qemu-img", &create).exits(0);
    let arguments = ["drive", "--overlay", "vm.qcow2", CACHE];
    dir.refuses(&arguments, 1, "qemu-img rebase -u -b base.raw -F raw vm.qcow2");
}

#[test]
fn a_cache_is_not_its_own_overlay() {
    let dir = Dir::with_cache(MIB);
    dir.refuses(&["drive", "--overlay", CACHE, CACHE], 1, "is the cache image itself");
}

#[test]
fn a_directory_is_no_overlay() {
    let dir = Dir::with_cache(MIB);
    dir.refuses(&["drive", "--overlay", ".", CACHE], 1, "is not a file");
}
