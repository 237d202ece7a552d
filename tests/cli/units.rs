//! The systemd units (`packaging/systemd`): their commands, run as they stand there with what systemd
//! puts in, by the real QEMU. `scripts/test` has them read by systemd-analyze.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::dir::{Dir, MIB, library};

const UNITS: [&str; 2] = ["vmcache-vm@.service", "vmcache-nbd@.service"];

/// A unit, with its continued lines as one each.
fn unit_text(unit: &str) -> String {
    let path = format!("{}/packaging/systemd/{unit}", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(path).unwrap().replace("\\\n", " ")
}

fn setting<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

/// The command of a unit's instance vm1, on one line, for a shell whose variables are the unit's:
/// an unquoted `$NAME` is cut into words there as well.
fn command_of(unit: &str, key: &str, dir: &Dir) -> String {
    let text = unit_text(unit);
    let line = setting(&text, key).unwrap();
    let root = dir.text("");
    line.replace("$$", "$")
        .replace("%i", "vm1")
        .replace("%t", &format!("{root}run"))
        .replace("%C", &format!("{root}cache"))
        .replace("%S", &format!("{root}lib"))
        .replace("/bin/sh ", "exec /bin/sh ")
        .replace("/usr/bin/vmcache ", &format!("exec {} ", env!("CARGO_BIN_EXE_vmcache")))
}

/// The directories that systemd makes for an instance vm1.
fn directories_of(unit: &str) -> Vec<String> {
    let text = unit_text(unit);
    let keys =
        [("CacheDirectory", "cache"), ("StateDirectory", "lib"), ("RuntimeDirectory", "run")];
    keys.iter()
        .filter_map(|(key, root)| Some(format!("{root}/{}", setting(&text, key)?)))
        .map(|name| name.replace("%i", "vm1"))
        .collect()
}

fn shell(dir: &Dir, command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .current_dir(dir.path("."))
        .env("VMCACHE_LIBRARY", library())
        .env("BASE", dir.text("base.raw"))
        .env("FORMAT", "raw")
        .env("BOOT_OPTIONS", "-o quota=4M --id d0")
        .env("QEMU_OPTIONS", "-M none -display none")
        .stdin(Stdio::null());
    shell
}

/// A directory in the place of the file system's root, with what systemd makes for the units.
fn node() -> Dir {
    let dir = Dir::with_base(2 * MIB);
    let made = UNITS.into_iter().flat_map(directories_of);
    made.for_each(|name| fs::create_dir_all(dir.path(&name)).unwrap());
    dir
}

#[track_caller]
fn eventually(mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
}

/// A service, killed when dropped.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a service, which is a shell, runs this program now.
fn runs(service: &Child, program: &str) -> bool {
    let pid = service.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    children.split_whitespace().any(|pid| name(pid).trim() == program)
}

#[test]
fn the_unit_of_a_machine_starts_qemu_with_a_monitor_that_stops_it() {
    let dir = node();
    let unit = "vmcache-vm@.service";
    let made = shell(&dir, &command_of(unit, "ExecStartPre", &dir)).status().unwrap();
    assert!(made.success());
    let mut service = Service(shell(&dir, &command_of(unit, "ExecStart", &dir)).spawn().unwrap());
    eventually(|| dir.path("lib/vmcache-vm/vm1.qcow2").exists());
    // A machine without a power button does not hear of it; QEMU takes the line all the same.
    let stop = command_of(unit, "ExecStop", &dir);
    assert!(stop.contains("echo system_powerdown >"), "{stop}");
    let quit = stop.replace("system_powerdown", "quit");
    let pid = service.0.id().to_string();
    let mut stopping = shell(&dir, &quit).env("MAINPID", &pid).spawn().unwrap();
    assert!(service.0.wait().unwrap().success());
    assert!(stopping.wait().unwrap().success());
    assert_eq!(dir.names("cache/vmcache-vm").len(), 2);
}

/// As after the guest has powered itself off: the pipe is there, and QEMU at its other end is gone.
#[test]
fn stopping_a_machine_that_has_ended_waits_for_nobody() {
    let dir = node();
    shell(&dir, &command_of(UNITS[0], "ExecStartPre", &dir)).status().unwrap();
    let stop = command_of(UNITS[0], "ExecStop", &dir);
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    for pid in ["", &ended.id().to_string()] {
        let mut stopping = Service(shell(&dir, &stop).env("MAINPID", pid).spawn().unwrap());
        eventually(|| stopping.0.try_wait().unwrap().is_some_and(|status| status.success()));
    }
}

/// QEMU may go between the look at it and the line for it.
#[test]
fn the_line_that_stops_a_machine_needs_no_reader() {
    let dir = node();
    shell(&dir, &command_of(UNITS[0], "ExecStartPre", &dir)).status().unwrap();
    let mut machine = Service(Command::new("sleep").arg("60").spawn().unwrap());
    let pid = machine.0.id().to_string();
    let stop = command_of(UNITS[0], "ExecStop", &dir);
    let mut stopping = Service(shell(&dir, &stop).env("MAINPID", &pid).spawn().unwrap());
    // The wait that follows the line.
    eventually(|| runs(&stopping.0, "sleep"));
    machine.0.kill().unwrap();
    machine.0.wait().unwrap();
    assert!(stopping.0.wait().unwrap().success());
}

/// systemd hands all that is in such a directory to the unit's user: root's own caches and machines,
/// and libvirt's, are in directories called vmcache.
#[test]
fn the_units_have_directories_that_nothing_else_uses() {
    let all: Vec<String> = UNITS.into_iter().flat_map(directories_of).collect();
    let expected = [
        "cache/vmcache-vm",
        "lib/vmcache-vm",
        "run/vmcache-vm/vm1",
        "cache/vmcache-nbd",
        "run/vmcache-nbd/vm1",
    ];
    assert_eq!(all, expected);
    let condition = setting(&unit_text(UNITS[1]), "ConditionPathExists").map(str::to_owned);
    assert_eq!(condition.as_deref(), Some("/var/cache/vmcache-nbd/%i.cache"));
}

#[test]
fn the_unit_of_an_export_serves_the_cache() {
    let dir = node();
    let cache = "cache/vmcache-nbd/vm1.cache";
    dir.vmcache(&["create", "-q", "-b", &dir.text("base.raw"), "-F", "raw", cache]).exits(0);
    let command = command_of("vmcache-nbd@.service", "ExecStart", &dir);
    let _service = Service(shell(&dir, &command).spawn().unwrap());
    let socket = dir.text("run/vmcache-nbd/vm1/nbd.sock");
    eventually(|| fs::exists(&socket).unwrap());
    let url = format!("nbd+unix:///?socket={socket}");
    dir.qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", "base.raw", &url]).exits(0);
    let info = dir.vmcache(&["info", "--output=json", cache]).json();
    assert_eq!((&info["cached-bytes"], &info["processes"]), (&(2 * MIB).into(), &1.into()));
}
