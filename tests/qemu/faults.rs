//! What the image, the live file and their filesystem can do to a process that uses them: be cut
//! off, fail at any system call, be full or read-only. A guest's read never notices, one line says
//! why the cache is of no use, the image stays valid, and the next open finds it in order.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use rand::Rng;

use crate::lab::{Cache, Lab, Over, anywhere, noise, sequential};
use crate::nbd::DEPTH;
use crate::settings::random;
use crate::system::{Machine, drive};

const CUT_OFF: &str = "its live file was cut off or can no longer be read; reading from the base";

fn cut_off(path: &Path, len: u64) {
    File::options().write(true).open(path).and_then(|file| file.set_len(len)).expect("a live file");
}

/// Fills a cache.
fn warm(lab: &Lab, cache: &Cache) {
    let server = lab.serve(cache);
    server.assert_serves(&cache.base.content);
    server.stop();
}

/// What has to hold after a fault is over: the image is in order, the next process serves the base
/// without a complaint and fills what is missing, and the one after that needs no base.
#[track_caller]
fn assert_recovered(lab: &Lab, cache: &Cache) {
    cache.assert_sound();
    let next = lab.serve(cache);
    next.assert_serves(&cache.base.content);
    assert_eq!(next.stop().stderr, "");
    let before = cache.stats();
    let last = lab.serve(cache);
    last.assert_serves(&cache.base.content);
    last.stop();
    let fetched = cache.stats().since(&before, "base-bytes");
    assert!(fetched <= 64 << 10, "{fetched} bytes from the base of a warm cache");
    cache.assert_sound();
}

fn a_warm_live_file_is_cut_to(len: u64) {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    warm(&lab, &cache);
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    cut_off(&cache.live(), len);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains(CUT_OFF), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_warm_cache_whose_live_file_is_cut_to_nothing_reads_from_the_base() {
    a_warm_live_file_is_cut_to(0);
}

#[test]
fn a_warm_cache_whose_live_file_is_cut_to_8_kib_reads_from_the_base() {
    a_warm_live_file_is_cut_to(8 << 10);
}

#[test]
fn a_warm_cache_whose_live_file_loses_its_map_reads_from_the_base() {
    // After the fixed parts: free list and slots stay, some groups of clusters go.
    a_warm_live_file_is_cut_to(312 << 10);
}

#[test]
fn a_live_file_cut_off_at_any_moment_of_filling_costs_one_line() {
    let lab = Lab::new();
    let base = lab.base();
    let mut random = random("cuts");
    for round in 0..12 {
        let cache = lab.cache(&base, ["", "quota=14M"][round % 2]);
        let server = lab.serve(&cache);
        let mut client = server.connect();
        let mut plan =
            anywhere(crate::settings::random(&format!("cut {round}")), base.content.len());
        for (offset, len) in plan.by_ref().take(DEPTH) {
            client.send(offset, len).expect("a request");
        }
        let reads = random.random_range(0..80);
        client.read_and_compare(&base.content, plan.by_ref().take(reads)).expect("reads");
        for (offset, len) in plan.by_ref().take(DEPTH) {
            client.send(offset, len).expect("a request");
        }
        thread::sleep(Duration::from_micros(random.random_range(0..4000)));
        cut_off(&cache.live(), [0, 8 << 10, 312 << 10][round % 3]);
        client.read_and_compare(&base.content, plan.take(40)).expect("reads");
        server.assert_serves(&base.content);
        let said = server.stop();
        // A quota that was reached before had its own line.
        let mut lines = said.warnings();
        lines.retain(|line| !line.contains("quota"));
        assert_eq!(lines.len(), 1, "round {round}: {said:?}");
        assert!(lines[0].ends_with(CUT_OFF), "{said:?}");
        cache.assert_sound();
        let next = lab.serve(&cache);
        next.assert_serves(&base.content);
        next.stop();
        cache.assert_sound();
    }
}

#[test]
fn everybody_on_a_live_file_that_is_cut_off_goes_on_and_newcomers_pass_through() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let servers = [(); 3].map(|()| lab.serve(&cache));
    let half = sequential(cache.base.content.len() / 2, 1 << 20);
    servers[0].connect().read_and_compare(&cache.base.content, half).expect("reads");
    cut_off(&cache.live(), 0);
    let newcomer = lab.serve(&cache);
    newcomer.assert_serves(&cache.base.content);
    for server in servers {
        server.assert_serves(&cache.base.content);
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains(CUT_OFF), "{said:?}");
    }
    let said = newcomer.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("deleted or replaced"), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_live_file_cut_off_while_nobody_reads_is_noticed_by_the_end_at_the_latest() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    cut_off(&cache.live(), 0);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_hole_in_a_live_file_costs_no_read_and_no_damage() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    let half = sequential(cache.base.content.len() / 2, 1 << 20);
    server.connect().read_and_compare(&cache.base.content, half).expect("reads");
    let live = File::options().write(true).open(cache.live()).expect("a live file");
    let len = live.metadata().expect("its length").len();
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&live, how, 0, len as i64).expect("a hole");
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert!(said.warnings().len() <= 1, "{said:?}");
    assert_recovered(&lab, &cache);
}

fn a_machine_survives_the_loss_of_its_live_file(iothread: Option<&str>) {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let content = &cache.base.content;
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    let mut client = machine.serve(&lab.fresh("nbd"), iothread);
    client.read_and_compare(content, sequential(content.len() / 2, 1 << 20)).expect("reads");
    cut_off(&cache.live(), 0);
    client.read_and_compare(content, sequential(content.len(), 1 << 20)).expect("reads");
    drop(client);
    let said = machine.quit();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains(CUT_OFF), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_machine_survives_the_loss_of_its_live_file_in_its_main_thread() {
    a_machine_survives_the_loss_of_its_live_file(None);
}

#[test]
fn a_machine_survives_the_loss_of_its_live_file_in_an_iothread() {
    a_machine_survives_the_loss_of_its_live_file(Some("t0"));
}

#[test]
fn one_lost_live_file_leaves_the_other_drives_of_a_machine_alone() {
    let lab = Lab::new();
    let base = lab.base_of(noise(8 << 20), "raw", Over::File);
    let caches = [lab.cache(&base, ""), lab.cache(&base, "")];
    let mut machine = Machine::start(&[drive("d0", &caches[0]), drive("d1", &caches[1])]);
    cut_off(&caches[0].live(), 0);
    for id in ["d0", "d1", "d0", "d1"] {
        machine.monitor(&format!("qemu-io {id} \"read -q 0 8M\""));
    }
    let said = machine.quit();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains(&caches[0].path.display().to_string()), "{said:?}");
    assert_eq!(caches[1].info_number("cached-bytes"), 8 << 20);
    assert_recovered(&lab, &caches[0]);
}

#[test]
fn a_signal_that_somebody_sends_ends_a_machine_as_without_the_library() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    machine.monitor("qemu-io d0 \"read -q 0 8M\"");
    let child = machine.process();
    child.signal(Signal::SIGBUS);
    assert_eq!(child.wait().status.signal(), Some(Signal::SIGBUS as i32));
    cache.assert_valid();
    assert_recovered(&lab, &cache);
}

#[test]
fn a_signal_that_somebody_sends_to_a_tool_is_ignored_as_without_the_library() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    for _ in 0..3 {
        server.assert_serves(&cache.base.content);
        server.signal(Signal::SIGBUS);
    }
    server.assert_serves(&cache.base.content);
    cut_off(&cache.live(), 0);
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().warnings().len(), 1);
    assert_recovered(&lab, &cache);
}
