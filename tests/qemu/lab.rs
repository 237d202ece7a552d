//! A compute node in a directory: bases of known content, caches of them, `qemu-nbd` serving a
//! cache through the driver, and what a plain QEMU says about the result.
//!
//! Used by the tests.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::Rng;
use tempfile::{NamedTempFile, TempDir};
use vmcache::lock::{LockKind, is_held_against};

use crate::nbd::Client;
use crate::process::{Child, Output, Tool, eventually};
use crate::settings::{random, text};

/// Bytes of most bases: many clusters of every size, and a tail that is no whole subcluster of the
/// larger ones.
pub const DISK: usize = (24 << 20) + 345 * 512;

/// Byte of the image that is locked by whoever writes a checkpoint (`src/image/file.rs`).
const CHECKPOINT_BYTE: u64 = 402;

/// A directory of the test's own, gone with it.
pub struct Lab {
    directory: TempDir,
    names: AtomicU32,
}

impl Lab {
    /// A new, empty one.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("t").tempdir().expect("a directory");
        Lab { directory, names: AtomicU32::new(0) }
    }

    /// One that every user of this machine can reach and leave files in.
    pub fn public() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("t")
            .permissions(Permissions::from_mode(0o1777))
            .tempdir_in("/tmp")
            .expect("a directory");
        // Whatever umask made of it.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).expect("its mode");
        Lab { directory, names: AtomicU32::new(0) }
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The path of a new file in it.
    pub fn fresh(&self, name: &str) -> PathBuf {
        self.path(&format!("{}.{name}", self.names.fetch_add(1, Ordering::Relaxed)))
    }

    /// A raw base on this machine with the usual content.
    pub fn base(&self) -> Base {
        self.base_of(content(DISK), "raw", Over::File)
    }

    /// A base of some content, in some format, behind some protocol.
    pub fn base_of(&self, content: Vec<u8>, format: &'static str, over: Over) -> Base {
        let raw = self.fresh("base.raw");
        write_sparse(&raw, &content);
        let file = match format {
            "raw" => raw,
            _ => {
                let converted = self.fresh("base.qcow2");
                Tool::stock("qemu-img")
                    .args(["convert", "-f", "raw", "-O", format])
                    .args([&raw, &converted])
                    .run()
                    .success();
                converted
            }
        };
        let (name, held) = over.publish(self, &file);
        Base { name, format, content: Arc::new(content), file, _held: held }
    }

    /// An empty cache of a base, with options of `vmcache create -o`.
    pub fn cache(&self, base: &Base, options: &str) -> Cache {
        self.cache_at(self.fresh("cache.qcow2"), base, options)
    }

    /// The same, at a place outside this directory.
    pub fn cache_at(&self, path: PathBuf, base: &Base, options: &str) -> Cache {
        let options = [options].into_iter().filter(|text| !text.is_empty());
        Tool::vmcache()
            .args(["create", "-q", "-b", &base.name, "-F", base.format])
            .args(options.flat_map(|text| ["-o", text]))
            .arg(&path)
            .run()
            .success();
        Cache { path, base: base.clone() }
    }

    /// Deletes a cache that is of no further use.
    pub fn discard(&self, cache: &Cache) {
        fs::remove_file(&cache.path).expect("a cache");
        // There is none where nobody ever used it.
        let _ = fs::remove_file(cache.live());
    }

    /// `qemu-nbd` with the driver, serving a cache.
    pub fn serve(&self, cache: &Cache) -> Server {
        self.serve_options(&cache.options())
    }

    /// `qemu-nbd` with the driver, serving whatever the options say.
    pub fn serve_options(&self, options: &str) -> Server {
        Server::start(self, Tool::driver("qemu-nbd"), &["-r", "--image-opts", options])
    }
}

/// Where a base is.
#[derive(Clone, Copy)]
pub enum Over {
    /// A local file.
    File,
    /// An NFS server.
    Nfs,
    /// An NBD server.
    Nbd,
}

impl Over {
    /// QEMU's name of the base, and what has to be kept for it to be there.
    fn publish(self, lab: &Lab, file: &Path) -> (String, Option<Arc<Held>>) {
        match self {
            Over::File => (file.display().to_string(), None),
            Over::Nfs => {
                let asked = |name| text(name).unwrap_or_else(|| panic!("{name}: see scripts/test"));
                let directory = asked("VMCACHE_TEST_NFS_DIRECTORY");
                let exported = NamedTempFile::new_in(&directory).expect("an exported file");
                fs::copy(file, exported.path()).expect("a copy in the exported directory");
                let name = exported.path().file_name().expect("a name").display();
                let url = format!("{}/{name}", asked("VMCACHE_TEST_NFS"));
                (url, Some(Arc::new(Held::Exported(exported))))
            }
            Over::Nbd => {
                let name = file.display().to_string();
                let server =
                    Server::start(lab, Tool::stock("qemu-nbd"), &["-r", "-f", "raw", &name]);
                let url = format!("nbd+unix:///?socket={}", server.socket.display());
                (url, Some(Arc::new(Held::Served(server))))
            }
        }
    }
}

/// What keeps a base reachable.
enum Held {
    Exported(#[expect(dead_code, reason = "deleted when dropped")] NamedTempFile),
    Served(#[expect(dead_code, reason = "killed when dropped")] Server),
}

/// A base image.
#[derive(Clone)]
pub struct Base {
    /// As QEMU takes it.
    pub name: String,
    /// QEMU's name of its format.
    pub format: &'static str,
    /// What a guest sees.
    pub content: Arc<Vec<u8>>,
    /// The image file on this machine.
    pub file: PathBuf,
    _held: Option<Arc<Held>>,
}

impl Base {
    /// One that somebody else has made.
    pub fn at(name: String, format: &'static str, content: Vec<u8>, file: PathBuf) -> Self {
        Base { name, format, content: Arc::new(content), file, _held: None }
    }
}

/// Something that looks like a disk: runs of data and of zeros of very different lengths, and data
/// at both ends.
pub fn content(len: usize) -> Vec<u8> {
    let mut random = random("content");
    let mut content = vec![0; len];
    let mut at = 0;
    let mut is_zero = false;
    while at < len {
        let run = log_uniform(&mut random, 512, 1 << 20) as usize;
        let end = if len - at < run + 4096 { len } else { at + run };
        if !is_zero || end == len {
            random.fill(&mut content[at..end]);
        }
        is_zero = random.random_bool(0.4);
        at = end;
    }
    content
}

/// Data without a single zero subcluster.
pub fn noise(len: usize) -> Vec<u8> {
    let mut content = vec![0; len];
    random("noise").fill(&mut content[..]);
    content
}

/// A number whose logarithm is uniform.
pub fn log_uniform(random: &mut impl Rng, least: u64, most: u64) -> u64 {
    let exponent = random.random_range((least as f64).ln()..=(most as f64).ln());
    (exponent.exp() as u64).clamp(least, most)
}

/// Leaves holes for about half of the zeros, so that both kinds are there.
fn write_sparse(path: &Path, content: &[u8]) {
    const BLOCK: usize = 64 << 10;
    let file = File::create(path).expect("a base");
    file.set_len(content.len() as u64).expect("room for a base");
    for (index, block) in content.chunks(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, (index * BLOCK) as u64).expect("room for a base");
        }
    }
}

/// A cache image.
#[derive(Clone)]
pub struct Cache {
    /// The image file.
    pub path: PathBuf,
    /// What it is a cache of.
    pub base: Base,
}

impl Cache {
    /// The same image under another name.
    pub fn under(&self, path: PathBuf) -> Self {
        Cache { path, base: self.base.clone() }
    }

    /// Image options that open it with the driver.
    pub fn options(&self) -> String {
        format!("driver=vmcache,file.filename={}", self.path.display())
    }

    /// Where its live state is.
    pub fn live(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".live");
        name.into()
    }

    /// Bytes that the image file occupies.
    pub fn occupied(&self) -> u64 {
        fs::metadata(&self.path).expect("the cache").blocks() * 512
    }

    /// Does something and says what the image file occupied at the most meanwhile.
    pub fn most_occupied_during(&self, work: impl FnOnce()) -> u64 {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut most = 0;
                while !done.load(Ordering::Relaxed) {
                    most = most.max(self.occupied());
                    thread::sleep(Duration::from_micros(200));
                }
                most
            });
            // Also where the work panics: the watch must end for the panic to get on.
            let end = SetOnDrop(&done);
            work();
            drop(end);
            watch.join().expect("the watch")
        })
    }

    /// What `vmcache stats` counts.
    pub fn stats(&self) -> Stats {
        let said = Tool::vmcache().args(["stats", "--output=json"]).arg(&self.path).run().success();
        let all: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
        let numbers = all.as_object().expect("an object").iter();
        Stats(numbers.filter_map(|(key, value)| Some((key.clone(), value.as_u64()?))).collect())
    }

    /// A value that `vmcache info` shows.
    pub fn info(&self, key: &str) -> serde_json::Value {
        let said = Tool::vmcache().args(["info", "--output=json"]).arg(&self.path).run().success();
        let mut all: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
        all[key].take()
    }

    /// A number that `vmcache info` shows.
    pub fn info_number(&self, key: &str) -> u64 {
        self.info(key).as_u64().unwrap_or_else(|| panic!("info shows no number {key}"))
    }

    /// Whether some process writes a checkpoint.
    pub fn is_in_checkpoint(&self) -> bool {
        let image = File::open(&self.path).expect("the cache");
        is_held_against(&image, CHECKPOINT_BYTE, LockKind::Exclusive).expect("the lock's state")
    }

    /// Bytes of the disk that a QEMU without the library finds in the image's tables.
    pub fn stock_mapped(&self) -> u64 {
        let said = Tool::stock("qemu-img")
            .args(["map", "-f", "qcow2", "--output=json"])
            .arg(&self.path)
            .run()
            .success();
        let map: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
        let extents = map.as_array().expect("extents").iter();
        let here = extents.filter(|extent| extent["depth"] == 0);
        here.map(|extent| extent["length"].as_u64().expect("a length")).sum()
    }

    /// `qemu-img check` by a QEMU without the library.
    pub fn stock_check(&self) -> Output {
        Tool::stock("qemu-img").args(["check", "-f", "qcow2"]).arg(&self.path).run()
    }

    /// `qemu-img compare` of base and cache by a QEMU without the library.
    #[track_caller]
    pub fn assert_equals_base(&self) {
        Tool::stock("qemu-img")
            .args(["compare", "-f", self.base.format, "-F", "qcow2", &self.base.name])
            .arg(&self.path)
            .run()
            .success();
    }

    /// What must hold whenever nobody uses the image: a plain QEMU finds neither an error nor a
    /// leak in it, and the base's content.
    #[track_caller]
    pub fn assert_sound(&self) {
        self.stock_check().success();
        self.assert_equals_base();
    }

    /// What must hold at any instant: no error, and the base's content. A cut inside a checkpoint
    /// may leave leaks (exit code 3) until the next open.
    #[track_caller]
    pub fn assert_valid(&self) {
        self.assert_no_errors();
        self.assert_equals_base();
    }

    /// A plain QEMU finds nothing worse than leaks.
    #[track_caller]
    pub fn assert_no_errors(&self) {
        let check = self.stock_check();
        assert!(matches!(check.code(), Some(0 | 3)), "{check:?}");
    }
}

/// Sets a flag when it goes out of scope, however that happens.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The counters of a cache.
pub struct Stats(HashMap<String, u64>);

impl Stats {
    /// One of them.
    pub fn get(&self, name: &str) -> u64 {
        *self.0.get(name).unwrap_or_else(|| panic!("stats shows no {name}"))
    }

    /// How much one has grown since an earlier look.
    pub fn since(&self, before: &Stats, name: &str) -> u64 {
        self.get(name).checked_sub(before.get(name)).expect("counters only grow")
    }
}

/// A running `qemu-nbd`.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts one and waits until it takes connections.
    pub fn start(lab: &Lab, tool: Tool, args: &[&str]) -> Self {
        let mut server = Self::start_without_waiting(lab, tool, args);
        server.await_connections();
        // Until it has answered, qemu-nbd forgets a SIGTERM.
        drop(server.connect());
        server
    }

    /// Waits until it takes connections.
    pub fn await_connections(&mut self) {
        let socket = &self.socket;
        eventually("qemu-nbd is there", || self.child.has_ended() || socket.exists());
        assert!(!self.child.has_ended(), "{}", self.child.complaints());
    }

    /// Takes away the socket's name: those who are connected stay so, and a killed process leaves
    /// nothing.
    pub fn hide(&self) {
        fs::remove_file(&self.socket).expect("a socket");
    }

    /// Starts one that may be anywhere in its start.
    pub fn start_without_waiting(lab: &Lab, tool: Tool, args: &[&str]) -> Self {
        let socket = lab.fresh("nbd");
        let child =
            tool.args(["-t", "-e", "64", "-k"]).arg(&socket).args(args).start_in_background();
        Server { child, socket }
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A new connection.
    pub fn connect(&self) -> Client {
        let mut connected = None;
        // The socket has a name a moment before it is listened to.
        eventually("qemu-nbd answers", || {
            connected = match Client::connect(&self.socket) {
                Err(err) if err.kind() == ErrorKind::ConnectionRefused => None,
                result => Some(result),
            };
            connected.is_some()
        });
        connected.expect("an attempt").expect("a connection to qemu-nbd")
    }

    /// Reads the whole disk and holds it against what it has to show.
    #[track_caller]
    pub fn assert_serves(&self, content: &[u8]) {
        let mut client = self.connect();
        assert_eq!(client.size(), content.len() as u64);
        client.read_and_compare(content, sequential(content.len(), 256 << 10)).expect("all reads");
    }

    /// Its process, for rough treatment.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Ends it in good order.
    #[track_caller]
    pub fn stop(self) -> Output {
        let ended = self.child.terminate();
        assert!(ended.status.success(), "{ended:?}");
        ended
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.child.signal(signal);
    }
}

/// Reads of a whole disk from start to end.
pub fn sequential(disk: usize, step: usize) -> impl Iterator<Item = (u64, u32)> {
    (0..disk).step_by(step).map(move |at| (at as u64, step.min(disk - at) as u32))
}

/// Endless random reads of all alignments, of 512 bytes to 2 MiB, the sizes log-uniform.
pub fn anywhere(random: impl Rng, disk: usize) -> impl Iterator<Item = (u64, u32)> {
    anywhere_up_to(2 << 20, random, disk)
}

/// The same, of `most` bytes at the most.
pub fn anywhere_up_to(
    most: u64,
    mut random: impl Rng,
    disk: usize,
) -> impl Iterator<Item = (u64, u32)> {
    std::iter::repeat_with(move || {
        let grain = [1, 1, 512, 4096][random.random_range(0..4)];
        let len = log_uniform(&mut random, 512, most).min(disk as u64);
        let offset = random.random_range(0..=disk as u64 - len) / grain * grain;
        (offset, len as u32)
    })
}
