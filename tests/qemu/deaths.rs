//! Processes killed in the middle of populating: the image stays valid and the cache keeps what it
//! had.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::Rng;

use crate::lab::{Cache, Lab, Over, Server, anywhere, noise, sequential};
use crate::nbd::DEPTH;
use crate::process::{Tool, eventually};
use crate::settings::random;
use crate::trace::killed_at;

/// Kills the server with reads in flight, after `replies` of them have come.
fn kill_while_reading(server: &mut Server, content: &[u8], replies: usize, purpose: &str) {
    let mut client = server.connect();
    let mut plan = anywhere(random(purpose), content.len());
    for (offset, len) in plan.by_ref().take(DEPTH) {
        client.send(offset, len).expect("a request");
    }
    for (offset, len) in plan.take(replies) {
        client.receive().expect("a reply");
        client.send(offset, len).expect("a request");
    }
    server.process().kill();
}

/// Reads everything through the next process, which must take from the base what the cache does not
/// hold and no more. Returns how much it held.
fn assert_next_fetches_what_is_missing(lab: &Lab, cache: &Cache) -> u64 {
    let content = &cache.base.content;
    let kept = cache.info_number("cached-bytes") + cache.info_number("zero-bytes");
    let before = cache.stats();
    let next = lab.serve(cache);
    next.assert_serves(content);
    next.stop();
    let fetched = cache.stats().since(&before, "base-bytes");
    // The last subcluster counts as a whole one above, and the disk ends within it.
    assert!(fetched <= content.len() as u64 + 4096 - kept, "{fetched} after {kept}");
    kept
}

#[test]
fn what_was_in_the_map_when_a_process_was_killed_is_served_by_the_next() {
    let lab = Lab::new();
    let base = lab.base();
    let mut random = random("moments");
    let mut all_kept = 0;
    for round in 0..8 {
        let cache = lab.cache(&base, "");
        let mut server = lab.serve(&cache);
        let replies = random.random_range(1..60);
        kill_while_reading(&mut server, &base.content, replies, &format!("death {round}"));
        cache.assert_valid();

        all_kept += assert_next_fetches_what_is_missing(&lab, &cache);
        cache.assert_sound();
    }
    // A kill after the first replies may come before anything was stored; all of them do not.
    assert!(all_kept > 0);
}

#[test]
fn a_process_killed_again_and_again_leaves_a_valid_image_each_time() {
    let lab = Lab::new();
    let base = lab.base();
    let cache = lab.cache(&base, "cluster_size=64K");
    let mut random = random("moments of one image");
    for round in 0..10 {
        let mut server = lab.serve(&cache);
        let replies = random.random_range(0..20);
        kill_while_reading(&mut server, &base.content, replies, &format!("again {round}"));
        cache.assert_valid();
    }
    let last = lab.serve(&cache);
    last.assert_serves(&base.content);
    last.stop();
    cache.assert_sound();
}

#[test]
fn processes_killed_while_they_end_leave_a_valid_image_each_time() {
    let lab = Lab::new();
    let base = lab.base_of(noise(48 << 20), "raw", Over::File);
    let cache = lab.cache(&base, "cluster_size=16K");
    let mut random = random("ends");
    for round in 0..48 {
        let mut server = lab.serve(&cache);
        let read = [(round << 20, 1 << 20)];
        server.connect().read_and_compare(&base.content, read).expect("a read");
        server.signal(Signal::SIGTERM);
        // Somewhere in the last checkpoint, of which nothing can be seen from outside.
        thread::sleep(Duration::from_micros(random.random_range(0..12_000)));
        server.process().kill();
        cache.assert_no_errors();
    }
    cache.assert_valid();
    assert_next_fetches_what_is_missing(&lab, &cache);
    cache.assert_sound();
}

#[test]
fn a_reboot_after_a_kill_costs_no_more_than_what_had_no_checkpoint() {
    let lab = Lab::new();
    let base = lab.base();
    let cache = lab.cache(&base, "");
    let first = lab.serve(&cache);
    let half = &base.content[..(base.content.len() / 2) & !0xf_ffff];
    let reads = sequential(half.len(), 1 << 20);
    first.connect().read_and_compare(half, reads).expect("reads");
    first.stop();
    let mut second = lab.serve(&cache);
    kill_while_reading(&mut second, &base.content, 20, "reboot");

    // A reboot takes the page cache and the live file's meaning; the image's tables stay.
    fs::remove_file(cache.live()).expect("a live file");
    cache.assert_valid();
    let third = lab.serve(&cache);
    third.assert_serves(&base.content);
    third.stop();
    let fetched = cache.stats().get("base-bytes");
    assert!(fetched <= (base.content.len() - half.len()) as u64, "{fetched} fetched again");
    cache.assert_sound();
}

#[test]
fn qemu_io_killed_while_populating_leaves_a_valid_image() {
    let lab = Lab::new();
    let base = lab.base();
    let cache = lab.cache(&base, "");
    let mut random = random("qemu-io");
    for _ in 0..5 {
        let mut child = Tool::driver("qemu-io")
            .args(["-r", "--image-opts", &cache.options()])
            .args((0..24).flat_map(|at| ["-c".into(), format!("read -q {at}M 1M")]))
            .start_in_background();
        let enough = random.random_range(1..20) << 20;
        eventually("qemu-io populates", || {
            child.has_ended() || cache.info_number("cached-bytes") >= enough
        });
        child.kill();
        cache.assert_valid();
    }
    let last = lab.serve(&cache);
    last.assert_serves(&base.content);
    last.stop();
    cache.assert_sound();
}

/// Bytes of the base that are read before exact deaths: few enough to die at each write.
const LITTLE: usize = 1 << 20;
const CLUSTER: usize = 64 << 10;

/// `qemu-io` that reads one cluster of three, so that there are several runs of tables to write.
fn fill_with_gaps(cache: &Cache) -> Tool {
    let reads = (0..LITTLE).step_by(3 * CLUSTER).map(|at| format!("read -q {at} {CLUSTER}"));
    qemu_io(cache).args(reads.flat_map(|read| ["-c".into(), read]))
}

/// `qemu-io` that opens the image and has nothing to do but to close it.
fn qemu_io(cache: &Cache) -> Tool {
    Tool::driver("qemu-io").args(["-r", "--image-opts", &cache.options()])
}

/// Kills a process before each of its calls of a kind, each time on a new image, until it comes to
/// its end; returns how many deaths that were.
fn die_at_each(
    call: &str,
    prepare: fn(&Cache),
    work: fn(&Cache) -> Tool,
    after: fn(&Cache),
) -> u32 {
    let lab = Lab::new();
    let base = lab.base_of(noise(LITTLE), "raw", Over::File);
    let dies = |number: &u32| {
        let cache = lab.cache(&base, "cluster_size=64K");
        prepare(&cache);
        let ended = killed_at(&lab, work(&cache), call, *number).run();
        after(&cache);
        cache.assert_valid();
        assert_next_fetches_what_is_missing(&lab, &cache);
        cache.assert_sound();
        lab.discard(&cache);
        let killed = ended.status.signal() == Some(Signal::SIGKILL as i32);
        assert!(killed || ended.status.success(), "{ended:?}");
        killed
    };
    let deaths = (1..).take_while(dies).count() as u32;
    println!("{deaths} deaths at {call}");
    deaths
}

/// Leaves a cache as a process that was killed before any checkpoint leaves it.
fn leave_without_checkpoint(cache: &Cache) {
    let lab = Lab::new();
    let ended = killed_at(&lab, fill_with_gaps(cache), "fdatasync", 1).run();
    assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{ended:?}");
}

/// What a reboot leaves: the image alone.
fn lose_live_file(cache: &Cache) {
    // There is none where nobody came to make one.
    let _ = fs::remove_file(cache.live());
}

#[test]
fn a_death_at_any_sync_leaves_a_valid_image() {
    let deaths = die_at_each("fdatasync", |_| (), fill_with_gaps, |_| ());
    assert_eq!(deaths, 3);
}

#[test]
fn a_death_at_any_sync_and_the_loss_of_the_live_file_leave_a_valid_image() {
    let deaths = die_at_each("fdatasync", |_| (), fill_with_gaps, lose_live_file);
    assert_eq!(deaths, 3);
}

#[test]
fn a_death_at_any_write_of_a_process_that_fills_leaves_a_valid_image() {
    let deaths = die_at_each("pwrite64", |_| (), fill_with_gaps, |_| ());
    assert!(deaths >= 6, "{deaths}");
}

#[test]
fn a_death_at_any_allocation_leaves_a_valid_image() {
    let deaths = die_at_each("fallocate", |_| (), fill_with_gaps, |_| ());
    assert!(deaths >= 2, "{deaths}");
}

#[test]
fn a_death_at_any_write_of_the_checkpoint_that_a_dead_process_left_leaves_a_valid_image() {
    let deaths = die_at_each("pwrite64", leave_without_checkpoint, qemu_io, |_| ());
    assert!(deaths >= 8, "{deaths}");
}

#[test]
fn a_death_at_any_write_of_a_checkpoint_and_the_loss_of_the_live_file_leave_a_valid_image() {
    let deaths = die_at_each("pwrite64", leave_without_checkpoint, qemu_io, lose_live_file);
    assert!(deaths >= 8, "{deaths}");
}
