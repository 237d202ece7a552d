//! Round trips, hostile bytes and the arithmetic of places.

use proptest::prelude::*;

use super::header::seal;
use super::*;
use crate::error::ErrorKind;

const KIB: u64 = 1 << 10;
/// Where vmcache's extension stands.
const EXTENSION: usize = 120;
const TIB: u64 = 1 << 40;

fn cache_extension() -> CacheExtension {
    CacheExtension {
        quota: Some(200 << 20),
        uuid: [7; 16],
        base: BaseIdentity {
            local: Some((-5, 123_456_789, 42)),
            sample: Some([9; 32]),
            changed: Some(BaseChange::Data(u64::MAX - 4095)),
        },
        checkpoints: 17,
    }
}

fn header(geometry: Geometry) -> Header {
    Header::new(geometry, "nfs://storage/debian12.raw", "raw", cache_extension()).unwrap()
}

fn file_len(geometry: &Geometry) -> u64 {
    let layout = Layout::new(geometry);
    layout.offset(layout.data).0
}

fn decode_mutated(offset: usize, bytes: &[u8]) -> ErrorKind {
    let geometry = Geometry::new(16, 1 << 30).unwrap();
    let mut encoded = header(geometry).encode();
    encoded[offset..offset + bytes.len()].copy_from_slice(bytes);
    // As somebody would who means it: the checksum fits.
    seal(&mut encoded, EXTENSION);
    Header::decode(&encoded, file_len(&geometry)).unwrap_err().kind()
}

/// Any geometry from one sector to 64 TiB.
fn geometries() -> impl Strategy<Value = Geometry> {
    (14u32..=21, 1u64..=(64 * TIB / 512), 0u32..38)
        .prop_map(|(bits, sectors, shift)| (bits, (sectors >> shift).max(1) * 512))
        .prop_map(|(bits, size)| Geometry::new(bits, size).unwrap())
}

#[test]
fn header_reads_back_as_it_was_written() {
    let geometry = Geometry::new(17, 4 << 30).unwrap();
    let written = header(geometry);
    let read = Header::decode(&written.encode(), file_len(&geometry)).unwrap();
    assert_eq!(read, written);
}

#[test]
fn what_is_noted_of_the_base_in_place_leaves_a_header_that_reads_back() {
    let geometry = Geometry::new(17, 4 << 30).unwrap();
    let cache = CacheExtension { base: BaseIdentity::default(), ..cache_extension() };
    let written = Header::new(geometry, "base.raw", "raw", cache).unwrap();
    let mut bytes = written.encode();
    let base = BaseIdentity { changed: Some(BaseChange::Whole), ..cache_extension().base };
    let (at, note) = written.base_note(base);
    bytes[at.0 as usize..][..note.len()].copy_from_slice(&note);
    let read = Header::decode(&bytes, file_len(&geometry)).unwrap();
    assert_eq!((read.cache.base, read.cache.checkpoints), (base, 17));
}

#[test]
fn a_note_of_the_base_lies_within_one_sector() {
    let (at, note) = header(Geometry::new(17, 4 << 30).unwrap()).base_note(BaseIdentity::default());
    assert_eq!(at.0 / SECTOR, (at.0 + note.len() as u64 - 1) / SECTOR);
}

#[test]
fn header_without_quota_and_identity_reads_back_as_it_was_written() {
    let geometry = Geometry::new(14, 512).unwrap();
    let cache = CacheExtension {
        quota: None,
        uuid: [0; 16],
        base: BaseIdentity::default(),
        checkpoints: 0,
    };
    let written = Header::new(geometry, "b", "qcow2", cache).unwrap();
    let read = Header::decode(&written.encode(), file_len(&geometry)).unwrap();
    assert_eq!(read, written);
}

#[test]
fn number_of_checkpoints_stands_where_the_header_says() {
    let geometry = Geometry::new(17, 4 << 30).unwrap();
    let header = header(geometry);
    let at = header.checkpoints_offset().0 as usize;
    assert_eq!(header.encode()[at..at + 8], 17u64.to_be_bytes());
}

#[test]
fn number_of_checkpoints_lies_within_one_sector() {
    let at = header(Geometry::new(17, 4 << 30).unwrap()).checkpoints_offset().0;
    assert_eq!(at / 512, (at + 7) / 512);
}

#[test]
fn longest_names_fit_into_the_smallest_cluster() {
    let geometry = Geometry::new(14, 64 * TIB).unwrap();
    let name = "x".repeat(1023);
    let written = Header::new(geometry, &name, "a-format-name-1", cache_extension()).unwrap();
    let bytes = written.encode();
    assert!(bytes.len() <= HEADER_MAX);
    assert_eq!(Header::decode(&bytes, file_len(&geometry)).unwrap().backing_file, name);
}

#[test]
fn name_that_is_too_long_is_refused() {
    let geometry = Geometry::new(17, 512).unwrap();
    let refused = Header::new(geometry, &"x".repeat(1024), "raw", cache_extension());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn empty_names_are_refused() {
    let geometry = Geometry::new(17, 512).unwrap();
    assert!(Header::new(geometry, "", "raw", cache_extension()).is_err());
    assert!(Header::new(geometry, "base", "", cache_extension()).is_err());
}

#[test]
fn other_magic_is_not_a_cache() {
    assert_eq!(decode_mutated(0, b"RAW\0"), ErrorKind::NotACache);
}

#[test]
fn empty_file_is_not_a_cache() {
    assert_eq!(Header::decode(&[], 0).unwrap_err().kind(), ErrorKind::NotACache);
}

#[test]
fn version_2_is_unsupported() {
    assert_eq!(decode_mutated(4, &2u32.to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn backing_name_beyond_the_header_is_damage() {
    assert_eq!(decode_mutated(8, &u64::MAX.to_be_bytes()), ErrorKind::Damaged);
}

#[test]
fn endless_backing_name_is_damage() {
    assert_eq!(decode_mutated(16, &u32::MAX.to_be_bytes()), ErrorKind::Damaged);
}

#[test]
fn cluster_size_out_of_range_is_unsupported() {
    assert_eq!(decode_mutated(20, &9u32.to_be_bytes()), ErrorKind::Unsupported);
    assert_eq!(decode_mutated(20, &64u32.to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn virtual_size_of_nothing_is_invalid() {
    assert_eq!(decode_mutated(24, &0u64.to_be_bytes()), ErrorKind::Invalid);
}

#[test]
fn virtual_size_of_everything_is_unsupported() {
    assert_eq!(decode_mutated(24, &(!511u64).to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn encrypted_image_is_unsupported() {
    assert_eq!(decode_mutated(32, &1u32.to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn other_number_of_l1_entries_is_damage() {
    assert_eq!(decode_mutated(36, &u32::MAX.to_be_bytes()), ErrorKind::Damaged);
}

#[test]
fn l1_table_elsewhere_is_damage() {
    for at in [0, 1, 512, 65536, 1 << 40, u64::MAX, !65535] {
        assert_eq!(decode_mutated(40, &at.to_be_bytes()), ErrorKind::Damaged);
    }
}

#[test]
fn refcount_table_elsewhere_is_damage() {
    for at in [0, 1, 512, 2 * 65536, 1 << 40, u64::MAX, !65535] {
        assert_eq!(decode_mutated(48, &at.to_be_bytes()), ErrorKind::Damaged);
    }
}

#[test]
fn refcount_table_of_another_size_is_damage() {
    assert_eq!(decode_mutated(56, &0u32.to_be_bytes()), ErrorKind::Damaged);
    assert_eq!(decode_mutated(56, &u32::MAX.to_be_bytes()), ErrorKind::Damaged);
}

#[test]
fn image_with_snapshots_is_unsupported() {
    assert_eq!(decode_mutated(60, &1u32.to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn unknown_incompatible_feature_is_unsupported() {
    assert_eq!(decode_mutated(72, &(1u64 << 40 | 16).to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn dirty_and_corrupt_bits_are_damage() {
    assert_eq!(decode_mutated(72, &17u64.to_be_bytes()), ErrorKind::Damaged);
    assert_eq!(decode_mutated(72, &18u64.to_be_bytes()), ErrorKind::Damaged);
}

#[test]
fn refcounts_of_another_width_are_unsupported() {
    assert_eq!(decode_mutated(96, &6u32.to_be_bytes()), ErrorKind::Unsupported);
}

#[test]
fn header_length_out_of_range_is_damage() {
    for length in [0, 72, 105, 16 << 10 | 8, !7] {
        assert_eq!(decode_mutated(100, &u32::to_be_bytes(length)), ErrorKind::Damaged);
    }
}

#[test]
fn image_without_its_autoclear_bit_is_read_but_not_trusted() {
    let geometry = Geometry::new(16, 1 << 30).unwrap();
    let mut bytes = header(geometry).encode();
    bytes[88..96].fill(0);
    assert!(!Header::decode(&bytes, file_len(&geometry)).unwrap().trusted);
}

#[test]
fn file_that_ends_within_its_tables_is_damage() {
    let geometry = Geometry::new(16, 1 << 30).unwrap();
    let err = Header::decode(&header(geometry).encode(), file_len(&geometry) - 1).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Damaged);
}

#[test]
fn geometry_takes_the_smallest_and_the_largest_disk() {
    assert_eq!(Geometry::new(21, 512).unwrap().clusters(), 1);
    assert_eq!(Geometry::new(14, 64 * TIB).unwrap().l2_tables(), 1 << 22);
    assert!(Geometry::new(14, 64 * TIB + 512).is_err());
}

#[test]
fn geometry_refuses_what_is_no_disk() {
    for size in [0, 1, 511, 513, u64::MAX] {
        assert_eq!(Geometry::new(16, size).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[test]
fn geometry_refuses_sizes_whose_offsets_no_entry_can_hold() {
    assert_eq!(Geometry::new(21, 1 << 60).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn geometry_refuses_cluster_sizes_that_are_none() {
    for size in [0, 1, 512, 8 * KIB, 4 << 20, 65535, 3 << 14, u64::MAX] {
        assert!(Geometry::with_cluster_size(size, 1 << 30).is_err());
    }
}

#[test]
fn last_subcluster_ends_with_the_disk() {
    let geometry = Geometry::new(16, 64 * KIB + 512).unwrap();
    assert_eq!(geometry.subcluster_range(32, 1), ByteRange { start: 64 * KIB, len: 512 });
    assert_eq!(geometry.subcluster_range(33, 5).len, 0);
}

#[test]
fn entry_with_a_compressed_cluster_is_damage() {
    let geometry = Geometry::new(16, 1 << 30).unwrap();
    let mut bytes = L2Entry { host: Some(HostOffset(1 << 20)), bits: SubclusterBits(1) }.encode();
    bytes[0] |= 0x40;
    assert_eq!(L2Entry::decode(bytes, &geometry).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn entry_with_a_subcluster_both_data_and_zero_is_damage() {
    let geometry = Geometry::new(16, 1 << 30).unwrap();
    let bits = SubclusterBits(1 << 32 | 1);
    let bytes = L2Entry { host: Some(HostOffset(1 << 20)), bits }.encode();
    assert_eq!(L2Entry::decode(bytes, &geometry).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn entry_with_data_and_no_place_is_damage() {
    let geometry = Geometry::new(16, 1 << 30).unwrap();
    let bytes = L2Entry { host: None, bits: SubclusterBits(1) }.encode();
    assert_eq!(L2Entry::decode(bytes, &geometry).unwrap_err().kind(), ErrorKind::Damaged);
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048), len: u64) {
        let _ = Header::decode(&bytes, len);
    }

    #[test]
    fn random_bytes_behind_a_good_start_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 104..1024),
        len: u64,
    ) {
        let mut encoded = header(Geometry::new(16, 1 << 30).unwrap()).encode();
        encoded.truncate(104);
        encoded.extend(bytes);
        let _ = Header::decode(&encoded, len);
    }

    #[test]
    fn header_that_is_accepted_after_damage_has_its_tables_in_place(
        geometry in geometries(),
        changes in prop::collection::vec((0usize..400, any::<u8>()), 1..4),
        cut in 0u64..3,
        sealed: bool,
    ) {
        let mut bytes = header(geometry).encode();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if sealed {
            seal(&mut bytes, EXTENSION);
        }
        let len = file_len(&geometry) - cut;
        if let Ok(found) = Header::decode(&bytes, len) {
            let layout = Layout::new(&found.geometry);
            prop_assert!(!found.trusted || layout.offset(layout.data).0 <= len);
            let at = found.checkpoints_offset().0 as usize;
            prop_assert!(at + 8 <= bytes.len());
            let pointers = [40..48, 48..56].map(|at: std::ops::Range<usize>| {
                u64::from_be_bytes(bytes[at].try_into().unwrap())
            });
            let expected = [layout.offset(layout.l1_table), layout.refcount_table_offset()];
            prop_assert!(!found.trusted || pointers == expected.map(|offset| offset.0));
        }
    }

    #[test]
    fn header_with_any_flipped_bit_is_refused_or_not_trusted(at in 0usize..350, bit in 0u32..8) {
        let geometry = Geometry::new(17, 4 << 30).unwrap();
        let written = header(geometry);
        let mut bytes = written.encode();
        let at = at.min(bytes.len() - 1);
        bytes[at] ^= 1 << bit;
        if let Ok(found) = Header::decode(&bytes, file_len(&geometry)) {
            let checkpoints = written.checkpoints_offset().0 as usize;
            prop_assert!(!found.trusted || (checkpoints..checkpoints + 8).contains(&at));
        }
    }

    #[test]
    fn checksum_differs_with_the_data_and_with_the_place(
        data in prop::collection::vec(any::<u8>(), 512),
        number in 0u64..1 << 40,
        flipped in 0usize..512 * 8,
        elsewhere in 1u64..1 << 40,
    ) {
        let written = Checksum::of(number, &data);
        prop_assert_eq!(Checksum::decode(written.encode()), written);
        prop_assert!(u32::from_be_bytes(written.encode()) > 1);
        prop_assert_ne!(Checksum::of(number ^ elsewhere, &data), written);
        let mut other = data;
        other[flipped / 8] ^= 1 << (flipped % 8);
        prop_assert_ne!(Checksum::of(number, &other), written);
    }

    #[test]
    fn truncated_header_is_refused(geometry in geometries(), keep in 0usize..350) {
        let bytes = header(geometry).encode();
        let keep = keep.min(bytes.len() - 1);
        prop_assert!(Header::decode(&bytes[..keep], file_len(&geometry)).is_err());
    }

    #[test]
    fn header_of_any_geometry_reads_back(geometry in geometries()) {
        let written = header(geometry);
        let read = Header::decode(&written.encode(), file_len(&geometry)).unwrap();
        prop_assert_eq!(read, written);
    }

    #[test]
    fn entry_reads_back_as_it_was_written(
        bits in 14u32..=21,
        cluster in 1u64..1 << 34,
        data: u32,
        zero: u32,
    ) {
        let geometry = Geometry::new(bits, 1 << 30).unwrap();
        let host = Some(HostOffset(cluster << bits));
        let written = L2Entry { host, bits: SubclusterBits::new(data, zero & !data) };
        prop_assert_eq!(L2Entry::decode(written.encode(), &geometry).unwrap(), written);
    }

    #[test]
    fn entry_that_is_accepted_writes_back_as_it_was_read(bytes: [u8; 16], bits in 14u32..=21) {
        let geometry = Geometry::new(bits, 1 << 30).unwrap();
        if let Ok(entry) = L2Entry::decode(bytes, &geometry) {
            prop_assert_eq!(entry.encode(), bytes);
        }
    }

    #[test]
    fn entry_with_random_place_is_accepted_only_where_it_is_a_cluster(place: u64, data: u32) {
        let geometry = Geometry::new(16, 1 << 30).unwrap();
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&place.to_be_bytes());
        bytes[12..].copy_from_slice(&data.to_be_bytes());
        if let Ok(L2Entry { host: Some(host), .. }) = L2Entry::decode(bytes, &geometry) {
            prop_assert_eq!(host.0 % (64 * KIB), 0);
            prop_assert_eq!(host.0, place & !(1 << 63));
        }
    }

    #[test]
    fn regions_of_the_layout_follow_each_other_without_gap(geometry in geometries()) {
        let layout = Layout::new(&geometry);
        let l1_clusters = (geometry.l2_tables() * 8).div_ceil(geometry.cluster_size());
        prop_assert_eq!(layout.refcount_table_offset(), layout.offset(1));
        prop_assert_eq!(layout.refcount_block_offset(0), layout.offset(1 + layout.refcount_table_clusters));
        prop_assert_eq!(layout.refcount_block_offset(layout.refcount_blocks), layout.offset(layout.l1_table));
        prop_assert_eq!(layout.l1_table + l1_clusters, layout.l2_tables);
        prop_assert_eq!(layout.l2_table_offset(geometry.l2_tables()), layout.offset(layout.checksums));
        let subclusters = geometry.clusters() * u64::from(SUBCLUSTERS);
        let checksums_end = layout.checksum_offset(subclusters).0.next_multiple_of(geometry.cluster_size());
        prop_assert_eq!(HostOffset(checksums_end), layout.offset(layout.data));
        prop_assert_eq!(layout.end - layout.data, geometry.clusters());
    }

    #[test]
    fn refcounts_cover_the_whole_file_and_hardly_more(geometry in geometries()) {
        let layout = Layout::new(&geometry);
        let per_block = geometry.cluster_size() / 2;
        prop_assert!(layout.refcount_blocks * per_block >= layout.end);
        prop_assert!((layout.refcount_blocks - 1) * per_block <= layout.end);
        prop_assert!(layout.refcount_table_clusters * geometry.cluster_size() >= layout.refcount_blocks * 8);
        prop_assert!(layout.refcount_offset(layout.end).0 <= layout.offset(layout.l1_table).0);
    }

    #[test]
    fn tables_stay_below_what_qemu_accepts(geometry in geometries()) {
        let layout = Layout::new(&geometry);
        prop_assert!(layout.refcount_table_clusters * geometry.cluster_size() <= 8 << 20);
        prop_assert!(geometry.l2_tables() * 8 <= 32 << 20);
        prop_assert!(layout.offset(layout.end).0 < 1 << 56);
    }

    #[test]
    fn entries_of_all_guest_clusters_lie_within_the_l2_tables(geometry in geometries(), part: f64) {
        let layout = Layout::new(&geometry);
        let last = geometry.clusters() - 1;
        let cluster = ((last as f64 * (part.abs() % 1.0)) as u64).min(last);
        for cluster in [0, cluster, last] {
            let at = layout.l2_entry_offset(cluster).0;
            prop_assert!((layout.offset(layout.l2_tables).0..layout.offset(layout.data).0).contains(&at));
            prop_assert_eq!(at / 512, (at + 15) / 512);
        }
    }

    #[test]
    fn data_clusters_are_those_behind_the_tables(geometry in geometries(), offset: u64) {
        let layout = Layout::new(&geometry);
        let inside = (layout.offset(layout.data).0..layout.offset(layout.end).0).contains(&offset);
        let aligned = offset % geometry.cluster_size() == 0;
        prop_assert_eq!(layout.is_data_cluster(HostOffset(offset)), inside && aligned);
    }

    #[test]
    fn offsets_of_the_disk_belong_to_one_cluster_and_subcluster(geometry in geometries(), offset: u64) {
        let offset = offset % geometry.virtual_size();
        let subcluster = geometry.subcluster_of(GuestOffset(offset));
        let range = geometry.subcluster_range(subcluster, 1);
        prop_assert!(range.start <= offset && offset < range.end());
        prop_assert_eq!(subcluster / 32, geometry.cluster_of(GuestOffset(offset)));
        prop_assert!(geometry.cluster_of(GuestOffset(offset)) < geometry.clusters());
    }
}
