//! Several processes on one image: they share every fetch, and one that is killed or stopped costs
//! the others nothing and loses nothing.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vmcache::engine::{Base, Reader, Status};

use crate::child::{Child, Role};
use crate::fixture::{Fixture, KIB, MIB, file_base, full_content, seed};

const NEVER: fn(&mut [u8], u64) -> std::io::Result<()> =
    |_, at| panic!("the base was asked for {at}, which the cache holds");

/// Reads of the base that children noted, as (offset, bytes).
fn noted_reads(fixture: &Fixture) -> Vec<(u64, u64)> {
    fs::read_to_string(fixture.dir.path().join("reads.log"))
        .unwrap()
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(at, len)| (at.parse().unwrap(), len.parse().unwrap()))
        .collect()
}

/// Bytes that the cache answers for.
fn stored(fixture: &Fixture) -> u64 {
    let status = Status::read(&fixture.image()).unwrap();
    status.cached_bytes + status.zero_bytes
}

#[test]
fn processes_read_each_base_block_once() {
    let fixture = Fixture::with(64 * KIB, full_content(6 * MIB), None);
    let mut children = [0, 0, 40, 80].map(|seed| Child::spawn(Role::ReadAll, &fixture, seed));
    children.iter_mut().for_each(|child| drop(child.wait_for("@open")));
    children.iter_mut().for_each(Child::go);
    children.iter_mut().for_each(|child| drop(child.wait_for("@done")));
    let bytes: u64 = noted_reads(&fixture).iter().map(|(_, len)| len).sum();
    assert_eq!(bytes, fixture.size());
    fixture.assert_sound();
}

#[test]
fn what_a_killed_process_stored_is_served_without_the_base() {
    let fixture = Fixture::new(64 * KIB, 4 * MIB);
    let mut child = Child::spawn(Role::Fill, &fixture, 1);
    while stored(&fixture) < 400 * KIB {
        child.wait_for("@read");
    }
    child.kill();
    let reader = Reader::new(fixture.engine(), NEVER);
    let present = fixture.present(reader.engine());
    assert!(present.iter().map(|range| range.len).sum::<u64>() >= 400 * KIB, "{present:?}");
    present.iter().for_each(|range| fixture.read(&reader, range.start, range.len));
}

#[test]
fn processes_killed_while_they_fill_leave_a_sound_image() {
    let fixture = Fixture::new(16 * KIB, 4 * MIB + 512);
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..12 {
        let mut children = [0, 1].map(|n| Child::spawn(Role::Fill, &fixture, seed + round + n));
        let reads = rng.random_range(1..80);
        (0..reads).for_each(|_| drop(children[0].wait_for("@read")));
        children.into_iter().for_each(Child::kill);
        fixture.assert_sound_but_for_leaks();
    }
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    drop(reader);
    fixture.assert_sound();
}

#[test]
fn process_killed_at_any_moment_leaves_leaks_at_the_most() {
    let fixture = Fixture::new(16 * KIB, 8 * MIB);
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..25 {
        let mut child = Child::spawn(Role::OpenAndClose, &fixture, seed + round);
        child.wait_for("@closed");
        thread::sleep(Duration::from_micros(rng.random_range(0..60_000)));
        child.kill();
        fixture.assert_sound_but_for_leaks();
        drop(fixture.reader());
        fixture.assert_sound();
    }
}

#[test]
fn fills_of_a_killed_process_are_checkpointed_by_the_next_user() {
    let fixture = Fixture::with(64 * KIB, full_content(4 * MIB), None);
    let mut child = Child::spawn(Role::Fill, &fixture, 1);
    while stored(&fixture) < 400 * KIB {
        child.wait_for("@read");
    }
    child.kill();
    let cached = stored(&fixture);
    drop(fixture.reader());
    fs::remove_file(fixture.live()).unwrap();
    let on_disk = stored(&fixture);
    assert_eq!(on_disk, cached);
}

#[test]
fn claims_of_a_killed_process_fall_free_before_the_deadline() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let base = file_base(&fixture.base());
    // A base this slow makes for the longest deadline, two seconds.
    let slow = move |buf: &mut [u8], at: u64| {
        thread::sleep(Duration::from_millis(300));
        base.read(buf, at)
    };
    let reader = Reader::new(fixture.engine(), slow);
    fixture.read(&reader, 512 * KIB, KIB);
    let mut child = Child::spawn(Role::Stuck, &fixture, 0);
    child.wait_for("@fetching");
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| fixture.read(&reader, 0, 64 * KIB));
        child.kill();
    });
    assert!(started.elapsed() < Duration::from_millis(1800), "{:?}", started.elapsed());
}

#[test]
fn stopped_process_holds_a_reader_up_once_and_not_for_long() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let mut child = Child::spawn(Role::Stuck, &fixture, 0);
    child.wait_for("@fetching");
    child.signal(Signal::SIGSTOP);
    let reader = fixture.reader();
    let started = Instant::now();
    fixture.read(&reader, 0, 4 * KIB);
    let first = started.elapsed();
    let waited = reader.engine().counters().waited_bytes.get();
    fixture.read(&reader, 4 * KIB, 60 * KIB);
    assert!(first < Duration::from_secs(5), "{first:?}");
    assert_eq!(reader.engine().counters().waited_bytes.get(), waited);
    child.signal(Signal::SIGCONT);
}

#[test]
fn stopped_process_that_goes_on_does_no_damage() {
    let fixture = Fixture::new(64 * KIB, 4 * MIB);
    let mut stopped = Child::spawn(Role::Fill, &fixture, 1);
    (0..20).for_each(|_| drop(stopped.wait_for("@read")));
    stopped.signal(Signal::SIGSTOP);
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    stopped.signal(Signal::SIGCONT);
    stopped.wait_for("@done");
    drop(reader);
    fixture.assert_sound();
}

#[test]
fn processes_show_in_the_status_while_they_are_there() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let mut children = [0, 1, 2].map(|seed| Child::spawn(Role::ReadAll, &fixture, seed));
    children.iter_mut().for_each(|child| drop(child.wait_for("@open")));
    let together = Status::read(&fixture.image()).unwrap().processes.len();
    children.into_iter().for_each(Child::kill);
    let afterwards = Status::read(&fixture.image()).unwrap().processes.len();
    assert_eq!((together, afterwards), (3, 0));
}
