//! Cached data that is no longer what was stored: it is found when it is first read after an open,
//! read from the base, and stored anew in its place.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vmcache::engine::{self, Engine, Options, Reader, Status};
use vmcache::format::Layout;

use crate::fixture::{CountedBase, Fixture, KIB, MIB, full_content, seed};

const FLIPS: usize = 1000;

/// A fixture whose cache holds all of the base, and nobody has it open.
fn warm() -> Fixture {
    let fixture = Fixture::new(64 * KIB, 24 * MIB + 512);
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    reader.engine().close();
    fixture
}

fn image_file(fixture: &Fixture) -> File {
    OpenOptions::new().read(true).write(true).open(fixture.image()).unwrap()
}

/// The parts of a file from an offset on that are not holes.
fn extents(file: &File, from: u64) -> Vec<std::ops::Range<u64>> {
    let mut at = from as i64;
    std::iter::from_fn(|| {
        let start = lseek(file, at, Whence::SeekData).ok()?;
        at = lseek(file, start, Whence::SeekHole).unwrap();
        Some(start as u64..at as u64)
    })
    .collect()
}

/// Changes bytes at random places of some extents.
fn flip(file: &File, extents: &[std::ops::Range<u64>], flips: usize, random: &mut StdRng) {
    let total: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
    for _ in 0..flips {
        let mut at = random.random_range(0..total);
        let extent = extents
            .iter()
            .find(|extent| {
                let len = extent.end - extent.start;
                let inside = at < len;
                at -= if inside { 0 } else { len };
                inside
            })
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, extent.start + at).unwrap();
        file.write_all_at(&[byte[0] ^ random.random_range(1..=255u8)], extent.start + at).unwrap();
    }
}

/// Changes bytes of the cached data.
fn flip_data(fixture: &Fixture) {
    let file = image_file(fixture);
    let data = Layout::new(&fixture.geometry);
    let data = extents(&file, data.offset(data.data).0);
    flip(&file, &data, FLIPS, &mut StdRng::seed_from_u64(seed()));
}

fn counters(reader: &Reader<CountedBase>) -> (u64, u64) {
    let counters = reader.engine().counters();
    (counters.bad_bytes.get(), counters.repaired_bytes.get())
}

/// Reads everything again through a new open, and once more after that one: the first repairs
/// something, the second reads nothing from the base.
fn is_healed_by_reading(fixture: &Fixture) {
    let before = counters(&fixture.reader());
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    reader.engine().close();
    let (bad, repaired) = counters(&reader);
    assert!(bad > before.0 && repaired > before.1, "{bad} bytes bad, {repaired} repaired");
    let base = fixture.counted_base();
    let again = Reader::new(fixture.engine(), base.clone());
    fixture.read_everything(&again);
    again.engine().close();
    assert_eq!(base.reads(), 0);
    fixture.assert_sound();
    let report = engine::check(&fixture.image(), false, |_, _| {}).unwrap();
    assert_eq!(report.scan.errors(), 0);
}

#[test]
fn thousand_flipped_bytes_of_cached_data_are_healed_by_reading() {
    let fixture = warm();
    flip_data(&fixture);
    is_healed_by_reading(&fixture);
}

#[test]
fn flipped_checksums_are_healed_by_reading() {
    let (fixture, mut random) = (warm(), StdRng::seed_from_u64(seed()));
    let layout = Layout::new(&fixture.geometry);
    let checksums = layout.offset(layout.checksums).0;
    let area = checksums..checksums + fixture.geometry.clusters() * 128;
    flip(&image_file(&fixture), &[area], FLIPS, &mut random);
    // As after a reboot: what says that it is zero and has another checksum is dropped then.
    fs::remove_file(fixture.live()).unwrap();
    is_healed_by_reading(&fixture);
}

#[test]
fn data_lost_on_the_way_to_another_node_is_healed_by_reading() {
    let fixture = warm();
    let layout = Layout::new(&fixture.geometry);
    let middle = layout.offset(layout.data + 100).0;
    let rest = layout.offset(layout.end).0 - middle;
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(image_file(&fixture), how, middle as i64, rest as i64).unwrap();
    is_healed_by_reading(&fixture);
}

#[test]
fn thousand_flipped_bytes_anywhere_never_show_in_a_read() {
    let mut random = StdRng::seed_from_u64(seed());
    for _ in 0..10 {
        let fixture = warm();
        let file = image_file(&fixture);
        // The header apart: with a damaged one an image is not opened.
        flip(&file, &extents(&file, 64 * KIB), FLIPS / 10, &mut random);
        let reader = fixture.reader();
        fixture.read_everything(&reader);
    }
}

#[test]
fn what_was_sound_when_one_open_read_it_is_looked_at_again_by_the_next() {
    let fixture = warm();
    let first = fixture.reader();
    fixture.read_everything(&first);
    flip_data(&fixture);
    let second = fixture.reader();
    fixture.read_everything(&second);
    assert!(counters(&second).0 > 0);
}

#[test]
fn bad_data_without_a_base_that_it_was_made_from_gives_the_cache_up() {
    let fixture = warm();
    flip_data(&fixture);
    let changed: Vec<u8> = fixture.content.iter().map(|byte| byte ^ 0x11).collect();
    let base = CountedBase::new(Arc::new(changed), fixture.geometry.subcluster_size());
    let reader = Reader::new(fixture.engine(), base);
    let mut buf = vec![0; fixture.size() as usize];
    reader.read(&mut buf, 0).unwrap();
    // The queue is worked off.
    reader.engine().close();
    assert!(reader.engine().is_bypassed());
    assert!(counters(&reader).1 <= 64 * 2 * KIB, "{} bytes repaired", counters(&reader).1);
}

#[test]
fn block_whose_checksum_is_bad_too_is_healed_by_reading() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    fixture.read_everything(&fixture.reader());
    let layout = Layout::new(&fixture.geometry);
    let file = image_file(&fixture);
    file.write_all_at(&[0x5a; 4], layout.checksum_offset(0).0).unwrap();
    let data = layout.offset(layout.data).0;
    file.write_all_at(&[0x5a; 4], data).unwrap();
    is_healed_by_reading(&fixture);
}

#[test]
fn cache_that_may_not_be_written_is_read_around_what_is_bad() {
    let fixture = warm();
    flip_data(&fixture);
    let options = Options { populate: false, ..Options::default() };
    let engine = Arc::new(Engine::open(&fixture.image(), &options).unwrap());
    let reader = Reader::new(engine, fixture.counted_base());
    fixture.read_everything(&reader);
    fixture.read_everything(&reader);
    let (bad, repaired) = counters(&reader);
    assert!(bad > 0 && repaired == 0);
}

#[test]
fn check_finds_what_is_bad_and_repair_drops_it() {
    let fixture = warm();
    flip_data(&fixture);
    let before = Status::read(&fixture.image()).unwrap().cached_bytes;
    let found = engine::check(&fixture.image(), false, |_, _| {}).unwrap().scan;
    engine::check(&fixture.image(), true, |_, _| {}).unwrap();
    let left = engine::check(&fixture.image(), false, |_, _| {}).unwrap().scan;
    let after = Status::read(&fixture.image()).unwrap().cached_bytes;
    assert!(found.bad_subclusters() > 0);
    assert_eq!(left.errors(), 0);
    assert!(after < before && after > before / 2, "{before} bytes before, {after} after");
    fixture.assert_sound();
}

#[test]
fn entry_that_shows_data_where_nothing_was_ever_stored_is_healed_by_reading() {
    let fixture = Fixture::with(64 * KIB, full_content(4 * MIB), None);
    let reader = fixture.reader();
    fixture.read(&reader, 0, 32 * KIB);
    drop(reader);
    // The other half of the first cluster: its bits in the L2 entry, and a reboot.
    let layout = Layout::new(&fixture.geometry);
    image_file(&fixture).write_all_at(&[0xff; 2], layout.l2_entry_offset(0).0 + 12).unwrap();
    fs::remove_file(fixture.live()).unwrap();
    let reader = fixture.reader();
    fixture.read(&reader, 0, 64 * KIB);
    reader.engine().close();
    assert_eq!(counters(&reader), (32 * KIB, 32 * KIB));
    drop(reader);
    fixture.assert_sound();
}
