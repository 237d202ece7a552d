//! Many processes on one image at the same time.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::Rng;

use crate::lab::{Base, Cache, DISK, Lab, Server, anywhere};
use crate::nbd::DEPTH;
use crate::process::{Child, Tool, eventually};
use crate::settings::random;

const PROCESSES: u64 = 16;
const BLOCK: u64 = 4096;

/// The reads that a boot sent to its base.
fn trace() -> Vec<(u64, u64)> {
    let text = include_str!("../data/debian12-boot.csv");
    let numbers = |line: &str| {
        let mut fields = line.split(',').map(|field| field.parse().expect("a number"));
        fields.next();
        (fields.next().expect("an offset"), fields.next().expect("a length"))
    };
    text.lines()
        .filter(|line| line.starts_with(|first: char| first.is_ascii_digit()))
        .map(numbers)
        .collect()
}

/// The blocks that some reads touch.
fn blocks(reads: &[(u64, u64)]) -> BTreeSet<u64> {
    reads.iter().flat_map(|(at, len)| at / BLOCK..(at + len).div_ceil(BLOCK)).collect()
}

/// A sparse disk with data in these blocks.
fn base_of_blocks(lab: &Lab, size: u64, blocks: &BTreeSet<u64>) -> Base {
    let path = lab.path("trace-base.raw");
    let file = File::create(&path).expect("a base");
    file.set_len(size).expect("a length");
    let mut random = random("blocks");
    let mut bytes = [0; BLOCK as usize];
    for block in blocks {
        random.fill(&mut bytes);
        file.write_all_at(&bytes, block * BLOCK).expect("room for a base");
    }
    Base::at(path.display().to_string(), "raw", Vec::new(), path)
}

/// `qemu-io` on the cache, waiting for commands.
fn qemu_io(cache: &Cache) -> Child {
    Tool::driver("qemu-io").args(["-r", "--image-opts", &cache.options()]).start_with_input()
}

/// Starts processes and waits until all have the image open.
fn qemu_ios(cache: &Cache, count: u64) -> Vec<Child> {
    let children = (0..count).map(|_| qemu_io(cache)).collect();
    eventually("all have the image open", || cache.stats().get("processes") == count);
    children
}

/// Gives all the same commands at once and waits for their ends.
fn run_commands(children: Vec<Child>, commands: &str) {
    thread::scope(|scope| {
        for mut child in children {
            scope.spawn(move || {
                child.take_input().write_all(commands.as_bytes()).expect("commands");
                let said = child.wait().success();
                assert!(!said.stdout.contains("failed"), "{said:?}");
            });
        }
    });
}

#[test]
fn sixteen_boots_at_once_from_an_empty_cache_cost_the_base_one_working_set() {
    let lab = Lab::new();
    let trace = trace();
    let blocks = blocks(&trace);
    let base = base_of_blocks(&lab, 4 << 30, &blocks);
    let cache = lab.cache(&base, "");
    let commands: String = trace.iter().map(|(at, len)| format!("read -q {at} {len}\n")).collect();

    let started = Instant::now();
    run_commands(qemu_ios(&cache, PROCESSES), &commands);
    let took = started.elapsed();

    let stats = cache.stats();
    let distinct = blocks.len() as u64 * BLOCK;
    let fetched = stats.get("base-bytes");
    println!(
        "{PROCESSES} replays in {took:.1?}: {fetched} bytes from the base for {distinct} distinct \
         ones ({:.4}), {} waited for",
        fetched as f64 / distinct as f64,
        stats.get("waited-bytes")
    );
    assert!(fetched * 100 <= distinct * 105, "{fetched} of {distinct}");
    assert_eq!(stats.get("processes"), 0);
    cache.assert_sound();
}

#[test]
fn stats_shows_every_process_that_has_the_image_open() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let children = qemu_ios(&cache, PROCESSES);
    let listed = Tool::vmcache().args(["stats", "--output=json"]).arg(&cache.path).run().success();
    for child in &children {
        assert!(listed.stdout.contains(&child.id().to_string()), "{} in {listed:?}", child.id());
    }
    run_commands(children, "quit\n");
    assert_eq!(cache.stats().get("processes"), 0);
}

/// The ids that a command shows of the processes on an image.
fn shown_by(command: &str, cache: &Cache) -> BTreeSet<u64> {
    let said = Tool::vmcache().args([command, "--output=json"]).arg(&cache.path).run().success();
    let all: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
    let list = all["process-list"].as_array().expect("a list");
    assert_eq!(all["processes"], list.len());
    list.iter().map(|process| process["pid"].as_u64().expect("a process id")).collect()
}

/// Whether both commands show these processes and no others.
#[track_caller]
fn assert_shown(cache: &Cache, servers: &mut [&mut Server]) {
    let ids = servers.iter_mut().map(|server| u64::from(server.process().id())).collect();
    assert_eq!(shown_by("info", cache), ids);
    assert_eq!(shown_by("stats", cache), ids);
}

#[test]
fn info_and_stats_show_the_processes_that_live_however_the_others_ended() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    assert_shown(&cache, &mut []);
    let [mut killed, mut left, mut stays] = [(); 3].map(|()| lab.serve(&cache));
    assert_shown(&cache, &mut [&mut killed, &mut left, &mut stays]);
    killed.process().kill();
    assert_shown(&cache, &mut [&mut left, &mut stays]);
    left.stop();
    assert_shown(&cache, &mut [&mut stays]);
    stays.stop();
    assert_shown(&cache, &mut []);
}

#[test]
fn many_processes_read_at_random_what_each_of_them_fetches() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "cluster_size=64K");
    let content = &cache.base.content;
    let servers: Vec<_> = (0..8).map(|_| lab.serve(&cache)).collect();
    thread::scope(|scope| {
        for (number, server) in servers.iter().enumerate() {
            let reads = anywhere(random(&format!("share {number}")), DISK).take(200);
            scope.spawn(move || server.connect().read_and_compare(content, reads).expect("reads"));
        }
    });
    servers.iter().for_each(|server| server.assert_serves(content));
    servers.into_iter().for_each(|server| drop(server.stop()));
    let fetched = cache.stats().get("base-bytes");
    assert!(fetched * 100 <= DISK as u64 * 105, "{fetched} of {DISK}");
    cache.assert_sound();
}

/// Reads through two names of one image at once; gives what the second one's process said.
fn served_under_two_names(lab: &Lab, cache: &Cache, other: PathBuf) -> String {
    let content = &cache.base.content;
    let servers = [lab.serve(cache), lab.serve(&cache.under(other))];
    thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| server.assert_serves(content));
        }
    });
    let [_, said] = servers.map(|server| server.stop().stderr);
    cache.assert_sound();
    said
}

#[test]
fn a_symlink_is_the_same_image() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let link = lab.path("symlink");
    symlink(&cache.path, &link).expect("a symlink");
    let said = served_under_two_names(&lab, &cache, link);
    assert_eq!(said, "");
    assert_eq!(cache.stats().get("base-bytes"), DISK as u64);
}

#[test]
fn a_hard_link_is_the_same_image() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let link = lab.path("hardlink");
    fs::hard_link(&cache.path, &link).expect("a hard link");
    let said = served_under_two_names(&lab, &cache, link);
    assert_eq!(said, "");
    assert_eq!(cache.stats().get("base-bytes"), DISK as u64);
}

#[test]
fn without_its_live_file_an_image_in_use_takes_no_new_users_but_serves_them() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let first = lab.serve(&cache);
    first.connect().read_and_compare(&cache.base.content, [(0, 1 << 20)]).expect("a read");
    fs::remove_file(cache.live()).expect("a live file");

    let second = lab.serve(&cache);
    second.assert_serves(&cache.base.content);
    let said = second.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("live file"), "{said:?}");

    first.assert_serves(&cache.base.content);
    assert_eq!(first.stop().stderr, "");
    cache.assert_sound();
    let third = lab.serve(&cache);
    third.assert_serves(&cache.base.content);
    assert_eq!(third.stop().stderr, "");
    assert_eq!(cache.stats().get("base-reads"), 0);
}

#[test]
fn a_stopped_process_holds_nobody_up_and_does_no_damage_when_it_goes_on() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let content = &cache.base.content;
    let stopped = lab.serve(&cache);
    let mut client = stopped.connect();
    for (offset, len) in anywhere(random("stopped"), DISK).take(DEPTH) {
        client.send(offset, len).expect("a request");
    }
    stopped.signal(Signal::SIGSTOP);

    let other = lab.serve(&cache);
    let started = Instant::now();
    other.assert_serves(content);
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    other.stop();
    cache.assert_valid();

    stopped.signal(Signal::SIGCONT);
    client.read_and_compare(content, []).expect("the replies");
    stopped.assert_serves(content);
    stopped.stop();
    cache.assert_sound();
}
