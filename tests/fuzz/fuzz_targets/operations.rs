//! Any sequence of opens, reads, closes, kills, lost live files and copies of the image at a chosen
//! moment, with a quota near its end or none. Every read equals the base, the quota holds, and what
//! is left is a sound image.
#![no_main]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, getpid};
use vmcache::engine::check;
use vmcache::format::{ByteRange, Geometry};
use vmcache::image::{Access, Image, Scan};
use vmcache_fuzz::{BaseReader, Cache, Template, read_as_base};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 2 * MIB + 3 * 512;
/// The least quota that such an image can have.
const LEAST: u64 = MIB + 28 * KIB;
const PATIENCE: Duration = Duration::from_secs(10);
/// Repairs in one run: each waits a while for those who use the image.
const REPAIRS: usize = 3;
/// Opens at the same time.
const OPENS: usize = 3;

#[derive(Arbitrary, Debug)]
struct Input {
    cluster_bits: u8,
    /// Bytes beyond the least quota, in units of 4 KiB.
    quota: Option<u8>,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Open(u8),
    Read {
        open: u8,
        at: u32,
        len: u32,
    },
    Close(u8),
    /// A process opens the image, reads and is killed before anything else happens.
    KilledAfter {
        at: u32,
        len: u32,
    },
    LoseLiveFile,
    /// The image as it stands now takes the place of the one in use: a power cut that loses no
    /// write, or a copy from elsewhere.
    Replace,
    Check,
    Repair,
}

fn range(at: u32, len: u32) -> ByteRange {
    let start = u64::from(at) % SIZE;
    ByteRange { start, len: u64::from(len) % (256 * KIB).min(SIZE - start) + 1 }
}

/// Sound, but for leaks where something was killed.
fn assert_sound(cache: &Cache) {
    let scan = Scan::read(&Image::open(&cache.path, Access::ReadOnly).unwrap(), |_, _| {}).unwrap();
    assert_eq!(scan.damages, 0, "{:?}", scan.findings);
}

/// Reads in a process of its own that is killed afterwards. Only while this process has no engine,
/// so that no thread but this one exists.
fn read_and_be_killed(cache: &Cache, range: ByteRange) {
    // SAFETY: no other thread of this process holds a lock that the child could want: the engines
    // are closed, and the fuzzer's own threads only watch.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let reader = cache.reader().unwrap();
            read_as_base(&reader, range);
            kill(getpid(), Signal::SIGKILL).unwrap();
        }
        ForkResult::Parent { child } => {
            let ended = loop {
                match waitpid(child, None) {
                    // The fuzzer's own timer.
                    Err(Errno::EINTR) => {}
                    ended => break ended.unwrap(),
                }
            };
            assert!(
                matches!(ended, nix::sys::wait::WaitStatus::Signaled(_, Signal::SIGKILL, _)),
                "{ended:?}"
            );
        }
    }
}

fn perform(cache: &Cache, readers: &mut [Option<BaseReader>; OPENS], operation: &Operation) {
    // An image that this made is never refused.
    let new = || cache.reader().unwrap();
    match *operation {
        Operation::Open(open) => {
            readers[open as usize % OPENS].get_or_insert_with(new);
        }
        Operation::Read { open, at, len } => {
            let reader = readers[open as usize % OPENS].get_or_insert_with(new);
            read_as_base(reader, range(at, len));
        }
        Operation::Close(open) => readers[open as usize % OPENS] = None,
        Operation::KilledAfter { at, len } => {
            readers.fill_with(|| None);
            read_and_be_killed(cache, range(at, len));
        }
        // It may not be there.
        Operation::LoseLiveFile => drop(fs::remove_file(cache.live_path())),
        Operation::Replace => {
            let image = Image::open(&cache.path, Access::ReadWrite).unwrap();
            // Tables copied while they are written show neither one state nor the other.
            let _lock = image.lock_checkpoint(PATIENCE).unwrap().unwrap();
            let copy = cache.path.with_extension("copy");
            // With its holes, which count for the quota.
            Template::of(&cache.path).write(&File::create(&copy).unwrap());
            fs::rename(&copy, &cache.path).unwrap();
        }
        Operation::Check => {
            let report = check(&cache.path, false, |_, _| {}).unwrap();
            assert_eq!(report.scan.damages, 0, "{:?}", report.scan.findings);
        }
        // Refused while somebody uses the image.
        Operation::Repair => drop(check(&cache.path, true, |_, _| {})),
    }
}

fuzz_target!(|input: Input| {
    let Input { cluster_bits, quota, mut operations } = input;
    operations.truncate(24);
    let mut repairs = 0;
    operations.retain(|operation| {
        repairs += usize::from(matches!(operation, Operation::Repair));
        repairs <= REPAIRS || !matches!(operation, Operation::Repair)
    });
    let geometry = Geometry::new(14 + u32::from(cluster_bits % 5), SIZE).unwrap();
    let quota = quota.map(|more| LEAST + u64::from(more) * 4 * KIB);
    let cache = Cache::new(geometry, quota);
    let mut readers = [const { None::<BaseReader> }; OPENS];
    for operation in &operations {
        perform(&cache, &mut readers, operation);
    }
    drop(readers);
    assert_sound(&cache);
    if let Some(quota) = quota {
        let occupied = fs::metadata(&cache.path).unwrap().blocks() * 512;
        assert!(occupied <= quota, "{occupied} bytes of {quota}");
    }
    let reader = cache.reader().unwrap();
    read_as_base(&reader, ByteRange { start: 0, len: SIZE });
    drop(reader);
    assert_sound(&cache);
});
