//! A cache's disk that takes long: nobody waits for it, and nothing is lost.

use std::fs;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use vmcache::engine::{Engine, Options, Reader, Status, Step, Surroundings};
use vmcache::format::ByteRange;
use vmcache::image::{Observer, Operation};

use crate::fixture::{CountedBase, Fixture, KIB, MIB, full_content};

/// Holds operations of one kind up.
#[derive(Debug)]
struct Slow {
    writes: Duration,
    syncs: Duration,
}

impl Observer for Slow {
    fn before(&self, operation: Operation<'_>) -> std::io::Result<usize> {
        match operation {
            Operation::Write { .. } => thread::sleep(self.writes),
            Operation::Sync => thread::sleep(self.syncs),
            _ => {}
        }
        Ok(usize::MAX)
    }

    fn after(&self, _: Operation<'_>) {}
}

fn reader_on(fixture: &Fixture, disk: Slow) -> Reader<CountedBase> {
    let surroundings = Surroundings { observer: Some(Arc::new(disk)), ..Default::default() };
    let options = Options { surroundings, ..Options::default() };
    let engine = Engine::open(&fixture.image(), &options).unwrap();
    Reader::new(Arc::new(engine), fixture.counted_base())
}

#[test]
fn block_that_cannot_be_stored_is_read_again_from_the_base_after_a_moment() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let syncs = Duration::ZERO;
    let reader = reader_on(&fixture, Slow { writes: Duration::from_secs(1), syncs });
    fixture.read(&reader, 0, 512);
    let started = Instant::now();
    fixture.read(&reader, 512, 512);
    let first = started.elapsed();
    let started = Instant::now();
    fixture.read(&reader, 1024, 512);
    fixture.read(&reader, 64 * KIB, 512);
    fixture.read(&reader, 64 * KIB + 512, 512);
    let later = started.elapsed();
    assert!(first < Duration::from_millis(1500), "{first:?}");
    assert!(later < Duration::from_millis(200), "{later:?}");
}

#[test]
fn what_is_stored_while_another_writes_its_last_checkpoint_reaches_the_tables() {
    let fixture = Fixture::with(64 * KIB, full_content(24 * MIB), None);
    let writes = Duration::ZERO;
    let first = reader_on(&fixture, Slow { writes, syncs: Duration::from_millis(500) });
    let second = fixture.reader();
    fixture.read(&first, 0, 64 * KIB);
    fixture.read(&second, 0, 64 * KIB);
    thread::scope(|scope| {
        scope.spawn(move || drop(first));
        thread::sleep(Duration::from_millis(200));
        fixture.read(&second, 20 * MIB, MIB);
        drop(second);
    });
    fs::remove_file(fixture.live()).unwrap();
    let cached = Status::read(&fixture.image()).unwrap().cached_bytes;
    assert_eq!(cached, MIB + 64 * KIB);
}

#[test]
fn wait_ends_when_the_claim_was_let_go_and_made_again() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let (owner, other) = (fixture.engine(), fixture.engine());
    let range = ByteRange { start: 0, len: 4 * KIB };
    fixture.read(&Reader::new(Arc::clone(&owner), fixture.counted_base()), 512 * KIB, 4096);
    let first = owner.plan(range);
    let (sender, woken) = mpsc::channel();
    let Some(Step::Wait(ticket)) = other.plan(range).pop().map(|part| part.step) else {
        panic!("the other one has the claim");
    };
    assert!(other.wait(ticket, move || sender.send(()).unwrap()));
    drop(first);
    let _again = owner.plan(range);
    woken.recv_timeout(Duration::from_millis(400)).unwrap();
}
