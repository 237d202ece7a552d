//! A base with its cache image in a directory of its own, and what the tests ask of them.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;
use vmcache::engine::{Base, Engine, Options, Presence, Reader};
use vmcache::format::{BaseIdentity, ByteRange, Geometry};
use vmcache::image::{CreateOptions, create};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// A raw base and an empty cache image for it.
pub struct Fixture {
    pub dir: TempDir,
    pub content: Arc<Vec<u8>>,
    pub geometry: Geometry,
}

impl Fixture {
    /// A base of `size` bytes with data and zeros in runs of all lengths.
    pub fn new(cluster_size: u64, size: u64) -> Self {
        Fixture::with(cluster_size, mixed_content(size, 1), None)
    }

    /// A base with this content; the image may occupy `quota` bytes.
    pub fn with(cluster_size: u64, content: Vec<u8>, quota: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("base.raw"), &content).unwrap();
        let size = content.len() as u64;
        let fixture = Fixture {
            dir,
            content: Arc::new(content),
            geometry: Geometry::with_cluster_size(cluster_size, size).unwrap(),
        };
        create_image(&fixture.image(), &fixture.base(), fixture.geometry, quota);
        fixture
    }

    pub fn base(&self) -> PathBuf {
        self.dir.path().join("base.raw")
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("cache.qcow2")
    }

    pub fn live(&self) -> PathBuf {
        self.dir.path().join("cache.qcow2.live")
    }

    pub fn size(&self) -> u64 {
        self.geometry.virtual_size()
    }

    pub fn engine(&self) -> Arc<Engine> {
        Arc::new(Engine::open(&self.image(), &Options::default()).unwrap())
    }

    /// An engine of its own with a base that counts.
    pub fn reader(&self) -> Reader<CountedBase> {
        Reader::new(self.engine(), self.counted_base())
    }

    pub fn counted_base(&self) -> CountedBase {
        CountedBase::new(Arc::clone(&self.content), self.geometry.subcluster_size())
    }

    /// Reads all of the disk in pieces and compares.
    pub fn read_everything<B: Base>(&self, reader: &Reader<B>) {
        let piece = 256 * KIB;
        (0..self.size().div_ceil(piece))
            .map(|index| index * piece)
            .for_each(|at| self.read(reader, at, piece.min(self.size() - at)));
    }

    /// Reads a range and compares it with the base.
    pub fn read<B: Base>(&self, reader: &Reader<B>, at: u64, len: u64) {
        let mut found = vec![0xa5; len as usize];
        reader.read(&mut found, at).unwrap();
        assert!(found == self.content[at as usize..][..len as usize], "wrong bytes: {at}+{len}");
    }

    /// Bytes of the disk that the cache answers for.
    pub fn present(&self, engine: &Engine) -> Vec<ByteRange> {
        let mut at = 0;
        let runs = std::iter::from_fn(|| {
            (at < self.size()).then(|| {
                let rest = ByteRange { start: at, len: self.size() - at };
                let (presence, len) = engine.status_of(rest);
                at += len;
                (presence, ByteRange { start: at - len, len })
            })
        });
        runs.filter(|(presence, _)| *presence != Presence::Absent).map(|(_, range)| range).collect()
    }

    /// `qemu-img` finds nothing wrong with the image, not even a leak, and no difference.
    pub fn assert_sound(&self) {
        assert_eq!(self.check_code(), 0, "qemu-img check");
        self.assert_equal();
    }

    /// The same, but for leaked clusters, which a process killed in a checkpoint may leave.
    pub fn assert_sound_but_for_leaks(&self) {
        let code = self.check_code();
        assert!(code == 0 || code == 3, "qemu-img check: {code}");
        self.assert_equal();
    }

    fn assert_equal(&self) {
        let (image, base) = (self.image(), self.base());
        let compared = qemu_img(&["compare", "-f", "qcow2", "-F", "raw"], &[&image, &base]);
        assert!(compared.status.success(), "qemu-img compare: {compared:?}");
    }

    /// Exit code of `qemu-img check`: 0 clean, 2 damaged, 3 leaks.
    fn check_code(&self) -> i32 {
        qemu_img(&["check", "-f", "qcow2"], &[&self.image()]).status.code().unwrap()
    }

    /// Bytes that the image occupies on its filesystem.
    pub fn occupied(&self) -> u64 {
        fs::metadata(self.image()).unwrap().blocks() * 512
    }
}

pub fn create_image(image: &Path, base: &Path, geometry: Geometry, quota: Option<u64>) {
    let options = CreateOptions {
        backing_file: base.to_str().unwrap().into(),
        backing_format: "raw".into(),
        geometry,
        quota,
        base: BaseIdentity::default(),
        mode: 0o644,
        force: false,
    };
    create(image, &options).unwrap();
}

pub fn qemu_img(args: &[&str], files: &[&Path]) -> Output {
    Command::new("qemu-img").args(args).args(files).output().unwrap()
}

pub fn qemu_io(args: &[&str], command: &str, file: &Path) -> Output {
    Command::new("qemu-io").args(args).args(["-c", command]).arg(file).output().unwrap()
}

/// Data and zeros in runs from 512 B to 256 KiB.
pub fn mixed_content(size: u64, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut content = vec![0; size as usize];
    let mut rest = content.as_mut_slice();
    while !rest.is_empty() {
        let len = (512usize << rng.random_range(0..10)).min(rest.len());
        let (run, after) = std::mem::take(&mut rest).split_at_mut(len);
        if rng.random_bool(0.6) {
            rng.fill(run);
        }
        rest = after;
    }
    content
}

/// Incompressible data without a zero subcluster.
pub fn full_content(size: u64) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    StdRng::seed_from_u64(2).fill(content.as_mut_slice());
    content
}

/// A seed, printed so that a failure can be repeated.
pub fn seed() -> u64 {
    let seed = rand::random();
    println!("seed {seed:#x}");
    seed
}

/// A base that counts how often each of its subclusters is read.
#[derive(Clone)]
pub struct CountedBase(Arc<Counted>);

struct Counted {
    content: Arc<Vec<u8>>,
    subcluster_size: u64,
    reads: AtomicU64,
    touched: Vec<AtomicU32>,
}

impl CountedBase {
    /// A base with some content.
    pub fn new(content: Arc<Vec<u8>>, subcluster_size: u64) -> Self {
        let subclusters = (content.len() as u64).div_ceil(subcluster_size);
        let touched = (0..subclusters).map(|_| AtomicU32::new(0)).collect();
        CountedBase(Arc::new(Counted {
            content,
            subcluster_size,
            reads: AtomicU64::new(0),
            touched,
        }))
    }

    /// Requests so far.
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Ordering::Relaxed)
    }

    /// How often the subcluster that was read most often was read.
    pub fn most_reads_of_a_subcluster(&self) -> u32 {
        self.0.touched.iter().map(|count| count.load(Ordering::Relaxed)).max().unwrap()
    }
}

impl Base for CountedBase {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        let end = offset + buf.len() as u64;
        let touched = offset / self.0.subcluster_size..end.div_ceil(self.0.subcluster_size);
        for count in &self.0.touched[touched.start as usize..touched.end as usize] {
            count.fetch_add(1, Ordering::Relaxed);
        }
        buf.copy_from_slice(&self.0.content[offset as usize..end as usize]);
        Ok(())
    }
}

/// A base that is a file.
pub fn file_base(path: &Path) -> impl Base + use<> {
    let file = fs::File::open(path).unwrap();
    move |buf: &mut [u8], offset: u64| file.read_exact_at(buf, offset)
}
