//! An image that somebody prepared: a sound one, half full, with anything written over its header,
//! tables, refcounts and data, cut or not. Looking at it, repairing it and reading through it must
//! neither crash nor hang, nor reach outside its data area.
#![no_main]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmcache::engine::{Status, check};
use vmcache::format::{ByteRange, Geometry, HostOffset, L2Entry, Layout, SubclusterBits};
use vmcache_fuzz::{Cache, Template, check_plan, read_prepared};

const KIB: u64 = 1 << 10;
const TIB: u64 = 1 << 40;

#[derive(Arbitrary, Debug)]
struct Input {
    shape: Shape,
    changes: Vec<Change>,
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
    Data {
        at: u32,
        bytes: Vec<u8>,
    },
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
            Change::L2Raw { cluster, .. } | Change::L2 { cluster, .. } => {
                u64::from(*cluster) % geometry.clusters()
            }
            _ => geometry.clusters() - 1,
        }
    }
}

fn refcount_at(layout: &Layout, host: HostOffset) -> u64 {
    let cluster = host.0 / (layout.offset(1).0 - layout.offset(0).0);
    layout.refcount_offset(cluster).0
}

fuzz_target!(|input: Input| {
    let Input { shape, mut changes, cut, repair } = input;
    changes.truncate(8);
    let cache = shape.cache();
    let file = OpenOptions::new().read(true).write(true).open(&cache.path).unwrap();
    for change in &changes {
        change.apply(&file, &cache.layout, &cache.geometry);
    }
    if let Some(cut) = cut {
        file.set_len(cache.file_len() - u64::from(cut).min(cache.file_len())).unwrap();
    }

    let looked_at = Status::read(&cache.path);
    let checked = check(&cache.path, false, |_, _| {});
    if repair && check(&cache.path, true, |_, _| {}).is_ok() {
        let left = check(&cache.path, false, |_, _| {}).unwrap().scan;
        assert_eq!((left.damages, left.leaked_clusters()), (0, 0), "{:?}", left.findings);
    }

    let before = cache.fixed_tables();
    if let Ok(reader) = cache.reader() {
        assert!(looked_at.is_ok() || checked.is_err() || repair, "{looked_at:?}");
        // A header of another disk is as good as any, as long as it is consistent.
        let geometry = reader.engine().header().geometry;
        let layout = Layout::new(&geometry);
        let clusters = changes.iter().map(|change| change.cluster(&geometry)).take(4);
        for cluster in clusters.chain([0, geometry.clusters() / 2]) {
            let start = cluster * geometry.cluster_size();
            let len = geometry.cluster_size().min(geometry.virtual_size() - start);
            let range = ByteRange { start, len: len.min(256 * KIB) };
            check_plan(reader.engine(), &layout, range);
            read_prepared(&reader, range);
        }
        reader.engine().close();
        assert!(cache.file_len() <= layout.offset(layout.end).0.max(layout.offset(layout.data).0));
        assert_eq!(cache.fixed_tables(), before, "header or tables were written");
    }
});
