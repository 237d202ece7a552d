//! Processes stopped (SIGSTOP) at the worst moments and continued much later: nobody is held up
//! meanwhile, and nothing is wrong afterwards.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmcache::engine::WAIT_LIMIT;

use crate::lab::{Cache, Lab, Over, Server, anywhere, noise, sequential};
use crate::nbd::{Client, DEPTH, assert_equal};
use crate::process::eventually;
use crate::settings::{number, random};
use crate::trace::Delay;

/// How many go on all the time while one is stopped.
const OTHERS: usize = 3;
const READ: usize = 32 << 10;
const DISK: usize = 24 << 20;

/// How long a process is stopped.
fn stop_length() -> Duration {
    let is_full = number("VMCACHE_TEST_FULL") == Some(1);
    Duration::from_secs(if is_full { 60 } else { 5 })
}

/// What took longest while a process was stopped.
#[derive(Debug, Default)]
struct Longest {
    read: Duration,
    /// From the start of a process that reads a little to its end.
    visit: Duration,
    visits: u32,
}

/// One read, compared; how long it took.
fn timed(client: &mut Client, content: &[u8], (offset, len): (u64, u32)) -> Duration {
    let started = Instant::now();
    client.send(offset, len).expect("a request");
    let (offset, data) = client.receive().expect("a reply");
    assert_equal(offset, data, content);
    started.elapsed()
}

/// Reads the whole disk from some place on, spread over some time; the longest read.
fn read_slowly(server: &Server, content: &[u8], from: usize, length: Duration) -> Duration {
    let mut client = server.connect();
    let mut reads: Vec<_> = sequential(content.len(), READ).collect();
    reads.rotate_left(from);
    let count = reads.len() as u32;
    let started = Instant::now();
    let mut longest = Duration::ZERO;
    for (index, read) in (0..).zip(reads) {
        longest = longest.max(timed(&mut client, content, read));
        let due = length * index / count;
        thread::sleep(due.saturating_sub(started.elapsed()));
    }
    longest
}

/// Processes that come, read a little and leave, until some time has passed.
fn visit(lab: &Lab, cache: &Cache, length: Duration) -> Longest {
    let mut longest = Longest::default();
    let mut reads = anywhere(random("visits"), cache.base.content.len());
    let started = Instant::now();
    while started.elapsed() < length {
        let came = Instant::now();
        let server = lab.serve(cache);
        let mut client = server.connect();
        for read in reads.by_ref().take(8) {
            longest.read = longest.read.max(timed(&mut client, &cache.base.content, read));
        }
        drop(client);
        server.stop();
        longest.visit = longest.visit.max(came.elapsed());
        longest.visits += 1;
        thread::sleep(Duration::from_millis(100));
    }
    longest
}

/// Others read, fill, join and leave for a while.
fn others_go_on(lab: &Lab, cache: &Cache, length: Duration) -> Longest {
    let content = &cache.base.content;
    let servers: Vec<_> = (0..OTHERS).map(|_| lab.serve(cache)).collect();
    let longest = thread::scope(|scope| {
        let part = content.len() / READ / OTHERS;
        let readers: Vec<_> = servers
            .iter()
            .zip((0..).step_by(part))
            .map(|(server, from)| scope.spawn(move || read_slowly(server, content, from, length)))
            .collect();
        let visits = visit(lab, cache, length);
        readers.into_iter().fold(visits, |longest, reader| {
            let read = longest.read.max(reader.join().expect("a reader"));
            Longest { read, ..longest }
        })
    });
    servers.into_iter().for_each(|server| drop(server.stop()));
    longest
}

#[track_caller]
fn assert_not_held_up(longest: &Longest) {
    println!("stopped for {:?}: {longest:?}", stop_length());
    assert!(longest.read < WAIT_LIMIT, "{longest:?}");
    // Starting and ending a process on a busy machine included.
    assert!(longest.visit < 2 * WAIT_LIMIT, "{longest:?}");
    // One a second at the least, so that most take no time to speak of.
    assert!(u64::from(longest.visits) >= stop_length().as_secs(), "{longest:?}");
}

#[test]
fn a_process_stopped_with_claims_in_its_hands_holds_nobody_up() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let content = &cache.base.content;
    let mut stopped = lab.serve(&cache);
    let delay = Delay::attach(&lab, stopped.process().id(), "pread64,preadv", 1, 100);
    let mut client = stopped.connect();
    for (offset, _) in sequential(DISK, DISK / DEPTH) {
        client.send(offset, 256 << 10).expect("a request");
    }
    thread::sleep(Duration::from_millis(500));
    stopped.signal(Signal::SIGSTOP);
    let longest = others_go_on(&lab, &cache, stop_length());
    assert_not_held_up(&longest);
    assert!(cache.stats().get("waited-bytes") > 0, "there were no claims");
    cache.assert_valid();

    drop(delay);
    stopped.signal(Signal::SIGCONT);
    client.read_and_compare(content, []).expect("the replies");
    stopped.assert_serves(content);
    stopped.stop();
    cache.assert_sound();
}

#[test]
fn a_process_stopped_in_the_middle_of_a_checkpoint_holds_nobody_up() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(DISK), "raw", Over::File), "");
    let content = &cache.base.content;
    let mut stopped = lab.serve(&cache);
    // The second sync: refcounts are written, L2 entries are not.
    let delay = Delay::attach(&lab, stopped.process().id(), "fdatasync", 2, 100);
    let reads = sequential(DISK / 4, 1 << 20);
    stopped.connect().read_and_compare(content, reads).expect("reads");
    eventually("a checkpoint begins", || cache.is_in_checkpoint());
    thread::sleep(Duration::from_millis(500));
    stopped.signal(Signal::SIGSTOP);
    let longest = others_go_on(&lab, &cache, stop_length());
    assert_not_held_up(&longest);
    assert!(cache.is_in_checkpoint());
    cache.assert_valid();

    drop(delay);
    stopped.signal(Signal::SIGCONT);
    stopped.assert_serves(content);
    stopped.stop();
    cache.assert_sound();
    assert_eq!(cache.stock_mapped(), content.len() as u64);
}
