//! `vmcache create`: what it makes, as QEMU sees it.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::dir::{CACHE, Dir, KIB, MIB, TIB};

fn create_with_clusters(size: u64, option: &str) -> Dir {
    let dir = Dir::with_base(size);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", "-o", option, CACHE]).exits(0);
    dir
}

#[test]
fn an_image_with_clusters_of_16_kib_is_sound_to_qemu() {
    create_with_clusters(3 * MIB, "cluster_size=16K").is_sound_to_qemu();
}

#[test]
fn an_image_with_clusters_of_64_kib_is_sound_to_qemu() {
    create_with_clusters(3 * MIB, "cluster_size=64K").is_sound_to_qemu();
}

#[test]
fn an_image_with_clusters_of_128_kib_is_sound_to_qemu() {
    create_with_clusters(3 * MIB, "cluster_size=128K").is_sound_to_qemu();
}

#[test]
fn an_image_with_clusters_of_2_mib_is_sound_to_qemu() {
    create_with_clusters(5 * MIB, "cluster_size=2M").is_sound_to_qemu();
}

#[test]
fn a_base_of_1000_bytes_has_a_disk_of_1024() {
    let dir = create_with_clusters(1000, "cluster_size=16K");
    dir.is_sound_to_qemu();
    assert_eq!(dir.vmcache(&["info", "--output=json", CACHE]).json()["virtual-size"], 1024);
}

#[test]
fn a_base_that_is_no_whole_number_of_clusters_is_sound_to_qemu() {
    let dir = create_with_clusters(3 * MIB + 512, "cluster_size=128K");
    dir.is_sound_to_qemu();
    let info = dir.vmcache(&["info", "--output=json", CACHE]).json();
    assert_eq!(info["virtual-size"], 3 * MIB + 512);
}

#[test]
fn qemu_sees_the_backing_file_its_format_and_extended_l2_entries() {
    let dir = Dir::with_cache(MIB);
    let info = dir.qemu("qemu-img", &["info", "--output=json", CACHE]).exits(0).json();
    assert_eq!(info["format"], "qcow2");
    assert_eq!(info["backing-filename"], "base.raw");
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["cluster-size"], 16 * KIB);
    assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
}

#[test]
fn clusters_have_128_kib_unless_told_otherwise() {
    let dir = Dir::with_base(MIB);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    let info = dir.vmcache(&["info", "--output=json", CACHE]).json();
    assert_eq!(info["cluster-size"], 128 * KIB);
    assert_eq!(info["subcluster-size"], 4 * KIB);
}

#[test]
fn a_cache_for_one_tebibyte_occupies_next_to_nothing() {
    let dir = Dir::new();
    dir.set_len("base.raw", TIB);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    assert!(dir.occupied(CACHE) <= 512 * KIB, "{} bytes", dir.occupied(CACHE));
    dir.qemu("qemu-img", &["check", "-f", "qcow2", CACHE]).exits(0);
}

#[test]
fn a_qcow2_base_gives_the_cache_its_virtual_size() {
    let dir = Dir::new();
    dir.qemu("qemu-img", &["create", "-f", "qcow2", "base.qcow2", "100M"]).exits(0);
    dir.vmcache(&["create", "-b", "base.qcow2", "-F", "qcow2", CACHE]).exits(0);
    let info = dir.vmcache(&["info", "--output=json", CACHE]).json();
    assert_eq!(info["virtual-size"], 100 * MIB);
    assert_eq!(info["backing-filename-format"], "qcow2");
    dir.qemu("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", "base.qcow2", CACHE]).exits(0);
}

#[test]
fn a_cache_can_be_the_base_of_another() {
    let dir = Dir::with_cache(MIB);
    dir.vmcache(&["create", "-b", CACHE, "-F", "qcow2", "second.qcow2"]).exits(0);
    dir.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "base.raw", "second.qcow2"])
        .exits(0);
}

/// A server of a base, until it is dropped.
struct NbdServer(Child);

impl NbdServer {
    fn start(dir: &Dir) -> Self {
        let arguments = ["--read-only", "--persistent", "-f", "raw", "-k", &dir.text("socket")];
        let child = Command::new("qemu-nbd")
            .args(arguments)
            .arg(dir.path("base.raw"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let is_socket = |meta: fs::Metadata| meta.file_type().is_socket();
        while !fs::metadata(dir.path("socket")).is_ok_and(is_socket) {
            assert!(Instant::now() < deadline, "qemu-nbd did not start");
            thread::sleep(Duration::from_millis(5));
        }
        NbdServer(child)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_base_behind_a_url_gives_the_cache_its_size() {
    let dir = Dir::with_base(3 * MIB);
    let _server = NbdServer::start(&dir);
    let url = format!("nbd+unix:///?socket={}", dir.text("socket"));
    dir.vmcache(&["create", "-b", &url, "-F", "raw", CACHE]).exits(0);
    let info = dir.vmcache(&["info", "--output=json", CACHE]).json();
    assert_eq!(info["virtual-size"], 3 * MIB);
    assert_eq!(info["backing-filename"], url);
    dir.is_sound_to_qemu();
}

#[test]
fn a_relative_base_starts_at_the_directory_of_the_cache() {
    let dir = Dir::with_base(MIB);
    fs::create_dir(dir.path("caches")).unwrap();
    let cache = "caches/cache.qcow2";
    dir.vmcache(&["create", "-b", "../base.raw", "-F", "raw", cache]).exits(0);
    dir.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "base.raw", cache]).exits(0);
}

#[test]
fn an_absolute_base_is_found_from_anywhere() {
    let dir = Dir::with_base(MIB);
    fs::create_dir(dir.path("caches")).unwrap();
    let cache = "caches/cache.qcow2";
    dir.vmcache(&["create", "-b", &dir.text("base.raw"), "-F", "raw", cache]).exits(0);
    dir.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "base.raw", cache]).exits(0);
}

#[test]
fn options_can_stand_in_one_argument_or_in_several() {
    let dir = Dir::with_base(MIB);
    let create = ["create", "-b", "base.raw", "-F", "raw"];
    dir.vmcache(&[&create[..], &["-o", "quota=1.5G,cluster_size=64K", "one"]].concat()).exits(0);
    dir.vmcache(&[&create[..], &["-o", "quota=1536M", "-o", "cluster_size=64k", "two"]].concat())
        .exits(0);
    let one = dir.vmcache(&["info", "--output=json", "one"]).json();
    let two = dir.vmcache(&["info", "--output=json", "two"]).json();
    assert_eq!(one["quota"], 1536 * MIB);
    assert_eq!(one["quota"], two["quota"]);
    assert_eq!(one["cluster-size"], two["cluster-size"]);
}

#[test]
fn force_replaces_what_is_there() {
    let dir = Dir::with_cache(MIB);
    let before = dir.vmcache(&["info", "--output=json", CACHE]).json();
    dir.vmcache(&["create", "--force", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    let after = dir.vmcache(&["info", "--output=json", CACHE]).json();
    assert_ne!(before["uuid"], after["uuid"]);
    dir.is_sound_to_qemu();
}

#[test]
fn nothing_but_the_image_is_left_behind() {
    let dir = Dir::with_cache(MIB);
    let names: Vec<_> = dir.contents().into_keys().collect();
    assert_eq!(names, [dir.path("base.raw"), dir.path(CACHE)]);
}

#[test]
fn the_image_belongs_to_its_maker_alone_unless_the_mode_says_otherwise() {
    let dir = Dir::with_cache(MIB);
    let mode = |name| fs::metadata(dir.path(name)).unwrap().permissions().mode() & 0o7777;
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", "--mode", "0640", "shared"]).exits(0);
    assert_eq!(mode(CACHE), 0o600);
    assert_eq!(mode("shared"), 0o640);
}

#[test]
fn create_says_what_it_made() {
    let dir = Dir::with_base(MIB);
    dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", "-o", "quota=200M", CACHE])
        .exits(0)
        .prints("Created 'cache.qcow2' for base 'base.raw' (raw): 1 MiB, clusters of 128 KiB")
        .prints("quota 200 MiB");
}

#[test]
fn quiet_says_nothing() {
    let dir = Dir::with_base(MIB);
    let run = dir.vmcache(&["create", "-q", "-b", "base.raw", "-F", "raw", CACHE]).exits(0);
    assert_eq!(run.stdout + &run.stderr, "");
}

#[test]
fn a_qcow2_file_named_as_raw_is_made_with_a_warning() {
    let dir = Dir::with_cache(MIB);
    dir.vmcache(&["create", "-b", CACHE, "-F", "raw", "second.qcow2"])
        .exits(0)
        .complains("looks like a qcow2 image");
}
