//! Torture: sixteen `qemu-nbd` processes on one image that come and go, are killed, stopped and
//! continued at random, with a quota near its end. Every process is a real QEMU, so that what dies
//! is what dies in production: the driver in its coroutines, with QEMU's locks and threads.
//!
//! Every byte that comes back is held against the base. After each round a plain QEMU finds no
//! error in the image and the base's content, and after the next user no leak either.
//!
//! Length: `VMCACHE_TORTURE_SECONDS` (default 30), and on until `VMCACHE_TORTURE_KILLS` (default
//! none) are reached. The same seed makes the same plan; the machine's scheduling is its own.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::Rng;
use rand::rngs::StdRng;
use vmcache::image::{Access, Image};

use crate::lab::{Base, Cache, Lab, Over, Server, SetOnDrop, anywhere_up_to, content, log_uniform};
use crate::nbd::{Client, DEPTH, assert_equal};
use crate::process::Tool;
use crate::settings::{number, random};

const PROCESSES: usize = 16;
const DISK: usize = (96 << 20) + 777 * 512;
/// Bytes of the largest reads: small enough for a cache to be filled for most of a round.
const LARGEST: u64 = 256 << 10;
const ROUND: Duration = Duration::from_secs(4);
/// Longer than any deadline of the driver's, with sixteen processes on few processors.
const LONGEST_READ: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Figures {
    kills: AtomicU64,
    kills_at_start: AtomicU64,
    kills_at_end: AtomicU64,
    leaves: AtomicU64,
    stops: AtomicU64,
    reads: AtomicU64,
    bytes: AtomicU64,
    slowest_ms: AtomicU64,
    checks: AtomicU64,
    /// Written during the rounds.
    checkpoints: AtomicU64,
}

impl Figures {
    fn kills(&self) -> u64 {
        [&self.kills, &self.kills_at_start, &self.kills_at_end].map(load).iter().sum()
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What becomes of a process.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Killed before anybody could connect.
    DiesStarting,
    /// Killed with reads in flight.
    DiesReading,
    /// Asked to end, and killed while it does.
    DiesEnding,
    /// Asked to end, and left alone.
    Leaves,
}

impl Fate {
    fn choose(random: &mut StdRng) -> Self {
        match random.random_range(0..100) {
            0..12 => Fate::DiesStarting,
            12..75 => Fate::DiesReading,
            75..85 => Fate::DiesEnding,
            _ => Fate::Leaves,
        }
    }
}

struct Round<'a> {
    lab: &'a Lab,
    cache: &'a Cache,
    content: &'a [u8],
    figures: &'a Figures,
    ends: Instant,
}

impl Round<'_> {
    /// One process after the other until the round ends.
    fn lives(&self, mut random: StdRng) {
        while Instant::now() < self.ends {
            self.life(&mut random);
        }
    }

    fn life(&self, random: &mut StdRng) {
        let fate = Fate::choose(random);
        let options = self.cache.options();
        let mut server = Server::start_without_waiting(
            self.lab,
            Tool::driver("qemu-nbd"),
            &["-r", "--image-opts", &options],
        );
        if fate == Fate::DiesStarting {
            pause(random, 300);
            server.process().kill();
            count(&self.figures.kills_at_start);
            return;
        }
        server.await_connections();
        let mut client = server.connect();
        server.hide();
        self.read(&server, &mut client, random);
        match fate {
            Fate::Leaves => {
                while client.in_flight() > 0 {
                    self.receive(&mut client);
                }
                drop(client);
                server.stop();
                count(&self.figures.leaves);
            }
            Fate::DiesEnding => {
                server.signal(Signal::SIGTERM);
                pause(random, 60);
                server.process().kill();
                count(&self.figures.kills_at_end);
            }
            Fate::DiesReading | Fate::DiesStarting => {
                pause(random, 5);
                server.process().kill();
                count(&self.figures.kills);
            }
        }
    }

    /// Reads for a while, perhaps with a stop in between, and leaves reads in flight.
    fn read(&self, server: &Server, client: &mut Client, random: &mut StdRng) {
        let mut reads = anywhere_up_to(LARGEST, random.clone(), self.content.len());
        for (offset, len) in reads.by_ref().take(DEPTH) {
            client.send(offset, len).expect("a request");
        }
        let replies = log_uniform(random, 1, 400) as usize;
        let stop_after = random.random_bool(0.12).then(|| random.random_range(0..replies));
        for (index, (offset, len)) in reads.take(replies).enumerate() {
            if stop_after == Some(index) {
                server.signal(Signal::SIGSTOP);
                pause(random, 3000);
                server.signal(Signal::SIGCONT);
                count(&self.figures.stops);
            }
            self.receive(client);
            client.send(offset, len).expect("a request");
        }
    }

    fn receive(&self, client: &mut Client) {
        let started = Instant::now();
        let (offset, data) = client.receive().expect("a reply");
        assert_equal(offset, data, self.content);
        let took = started.elapsed();
        assert!(took < LONGEST_READ, "{took:?} for a read");
        let figures = self.figures;
        count(&figures.reads);
        figures.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        figures.slowest_ms.fetch_max(took.as_millis() as u64, Ordering::Relaxed);
    }
}

/// Sleeps for up to some milliseconds, mostly for few: time is what this test is about.
fn pause(random: &mut StdRng, most_ms: u64) {
    thread::sleep(Duration::from_micros(log_uniform(random, 10, most_ms * 1000)));
}

/// A fresh cache of a random shape; two of three have a quota that does not suffice.
fn fresh_cache(lab: &Lab, base: &Base, random: &mut StdRng) -> (Cache, u64) {
    let cluster_size = ["16K", "64K", "128K", "2M"][random.random_range(0..4)];
    let quota = random.random_range(8 << 20..DISK as u64 * 5 / 4);
    let options = format!("cluster_size={cluster_size},quota={quota}");
    (lab.cache(base, &options), quota)
}

/// One round. Meanwhile a plain `qemu-img check` never finds an error, in whatever state the
/// killed left the image: leaks at the most, of a checkpoint that was cut. It looks while nobody
/// writes a checkpoint, since it reads the tables one after the other and some twice.
fn play(round: &Round<'_>, random: &mut StdRng) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let image = Image::open(&round.cache.path, Access::ReadWrite).expect("the cache");
            while !done.load(Ordering::Relaxed) {
                let lock = image.lock_checkpoint(LONGEST_READ).expect("a lock");
                assert!(lock.is_some(), "a checkpoint took too long");
                round.cache.assert_no_errors();
                count(&round.figures.checks);
                drop(lock);
                // So that checkpoints are written in between.
                thread::sleep(Duration::from_millis(200));
            }
        });
        let _end = SetOnDrop(&done);
        thread::scope(|scope| {
            for _ in 0..PROCESSES {
                let random = rand::SeedableRng::seed_from_u64(random.random());
                scope.spawn(move || round.lives(random));
            }
        });
    });
}

#[test]
fn torture() {
    let least = Duration::from_secs(number("VMCACHE_TORTURE_SECONDS").unwrap_or(30));
    let kills = number("VMCACHE_TORTURE_KILLS").unwrap_or(0);
    let mut random = random("torture");
    let figures = Figures::default();
    let lab = Lab::new();
    let base = lab.base_of(content(DISK), "raw", Over::File);
    let (mut cache, mut quota) = fresh_cache(&lab, &base, &mut random);
    let started = Instant::now();
    let mut rounds = 0;
    while started.elapsed() < least || figures.kills() < kills {
        let ends = Instant::now() + ROUND;
        let content = &base.content;
        let round = Round { lab: &lab, cache: &cache, content, figures: &figures, ends };
        let before = if cache.live().exists() { cache.stats().get("checkpoints") } else { 0 };
        let most = cache.most_occupied_during(|| play(&round, &mut random));
        rounds += 1;
        // None where all died before anybody joined.
        let checkpoints = if cache.live().exists() { cache.stats().get("checkpoints") } else { 0 };
        figures.checkpoints.fetch_add(checkpoints.saturating_sub(before), Ordering::Relaxed);
        assert!(most <= quota, "{most} bytes occupied of {quota}");
        cache.assert_valid();
        if random.random_bool(0.3) {
            // As after a reboot; there may be none when all died before they joined.
            let _ = fs::remove_file(cache.live());
        }
        let next = lab.serve(&cache);
        next.assert_serves(&base.content);
        next.stop();
        cache.assert_sound();
        assert!(cache.occupied() <= quota);
        if random.random_bool(0.6) {
            lab.discard(&cache);
            (cache, quota) = fresh_cache(&lab, &base, &mut random);
        }
        if rounds % 20 == 0 {
            report(&figures, rounds, started.elapsed());
        }
    }
    report(&figures, rounds, started.elapsed());
    assert!(figures.kills() > 0 && load(&figures.checkpoints) > 0);
}

fn report(figures: &Figures, rounds: u64, took: Duration) {
    println!(
        "torture: {rounds} rounds in {took:.0?}: {} kills ({} starting, {} reading, {} ending), {} \
         leaves, {} stops; {} reads, {} MB, all equal to the base; slowest read {} ms; \
         {} checkpoints, {} checks in use, no error",
        figures.kills(),
        load(&figures.kills_at_start),
        load(&figures.kills),
        load(&figures.kills_at_end),
        load(&figures.leaves),
        load(&figures.stops),
        load(&figures.reads),
        load(&figures.bytes) >> 20,
        load(&figures.slowest_ms),
        load(&figures.checkpoints),
        load(&figures.checks)
    );
}
