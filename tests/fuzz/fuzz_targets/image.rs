//! An image that somebody prepared: a sound one, half full, with anything written over its header,
//! tables, refcounts, checksums and data, cut or not. Looking at it, repairing it and reading through
//! it must neither crash nor hang, nor reach outside its data area. Every byte that is read is the
//! base's, in the first open and in the next, unless the image was prepared with the checksum of
//! other bytes.
#![no_main]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmcache::engine::{Status, check};
use vmcache::format::{
    ByteRange, Checksum, Geometry, HEADER_MAX, HostOffset, L2Entry, Layout, SUBCLUSTERS,
    SubclusterBits,
};
use vmcache::image::{Access, Image};
use vmcache_fuzz::{Cache, Checksums, Template, base, check_plan, read_prepared, seal};

const KIB: u64 = 1 << 10;
const TIB: u64 = 1 << 40;

#[derive(Arbitrary, Debug)]
struct Input {
    shape: Shape,
    changes: Vec<Change>,
    /// Whether the header keeps the CRC it has, whatever was written over it.
    unsealed: bool,
    cut: Option<u32>,
    repair: bool,
}

#[derive(Arbitrary, Debug)]
enum Shape {
    Small16K,
    Small64K,
    Small2M,
    /// A file of next to nothing for a disk of 128 GiB or 4 TiB.
    Huge16K,
    Huge64K,
}

#[derive(Arbitrary, Debug)]
enum Change {
    Header {
        at: u16,
        bytes: Vec<u8>,
    },
    RefcountTable {
        entry: u16,
        value: u64,
    },
    Refcount {
        cluster: u32,
        value: u16,
    },
    L1 {
        entry: u16,
        value: u64,
    },
    /// An entry of any bytes.
    L2Raw {
        cluster: u32,
        bytes: [u8; 16],
    },
    /// An entry that looks right, with a place `host` clusters into the data area, or that far
    /// from its end.
    L2 {
        cluster: u32,
        host: u16,
        from_end: bool,
        data: u32,
        zero: u32,
    },
    /// A cluster of the base that stands there as it should, `host` clusters into the data area.
    Stored {
        cluster: u32,
        host: u16,
        data: u32,
    },
    Data {
        at: u32,
        bytes: Vec<u8>,
    },
    /// A subcluster's data stands in another's place, with or without its checksum.
    Misplaced {
        from: u32,
        to: u32,
        with_checksum: bool,
    },
    Checksum {
        subcluster: u32,
        value: Value,
    },
}

/// What to write over a checksum.
#[derive(Arbitrary, Debug)]
enum Value {
    None,
    Zero,
    Any(u32),
    /// What it is, with a bit changed.
    Flipped(u8),
}

static SMALL: LazyLock<[Template; 3]> = LazyLock::new(|| {
    [Shape::Small16K, Shape::Small64K, Shape::Small2M]
        .map(|shape| Template::of(&Cache::half_full(shape.geometry()).path))
});

impl Shape {
    fn geometry(&self) -> Geometry {
        let (cluster_size, size) = match self {
            Shape::Small16K => (16 * KIB, 256 * KIB + 512),
            Shape::Small64K => (64 * KIB, 512 * KIB),
            Shape::Small2M => (2048 * KIB, 3072 * KIB - 512),
            Shape::Huge16K => (16 * KIB, TIB / 8),
            Shape::Huge64K => (64 * KIB, 4 * TIB),
        };
        Geometry::with_cluster_size(cluster_size, size).unwrap()
    }

    fn cache(&self) -> Cache {
        let cache = Cache::new(self.geometry(), None);
        let template = match self {
            Shape::Small16K => &SMALL[0],
            Shape::Small64K => &SMALL[1],
            Shape::Small2M => &SMALL[2],
            Shape::Huge16K | Shape::Huge64K => return cache,
        };
        template.write(&OpenOptions::new().write(true).open(&cache.path).unwrap());
        cache
    }
}

impl Change {
    fn apply(&self, file: &File, layout: &Layout, geometry: &Geometry) {
        let of = |number: u32| u64::from(number) % geometry.clusters();
        let (at, bytes) = match self {
            Change::Header { at, bytes } => (u64::from(*at) % 512, bytes.clone()),
            Change::RefcountTable { entry, value } => {
                let entry = u64::from(*entry) % layout.refcount_blocks;
                (layout.refcount_table_offset().0 + entry * 8, value.to_be_bytes().to_vec())
            }
            Change::Refcount { cluster, value } => {
                let cluster = u64::from(*cluster) % layout.end;
                (layout.refcount_offset(cluster).0, value.to_be_bytes().to_vec())
            }
            Change::L1 { entry, value } => {
                let entry = u64::from(*entry) % geometry.l2_tables();
                (layout.offset(layout.l1_table).0 + entry * 8, value.to_be_bytes().to_vec())
            }
            Change::L2Raw { cluster, bytes } => {
                let cluster = u64::from(*cluster) % (geometry.l2_tables() * geometry.l2_entries());
                (layout.l2_entry_offset(cluster).0, bytes.to_vec())
            }
            Change::L2 { cluster, host, from_end, data, zero } => {
                let host = u64::from(*host) % geometry.clusters();
                let host = if *from_end { layout.end - 1 - host } else { layout.data + host };
                let host = layout.offset(host);
                let bits = SubclusterBits::new(*data, zero & !data);
                // So that it is a place that something was written to.
                let end = host.0 + geometry.cluster_size();
                file.write_all_at(b"data", end - 4).unwrap();
                file.write_all_at(&1u16.to_be_bytes(), refcount_at(layout, host)).unwrap();
                let entry = L2Entry { host: Some(host), bits };
                (layout.l2_entry_offset(of(*cluster)).0, entry.encode().to_vec())
            }
            Change::Stored { cluster, host, data } => {
                let cluster = of(*cluster);
                let host = layout.offset(layout.data + u64::from(*host) % geometry.clusters());
                store(file, layout, geometry, cluster, host, *data);
                let entry = L2Entry { host: Some(host), bits: SubclusterBits::new(*data, 0) };
                (layout.l2_entry_offset(cluster).0, entry.encode().to_vec())
            }
            Change::Misplaced { from, to, with_checksum } => {
                let subclusters = geometry.clusters() * u64::from(SUBCLUSTERS);
                let size = geometry.subcluster_size();
                let [from, to] = [*from, *to].map(|number| u64::from(number) % subclusters);
                if *with_checksum {
                    let checksum = read(file, layout.checksum_offset(from).0, Checksum::SIZE);
                    file.write_all_at(&checksum, layout.checksum_offset(to).0).unwrap();
                }
                let data = layout.offset(layout.data).0;
                (data + to * size, read(file, data + from * size, size as usize))
            }
            Change::Checksum { subcluster, value } => {
                let subclusters = geometry.clusters() * u64::from(SUBCLUSTERS);
                let at = layout.checksum_offset(u64::from(*subcluster) % subclusters).0;
                let mut bytes = read(file, at, Checksum::SIZE);
                match value {
                    Value::None => bytes = Checksum::NONE.encode().to_vec(),
                    Value::Zero => bytes = Checksum::ZERO.encode().to_vec(),
                    Value::Any(value) => bytes = value.to_be_bytes().to_vec(),
                    Value::Flipped(bit) => bytes[usize::from(bit / 8 % 4)] ^= 1 << (bit % 8),
                }
                (at, bytes)
            }
            Change::Data { at, bytes } => {
                let area = layout.offset(layout.data).0;
                (area + u64::from(*at) % geometry.virtual_size(), bytes.clone())
            }
        };
        file.write_all_at(&bytes, at).unwrap();
    }

    /// A guest cluster that is worth a read.
    fn cluster(&self, geometry: &Geometry) -> u64 {
        match self {
            Change::L2Raw { cluster, .. }
            | Change::L2 { cluster, .. }
            | Change::Stored { cluster, .. } => u64::from(*cluster) % geometry.clusters(),
            Change::Misplaced { to: subcluster, .. } | Change::Checksum { subcluster, .. } => {
                u64::from(*subcluster / SUBCLUSTERS) % geometry.clusters()
            }
            _ => geometry.clusters() - 1,
        }
    }
}

/// Some bytes of a file; beyond its end there are zeros.
fn read(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let _ = file.read_at(&mut bytes, at).unwrap();
    bytes
}

fn refcount_at(layout: &Layout, host: HostOffset) -> u64 {
    let cluster = host.0 / (layout.offset(1).0 - layout.offset(0).0);
    layout.refcount_offset(cluster).0
}

/// Puts subclusters (a mask) of the base where they belong, with all that goes with them but the
/// L2 entry.
fn store(
    file: &File,
    layout: &Layout,
    geometry: &Geometry,
    cluster: u64,
    host: HostOffset,
    mask: u32,
) {
    let size = geometry.subcluster_size();
    for index in (0..u64::from(SUBCLUSTERS)).filter(|index| mask >> index & 1 != 0) {
        let number = cluster * u64::from(SUBCLUSTERS) + index;
        let range = geometry.subcluster_range(number, 1);
        let mut data = vec![0; size as usize];
        base(&mut data[..range.len as usize], range.start).unwrap();
        file.write_all_at(&data, host.0 + index * size).unwrap();
        let checksum = Checksum::of(number, &data).encode();
        file.write_all_at(&checksum, layout.checksum_offset(number).0).unwrap();
    }
    file.write_all_at(&1u16.to_be_bytes(), refcount_at(layout, host)).unwrap();
}

/// Reads some ranges, in two opens one after the other.
fn read_twice(cache: &Cache, wanted: &[ByteRange]) {
    let mut prepared: Vec<Checksums> = Vec::new();
    for _ in 0..2 {
        let Ok(reader) = cache.reader() else { return };
        let engine = reader.engine();
        let layout = Layout::new(&engine.header().geometry);
        if prepared.is_empty() {
            prepared.extend(wanted.iter().map(|range| Checksums::read(engine, *range)));
        }
        for (range, checksums) in wanted.iter().zip(&prepared) {
            check_plan(engine, &layout, *range);
            read_prepared(&reader, *range, |number, bytes| checksums.vouch_for(number, bytes));
        }
        engine.close();
    }
}

fuzz_target!(|input: Input| {
    let Input { shape, mut changes, unsealed, cut, repair } = input;
    changes.truncate(8);
    let cache = shape.cache();
    let file = OpenOptions::new().read(true).write(true).open(&cache.path).unwrap();
    for change in &changes {
        change.apply(&file, &cache.layout, &cache.geometry);
    }
    if !unsealed {
        let mut header = read(&file, 0, HEADER_MAX);
        seal(&mut header);
        file.write_all_at(&header, 0).unwrap();
    }
    if let Some(cut) = cut {
        file.set_len(cache.file_len() - u64::from(cut).min(cache.file_len())).unwrap();
    }

    let looked_at = Status::read(&cache.path);
    let checked = check(&cache.path, false, |_, _| {});
    if repair && check(&cache.path, true, |_, _| {}).is_ok() {
        let left = check(&cache.path, false, |_, _| {}).unwrap().scan;
        assert_eq!((left.errors(), left.leaked_clusters()), (0, 0), "{:?}", left.findings);
    }

    let Ok(image) = Image::open(&cache.path, Access::Header) else { return };
    assert!(looked_at.is_ok() || checked.is_err() || repair, "{looked_at:?}");
    // A header of another disk is as good as any, as long as it is consistent.
    let (geometry, layout) = (*image.geometry(), *image.layout());
    let clusters = changes.iter().map(|change| change.cluster(&geometry)).take(4);
    let wanted: Vec<ByteRange> = clusters
        .chain([0, geometry.clusters() / 2])
        .map(|cluster| {
            let start = cluster * geometry.cluster_size();
            let len = geometry.cluster_size().min(geometry.virtual_size() - start);
            ByteRange { start, len: len.min(256 * KIB) }
        })
        .collect();
    let before = cache.fixed_tables();
    read_twice(&cache, &wanted);
    assert!(cache.file_len() <= layout.offset(layout.end).0.max(layout.offset(layout.data).0));
    assert_eq!(cache.fixed_tables(), before, "header or tables were written");
});
