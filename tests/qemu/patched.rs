//! What only a QEMU with the driver in its own tree can do: `-blockdev`, `blockdev-add`,
//! `qemu-storage-daemon`, plugging, reopening, statistics and image information.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::lab::{Cache, DISK, Lab, Over, noise, sequential};
use crate::monitor::Monitor;
use crate::nbd::Client;
use crate::process::{Child, Tool, eventually};
use crate::settings::{LIBRARY, PATCHED};
use crate::system::Machine;
use crate::virtio;

/// A definition of a cache, everything within it.
fn nested(cache: &Cache) -> Value {
    let file = json!({ "driver": "file", "filename": cache.path });
    json!({ "driver": "vmcache", "node-name": "cache", "read-only": true, "file": file })
}

/// The same as nodes of their own, to be added one after the other.
fn by_reference(cache: &Cache) -> [Value; 4] {
    let file = |name: &str, path: &Path| json!({ "driver": "file", "node-name": name, "filename": path, "read-only": true });
    [
        file("cache-file", &cache.path),
        file("base-file", &cache.base.file),
        json!({ "driver": cache.base.format, "node-name": "base", "read-only": true, "file": "base-file" }),
        json!({
            "driver": "vmcache", "node-name": "cache", "read-only": true, "file": "cache-file",
            "backing": "base", "populate": true, "populate-queue": 16 << 20, "base-changed": "refuse",
        }),
    ]
}

fn add(qmp: &mut Monitor, nodes: impl IntoIterator<Item = Value>) {
    nodes.into_iter().for_each(|node| drop(qmp.run("blockdev-add", node)));
}

fn serve(qmp: &mut Monitor, socket: &Path, node: &str) -> Client {
    let at = json!({ "type": "unix", "data": { "path": socket } });
    qmp.run("nbd-server-start", json!({ "addr": at }));
    let export = json!({ "type": "nbd", "id": "e0", "node-name": node, "name": "" });
    qmp.run("block-export-add", export);
    Client::connect(socket).expect("a connection")
}

/// Ends what [`serve`] began, so that the node can be deleted.
fn end_serving(qmp: &mut Monitor, client: Client) {
    drop(client);
    qmp.run("block-export-del", json!({ "id": "e0", "mode": "hard" }));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.run("nbd-server-stop", json!({}));
}

fn reads() -> impl Iterator<Item = (u64, u32)> {
    sequential(DISK, 256 << 10)
}

/// A `qemu-storage-daemon` with its monitor behind a socket.
fn storage_daemon(lab: &Lab, args: &[String]) -> (Child, Monitor) {
    let socket = lab.fresh("qmp");
    let chardev = format!("socket,id=qmp,server=on,wait=off,path={}", socket.display());
    let daemon = Tool::driver("qemu-storage-daemon")
        .args(["--chardev", &chardev, "--monitor", "chardev=qmp"])
        .args(args)
        .start_in_background();
    (daemon, Monitor::connect(&socket))
}

#[test]
fn a_nested_definition_on_the_command_line_serves_the_base() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start_with(["-blockdev", &nested(&cache).to_string()]);
    let mut client = serve(machine.qmp(), &lab.fresh("nbd"), "cache");
    client.read_and_compare(&cache.base.content, reads()).expect("all reads");
    machine.quit();
    assert!(cache.stats().get("base-bytes") <= DISK as u64);
    cache.assert_sound();
}

#[test]
fn a_node_that_refers_to_others_is_added_and_deleted() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(lab.base().content.to_vec(), "qcow2", Over::File), "");
    let mut machine = Machine::start_with([]);
    let qmp = machine.qmp();
    add(qmp, by_reference(&cache));
    let mut client = serve(qmp, &lab.fresh("nbd"), "cache");
    client.read_and_compare(&cache.base.content, reads()).expect("all reads");
    let in_use = qmp.refusal("blockdev-del", json!({ "node-name": "cache-file" }));
    end_serving(qmp, client);
    for node in ["cache", "base", "base-file", "cache-file"] {
        qmp.run("blockdev-del", json!({ "node-name": node }));
    }

    assert!(in_use.contains("in use"), "{in_use}");
    // Closed, with a last checkpoint, while the machine goes on.
    fs::remove_file(cache.live()).expect("a live file");
    cache.assert_sound();
    assert!(cache.info_number("cached-bytes") > 0);
    machine.quit();
}

#[test]
fn the_library_is_loaded_when_a_cache_is_opened_and_not_before() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start_with([]);
    let process = machine.id();
    let is_loaded = || {
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).expect("a process");
        ["libvmcache.so", "block-vmcache.so"].map(|name| maps.contains(name))
    };
    let before = is_loaded();
    machine.qmp().run("blockdev-add", nested(&cache));

    assert_eq!((before, is_loaded()), ([false; 2], [true; 2]));
    machine.quit();
}

#[test]
fn without_the_library_an_error_says_what_is_missing() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let patched = PATCHED.as_ref().expect("VMCACHE_TEST_PATCHED");
    let said = Tool::patched(patched, "qemu-img")
        .args(["info", "--image-opts", &cache.options()])
        .run()
        .failure();

    assert!(
        said.stderr.contains("failed to open module: libvmcache.so.0: cannot open"),
        "{said:?}"
    );
    assert!(said.stderr.contains("Unknown driver 'vmcache'"), "{said:?}");
}

#[test]
fn a_library_that_was_preloaded_before_the_module_is_no_second_driver() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let preload = format!("LD_PRELOAD={}", LIBRARY.display());
    let said = Tool::driver("qemu-img")
        .args(["info", "-f", "vmcache"])
        .arg(&cache.path)
        .under(["env", &preload])
        .run()
        .success();

    assert!(said.stdout.contains("file format: vmcache"), "{said:?}");
}

#[test]
fn a_disk_with_several_queues_in_iothreads_is_plugged_and_unplugged() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let socket = lab.fresh("qmp");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let system = Tool::driver("qemu-system-x86_64");
    let mut machine = virtio::Machine::start(&lab, system, &["-qmp".into(), monitor]);
    let mut qmp = Monitor::connect(&socket);
    for round in 1..=2 {
        add(&mut qmp, by_reference(&cache));
        let mapping = json!([{ "iothread": "t0", "vqs": [0] }, { "iothread": "t1", "vqs": [1] }]);
        let device = json!({
            "driver": "virtio-blk-pci", "id": "disk", "addr": "04", "drive": "cache",
            "num-queues": 2, "iothread-vq-mapping": mapping,
        });
        qmp.run("device_add", device);
        let mut queues = machine.disk(4, 2);
        let reads = virtio::reads_of_two_queues(DISK);
        machine.read_and_compare(&mut queues, &reads, &cache.base.content);
        qmp.run("device_del", json!({ "id": "disk" }));
        machine.eject(4);
        eventually("the device is gone", || qmp.event("DEVICE_DELETED")["device"] == "disk");
        // The device lets go of the node a moment later.
        let node = json!({ "node-name": "cache" });
        eventually("the node is gone", || {
            qmp.command("blockdev-del", node.clone()).get("error").is_none()
        });
        for node in ["base", "base-file", "cache-file"] {
            qmp.run("blockdev-del", json!({ "node-name": node }));
        }
        cache.assert_sound();
        println!("round {round}: {} bytes fetched", cache.stats().get("base-bytes"));
    }
    machine.stop();
    assert_eq!(cache.stats().get("base-bytes"), DISK as u64);
}

#[test]
fn a_running_disk_gets_a_cache_by_a_reopen_and_loses_it_again() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let overlay = lab.fresh("overlay.qcow2");
    Tool::stock("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-b", &cache.base.name, "-F", "raw"])
        .arg(&overlay)
        .run()
        .success();
    let mut machine = Machine::start_with([]);
    let qmp = machine.qmp();
    add(qmp, by_reference(&cache));
    let file = json!({ "driver": "file", "node-name": "overlay-file", "filename": overlay });
    qmp.run("blockdev-add", file);
    let top = |backing: &str| json!({ "driver": "qcow2", "node-name": "top", "file": "overlay-file", "backing": backing });
    qmp.run("blockdev-add", top("base"));
    let mut client = serve(qmp, &lab.fresh("nbd"), "top");
    let mut read = |mib: u64| {
        let read = [(mib << 20, 1 << 20)];
        client.read_and_compare(&cache.base.content, read).expect("a read");
        cache.stats().get("hit-bytes") + cache.stats().get("miss-bytes")
    };
    let without = read(1);
    qmp.run("blockdev-reopen", json!({ "options": [top("cache")] }));
    let with = read(2);
    qmp.run("blockdev-reopen", json!({ "options": [top("base")] }));
    let without_again = read(3);
    end_serving(qmp, client);
    qmp.run("blockdev-del", json!({ "node-name": "cache" }));
    machine.quit();

    assert_eq!([without, with, without_again], [0, 1 << 20, 1 << 20]);
    cache.assert_sound();
}

#[test]
fn a_reopen_of_the_cache_itself_keeps_its_image_and_its_side() {
    let lab = Lab::new();
    let (cache, other) = (lab.cache(&lab.base(), ""), lab.cache(&lab.base(), ""));
    let mut machine = Machine::start_with([]);
    let qmp = machine.qmp();
    let nodes = by_reference(&cache);
    add(qmp, nodes.clone());
    let file = json!({ "driver": "file", "node-name": "other", "filename": other.path, "read-only": true });
    qmp.run("blockdev-add", file);
    let changed = |key: &str, value: Value| {
        let mut node = nodes[3].clone();
        node[key] = value;
        json!({ "options": [node] })
    };
    qmp.run("blockdev-reopen", changed("node-name", json!("cache")));
    let image = qmp.refusal("blockdev-reopen", changed("file", json!("other")));
    let writable = qmp.refusal("blockdev-reopen", changed("read-only", json!(false)));
    let populate = qmp.refusal("blockdev-reopen", changed("populate", json!(false)));

    assert!(image.contains("keeps its cache image"), "{image}");
    assert!(writable.contains("read-only"), "{writable}");
    assert!(populate.contains("Cannot change the option 'populate'"), "{populate}");
    let mut client = serve(qmp, &lab.fresh("nbd"), "cache");
    client.read_and_compare(&cache.base.content, reads()).expect("all reads");
    machine.quit();
    cache.assert_sound();
}

#[test]
fn another_node_in_place_of_the_base_is_read_and_not_cached() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut other = cache.base.content.to_vec();
    other[5 << 20..6 << 20].fill(0x77);
    let replacement = lab.base_of(other.clone(), "raw", Over::File);
    let mut machine = Machine::start_with([]);
    let qmp = machine.qmp();
    let nodes = by_reference(&cache);
    add(qmp, nodes.clone());
    let [.., mut node] = nodes;
    let file = json!({ "driver": "file", "node-name": "new", "filename": replacement.file, "read-only": true });
    qmp.run("blockdev-add", file);
    let mut client = serve(qmp, &lab.fresh("nbd"), "cache");
    client.read_and_compare(&cache.base.content, reads().take(4)).expect("reads");
    node["backing"] = json!("new");
    qmp.run("blockdev-reopen", json!({ "options": [node] }));
    client.read_and_compare(&other, reads()).expect("all reads");
    let shown = qmp.run("query-named-block-nodes", json!({ "flat": true }));
    machine.quit();

    let shown = shown.as_array().expect("nodes").iter().find(|node| node["drv"] == "vmcache");
    let data = &shown.expect("the node")["image"]["format-specific"]["data"];
    assert_eq!(data["bypassed"], json!(true), "{data}");
    cache.assert_sound();
}

#[test]
fn statistics_and_image_information_are_those_of_the_command_line() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "quota=64M");
    let mut machine = Machine::start_with(["-blockdev", &nested(&cache).to_string()]);
    let qmp = machine.qmp();
    let mut client = serve(qmp, &lab.fresh("nbd"), "cache");
    for _ in 0..2 {
        client.read_and_compare(&cache.base.content, reads()).expect("all reads");
    }
    eventually("all is stored", || {
        let stored = cache.stats().get("populated-bytes") + cache.stats().get("dropped-bytes");
        stored >= cache.stats().get("base-bytes")
    });
    let shown = |qmp: &mut Monitor| {
        let all = qmp.run("query-blockstats", json!({ "query-nodes": true }));
        let all = all.as_array().expect("nodes").clone();
        let node = all.into_iter().find(|node| node["node-name"] == "cache").expect("the node");
        node["driver-specific"].clone()
    };
    let (stats, told) = (cache.stats(), shown(qmp));
    let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }));
    let node = nodes.as_array().expect("nodes").iter().find(|node| node["drv"] == "vmcache");
    let image = node.expect("the node")["image"]["format-specific"].clone();

    assert_eq!((&told["driver"], &image["type"]), (&json!("vmcache"), &json!("vmcache")));
    assert!(
        told["hit-bytes"].as_u64() > Some(0) && told["miss-bytes"].as_u64() > Some(0),
        "{told}"
    );
    for key in [
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
        "bad-bytes",
        "repaired-bytes",
    ] {
        assert_eq!(told[key], json!(stats.get(key)), "{key}: {told}");
    }
    for key in [
        "state",
        "cluster-size",
        "subcluster-size",
        "quota",
        "cached-bytes",
        "zero-bytes",
        "processes",
        "uuid",
    ] {
        assert_eq!(image["data"][key], cache.info(key), "{key}: {image}");
    }
    assert_eq!(image["data"]["bypassed"], json!(false));
    machine.quit();
    cache.assert_sound();
}

#[test]
fn a_cache_is_mirrored_and_backed_up_to_nodes() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start_with(["-blockdev", &nested(&cache).to_string()]);
    let copies = ["mirror", "backup"].map(|job| {
        let copy = lab.fresh("copy.raw");
        fs::File::create(&copy).and_then(|file| file.set_len(DISK as u64)).expect("a file");
        let node = json!({ "driver": "file", "node-name": job, "filename": copy });
        machine.qmp().run("blockdev-add", node);
        copy
    });
    let options = |job| json!({ "job-id": job, "device": "cache", "target": job, "sync": "full" });
    let qmp = machine.qmp();
    qmp.run("blockdev-mirror", options("mirror"));
    qmp.event("BLOCK_JOB_READY");
    // Without "force" it ends with the copy as the disk is now.
    qmp.run("block-job-cancel", json!({ "device": "mirror" }));
    let mirrored = qmp.event("BLOCK_JOB_COMPLETED");
    qmp.run("blockdev-backup", options("backup"));
    let backed_up = qmp.event("BLOCK_JOB_COMPLETED");
    machine.quit();

    assert_eq!([&mirrored["error"], &backed_up["error"]], [&Value::Null; 2]);
    for copy in copies {
        assert!(fs::read(&copy).expect("a copy") == *cache.base.content, "{}", copy.display());
    }
    assert!(cache.stats().get("base-bytes") <= DISK as u64);
    cache.assert_sound();
}

#[test]
fn a_storage_daemon_serves_a_cache_over_nbd() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let (daemon, mut qmp) =
        storage_daemon(&lab, &["--blockdev".into(), nested(&cache).to_string()]);
    let mut client = serve(&mut qmp, &lab.fresh("nbd"), "cache");
    client.read_and_compare(&cache.base.content, reads()).expect("all reads");
    let said = daemon.terminate().success();

    assert_eq!(said.stderr, "");
    cache.assert_sound();
}

#[test]
fn a_storage_daemon_serves_a_cache_to_a_machine_over_vhost_user() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let socket = lab.fresh("vhost");
    let export = format!(
        "type=vhost-user-blk,id=e0,node-name=cache,num-queues=2,iothread=t0,addr.type=unix,addr.path={}",
        socket.display()
    );
    let iothread = ["--object".into(), "iothread,id=t0".into()];
    let export = ["--blockdev".into(), nested(&cache).to_string(), "--export".into(), export];
    let (daemon, _qmp) = storage_daemon(&lab, &[&iothread[..], &export[..]].concat());
    eventually("the export is there", || socket.exists());
    let system = Tool::driver("qemu-system-x86_64");
    let mut machine = virtio::Machine::start(&lab, system, &virtio::vhost_user_disk(&socket));
    let mut queues = machine.modern_disk(4, 2);
    let reads = virtio::reads_of_two_queues(DISK);
    machine.read_and_compare(&mut queues, &reads, &cache.base.content);
    machine.stop();
    daemon.terminate().success();

    assert_eq!(cache.stats().get("base-bytes"), DISK as u64);
    cache.assert_sound();
}
