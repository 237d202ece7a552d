//! `vmcache drive`: arguments that QEMU and libvirt take.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Command;

use serde_json::json;

use crate::dir::{CACHE, Dir, MIB, copy_program};

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
fn libvirt_gets_a_complete_domain_on_the_wrapper() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "vm1.qcow2");
    let run = dir
        .vmcache(&["drive", "--as=libvirt", "--emulator=/w", "--overlay", "vm1.qcow2", CACHE])
        .exits(0);
    let (cache, vm) = (dir.text(CACHE), dir.text("vm1.qcow2"));
    assert_eq!(
        run.stdout,
        format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm1</name>
  <memory unit='KiB'>1048576</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <cpu mode='host-model'/>
  <clock offset='utc'/>
  <devices>
    <emulator>/w</emulator>
    <console type='pty'/>
    <rng model='virtio'>
      <backend model='builtin'/>
    </rng>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-drive'/>
    <qemu:arg value='if=none,id=vmcache0,driver=qcow2,file.filename={vm},backing.driver=vmcache,backing.file.filename={cache}'/>
    <qemu:arg value='-device'/>
    <qemu:arg value='virtio-blk-pci,drive=vmcache0,addr=0x10,bootindex=100'/>
  </qemu:commandline>
</domain>
"
        )
    );
    assert_eq!(run.stderr, "");
}

#[test]
fn a_domain_on_an_export_names_the_overlay_and_the_socket_only() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "vm1.qcow2");
    let _socket = UnixListener::bind(dir.path("a&b.sock")).unwrap();
    let arguments = ["--as=libvirt-nbd", "--socket=a&b.sock", "--overlay=vm1.qcow2", CACHE];
    let run = dir.vmcache(&[&["drive"], &arguments[..]].concat()).exits(0);
    let (socket, vm) = (dir.text("a&amp;b.sock"), dir.text("vm1.qcow2"));
    assert!(!run.stdout.contains("cache.qcow2") && !run.stdout.contains("emulator"), "{run:?}");
    assert_eq!(run.stderr, "");
    run.prints(&format!("<source file='{vm}'/>"))
        .prints(&format!("<host transport='unix' socket='{socket}'/>"));
}

#[test]
fn a_socket_that_nobody_serves_gets_the_command_that_does() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "vm1.qcow2");
    let arguments = ["--as=libvirt-nbd", "--socket=d.sock", "--overlay=vm1.qcow2", CACHE];
    let serve = format!(
        "vmcache exec qemu-nbd -r -t -e 64 -k {} --image-opts driver=vmcache,file.filename={}",
        dir.text("d.sock"),
        dir.text(CACHE)
    );
    dir.vmcache(&[&["drive"], &arguments[..]].concat()).exits(0).complains(&serve);
}

#[test]
fn a_domain_takes_name_memory_accelerator_and_emulator() {
    let dir = Dir::with_cache(MIB);
    let options = ["--name=a<b", "--memory=1.5G", "--accel=tcg", "--emulator=/opt/q&q"];
    let run = dir.vmcache(&[&["drive", "--as=libvirt"], &options[..], &[CACHE]].concat()).exits(0);
    assert!(run.stdout.starts_with("<domain type='qemu' "), "{run:?}");
    assert!(!run.stdout.contains("<cpu "), "{run:?}");
    run.prints("<name>a&lt;b</name>")
        .prints("<memory unit='KiB'>1572864</memory>")
        .prints("<emulator>/opt/q&amp;q</emulator>");
}

#[test]
fn the_emulator_is_the_wrapper_beside_the_program() {
    let dir = Dir::with_cache(MIB);
    copy_program(&dir.path("vmcache"));
    symlink("vmcache", dir.path("qemu-system-x86_64-vmcache")).unwrap();
    let output = Command::new(dir.path("vmcache"))
        .args(["drive", "--as=libvirt"])
        .arg(dir.path(CACHE))
        .output()
        .unwrap();
    let wrapper = dir.text("qemu-system-x86_64-vmcache");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains(&format!("<emulator>{wrapper}</emulator>")), "{printed}");
}

#[test]
fn a_fragment_is_the_element_alone_with_names_escaped_for_xml() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "a&b'<c>.qcow2");
    let arguments = ["--as=libvirt", "--fragment", "--overlay", "a&b'<c>.qcow2", CACHE];
    let run = dir.vmcache(&[&["drive"], &arguments[..]].concat()).exits(0);
    assert!(run.stdout.starts_with("<qemu:commandline xmlns:qemu='http://libvirt.org/"), "{run:?}");
    assert!(run.stdout.ends_with("</qemu:commandline>\n"), "{run:?}");
    let vm = dir.text("a&amp;b&apos;&lt;c&gt;.qcow2");
    run.prints("\n  <qemu:arg value='-drive'/>\n")
        .prints(&format!("if=none,id=vmcache0,driver=qcow2,file.filename={vm},"));
}

#[test]
fn a_fragment_for_an_export_is_a_disk() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "vm1.qcow2");
    let arguments =
        ["--as=libvirt-nbd", "--fragment", "--socket=d.sock", "--overlay=vm1.qcow2", CACHE];
    let run = dir.vmcache(&[&["drive"], &arguments[..]].concat()).exits(0);
    assert!(run.stdout.starts_with("<disk type='file' device='disk'>\n  <driver "), "{run:?}");
    assert!(run.stdout.ends_with("\n</disk>\n"), "{run:?}");
}

#[test]
fn an_export_is_only_read_and_needs_an_overlay_and_a_socket() {
    let dir = Dir::with_cache(MIB);
    overlay(&dir, "vm1.qcow2");
    dir.refuses(&["drive", "--as=libvirt-nbd", "--socket=s", CACHE], 2, "needs --overlay");
    dir.refuses(&["drive", "--as=libvirt-nbd", "--overlay=vm1.qcow2", CACHE], 2, "needs --socket");
}

#[test]
fn an_option_of_another_form_is_refused() {
    let dir = Dir::with_cache(MIB);
    dir.refuses(&["drive", "--memory=1G", CACHE], 2, "--memory is for --as=libvirt and");
    dir.refuses(&["drive", "--as=blockdev", "--fragment", CACHE], 2, "--fragment is for");
    dir.refuses(&["drive", "--as=libvirt", "--socket=s", CACHE], 2, "for --as=libvirt-nbd");
    dir.refuses(&["drive", "--as=libvirt-nbd", "--id=d0", CACHE], 2, "--id is for --as=drive");
}

#[test]
fn names_and_sizes_that_libvirt_would_not_take_are_refused() {
    let dir = Dir::with_cache(MIB);
    dir.refuses(&["drive", "--as=libvirt", "--name=a/b", CACHE], 2, "without slashes");
    dir.refuses(&["drive", "--as=libvirt", "--memory=1024", CACHE], 2, "less than 1M");
    dir.refuses(&["drive", "--as=libvirt", "--emulator=a\nb", CACHE], 1, "control characters");
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
