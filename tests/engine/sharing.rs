//! Many readers of one image in one process: each block is fetched once, nobody waits for ever.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use vmcache::engine::{Base, Engine, Fetch, Options, Part, Reader, Step};
use vmcache::format::ByteRange;

use crate::fixture::{Fixture, KIB, MIB, full_content};

/// Longer than any deadline; only a hang takes that long.
const HANG: Duration = Duration::from_secs(30);

/// Claims a range of which the cache has nothing.
fn claim(engine: &Engine, start: u64, len: u64) -> Vec<Fetch> {
    let range = ByteRange { start, len };
    // The first plan may only ask for room in the live file.
    let (done, waited) = mpsc::channel();
    for Part { step, .. } in engine.plan(range) {
        if let Step::Wait(ticket) = step {
            let done = done.clone();
            engine.wait(ticket, move || done.send(()).unwrap());
        }
    }
    drop(done);
    while waited.recv().is_ok() {}
    engine
        .plan(range)
        .into_iter()
        .map(|part| match part.step {
            Step::Fetch(fetch) => fetch,
            other => panic!("{other:?} where a fetch was expected"),
        })
        .collect()
}

/// Returns when the reader has begun to wait for somebody else's fetch.
fn until_it_waits<B: Base>(reader: &Reader<B>) {
    let started = Instant::now();
    while reader.engine().counters().waited_bytes.get() == 0 {
        assert!(started.elapsed() < HANG, "the reader does not wait");
        thread::yield_now();
    }
}

#[test]
fn threads_on_the_same_ranges_read_each_base_block_once() {
    let fixture = Fixture::new(64 * KIB, 8 * MIB + 512);
    let counted = fixture.counted_base();
    let slow = {
        let counted = counted.clone();
        move |buf: &mut [u8], at: u64| {
            thread::sleep(Duration::from_millis(2));
            counted.read(buf, at)
        }
    };
    let reader = Reader::new(fixture.engine(), slow);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| fixture.read_everything(&reader));
        }
    });
    assert_eq!(counted.most_reads_of_a_subcluster(), 1);
}

#[test]
fn threads_on_overlapping_ranges_read_each_base_block_once() {
    let fixture = Fixture::new(64 * KIB, 4 * MIB);
    let counted = fixture.counted_base();
    let reader = Reader::new(fixture.engine(), counted.clone());
    thread::scope(|scope| {
        for thread in 0..8 {
            let (fixture, reader) = (&fixture, &reader);
            scope.spawn(move || {
                for index in 0..250 {
                    fixture.read(reader, index * 16 * KIB + thread * 512, 60 * KIB);
                }
            });
        }
    });
    assert_eq!(counted.most_reads_of_a_subcluster(), 1);
}

#[test]
fn two_engines_on_one_image_read_each_base_block_once() {
    let fixture = Fixture::new(128 * KIB, 8 * MIB);
    let counted = fixture.counted_base();
    let readers = [(); 2].map(|()| Reader::new(fixture.engine(), counted.clone()));
    thread::scope(|scope| {
        for reader in readers.iter().chain(&readers) {
            scope.spawn(|| fixture.read_everything(reader));
        }
    });
    assert_eq!(counted.most_reads_of_a_subcluster(), 1);
    drop(readers);
    fixture.assert_sound();
}

#[test]
fn image_under_a_symlink_is_the_same_image() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let link = fixture.dir.path().join("link");
    std::os::unix::fs::symlink(fixture.image(), &link).unwrap();
    let first = fixture.reader();
    fixture.read_everything(&first);
    let counted = fixture.counted_base();
    let engine = Arc::new(Engine::open(&link, &Options::default()).unwrap());
    fixture.read_everything(&Reader::new(engine, counted.clone()));
    // The last fills of the first reader may still be on their way.
    assert!(counted.most_reads_of_a_subcluster() <= 1);
    assert!(counted.reads() <= 1, "{} reads", counted.reads());
}

#[test]
fn image_under_a_hard_link_is_the_same_image() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let link = fixture.dir.path().join("link");
    std::fs::hard_link(fixture.image(), &link).unwrap();
    let first = fixture.reader();
    fixture.read_everything(&first);
    let counted = fixture.counted_base();
    let engine = Arc::new(Engine::open(&link, &Options::default()).unwrap());
    fixture.read_everything(&Reader::new(engine, counted.clone()));
    // The last fills of the first reader may still be on their way.
    assert!(counted.reads() <= 1, "{} reads", counted.reads());
}

#[test]
fn live_file_that_was_away_while_a_new_one_was_made_is_worthless() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.read_everything(&fixture.reader());
    let away = fixture.dir.path().join("away");
    std::fs::rename(fixture.live(), &away).unwrap();
    drop(fixture.engine());
    std::fs::rename(&away, fixture.live()).unwrap();
    let inode = || std::fs::metadata(fixture.live()).unwrap().ino();
    let returned = inode();
    drop(fixture.engine());
    assert_ne!(inode(), returned);
    fixture.assert_sound();
}

#[test]
fn two_images_in_one_process_do_not_disturb_each_other() {
    let fixtures = [(64 * KIB, MIB), (16 * KIB, MIB)]
        .map(|(cluster, size)| Fixture::with(cluster, full_content(size + cluster), None));
    let readers = [0, 1].map(|index| fixtures[index].reader());
    thread::scope(|scope| {
        for (fixture, reader) in fixtures.iter().zip(&readers) {
            scope.spawn(|| fixture.read_everything(reader));
        }
    });
    drop(readers);
    fixtures.iter().for_each(Fixture::assert_sound);
}

#[test]
fn failed_base_read_fails_the_request_with_its_error() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let broken = |_: &mut [u8], _: u64| Err(io::Error::from_raw_os_error(libc::EREMOTEIO));
    let reader = Reader::new(fixture.engine(), broken);
    let err = reader.read(&mut [0; 512], 0).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(libc::EREMOTEIO));
}

#[test]
fn failed_base_read_gives_all_its_claims_up() {
    let fixture = Fixture::new(64 * KIB, 8 * MIB);
    let engine = fixture.engine();
    let broken = |_: &mut [u8], _: u64| Err(io::Error::from_raw_os_error(libc::EIO));
    let failed = Reader::new(Arc::clone(&engine), broken).read(&mut vec![0; 5 << 20], 0);
    let other = Reader::new(fixture.engine(), fixture.counted_base());
    fixture.read(&other, 0, 5 * MIB);
    assert!(failed.is_err());
    assert_eq!(other.engine().counters().waited_bytes.get(), 0);
}

#[test]
fn waiter_on_a_fetch_that_fails_fetches_itself() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let owner = fixture.engine();
    let held = claim(&owner, 0, 4 * KIB);
    let reader = fixture.reader();
    thread::scope(|scope| {
        let read = scope.spawn(|| fixture.read(&reader, 0, 4 * KIB));
        until_it_waits(&reader);
        drop(held);
        read.join().unwrap();
    });
    assert_eq!(reader.engine().counters().base_bytes.get(), 4 * KIB);
}

#[test]
fn waiter_finds_what_the_owner_stored() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let owner = fixture.engine();
    let held = claim(&owner, 0, 4 * KIB);
    let reader = fixture.reader();
    thread::scope(|scope| {
        let read = scope.spawn(|| fixture.read(&reader, 0, 4 * KIB));
        until_it_waits(&reader);
        for fetch in held {
            let range = fetch.range();
            let mut data = owner.buffer(range).expect("room");
            data.copy_from_slice(&fixture.content[range.start as usize..range.end() as usize]);
            owner.fill(fetch, data, Duration::from_millis(1));
        }
        read.join().unwrap();
    });
    assert_eq!(reader.engine().counters().base_bytes.get(), 0);
}

#[test]
fn owner_that_never_finishes_holds_a_reader_up_no_longer_than_the_deadline() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let owner = fixture.engine();
    let _held = claim(&owner, 0, 64 * KIB);
    let reader = fixture.reader();
    let started = Instant::now();
    fixture.read(&reader, 0, 64 * KIB);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn owner_that_never_finishes_is_waited_for_once() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let owner = fixture.engine();
    let _held = claim(&owner, 0, 512 * KIB);
    let reader = fixture.reader();
    fixture.read(&reader, 0, 4 * KIB);
    let waited = reader.engine().counters().waited_bytes.get();
    fixture.read(&reader, 4 * KIB, 508 * KIB);
    assert_eq!(reader.engine().counters().waited_bytes.get(), waited);
}

#[test]
fn owner_that_was_late_is_trusted_again_when_it_reads() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let owner = fixture.engine();
    let _late = claim(&owner, 0, 4 * KIB);
    let reader = fixture.reader();
    fixture.read(&reader, 0, 4 * KIB);
    let waited = reader.engine().counters().waited_bytes.get();
    let _again = claim(&owner, 64 * KIB, 4 * KIB);
    fixture.read(&reader, 64 * KIB, 4 * KIB);
    assert!(reader.engine().counters().waited_bytes.get() > waited);
}

#[test]
fn closed_engine_ends_the_waits_of_its_readers() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let owner = fixture.engine();
    let _held = claim(&owner, 0, 4 * KIB);
    let reader = fixture.reader();
    thread::scope(|scope| {
        let read = scope.spawn(|| fixture.read(&reader, 0, 4 * KIB));
        until_it_waits(&reader);
        reader.engine().close();
        read.join().unwrap();
    });
}

#[test]
fn closed_engine_passes_reads_through() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let reader = fixture.reader();
    fixture.read(&reader, 0, 64 * KIB);
    reader.engine().close();
    fixture.read(&reader, 0, MIB);
    assert!(!reader.engine().is_active());
}

#[test]
fn fill_of_the_wrong_length_is_not_stored() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let engine = fixture.engine();
    for fetch in claim(&engine, 0, 4 * KIB) {
        let short = engine.buffer(ByteRange { start: 0, len: 512 }).expect("room");
        engine.fill(fetch, short, Duration::ZERO);
    }
    engine.close();
    drop(engine);
    fixture.assert_sound();
    fixture.read_everything(&fixture.reader());
}

#[test]
fn engine_that_must_not_populate_stores_nothing() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let options = Options { populate: false, ..Default::default() };
    let engine = Arc::new(Engine::open(&fixture.image(), &options).unwrap());
    let reader = Reader::new(engine, fixture.counted_base());
    fixture.read_everything(&reader);
    assert!(fixture.present(reader.engine()).is_empty());
}

#[test]
fn every_byte_is_stored_once_however_many_read_it() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let reader = fixture.reader();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| fixture.read_everything(&reader));
        }
    });
    reader.engine().close();
    assert_eq!(reader.engine().counters().populated_bytes.get(), MIB);
}
