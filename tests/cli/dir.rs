//! A directory of a test's own with a base and a cache image, the commands that run in it, and
//! writing into an image where it hurts.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;
use vmcache::engine::{Base, Engine, Options, Reader};
use vmcache::format::{Geometry, HEADER_MAX, Header, Layout};
use vmcache::lock::{LockKind, is_held_against};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const TIB: u64 = 1 << 40;

/// The byte of the image that its users lock, see src/image/file.rs.
const USE_BYTE: u64 = 400;
/// A user without any rights.
const NOBODY: u32 = 65534;

/// What a command answered.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Self {
        let output = command.stdin(Stdio::null()).output().unwrap();
        let run = Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!run.stderr.contains("panicked"), "{run:?}");
        run
    }

    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert!(self.stdout.contains(text), "no '{text}' in {self:?}");
        self
    }

    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no '{text}' in {self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// A directory with the test's files.
pub struct Dir(TempDir);

impl Dir {
    /// An empty one.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        Dir(dir)
    }

    /// With a base.raw of `size` bytes of data.
    pub fn with_base(size: u64) -> Self {
        let dir = Dir::new();
        dir.write("base.raw", &content(size));
        dir
    }

    /// With base.raw and an empty cache.qcow2 for it, in clusters of 16 KiB.
    pub fn with_cache(size: u64) -> Self {
        let dir = Dir::with_base(size);
        dir.vmcache(&["create", "-b", "base.raw", "-F", "raw", "-o", "cluster_size=16K", CACHE])
            .exits(0);
        dir
    }

    /// The same, and all of the base read into it.
    pub fn with_full_cache(size: u64) -> Self {
        let dir = Dir::with_cache(size);
        dir.fill(size);
        dir
    }

    /// Reads the first `len` bytes through the cache and closes it again.
    pub fn fill(&self, len: u64) {
        let engine = self.open();
        self.read(&engine, len);
        self.close(engine);
        // As after a restart of the machine.
        fs::remove_file(self.path(LIVE)).unwrap();
    }

    /// Opens the cache in this process.
    pub fn open(&self) -> Arc<Engine> {
        Arc::new(Engine::open(&self.path(CACHE), &Options::default()).unwrap())
    }

    /// Closes the cache and waits until nothing of it is left. Another test that is between fork
    /// and exec has copies of this process's descriptors and with them its locks.
    pub fn close(&self, engine: Arc<Engine>) {
        engine.close();
        drop(engine);
        let image = File::open(self.path(CACHE)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while is_held_against(&image, USE_BYTE, LockKind::Exclusive).unwrap() {
            assert!(Instant::now() < deadline, "the image is still locked");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads the first `len` bytes through the cache.
    pub fn read(&self, engine: &Arc<Engine>, len: u64) {
        let base = BaseContent(fs::read(self.path("base.raw")).unwrap());
        let mut buf = vec![0; len as usize];
        Reader::new(Arc::clone(engine), base).read(&mut buf, 0).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Writes bytes into a file that is there.
    pub fn poke(&self, name: &str, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.path(name)).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    pub fn punch_hole(&self, name: &str, at: u64, len: u64) {
        let (at, len) = (at.to_string(), len.to_string());
        let status = Command::new("fallocate")
            .args(["--punch-hole", "--offset", &at, "--length", &len])
            .arg(self.path(name))
            .status();
        assert!(status.unwrap().success());
    }

    pub fn set_len(&self, name: &str, len: u64) {
        // Also makes the file where there is none.
        let file = OpenOptions::new().create(true).append(true).open(self.path(name)).unwrap();
        file.set_len(len).unwrap();
    }

    /// Makes a file look as if it was written at another time.
    pub fn touch(&self, name: &str) {
        let file = File::options().append(true).open(self.path(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(86_400)).unwrap();
    }

    pub fn chmod(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    /// Runs vmcache in the directory.
    pub fn vmcache(&self, arguments: &[&str]) -> Run {
        Run::of(&mut self.command(arguments))
    }

    /// Runs vmcache with an environment variable.
    pub fn vmcache_with(&self, name: &str, value: &str, arguments: &[&str]) -> Run {
        Run::of(self.command(arguments).env(name, value))
    }

    /// Runs vmcache with the library that cargo has built.
    pub fn vmcache_with_library(&self, arguments: &[&str]) -> Run {
        let library = library().into_os_string().into_string().unwrap();
        self.vmcache_with("VMCACHE_LIBRARY", &library, arguments)
    }

    /// Runs vmcache as somebody without rights.
    pub fn vmcache_as_nobody(&self, arguments: &[&str]) -> Run {
        // Nobody may not be allowed to come to where it was built.
        let copy = self.0.path().with_extension("bin");
        copy_program(&copy);
        let mut command = Command::new(&copy);
        command.current_dir(self.0.path()).args(arguments);
        drop_privileges(&mut command);
        let run = Run::of(&mut command);
        fs::remove_file(copy).unwrap();
        run
    }

    /// The command, ready to be run in the directory.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmcache"));
        command
            .current_dir(self.0.path())
            .args(arguments)
            .env_remove("VMCACHE_LOG")
            .env_remove("VMCACHE_LIBRARY")
            .env_remove("LD_PRELOAD");
        command
    }

    /// Runs one of QEMU's tools, which has to be there, in the directory.
    #[track_caller]
    pub fn qemu(&self, program: &str, arguments: &[&str]) -> Run {
        Run::of(Command::new(program).current_dir(self.0.path()).args(arguments))
    }

    /// QEMU finds nothing wrong with the cache image and the same bytes in it as in the base.
    #[track_caller]
    pub fn is_sound_to_qemu(&self) {
        self.qemu("qemu-img", &["check", "-f", "qcow2", CACHE]).exits(0);
        self.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "base.raw", CACHE])
            .exits(0)
            .prints("Images are identical.");
    }

    /// Asserts that a command is refused with this exit code and message, and that it has changed
    /// nothing on disk.
    #[track_caller]
    pub fn refuses(&self, arguments: &[&str], code: i32, message: &str) {
        let before = self.contents();
        self.vmcache(arguments).exits(code).complains(message);
        assert_eq!(self.contents(), before);
    }

    /// Asserts that looking at the cache is refused by info with 1, by check and check --repair
    /// with `code`, each with this message and without changing anything.
    #[track_caller]
    pub fn is_refused(&self, name: &str, code: i32, message: &str) {
        self.refuses(&["info", name], 1, message);
        self.refuses(&["stats", name], 1, message);
        self.refuses(&["drive", name], 1, message);
        self.refuses(&["check", name], code, message);
        self.refuses(&["check", "--repair", name], code, message);
    }

    /// The names of all files in the directory, or in one in it.
    pub fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).unwrap();
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(|entry| name(entry.unwrap())).collect();
        names.sort();
        names
    }

    /// All files with owner, mode, time of modification and content.
    pub fn contents(&self) -> BTreeMap<PathBuf, (u32, u32, i64, i64, Vec<u8>)> {
        fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                // Of a directory, a pipe or what nobody may read it is enough that it is there.
                let content = Some(&path).filter(|_| meta.is_file()).map(fs::read);
                let content = content.and_then(Result::ok).unwrap_or_default();
                let (uid, mode) = (meta.uid(), meta.mode());
                (path, (uid, mode, meta.mtime(), meta.mtime_nsec(), content))
            })
            .collect()
    }

    /// Where everything stands in the cache image.
    pub fn layout(&self) -> Layout {
        Layout::new(&self.geometry())
    }

    pub fn geometry(&self) -> Geometry {
        let file = File::open(self.path(CACHE)).unwrap();
        let mut bytes = vec![0; HEADER_MAX];
        file.read_exact_at(&mut bytes, 0).unwrap();
        Header::decode(&bytes, file.metadata().unwrap().len()).unwrap().geometry
    }

    /// Where the first data cluster of the cache image stands in it.
    pub fn first_data_cluster(&self) -> u64 {
        let layout = self.layout();
        layout.offset(layout.data).0
    }

    /// Bytes that a file occupies.
    pub fn occupied(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().blocks() * 512
    }
}

/// The cache image of all tests.
pub const CACHE: &str = "cache.qcow2";
/// Its live state.
pub const LIVE: &str = "cache.qcow2.live";

struct BaseContent(Vec<u8>);

impl Base for BaseContent {
    fn read(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let from = self.0.iter().skip(offset as usize).copied();
        buf.iter_mut().zip(from.chain(std::iter::repeat(0))).for_each(|(to, from)| *to = from);
        Ok(())
    }
}

/// Bytes that are nowhere zero over a whole subcluster and nowhere the same.
pub fn content(size: u64) -> Vec<u8> {
    (0..size.div_ceil(8)).flat_map(|word| (word + 1).to_le_bytes()).take(size as usize).collect()
}

/// Root may do anything; anybody else lacks rights as it is.
fn drop_privileges(command: &mut Command) {
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        command.uid(NOBODY).gid(NOBODY);
    }
}

/// Copies vmcache. By another process: a file that this one has open for writing could not be run
/// as long as any other test is between fork and exec with a copy of the descriptor.
pub fn copy_program(to: &Path) {
    let status = Command::new("cp").arg(env!("CARGO_BIN_EXE_vmcache")).arg(to).status();
    assert!(status.unwrap().success());
}

/// Where cargo puts the library when it builds tests.
pub fn library() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_vmcache")).with_file_name("deps").join("libvmcache.so")
}
