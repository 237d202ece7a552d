//! Random reads of all alignments and lengths equal the base, cold, warm, by many threads and over
//! several opens; what is left on disk is a sound qcow2.

use std::thread;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vmcache::engine::{Base, Reader};

use crate::fixture::{Fixture, KIB, MIB, seed};

const THREADS: u64 = 8;
const READS: u64 = 120;

fn random_reads<B: Base>(fixture: &Fixture, reader: &Reader<B>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..READS {
        let longest = rng.random_range(0..=21);
        let at = rng.random_range(0..fixture.size());
        let len = rng.random_range(1..=1u64 << longest).min(fixture.size() - at);
        fixture.read(reader, at, len);
    }
}

fn reads_equal_the_base(cluster_size: u64) {
    let fixture = Fixture::new(cluster_size, 24 * MIB.max(cluster_size) + 5 * 512);
    let seed = seed();
    for round in 0..3 {
        let reader = fixture.reader();
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (fixture, reader) = (&fixture, &reader);
                scope.spawn(move || random_reads(fixture, reader, seed ^ (round << 8 | thread)));
            }
        });
        reader.engine().close();
        fixture.assert_sound();
    }
}

#[test]
fn random_reads_equal_the_base_with_clusters_of_16_kib() {
    reads_equal_the_base(16 * KIB);
}

#[test]
fn random_reads_equal_the_base_with_clusters_of_64_kib() {
    reads_equal_the_base(64 * KIB);
}

#[test]
fn random_reads_equal_the_base_with_clusters_of_128_kib() {
    reads_equal_the_base(128 * KIB);
}

#[test]
fn random_reads_equal_the_base_with_clusters_of_2_mib() {
    reads_equal_the_base(2 * MIB);
}

#[test]
fn second_open_serves_everything_without_the_base() {
    let fixture = Fixture::new(64 * KIB, 12 * MIB + 3 * 512);
    let first = fixture.reader();
    fixture.read_everything(&first);
    drop(first);
    let base = fixture.counted_base();
    let second = Reader::new(fixture.engine(), base.clone());
    fixture.read_everything(&second);
    assert_eq!(base.reads(), 0);
}

#[test]
fn image_without_its_live_file_serves_everything_without_the_base() {
    let fixture = Fixture::new(64 * KIB, 12 * MIB + 3 * 512);
    let first = fixture.reader();
    fixture.read_everything(&first);
    drop(first);
    std::fs::remove_file(fixture.live()).unwrap();
    let base = fixture.counted_base();
    let second = Reader::new(fixture.engine(), base.clone());
    fixture.read_everything(&second);
    assert_eq!(base.reads(), 0);
}

#[test]
fn disk_of_one_sector_is_cached() {
    let fixture = Fixture::with(128 * KIB, vec![7; 512], None);
    let first = fixture.reader();
    fixture.read(&first, 0, 512);
    drop(first);
    let base = fixture.counted_base();
    fixture.read(&Reader::new(fixture.engine(), base.clone()), 511, 1);
    assert_eq!(base.reads(), 0);
    fixture.assert_sound();
}

#[test]
fn fetch_is_widened_to_subclusters_and_no_further() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let reader = fixture.reader();
    fixture.read(&reader, 2 * KIB + 1, 1);
    assert_eq!(reader.engine().counters().base_bytes.get(), 2 * KIB);
}

#[test]
fn zeros_take_no_room_in_the_image() {
    let fixture = Fixture::with(64 * KIB, vec![0; 16 << 20], None);
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    reader.engine().close();
    assert!(fixture.occupied() < 64 * KIB, "{} bytes", fixture.occupied());
    fixture.assert_sound();
}

#[test]
fn image_in_use_is_sound_after_every_read() {
    let fixture = Fixture::new(16 * KIB, 2 * MIB);
    let reader = fixture.reader();
    for at in (0..fixture.size()).step_by(512 * KIB as usize) {
        fixture.read(&reader, at, 100 * KIB);
        fixture.assert_sound();
    }
}
