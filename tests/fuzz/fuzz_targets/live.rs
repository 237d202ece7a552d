//! A live file that somebody prepared, beside a sound image: one with its identity left as it is and
//! anything written over the rest, before the image is opened or while another open uses it. Joining,
//! looking at it, reading and the checkpoint at the end must neither crash nor hang, nor reach
//! outside the image's data area, nor put a reference there that does.
//!
//! What a prepared live file may do, all else is held against the base:
//!
//! - What it says reads as zeros does, in opens that join it.
//! - It may give two guest clusters one place: then an open that has seen the data of one there is
//!   given what was stored for the other since.
//!
//! Data that an open has not seen yet is the base's wherever the live file says that it stands. And
//! nothing outlasts it: without it, what the image has is the base's, or the image is left aside.
#![no_main]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmcache::engine::Status;
use vmcache::format::{ByteRange, Geometry, L2Entry};
use vmcache_fuzz::{BaseReader, Cache, Template, check_plan, read_as_base, read_prepared};

const KIB: u64 = 1 << 10;

/// Where things stand, as `live::regions` has it; if it moves, other things are written over.
const SHARED: u64 = 4096;
/// The first word of `Space` in the shared page.
const SPACE: u8 = 8;
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
    others: Others,
}

/// Who has the image open when the live file is changed.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Others {
    Nobody,
    /// Somebody who has read nothing yet.
    Idle,
    /// Somebody who has read all that is cached.
    Reading,
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
    /// One that says of a cluster what is so of another.
    EntryOf {
        cluster: u8,
        other: u8,
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
    /// All bytes, since one with holes where none should be is not joined.
    live: Vec<u8>,
}

fn geometry() -> Geometry {
    // A few clusters more than one group has.
    Geometry::with_cluster_size(16 * KIB, (2 << 20) + 64 * KIB).unwrap()
}

static PREPARED: LazyLock<Prepared> = LazyLock::new(|| {
    let cache = Cache::half_full(geometry());
    Prepared { image: Template::of(&cache.path), live: fs::read(cache.live_path()).unwrap() }
});

impl Change {
    /// Whether this may give a place to two guest clusters.
    fn is_about_places(&self) -> bool {
        match self {
            Change::Shared { word, .. } => (SPACE..SPACE + 8).contains(&(word % 32)),
            Change::FreeList { .. } | Change::FreeListOf { .. } => true,
            Change::Entry { .. } | Change::EntryAt { .. } | Change::EntryOf { .. } => true,
            _ => false,
        }
    }

    /// The words of eight bytes to write, and where.
    fn words(&self, cache: &Cache, live: &File) -> Vec<(u64, u64)> {
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
                let mut all: Vec<(u64, u64)> =
                    words(SHARED + u64::from(SPACE) * 8 + 24, &[0, u64::from(*len)]);
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
            Change::EntryOf { cluster, other } => {
                let [host, bits] = [0, 8].map(|word| word_at(live, entry(*other) + word));
                words(entry(*cluster), &[host, bits, 0])
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

fn word_at(live: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    // Nothing is there any more where it was cut off.
    let _ = live.read_at(&mut bytes, at).unwrap();
    u64::from_le_bytes(bytes)
}

/// What a live file says of each cluster: masks of the subclusters that read as zeros.
fn zeros(live: &File) -> Vec<u32> {
    (0..geometry().clusters())
        .map(|cluster| GROUPS + cluster / 128 * GROUP + cluster % 128 * ENTRY)
        .map(|entry| (word_at(live, entry + 8) >> 32) as u32)
        .collect()
}

fn whole() -> ByteRange {
    ByteRange { start: 0, len: geometry().virtual_size() }
}

fn read_whole(cache: &Cache, reader: &BaseReader, zeros: &[u32]) {
    check_plan(reader.engine(), &cache.layout, whole());
    read_prepared(reader, whole(), |number, bytes| {
        let says_zero = zeros[(number / 32) as usize] >> (number % 32) & 1 != 0;
        says_zero && bytes.iter().all(|byte| *byte == 0)
    });
}

fuzz_target!(|input: Input| {
    let Input { mut changes, cut, others } = input;
    changes.truncate(8);
    let prepared = &*PREPARED;
    let cache = Cache::new(geometry(), None);
    let open = |path| {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let (image, live) = (open(&cache.path), open(&cache.live_path()));
    prepared.image.write(&image);
    live.write_all_at(&prepared.live, 0).unwrap();
    let inodes = [&image, &live].map(|file| file.metadata().unwrap().ino().to_le_bytes()).concat();
    live.write_all_at(&inodes, IMAGE_INODE).unwrap();
    let new = || cache.reader().expect("the image itself is sound");
    let other = match others {
        Others::Nobody => None,
        Others::Idle => Some(new()),
        Others::Reading => {
            let other = new();
            read_as_base(&other, ByteRange { len: whole().len / 2, ..whole() });
            Some(other)
        }
    };
    let is_joined =
        || fs::metadata(cache.live_path()).unwrap().ino() == live.metadata().unwrap().ino();
    assert!(is_joined(), "a sound live file was replaced");
    for (at, word) in changes.iter().flat_map(|change| change.words(&cache, &live)) {
        live.write_all_at(&word.to_le_bytes(), at).unwrap();
    }
    if let Some(cut) = cut {
        live.set_len(prepared.live.len() as u64 - u64::from(cut)).unwrap();
    }

    let before = cache.fixed_tables();
    let zeros = zeros(&live);
    // An error is a fine answer; so is any number.
    let _ = Status::read(&cache.path);
    let reader = new();
    assert!(is_joined() || cut.is_some() || !changes.is_empty(), "a sound live file was replaced");
    read_whole(&cache, &reader, &zeros);
    let places_are_sound = !changes.iter().any(Change::is_about_places);
    if places_are_sound {
        // From here on these are plain hits.
        read_whole(&cache, &reader, &zeros);
    }
    if let Some(other) = other {
        if places_are_sound || matches!(others, Others::Idle) {
            read_whole(&cache, &other, &zeros);
        }
        other.engine().close();
    }
    reader.engine().close();
    drop(reader);

    assert_eq!(cache.file_len(), prepared.image.len, "the image has another length");
    assert_eq!(cache.fixed_tables(), before, "header or tables were written");
    let mut table = vec![0; (geometry().clusters() * 16) as usize];
    image.read_exact_at(&mut table, cache.layout.l2_entry_offset(0).0).unwrap();
    for bytes in table.as_chunks::<16>().0 {
        let entry = L2Entry::decode(*bytes, &geometry()).expect("a damaged entry was written");
        assert!(entry.host.is_none_or(|host| cache.layout.is_data_cluster(host)), "{entry:?}");
    }
    // It may have been taken for useless and replaced, or not.
    let _ = fs::remove_file(cache.live_path());
    read_as_base(&cache.reader_of_what_is_cached().unwrap(), whole());
});
