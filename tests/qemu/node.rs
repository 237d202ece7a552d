//! A compute node's commands where they meet the storage node: what `vmcache publish` leaves on a full
//! filesystem and while the cache fills, published images read over NFS, and what `vmcache boot`
//! refuses. What needs neither root nor a server is tested in `tests/cli`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::lab::{Base, Cache, DISK, Lab, Over, Server, SetOnDrop, content, noise, sequential};
use crate::mounts::with_tmpfs;
use crate::process::{Output, Tool};
use crate::settings::{LIBRARY, VMCACHE, text};

fn publish(cache: &Cache, to: &Path, options: &[&str]) -> Output {
    let base = cache.base.name.as_str();
    let tool = Tool::vmcache().args(["publish", "-q", "-b", base, "-F", cache.base.format]);
    tool.args(options).args([&cache.path, to]).run()
}

/// A published image, for the questions that can be asked of a cache.
fn published(cache: &Cache, path: &Path) -> Cache {
    Cache { path: path.to_owned(), base: cache.base.clone() }
}

fn names(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory");
    entries.map(|entry| entry.expect("a name").path()).collect()
}

#[test]
fn a_full_filesystem_keeps_nothing_of_what_is_published() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    server.stop();
    let small = lab.path("small");
    fs::create_dir(&small).expect("a directory");
    with_tmpfs(&small, 4 << 20, || {
        let said = publish(&cache, &small.join("published"), &[]).failure();
        assert!(said.stderr.contains("No space left on device"), "{said:?}");
        assert_eq!(names(&small), [PathBuf::new(); 0]);
        // And all room is there again.
        fs::write(small.join("ballast"), vec![1; 3 << 20]).expect("room");
    });
}

#[test]
fn what_is_published_is_sound_while_the_cache_fills() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    let done = AtomicBool::new(false);
    let editions = thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            let mut editions = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let to = lab.fresh("published");
                publish(&cache, &to, &[]).success();
                editions.push(to);
            }
            editions
        });
        let end = SetOnDrop(&done);
        server.assert_serves(&cache.base.content);
        drop(end);
        publisher.join().expect("the publisher")
    });
    server.stop();
    assert!(!editions.is_empty());
    editions.iter().for_each(|path| published(&cache, path).assert_sound());
}

/// A file in the exported directory, by its name here and by the server's.
fn exported(lab: &Lab) -> (PathBuf, String) {
    let asked = |name| text(name).unwrap_or_else(|| panic!("{name}: see scripts/test"));
    let name = lab.path("published").display().to_string().replace('/', "-");
    let directory = PathBuf::from(asked("VMCACHE_TEST_NFS_DIRECTORY"));
    (directory.join(&name), format!("{}/{name}", asked("VMCACHE_TEST_NFS")))
}

/// A cache of a base over NFS that holds some of it.
fn warm_cache(lab: &Lab, share: usize) -> Cache {
    let base = lab.base_of(content(DISK), "raw", Over::Nfs);
    let cache = lab.cache(&base, "");
    let server = lab.serve(&cache);
    let reads = sequential(DISK / share, 256 << 10);
    server.connect().read_and_compare(&base.content, reads).expect("reads");
    server.stop();
    cache
}

#[test]
fn who_reads_a_published_image_over_nfs_goes_on_when_there_is_another_edition() {
    let lab = Lab::new();
    let cache = warm_cache(&lab, 2);
    let (to, url) = exported(&lab);
    publish(&cache, &to, &[]).success();
    let reader = Server::start(&lab, Tool::stock("qemu-nbd"), &["-r", "-f", "qcow2", &url]);
    // Nothing but its tables is read before the other edition is there.
    drop(reader.connect());
    publish(&cache, &to, &["-f"]).success();
    reader.assert_serves(&cache.base.content);
    reader.stop();
    let old = to.with_file_name(format!("{}.old", to.file_name().expect("a name").display()));
    [to, old].iter().for_each(|path| fs::remove_file(path).expect("an edition"));
}

#[test]
fn a_node_without_a_cache_reads_what_was_published_and_the_rest_from_the_base() {
    let lab = Lab::new();
    let cache = warm_cache(&lab, 2);
    let (to, url) = exported(&lab);
    publish(&cache, &to, &[]).success();
    let second = Cache { path: lab.path("caches/second"), base: cache.base.clone() };
    let machine = lab.path("machine");
    let script = format!(
        "#!/bin/sh\nprintf 'qemu-io d0 \"read 0 {DISK}\"\\nquit\\n' | \
         exec qemu-system-x86_64 -M none -display none -monitor stdio \"$@\"\n"
    );
    fs::write(&machine, script).expect("a script");
    fs::set_permissions(&machine, Permissions::from_mode(0o755)).expect("its mode");
    let said = boot(&lab, &cache.base, &second.path, machine.as_os_str())
        .args(["--published", &url, "--id", "d0"])
        .run()
        .success();
    assert!(said.stderr.contains("before the base"), "{said:?}");
    assert!(said.stdout.contains(&format!("read {DISK}/{DISK} bytes")), "{said:?}");
    // Its cache is the base's, and needs what was published no more.
    fs::remove_file(to).expect("the published image");
    second.assert_sound();
    let before = second.stats();
    let server = lab.serve(&second);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings(), [""; 0]);
    assert_eq!(second.stats().since(&before, "miss-bytes"), 0);
}

#[test]
fn a_path_of_its_own_is_no_name_for_the_base_of_other_nodes() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let to = lab.path("published");
    let said = Tool::vmcache().arg("publish").args([&cache.path, &to]).run().failure();
    assert!(said.stderr.contains("cannot be found by other machines"), "{said:?}");
    assert!(!to.exists());
}

/// Boots with a cache, which may be a directory for it, and a program in QEMU's place.
fn boot(lab: &Lab, base: &Base, cache: &Path, machine: &OsStr) -> Tool {
    let mut library = OsString::from("VMCACHE_LIBRARY=");
    library.push(&*LIBRARY);
    Tool::stock("env")
        .args([&library, OsStr::new(VMCACHE)])
        .args(["boot", "-b", &base.name, "-F", base.format, "vm"])
        .args([OsStr::new("--qemu"), machine])
        .args([OsStr::new("--cache"), cache.as_os_str()])
        .args([OsStr::new("--overlay"), lab.path("vm.qcow2").as_os_str()])
}

#[test]
fn a_cache_on_a_network_filesystem_is_refused_with_what_to_do() {
    let lab = Lab::new();
    let base = lab.base();
    // The kernel need not know NFS to say that a directory is on one.
    let nfs = "inject=fstatfs:poke_exit=@arg2=6969000000000000";
    let strace = ["strace", "-D", "-f", "-qq", "-e", "trace=fstatfs", "-e", nfs, "-o"];
    let log = lab.fresh("strace");
    let words = strace.into_iter().map(OsStr::new).chain([log.as_os_str()]);
    let said =
        boot(&lab, &base, &lab.path("caches/"), OsStr::new("true")).under(words).run().failure();
    assert!(said.stderr.contains("is on a network filesystem"), "{said:?}");
    assert!(said.stderr.contains("Choose a directory on a local one with --cache"), "{said:?}");
    assert_eq!(names(&lab.path("caches")), [PathBuf::new(); 0]);
    boot(&lab, &base, &lab.path("caches/"), OsStr::new("true")).run().success();
}

#[test]
fn a_base_over_nfs_boots_and_boots_again() {
    let lab = Lab::new();
    let base = lab.base_of(content(DISK), "raw", Over::Nfs);
    boot(&lab, &base, &lab.path("caches/"), OsStr::new("true")).run().success();
    let said = boot(&lab, &base, &lab.path("caches/"), OsStr::new("true")).run().success();
    assert!(said.stderr.contains("vm.qcow2' is there"), "{said:?}");
    assert_eq!(names(&lab.path("caches")).len(), 1);
}
