//! What a running machine's disk goes through besides reads and writes, with an overlay on a cache:
//! plugging, exports, snapshots, jobs, draining, migration. Each ends with the content that base and writes make up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

use serde_json::{Value, json};

use crate::lab::{Base, Cache, DISK, Lab, Over, SetOnDrop, anywhere_up_to, noise};
use crate::monitor::Monitor;
use crate::nbd::Client;
use crate::process::{Tool, eventually};
use crate::settings::{PATCHED, random};
use crate::system::{Machine, drive};
use crate::virtio;

const MIB: usize = 1 << 20;

/// A machine with one disk: an overlay, node `top`, on a cache, node `cache`.
struct Disk {
    machine: Machine,
    /// What the disk has to show.
    content: Vec<u8>,
    /// Commands that have to succeed.
    commands: usize,
}

impl Disk {
    /// Starts one on a new overlay.
    fn start(lab: &Lab, cache: &Cache) -> (Self, PathBuf) {
        let overlay = overlay(lab, &cache.base);
        (Self::on(&overlay, cache, &[]), overlay)
    }

    /// Starts one, with further arguments.
    fn on(overlay: &Path, cache: &Cache, args: &[&str]) -> Self {
        let (disk, device) = definition(overlay, cache);
        let disk = disk.iter().map(String::as_str).chain(["-device", &device]);
        let machine = Machine::start_with(disk.chain(args.iter().copied()));
        Disk { machine, content: cache.base.content.to_vec(), commands: 0 }
    }

    /// Runs a command of `qemu-io` on the disk, as its device does. Whether it succeeded shows at
    /// the end.
    fn io(&mut self, command: &str) {
        let device = "/machine/peripheral/disk/virtio-backend";
        self.machine.monitor(&format!("qemu-io -d {device} \"{command}\""));
        self.commands += 1;
    }

    /// Writes a mebibyte of one byte.
    fn write(&mut self, byte: u8, mib: usize) {
        self.io(&format!("write -P {byte:#x} {mib}M 1M"));
        self.content[mib * MIB..][..MIB].fill(byte);
    }

    /// Waits for a block job's end, which must be a good one.
    #[track_caller]
    fn await_job(&mut self) {
        let ended = self.machine.qmp().event("BLOCK_JOB_COMPLETED");
        assert!(ended.get("error").is_none() && ended["offset"] == ended["len"], "{ended}");
    }

    /// Completes a job that goes on until it is told to.
    fn complete_job(&mut self, name: &str) {
        self.machine.qmp().event("BLOCK_JOB_READY");
        self.machine.qmp().run("block-job-complete", json!({ "device": name }));
        self.await_job();
    }

    fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.machine.qmp().run(command, arguments)
    }

    /// Ends the machine, in which all has to have succeeded.
    #[track_caller]
    fn stop(self) {
        let said = self.machine.quit();
        let done = |line: &&str| line.starts_with("wrote ") || line.starts_with("read ");
        assert!(said.stderr.is_empty() && !said.stdout.contains("failed"), "{said:?}");
        assert_eq!(said.stdout.lines().filter(done).count(), self.commands, "{said:?}");
    }

    /// The same; a plain QEMU has to find the disk's content in the image.
    #[track_caller]
    fn quit(mut self, image: &Path, format: &str) {
        let content = std::mem::take(&mut self.content);
        self.stop();
        assert!(content_of(image, format) == content, "{} is different", image.display());
    }
}

/// An overlay whose header names the base.
fn overlay(lab: &Lab, base: &Base) -> PathBuf {
    let overlay = lab.fresh("overlay.qcow2");
    Tool::stock("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-b", &base.name, "-F", base.format])
        .arg(&overlay)
        .run()
        .success();
    overlay
}

/// The arguments that define the nodes, as this QEMU takes them, and the device on top.
fn definition(overlay: &Path, cache: &Cache) -> ([String; 2], String) {
    let device = |drive| format!("virtio-blk-pci,id=disk,drive={drive}");
    let (overlay, cache) = (overlay.display(), cache.path.display());
    match *PATCHED {
        Some(_) => {
            let file = |name: String| json!({ "driver": "file", "filename": name });
            let cache = json!({ "driver": "vmcache", "node-name": "cache", "file": file(cache.to_string()) });
            let top = json!({
                "driver": "qcow2", "node-name": "top", "file": file(overlay.to_string()), "backing": cache,
            });
            (["-blockdev".into(), top.to_string()], device("top"))
        }
        None => {
            let top = format!("if=none,id=d0,node-name=top,driver=qcow2,file.filename={overlay}");
            let cache = format!(
                "backing.driver=vmcache,backing.node-name=cache,backing.file.filename={cache}"
            );
            (["-drive".into(), format!("{top},{cache}")], device("d0"))
        }
    }
}

/// What a plain QEMU reads from an image.
fn content_of(image: &Path, format: &str) -> Vec<u8> {
    let copy = tempfile::NamedTempFile::new().expect("a file");
    Tool::stock("qemu-img")
        .args(["convert", "-f", format, "-O", "raw"])
        .args([image, copy.path()])
        .run()
        .success();
    fs::read(copy.path()).expect("a copy")
}

fn backing_file_of(image: &Path) -> Value {
    let said = Tool::stock("qemu-img").args(["info", "--output=json"]).arg(image).run().success();
    let mut info: Value = serde_json::from_str(&said.stdout).expect("JSON");
    info["backing-filename"].take()
}

#[test]
fn a_live_snapshot_above_a_cache_is_committed_into_the_overlay_again() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (mut disk, overlay) = Disk::start(&lab, &cache);
    disk.write(0xa1, 1);
    let snapshot = lab.fresh("snapshot.qcow2");
    let options =
        json!({ "node-name": "top", "snapshot-file": snapshot, "snapshot-node-name": "snapshot" });
    disk.run("blockdev-snapshot-sync", options);
    disk.write(0xa2, 2);
    disk.io("read -P 0xa1 1M 1M");
    disk.run("block-commit", json!({ "job-id": "j", "device": "snapshot", "base-node": "top" }));
    disk.complete_job("j");
    disk.write(0xa3, 3);

    disk.quit(&overlay, "qcow2");
    assert_eq!(backing_file_of(&overlay), json!(cache.base.name));
    cache.assert_sound();
}

#[test]
fn an_overlay_is_streamed_full_through_a_cache() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (mut disk, overlay) = Disk::start(&lab, &cache);
    disk.write(0xa1, 1);
    disk.run("block-stream", json!({ "job-id": "j", "device": "top" }));
    disk.await_job();
    disk.write(0xa2, 2);

    disk.quit(&overlay, "qcow2");
    assert_eq!(backing_file_of(&overlay), Value::Null);
    // One mebibyte was the overlay's own.
    let fetched = cache.stats().get("base-bytes");
    assert!(fetched <= (DISK - MIB + 4096) as u64, "{fetched} bytes of {DISK}");
    cache.assert_sound();
}

#[test]
fn an_intermediate_overlay_is_streamed_down_to_the_cache_below_it_and_its_header_put_right() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (mut disk, _overlay) = Disk::start(&lab, &cache);
    disk.write(0xa1, 1);
    let snapshot = lab.fresh("snapshot.qcow2");
    let options =
        json!({ "node-name": "top", "snapshot-file": snapshot, "snapshot-node-name": "snapshot" });
    disk.run("blockdev-snapshot-sync", options);
    disk.write(0xa2, 2);
    let name = &cache.base.name;
    let options =
        json!({ "job-id": "j", "device": "snapshot", "base-node": "cache", "backing-file": name });
    disk.run("block-stream", options);
    disk.await_job();
    disk.io("read -P 0xa1 1M 1M");

    let content = std::mem::take(&mut disk.content);
    disk.stop();
    // QEMU notes the driver of the node as the format of the file whose name it was given.
    Tool::stock("qemu-img")
        .args(["rebase", "-u", "-f", "qcow2", "-b", name, "-F", cache.base.format])
        .arg(&snapshot)
        .run()
        .success();
    assert!(content_of(&snapshot, "qcow2") == content);
    // Nothing but what the device looked at, for a partition table.
    assert!(cache.stats().get("base-bytes") < MIB as u64);
}

#[test]
fn a_disk_on_a_cache_is_mirrored_while_it_is_written_to() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (mut disk, _overlay) = Disk::start(&lab, &cache);
    disk.write(0xa1, 1);
    let copy = lab.fresh("copy.raw");
    let target =
        json!({ "job-id": "j", "device": "top", "target": copy, "format": "raw", "sync": "full" });
    disk.run("drive-mirror", target);
    disk.write(0xa2, 2);
    disk.complete_job("j");
    disk.write(0xa3, 3);

    disk.quit(&copy, "raw");
    cache.assert_sound();
}

#[test]
fn draining_again_and_again_under_load_costs_no_read() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (mut disk, overlay) = Disk::start(&lab, &cache);
    let socket = lab.fresh("nbd");
    let at = json!({ "type": "unix", "data": { "path": socket } });
    disk.run("nbd-server-start", json!({ "addr": at }));
    let export = json!({ "type": "nbd", "id": "e0", "node-name": "top", "name": "" });
    disk.run("block-export-add", export);
    let mut client = Client::connect(&socket).expect("a connection");
    let done = AtomicBool::new(false);
    let content = Arc::clone(&cache.base.content);
    let drained = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let end = SetOnDrop(&done);
            let reads = anywhere_up_to(256 << 10, random("drain"), DISK).take(3000);
            client.read_and_compare(&content, reads).expect("all reads");
            drop(end);
        });
        let mut drained = 0;
        while !done.load(Ordering::Relaxed) {
            disk.run("cont", json!({}));
            disk.run("stop", json!({}));
            drained += 1;
        }
        load.join().expect("the load");
        drained
    });
    println!("drained {drained} times");
    assert!(drained > 10);

    drop(client);
    disk.quit(&overlay, "qcow2");
    cache.assert_sound();
}

#[test]
fn a_drive_of_a_cache_is_plugged_and_unplugged() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let socket = lab.fresh("qmp");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let system = Tool::driver("qemu-system-x86_64");
    let mut machine = virtio::Machine::start(&lab, system, &["-qmp".into(), monitor]);
    let mut qmp = Monitor::connect(&socket);
    for _ in 0..2 {
        let drive = drive("d0", &cache);
        assert_eq!(qmp.for_people(&format!("drive_add 0 {drive}")).trim(), "OK");
        let device = json!({
            "driver": "virtio-blk-pci", "id": "disk", "addr": "04", "drive": "d0",
            "num-queues": 2, "iothread": "t0",
        });
        qmp.run("device_add", device);
        let mut queues = machine.disk(4, 2);
        let reads = virtio::reads_of_two_queues(DISK);
        machine.read_and_compare(&mut queues, &reads, &cache.base.content);
        qmp.run("device_del", json!({ "id": "disk" }));
        machine.eject(4);
        eventually("the device is gone", || qmp.event("DEVICE_DELETED")["device"] == "disk");
        // The drive goes with it, a moment later.
        eventually("the node is closed", || !qmp.for_people("info block -n").contains("vmcache"));
        cache.assert_sound();
    }
    machine.stop();
    assert_eq!(cache.stats().get("base-bytes"), DISK as u64);
}

#[test]
fn a_machine_serves_a_cache_to_another_over_vhost_user() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let mut server = Machine::start(&[format!("{},node-name=cache", drive("d0", &cache))]);
    let socket = lab.fresh("vhost");
    let at = json!({ "type": "unix", "path": socket });
    let export = json!({
        "type": "vhost-user-blk", "id": "e0", "node-name": "cache", "num-queues": 2, "addr": at,
    });
    server.qmp().run("block-export-add", export);
    let system = Tool::driver("qemu-system-x86_64");
    let mut machine = virtio::Machine::start(&lab, system, &virtio::vhost_user_disk(&socket));
    let mut queues = machine.modern_disk(4, 2);
    let reads = virtio::reads_of_two_queues(DISK);
    machine.read_and_compare(&mut queues, &reads, &cache.base.content);
    machine.stop();
    server.quit();

    assert_eq!(cache.stats().get("base-bytes"), DISK as u64);
    cache.assert_sound();
}

#[test]
fn a_machine_moves_to_another_qemu_with_a_cache_of_its_own() {
    let lab = Lab::new();
    let base = lab.base();
    let (here, there) = (lab.cache(&base, ""), lab.cache(&base, "cluster_size=64K"));
    let (mut source, overlay) = Disk::start(&lab, &here);
    source.write(0xa1, 1);
    source.io("read 0 8M");
    let way = format!("unix:{}", lab.fresh("migration").display());
    let mut target = Disk::on(&overlay, &there, &["-incoming", &way]);
    source.run("cont", json!({}));
    source.run("migrate", json!({ "uri": way }));
    let mut state = Value::Null;
    eventually("the machine has moved", || {
        state = source.run("query-migrate", json!({}))["status"].take();
        state != "setup" && state != "active" && state != "device"
    });
    assert_eq!(state, "completed");
    eventually("the machine has arrived", || {
        target.run("query-status", json!({}))["status"] != "inmigrate"
    });
    target.run("cont", json!({}));

    target.content = std::mem::take(&mut source.content);
    source.stop();
    target.io("read -P 0xa1 1M 1M");
    target.write(0xa2, 2);
    target.io("read 4M 8M");
    target.quit(&overlay, "qcow2");
    let cached =
        |cache: &Cache| cache.info_number("cached-bytes") + cache.info_number("zero-bytes");
    // The devices look for a partition table.
    assert_eq!([cached(&here), cached(&there)].map(|bytes| bytes >> 20), [7, 8]);
    here.assert_sound();
    there.assert_sound();
}

#[test]
fn a_snapshot_of_the_whole_machine_is_taken_and_loaded_on_the_overlay() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (mut disk, overlay) = Disk::start(&lab, &cache);
    disk.write(0xa1, 1);
    assert_eq!(disk.machine.monitor("savevm s"), "");
    let then = disk.content.clone();
    disk.write(0xa2, 1);
    disk.write(0xa3, 2);
    assert_eq!(disk.machine.monitor("loadvm s"), "");
    disk.content = then;
    disk.io("read -P 0xa1 1M 1M");
    disk.io("read 8M 4M");

    disk.quit(&overlay, "qcow2");
    // The device looks for a partition table.
    let cached = cache.info_number("cached-bytes") + cache.info_number("zero-bytes");
    assert_eq!(cached >> 20, 4);
    cache.assert_sound();
}
