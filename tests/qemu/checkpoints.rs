//! A process that dies in the middle of a checkpoint: another one, which goes on running, writes
//! it.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::lab::{Lab, sequential};
use crate::process::eventually;
use crate::trace::Delay;

/// Two looks of the survivor for something to write (`INTERVAL` in `src/engine/keeper.rs`).
const SOON: Duration = Duration::from_secs(10);
/// Bytes in the checkpoint.
const READ: usize = 12 << 20;

/// Kills a process in this sync of its checkpoint: 1 is after the data, 2 after the refcounts, 3
/// after the L2 entries.
fn assert_survivor_writes_the_checkpoint(sync: u32) {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "cluster_size=64K");
    let content = &cache.base.content;
    let mut holder = lab.serve(&cache);
    let delay = Delay::attach(&lab, holder.process().id(), "fdatasync", sync, 100);
    let read = || sequential(READ, 1 << 20);
    holder.connect().read_and_compare(content, read()).expect("reads");
    eventually("a checkpoint begins", || cache.is_in_checkpoint());
    let survivor = lab.serve(&cache);
    // Nothing new: what there is to write is the other one's.
    survivor.connect().read_and_compare(content, read()).expect("reads");
    thread::sleep(Duration::from_secs(1));
    assert!(cache.is_in_checkpoint());

    holder.signal(Signal::SIGKILL);
    let killed = Instant::now();
    // It is not gone before its tracer knows.
    drop(delay);
    holder.process().kill();
    cache.assert_valid();
    // Only one that came to its end counts.
    eventually("the other one writes it", || cache.stats().get("checkpoints") == 1);
    let took = killed.elapsed();
    println!("killed in sync {sync}: written by the other one after {took:.1?}");
    assert!(took < SOON, "{took:?}");

    assert_eq!(cache.stock_mapped(), READ as u64);
    cache.assert_sound();
    survivor.assert_serves(content);
    survivor.stop();
    cache.assert_sound();
    assert_eq!(cache.stats().get("base-bytes"), content.len() as u64);
}

#[test]
fn a_checkpoint_cut_before_the_data_was_synced_is_written_by_another_process() {
    assert_survivor_writes_the_checkpoint(1);
}

#[test]
fn a_checkpoint_cut_between_refcounts_and_l2_entries_is_written_by_another_process() {
    assert_survivor_writes_the_checkpoint(2);
}

#[test]
fn a_checkpoint_cut_after_the_l2_entries_is_written_by_another_process() {
    assert_survivor_writes_the_checkpoint(3);
}
