//! Users who trust each other only so far, each with processes of its own: one populates, the others
//! may read the image and no more, or have no file at all; and what strangers leave in the cache's
//! directory. All need root, to become other users.
//!
//! The directory is one that every user can reach, and so is the copy of the library: the one that
//! was built may lie in somebody's home.

use std::fs::{self, File, Permissions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use vmcache::format::{BaseIdentity, Geometry};
use vmcache::image::{CreateOptions, create};

use crate::lab::{Cache, Lab, Server};
use crate::process::{Tool, eventually};
use crate::settings::LIBRARY;

/// Owns the image and populates it.
const OWNER: &str = "60001";
/// Two more users.
const TENANT: &str = "60002";
const OTHER: &str = "60003";
const STEP: usize = 256 << 10;
const QUARTER: usize = 6 << 20;

/// A node on which users other than root run QEMU.
struct Node {
    lab: Lab,
    cache: Cache,
}

impl Node {
    /// One with an empty cache that belongs to [`OWNER`], in a directory of his, with this mode.
    fn new(mode: u32) -> Self {
        let lab = Lab::public();
        fs::copy(&*LIBRARY, lab.path("library.so")).expect("a copy of the library");
        let base = lab.base();
        fs::set_permissions(&base.file, Permissions::from_mode(0o644)).expect("the base's mode");
        let directory = lab.path("cache");
        fs::create_dir(&directory).expect("a directory");
        let cache = Cache { path: directory.join("cache.qcow2"), base };
        let size = cache.base.content.len() as u64;
        let options = CreateOptions {
            backing_file: cache.base.name.clone(),
            backing_format: "raw".into(),
            geometry: Geometry::with_cluster_size(128 << 10, size).expect("a geometry"),
            quota: None,
            // As of a base behind a protocol, of which there may be copies.
            base: BaseIdentity::default(),
            mode,
            force: false,
        };
        create(&cache.path, &options).expect("an image");
        give(&directory, OWNER);
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).expect("a mode");
        give(&cache.path, OWNER);
        fs::set_permissions(&cache.path, Permissions::from_mode(mode)).expect("a mode");
        Node { lab, cache }
    }

    /// A QEMU program with the library, of a user.
    fn driver(&self, user: &str, program: &str) -> Tool {
        let mut preload = std::ffi::OsString::from("LD_PRELOAD=");
        preload.push(self.lab.path("library.so"));
        become_user(user, Tool::host("env").arg(preload).arg(program))
    }

    /// `qemu-nbd` of a user, on the cache.
    fn serve(&self, user: &str) -> Server {
        self.serve_options(user, &self.cache.options())
    }

    fn serve_options(&self, user: &str, options: &str) -> Server {
        let nbd = self.driver(user, "qemu-nbd");
        Server::start(&self.lab, nbd, &["-r", "--image-opts", options])
    }

    /// The same with a base of its own that shows something else once the cache is open: who reads
    /// from it is found out.
    fn serve_without_base(&self, user: &str) -> Server {
        let base = self.lab.fresh("copy.raw");
        fs::copy(&self.cache.base.file, &base).expect("a copy of the base");
        let backing = format!("backing.driver=raw,backing.file.filename={}", base.display());
        let server = self.serve_options(user, &format!("{},{backing}", self.cache.options()));
        let other = vec![0x5a; self.cache.base.content.len()];
        let file = File::options().write(true).open(&base).expect("the copy");
        let modified = file.metadata().and_then(|meta| meta.modified()).expect("its time");
        file.write_all_at(&other, 0).expect("other content");
        // Or the reader would notice that its base was changed, and be right.
        file.set_modified(modified).expect("its time");
        server
    }

    /// Reads a part of the disk.
    #[track_caller]
    fn assert_serves(&self, server: &Server, part: Range<usize>) {
        let reads = part.step_by(STEP).map(|at| (at as u64, STEP as u32));
        server.connect().read_and_compare(&self.cache.base.content, reads).expect("all reads");
    }

    /// Reads a part of the disk through a server that stores it, and waits until that is done for
    /// everything up to its end.
    fn populate(&self, server: &Server, part: Range<usize>) {
        let end = part.end as u64;
        self.assert_serves(server, part);
        eventually("all is stored", || self.cache.stats().get("populated-bytes") == end);
    }

    /// Waits until the image's tables show the first bytes of the disk.
    fn await_checkpoint(&self, bytes: usize) {
        eventually("a checkpoint", || self.cache.stock_mapped() == bytes as u64);
    }

    /// Content and time of change of the image and its live file.
    fn state(&self) -> [(Vec<u8>, SystemTime); 2] {
        [self.cache.path.clone(), self.cache.live()].map(|path| {
            let changed = fs::metadata(&path).and_then(|meta| meta.modified()).expect("a time");
            (fs::read(&path).expect("a file"), changed)
        })
    }

    /// The live file's owner and permission bits.
    fn live_owner(&self) -> (String, u32) {
        let meta = fs::metadata(self.cache.live()).expect("a live file");
        (meta.uid().to_string(), meta.mode() & 0o777)
    }
}

/// Makes a file a user's and his group's.
fn give(path: &Path, user: &str) {
    let id = Some(user.parse().expect("a user's number"));
    chown(path, id, id).expect("another owner (needs root)");
}

/// The same program run by a user who is in no group but his own.
fn become_user(user: &str, tool: Tool) -> Tool {
    let (user, group) = (format!("--reuid={user}"), format!("--regid={user}"));
    tool.under(["setpriv", &user, &group, "--clear-groups"])
}

/// What a server shows, as QEMU names it.
fn url(server: &Server) -> String {
    format!("nbd+unix:///?socket={}", server.socket().display())
}

/// How a process has a file open: the access mode of each descriptor, and the permissions of each
/// mapping.
fn access(server: &mut Server, path: &Path) -> (Vec<i32>, Vec<String>) {
    let process = PathBuf::from(format!("/proc/{}", server.process().id()));
    let links = fs::read_dir(process.join("fd")).expect("descriptors").map(|entry| {
        let entry = entry.expect("a descriptor");
        (entry.file_name(), fs::read_link(entry.path()).unwrap_or_default())
    });
    let modes = links.filter(|(_, target)| target == path).map(|(number, _)| {
        let info = fs::read_to_string(process.join("fdinfo").join(number)).expect("its state");
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags");
        i32::from_str_radix(flags.trim(), 8).expect("a number") & libc::O_ACCMODE
    });
    let maps = fs::read_to_string(process.join("maps")).expect("mappings");
    let mapped = maps.lines().filter(|line| line.ends_with(&path.display().to_string()));
    let permissions = |line: &str| line.split(' ').nth(1).expect("permissions").to_owned();
    (modes.collect(), mapped.map(permissions).collect())
}

#[test]
fn readers_are_served_what_one_trusted_process_stores_and_cannot_change_it() {
    let node = Node::new(0o644);
    let mut trusted = node.serve(OWNER);
    node.populate(&trusted, 0..QUARTER);
    let mut readers = [(); 2].map(|()| node.serve_without_base(TENANT));
    node.populate(&trusted, QUARTER..2 * QUARTER);
    node.await_checkpoint(2 * QUARTER);

    let before = node.state();
    for reader in &mut readers {
        node.assert_serves(reader, 0..2 * QUARTER);
        let (image, mapped_image) = access(reader, &node.cache.path);
        assert!(!image.is_empty() && image.iter().all(|mode| *mode == libc::O_RDONLY));
        assert_eq!(mapped_image, [""; 0]);
        let read_only = (vec![libc::O_RDONLY], vec!["r--s".to_owned()]);
        assert_eq!(access(reader, &node.cache.live()), read_only);
    }
    assert!(node.state() == before, "a reader left a trace");
    for path in [node.cache.path.clone(), node.cache.live()] {
        let write = Tool::host("sh").args(["-c", "exec 3>>\"$0\""]).arg(path);
        become_user(TENANT, write).run().failure();
    }

    trusted.process().kill();
    readers.iter().for_each(|reader| node.assert_serves(reader, 0..2 * QUARTER));
    let trusted = node.serve(OWNER);
    node.populate(&trusted, 2 * QUARTER..3 * QUARTER);
    readers.iter().for_each(|reader| node.assert_serves(reader, 0..3 * QUARTER));
    assert_eq!(trusted.stop().stderr, "");
    for reader in readers {
        node.assert_serves(&reader, 0..3 * QUARTER);
        let said = reader.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains("without adding to it"), "{said:?}");
    }
    node.cache.assert_sound();
}

#[test]
fn what_nobody_has_stored_readers_fetch_from_the_base() {
    let node = Node::new(0o644);
    let trusted = node.serve(OWNER);
    node.populate(&trusted, 0..QUARTER);
    let reader = node.serve(TENANT);
    reader.assert_serves(&node.cache.base.content);
    assert_eq!(node.cache.stats().get("populated-bytes"), QUARTER as u64);
    reader.stop();
    trusted.stop();
}

#[test]
fn readers_go_on_when_the_live_file_is_gone_and_populating_does_when_they_have_left() {
    let node = Node::new(0o644);
    let mut trusted = node.serve(OWNER);
    node.populate(&trusted, 0..QUARTER);
    node.await_checkpoint(QUARTER);
    let with_live = node.serve_without_base(TENANT);
    fs::remove_file(node.cache.live()).expect("a live file");
    let without_live = node.serve_without_base(TENANT);
    node.assert_serves(&with_live, 0..QUARTER);
    node.assert_serves(&without_live, 0..QUARTER);

    trusted.process().kill();
    let trusted = node.serve(OWNER);
    trusted.assert_serves(&node.cache.base.content);
    assert!(!node.cache.live().exists());
    with_live.stop();
    eventually("there is a new live file", || node.cache.live().exists());
    node.assert_serves(&without_live, 0..QUARTER);
    trusted.assert_serves(&node.cache.base.content);
    without_live.stop();
    let said = trusted.stop();
    assert_eq!(said.warnings().len(), 2, "{said:?}");
    assert!(said.stderr.contains("its live file was deleted"), "{said:?}");
    assert!(said.stderr.contains("using the cache from now on"), "{said:?}");
    node.cache.assert_sound();
}

#[test]
fn an_image_of_its_owner_alone_is_refused_to_others_with_the_reason() {
    let node = Node::new(0o600);
    let refused = node
        .driver(TENANT, "qemu-io")
        .args(["-r", "--image-opts", &node.cache.options(), "-c", "read 0 4k"])
        .run()
        .failure();
    assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
    let trusted = node.serve(OWNER);
    trusted.assert_serves(&node.cache.base.content);
    assert_eq!(node.live_owner(), (OWNER.to_owned(), 0o600));
    trusted.stop();
}

#[test]
fn root_leaves_the_live_file_to_the_owner_of_the_image() {
    let node = Node::new(0o640);
    node.lab.serve(&node.cache).stop();
    assert_eq!(node.live_owner(), (OWNER.to_owned(), 0o640));
    let trusted = node.serve(OWNER);
    trusted.assert_serves(&node.cache.base.content);
    assert_eq!(trusted.stop().stderr, "");
}

#[test]
fn a_live_file_of_a_stranger_is_believed_by_nobody() {
    let node = Node::new(0o644);
    let trusted = node.serve(OWNER);
    node.populate(&trusted, 0..QUARTER);
    trusted.stop();
    give(&node.cache.live(), TENANT);

    let mut reader = node.serve_without_base(OTHER);
    node.assert_serves(&reader, 0..QUARTER);
    assert_eq!(access(&mut reader, &node.cache.live()).1, [""; 0]);
    let said = reader.stop();
    assert!(said.stderr.contains("it belongs to user 60002"), "{said:?}");
    let trusted = node.serve(OWNER);
    trusted.assert_serves(&node.cache.base.content);
    assert_eq!(node.live_owner(), (OWNER.to_owned(), 0o644));
    let said = trusted.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("making a new one"), "{said:?}");
}

#[test]
fn members_of_a_group_populate_the_image_that_the_group_may_write_to() {
    let node = Node::new(0o660);
    let groups = ["setpriv", "--reuid=60002", "--regid=60002", "--groups=60001"];
    let directory = node.cache.path.parent().expect("a directory");
    fs::set_permissions(directory, Permissions::from_mode(0o775)).expect("a mode");
    let preload = format!("LD_PRELOAD={}", node.lab.path("library.so").display());
    let member = Tool::host("env").args([&preload, "qemu-nbd"]).under(groups);
    let options = ["-r", "--image-opts", &node.cache.options()];
    let member = Server::start(&node.lab, member, &options);
    assert_eq!(node.live_owner(), (TENANT.to_owned(), 0o660));
    let owner = node.serve(OWNER);
    node.populate(&member, 0..QUARTER);
    node.populate(&owner, QUARTER..2 * QUARTER);
    assert_eq!(node.cache.stats().get("processes"), 2);
    assert_eq!([member.stop().stderr, owner.stop().stderr], ["", ""]);
    node.cache.assert_sound();
}

#[test]
fn neighbours_behind_a_socket_are_served_without_any_file_of_the_cache() {
    let node = Node::new(0o600);
    fs::set_permissions(
        node.cache.path.parent().expect("a directory"),
        Permissions::from_mode(0o700),
    )
    .expect("a mode");
    let trusted = node.serve(OWNER);
    fs::set_permissions(trusted.socket(), Permissions::from_mode(0o666)).expect("a mode");
    let url = url(&trusted);
    let neighbours = [TENANT, OTHER].map(|user| {
        let overlay = node.lab.fresh("overlay.qcow2").display().to_string();
        let create = ["create", "-q", "-f", "qcow2", "-b", &url, "-F", "raw", &overlay];
        become_user(user, Tool::stock("qemu-img").args(create)).run().success();
        let nbd = become_user(user, Tool::stock("qemu-nbd"));
        Server::start(&node.lab, nbd, &["-f", "qcow2", &overlay])
    });
    neighbours[0].assert_serves(&node.cache.base.content);
    let fetched = node.cache.stats();
    neighbours[1].assert_serves(&node.cache.base.content);
    assert!(fetched.get("base-reads") > 0);
    assert_eq!(node.cache.stats().since(&fetched, "base-reads"), 0);
    neighbours.into_iter().for_each(|neighbour| drop(neighbour.stop()));
    trusted.stop();
    node.cache.assert_sound();
}
