//! `qemu-system-x86_64` without a guest: opening, looking, closing, through its monitor.

use std::path::Path;

use serde_json::{Value, json};

use crate::lab::{Cache, DISK, Lab, Over, noise};
use crate::monitor::Monitor;
use crate::nbd::Client;
use crate::process::{Child, Output, Tool};

/// A machine that does not run, and its monitor.
pub struct Machine {
    child: Child,
    monitor: Monitor,
}

impl Machine {
    /// Starts one with drives, arguments of `-drive`.
    pub fn start(drives: &[String]) -> Self {
        let drives = drives.iter().flat_map(|drive| ["-drive", drive]);
        Self::start_with(["-device", "virtio-scsi-pci"].into_iter().chain(drives))
    }

    /// Starts one with arguments.
    pub fn start_with<'a>(args: impl IntoIterator<Item = &'a str>) -> Self {
        let (child, input, output) = Tool::driver("qemu-system-x86_64")
            .args(["-S", "-nodefaults", "-no-user-config", "-accel", "tcg", "-display", "none"])
            .args(["-qmp", "stdio"])
            .args(args)
            .start_with_pipes();
        Machine { child, monitor: Monitor::over(input, output) }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its monitor.
    pub fn qmp(&mut self) -> &mut Monitor {
        &mut self.monitor
    }

    /// Runs a command and gives its answer, events left out.
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        self.monitor.command(name, arguments)
    }

    /// Runs a command of the monitor for people and gives what it prints.
    pub fn monitor(&mut self, command: &str) -> String {
        self.monitor.for_people(command)
    }

    /// Moves the one node of the driver to an iothread, or with `null` to the main thread.
    fn move_to_thread(&mut self, thread: &Value) {
        let node = self.node();
        let moved = self.command(
            "x-blockdev-set-iothread",
            json!({ "node-name": node, "iothread": thread, "force": true }),
        );
        assert_eq!(moved["return"], json!({}), "{moved}");
    }

    /// The name of the one node of the driver.
    fn node(&mut self) -> Value {
        let nodes = self.command("query-named-block-nodes", json!({ "flat": true }));
        let nodes = nodes["return"].as_array().expect("nodes");
        nodes.iter().find(|node| node["drv"] == "vmcache").expect("the node")["node-name"].clone()
    }

    /// Serves the one node of the driver over NBD, in an iothread of its own where there is one.
    pub fn serve(&mut self, socket: &Path, iothread: Option<&str>) -> Client {
        let node = self.node();
        let at = json!({ "type": "unix", "data": { "path": socket } });
        let mut export = json!({ "type": "nbd", "id": "e0", "node-name": node, "name": "" });
        if let Some(id) = iothread {
            self.command("object-add", json!({ "qom-type": "iothread", "id": id }));
            export["iothread"] = json!(id);
        }
        for (name, arguments) in
            [("nbd-server-start", json!({ "addr": at })), ("block-export-add", export)]
        {
            let done = self.command(name, arguments);
            assert_eq!(done["return"], json!({}), "{done}");
        }
        Client::connect(socket).expect("a connection")
    }

    /// Ends it in good order; commands may have printed something.
    #[track_caller]
    pub fn quit(self) -> Output {
        let stdout = self.monitor.quit();
        let mut said = self.child.wait().success();
        said.stdout = stdout;
        said
    }

    /// Its process.
    pub fn process(self) -> Child {
        self.child
    }
}

/// The argument of `-drive` for a cache without a device.
pub fn drive(id: &str, cache: &Cache) -> String {
    format!("if=none,id={id},{},read-only=on", cache.options())
}

#[test]
fn a_machine_opens_and_closes_a_cache_without_hanging() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    let shown = machine.monitor("info block -v");
    assert!(shown.contains("vmcache"), "{shown}");
    assert!(shown.contains(&cache.base.name), "{shown}");
    let said = machine.quit();
    assert_eq!(said.stderr, "");
    cache.assert_sound();
}

#[test]
fn a_drive_that_does_not_say_read_only_is_so_by_itself() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start(&[format!("if=none,id=d0,{}", cache.options())]);
    let shown = machine.monitor("info block");
    assert!(shown.contains("vmcache, read-only"), "{shown}");
    machine.quit();
}

#[test]
fn quitting_writes_the_last_checkpoint() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(9 << 20), "raw", Over::File), "");
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    machine.monitor("qemu-io d0 \"read -q 0 8M\"");
    machine.quit();
    assert!(cache.stats().get("checkpoints") >= 1);
    // What the next boot would find: the tables in the image alone.
    std::fs::remove_file(cache.live()).expect("a live file");
    assert_eq!(cache.info_number("cached-bytes"), 8 << 20);
    cache.assert_sound();
}

#[test]
fn the_same_image_serves_two_drives_of_one_machine() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start(&[drive("d0", &cache), drive("d1", &cache)]);
    let commands = (0..24).flat_map(|at| [("d0", at), ("d1", at)]);
    for (id, at) in commands {
        machine.monitor(&format!("qemu-io {id} \"aio_read -q {at}M 1M\""));
    }
    machine.monitor("qemu-io d0 \"aio_flush\"");
    machine.monitor("qemu-io d1 \"aio_flush\"");
    machine.quit();
    assert!(cache.stats().get("base-bytes") <= DISK as u64);
    cache.assert_sound();
}

#[test]
fn two_images_serve_two_drives_of_one_machine() {
    let lab = Lab::new();
    let base = lab.base();
    let caches = [lab.cache(&base, ""), lab.cache(&base, "cluster_size=2M")];
    let mut machine = Machine::start(&[drive("d0", &caches[0]), drive("d1", &caches[1])]);
    machine.monitor("qemu-io d0 \"read -q 0 3M\"");
    machine.monitor("qemu-io d1 \"read -q 1M 3M\"");
    machine.quit();
    for cache in &caches {
        assert_eq!(cache.info_number("cached-bytes") + cache.info_number("zero-bytes"), 3 << 20);
        cache.assert_sound();
    }
}

#[test]
fn a_cache_is_moved_to_an_iothread_and_back() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    machine.command("object-add", json!({ "qom-type": "iothread", "id": "t0" }));
    for thread in [json!("t0"), Value::Null] {
        machine.move_to_thread(&thread);
        machine.monitor("qemu-io d0 \"read -q 0 4M\"");
    }
    machine.quit();
    assert_eq!(cache.info_number("cached-bytes") + cache.info_number("zero-bytes"), 4 << 20);
    cache.assert_sound();
}
