//! A live file that somebody prepared: that of a sound image, with its identity left as it is and
//! anything written over the rest. Joining, looking at it, reading and the checkpoint at the end
//! must neither crash nor hang, nor reach outside the image's data area, nor put a reference there
//! that does.
#![no_main]

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmcache::engine::Status;
use vmcache::format::{ByteRange, Geometry, L2Entry};
use vmcache_fuzz::{Cache, Template, check_plan, read_prepared};

const KIB: u64 = 1 << 10;

/// Where things stand, as `live::regions` has it; if it moves, other things are written over.
const SHARED: u64 = 4096;
const FREE_LIST: u64 = 2 * 4096;
const SLOTS: u64 = FREE_LIST + 4096 * 8;
const SLOT: u64 = 256;
const PRESENT: u64 = SLOTS + 1024 * SLOT;
const DIRTY: u64 = PRESENT + 4096;
const GROUPS: u64 = DIRTY + 4096;
const ENTRY: u64 = 32;
const CLAIMS: u64 = 128 * ENTRY;
const GROUP: u64 = CLAIMS + 128 * 128;
/// Where the identity names the image's and the live file's inode.
const IMAGE_INODE: u64 = 64;

#[derive(Arbitrary, Debug)]
struct Input {
    changes: Vec<Change>,
    cut: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Change {
    Shared {
        word: u8,
        value: u64,
    },
    FreeList {
        entry: u16,
        value: u64,
    },
    /// A list that is in use.
    FreeListOf {
        len: u16,
        values: Vec<u64>,
    },
    Slot {
        slot: u16,
        word: u8,
        value: u64,
    },
    Present {
        word: u8,
        value: u64,
    },
    Dirty {
        word: u8,
        value: u64,
    },
    Entry {
        cluster: u8,
        host: u64,
        bits: u64,
        on_disk: u64,
    },
    /// One whose place looks right.
    EntryAt {
        cluster: u8,
        host: u8,
        bits: u64,
        on_disk: u64,
    },
    Claim {
        cluster: u8,
        subcluster: u8,
        value: u32,
    },
    /// All claims of a cluster, held by one owner.
    Claims {
        cluster: u8,
        slot: u8,
        generation: u8,
    },
}

struct Prepared {
    image: Template,
    live: Template,
}

fn geometry() -> Geometry {
    Geometry::with_cluster_size(16 * KIB, 3 << 20).unwrap()
}

static PREPARED: LazyLock<Prepared> = LazyLock::new(|| {
    let cache = Cache::half_full(geometry());
    Prepared { image: Template::of(&cache.path), live: Template::of(&cache.live_path()) }
});

impl Change {
    /// The words of eight bytes to write, and where.
    fn words(&self, cache: &Cache) -> Vec<(u64, u64)> {
        let words = |at: u64, words: &[u64]| (at..).step_by(8).zip(words.to_vec()).collect();
        let clusters = geometry().clusters();
        let group = |cluster: u8| {
            let cluster = u64::from(cluster) % clusters;
            (GROUPS + cluster / 128 * GROUP, cluster % 128)
        };
        let entry = |cluster: u8| group(cluster).0 + group(cluster).1 * ENTRY;
        let claims = |cluster: u8| group(cluster).0 + CLAIMS + group(cluster).1 * 128;
        match self {
            Change::Shared { word, value } => words(SHARED + u64::from(*word % 32) * 8, &[*value]),
            Change::FreeList { entry, value } => {
                words(FREE_LIST + u64::from(entry % 4096) * 8, &[*value])
            }
            Change::FreeListOf { len, values } => {
                // In `Space`: full and free_taken, then free_len.
                let mut all: Vec<(u64, u64)> = words(SHARED + 64 + 24, &[0, u64::from(*len)]);
                all.extend(words(FREE_LIST, &values[..values.len().min(64)]));
                all
            }
            Change::Slot { slot, word, value } => {
                words(SLOTS + u64::from(slot % 1024) * SLOT + u64::from(word % 8) * 8, &[*value])
            }
            Change::Present { word, value } => words(PRESENT + u64::from(word % 8) * 8, &[*value]),
            Change::Dirty { word, value } => words(DIRTY + u64::from(word % 8) * 8, &[*value]),
            Change::Entry { cluster, host, bits, on_disk } => {
                words(entry(*cluster), &[*host, *bits, *on_disk])
            }
            Change::EntryAt { cluster, host, bits, on_disk } => {
                let host = cache.layout.offset(cache.layout.data - 2 + u64::from(*host)).0;
                words(entry(*cluster), &[host, *bits, *on_disk])
            }
            Change::Claim { cluster, subcluster, value } => {
                let at = claims(*cluster) + u64::from(subcluster % 16) * 8;
                words(at, &[u64::from(*value)])
            }
            Change::Claims { cluster, slot, generation } => {
                let word = 1 << 31 | u64::from(*slot) << 20 | u64::from(*generation);
                words(claims(*cluster), &[word << 32 | word; 16])
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let Input { mut changes, cut } = input;
    changes.truncate(8);
    let prepared = &*PREPARED;
    let cache = Cache::new(geometry(), None);
    let open = |path| {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let (image, live) = (open(&cache.path), open(&cache.live_path()));
    prepared.image.write(&image);
    prepared.live.write(&live);
    let inodes = [&image, &live].map(|file| file.metadata().unwrap().ino().to_le_bytes()).concat();
    live.write_all_at(&inodes, IMAGE_INODE).unwrap();
    for (at, word) in changes.iter().flat_map(|change| change.words(&cache)) {
        live.write_all_at(&word.to_le_bytes(), at).unwrap();
    }
    if let Some(cut) = cut {
        live.set_len(prepared.live.len - u64::from(cut)).unwrap();
    }

    let before = cache.fixed_tables();
    // An error is a fine answer; so is any number.
    let _ = Status::read(&cache.path);
    let reader = cache.reader().expect("the image itself is sound");
    let whole = ByteRange { start: 0, len: geometry().virtual_size() };
    check_plan(reader.engine(), &cache.layout, whole);
    read_prepared(&reader, whole);
    reader.engine().close();

    assert_eq!(cache.file_len(), prepared.image.len, "the image has another length");
    assert_eq!(cache.fixed_tables(), before, "header or tables were written");
    let mut table = vec![0; (geometry().clusters() * 16) as usize];
    image.read_exact_at(&mut table, cache.layout.l2_entry_offset(0).0).unwrap();
    for bytes in table.as_chunks::<16>().0 {
        let entry = L2Entry::decode(*bytes, &geometry()).expect("a damaged entry was written");
        assert!(entry.host.is_none_or(|host| cache.layout.is_data_cluster(host)), "{entry:?}");
    }
});
