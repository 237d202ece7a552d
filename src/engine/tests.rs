//! What cannot be seen from outside: checkpoints that are cut off or fail, the account of the
//! quota, the pool's threads. The rest is in `tests/engine`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use tempfile::TempDir;

use super::buffer::Room;
use super::core::Core;
use super::plan::{Fetch, Part, Step};
use super::pool::Pool;
use super::{COUNTERS, Engine, Options, Reader, Status, Surroundings, checkpoint, join, populate};
use crate::format::{BaseIdentity, ByteRange, Geometry, HostOffset, L2Entry, SubclusterBits};
use crate::image::{Access, CreateOptions, Image, Scan, create};
use crate::live::{LiveFile, LiveIdentity, SlotGuard};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const HANG: Duration = Duration::from_secs(30);

fn new_image(quota: Option<u64>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let options = CreateOptions {
        backing_file: "base.raw".into(),
        backing_format: "raw".into(),
        geometry: Geometry::with_cluster_size(64 * KIB, 64 * MIB).unwrap(),
        quota,
        base: BaseIdentity::default(),
        mode: 0o600,
        force: false,
    };
    create(&path, &options).unwrap();
    (dir, path)
}

/// An engine that has stored the first `bytes` of a base that is all ones.
fn filled(path: &Path, bytes: u64) -> Arc<Engine> {
    let engine = Arc::new(Engine::open(path, &Options::default()).unwrap());
    let ones = |buf: &mut [u8], _: u64| {
        buf.fill(1);
        Ok(())
    };
    let reader = Reader::new(Arc::clone(&engine), ones);
    reader.read(&mut vec![0; bytes as usize], 0).unwrap();
    let started = Instant::now();
    while engine.counters().populated_bytes.get() < bytes {
        assert!(started.elapsed() < HANG, "the fills are not stored");
        std::thread::yield_now();
    }
    engine
}

fn scan(path: &Path) -> Scan {
    Scan::read(&Image::open(path, Access::ReadOnly).unwrap(), |_, _| {}).unwrap()
}

/// What a process leaves that is killed in a checkpoint after it has taken the marks.
fn cut_off_in_checkpoint(path: &Path, bytes: u64) {
    let engine = filled(path, bytes);
    let live = engine.core.live().unwrap();
    live.enter_checkpoint();
    let groups: Vec<u64> = live.dirty_groups().collect();
    assert!(groups.into_iter().all(|group| live.take_dirty(group).is_some()));
    // No last checkpoint.
    engine.core.retire();
}

#[test]
fn fills_whose_marks_a_dead_process_took_reach_the_disk_with_the_next_user() {
    let (_dir, path) = new_image(None);
    cut_off_in_checkpoint(&path, MIB);
    drop(Engine::open(&path, &Options::default()).unwrap());
    assert_eq!(scan(&path).entries.len(), 16);
}

#[test]
fn fills_whose_marks_a_dead_process_took_reach_the_disk_with_a_user_who_was_there_before() {
    let (_dir, path) = new_image(None);
    let other = Engine::open(&path, &Options::default()).unwrap();
    cut_off_in_checkpoint(&path, MIB);
    drop(other);
    assert_eq!(scan(&path).entries.len(), 16);
}

#[test]
fn fills_that_were_never_marked_reach_the_disk_with_the_next_lone_user() {
    let (_dir, path) = new_image(None);
    cut_off_in_checkpoint(&path, MIB);
    let engine = Engine::open(&path, &Options { populate: false, ..Options::default() }).unwrap();
    engine.core.live().unwrap().leave_checkpoint();
    drop(engine);
    drop(Engine::open(&path, &Options::default()).unwrap());
    assert_eq!(scan(&path).entries.len(), 16);
}

fn leaks_are_given_back_by_an_open_that_populates_or_not(populate: bool) {
    let (_dir, path) = new_image(None);
    cut_off_in_checkpoint(&path, MIB);
    let image = Image::open(&path, Access::ReadWrite).unwrap();
    image.write_refcounts(image.layout().data, 16, 1).unwrap();
    let leaked = scan(&path).leaked_clusters();
    drop(image);
    drop(Engine::open(&path, &Options { populate, ..Options::default() }).unwrap());
    assert_eq!((leaked, scan(&path).leaked_clusters()), (16, 0));
}

#[test]
fn refcounts_of_a_checkpoint_that_was_cut_off_do_not_stay_leaks() {
    leaks_are_given_back_by_an_open_that_populates_or_not(true);
}

#[test]
fn leaks_do_not_outlive_an_open_that_stores_nothing() {
    leaks_are_given_back_by_an_open_that_populates_or_not(false);
}

#[test]
fn leaks_are_given_back_where_the_live_state_is_lost_too() {
    let (dir, path) = new_image(None);
    cut_off_in_checkpoint(&path, MIB);
    let image = Image::open(&path, Access::ReadWrite).unwrap();
    image.write_refcounts(image.layout().data, 16, 1).unwrap();
    drop(image);
    std::fs::remove_file(dir.path().join("cache.live")).unwrap();
    drop(Engine::open(&path, &Options::default()).unwrap());
    let scan = scan(&path);
    assert_eq!((scan.leaked_clusters(), scan.entries.len()), (0, 0));
}

#[test]
fn entries_of_a_checkpoint_that_was_cut_off_are_joined_by_the_rest() {
    let (_dir, path) = new_image(None);
    cut_off_in_checkpoint(&path, MIB);
    let image = Image::open(&path, Access::ReadWrite).unwrap();
    let host = image.layout().offset(image.layout().data);
    image.write_refcounts(image.layout().data, 1, 1).unwrap();
    let half = L2Entry { host: Some(host), bits: SubclusterBits::new(u32::MAX >> 16, 0) };
    image.write_l2_entries(0, &[half]).unwrap();
    drop(image);
    drop(Engine::open(&path, &Options::default()).unwrap());
    assert_eq!(scan(&path).entries[&0].bits.data(), u32::MAX);
}

/// A core on a live state of its own whose image cannot be written to.
fn core_that_cannot_write(path: &Path, live_path: &Path) -> Core {
    let image = Image::open(path, Access::ReadOnly).unwrap();
    let identity =
        LiveIdentity::of(image.file(), image.header().cache.uuid, *image.geometry()).unwrap();
    let live = LiveFile::make(live_path, image.file(), &identity, 0).unwrap();
    let slot = SlotGuard::acquire(&live).unwrap();
    live.space().restore(image.layout().data, image.layout().end, 0, 0);
    live.ensure(0).unwrap();
    let core = Core::new(image, &Options::default());
    core.use_live(live, Some(slot));
    core
}

fn publish_something(live: &LiveFile) {
    live.entry(0).unwrap().publish(SubclusterBits::new(0, 1));
    live.mark_dirty(0);
}

#[test]
fn checkpoint_that_fails_leaves_its_marks_to_the_next() {
    let (dir, path) = new_image(None);
    let core = core_that_cannot_write(&path, &dir.path().join("live"));
    let live = core.live().unwrap();
    publish_something(live);
    checkpoint::write(&core, Duration::ZERO);
    assert!(live.is_dirty());
    assert!(!live.is_checkpointing());
    assert_eq!(core.counters().populate_errors.get(), 1);
}

#[test]
fn checkpoint_that_fails_gives_its_bytes_back() {
    let (dir, path) = new_image(None);
    let core = core_that_cannot_write(&path, &dir.path().join("live"));
    publish_something(core.live().unwrap());
    checkpoint::write(&core, Duration::ZERO);
    assert_eq!(core.slot().unwrap().in_flight(), 0);
}

#[test]
fn storing_that_fails_pauses_and_publishes_nothing() {
    let (dir, path) = new_image(None);
    let core = Arc::new(core_that_cannot_write(&path, &dir.path().join("live")));
    let populator = populate::Populator::new(Arc::clone(&core));
    let fetches = super::plan::plan(&core, ByteRange { start: 0, len: 4 * KIB });
    fetches.into_iter().for_each(|part| match part.step {
        Step::Fetch(fetch) => populator.push(fetch, Room::new(MIB).buffer(4096, 4096).unwrap()),
        other => panic!("{other:?}"),
    });
    populator.stop();
    let counters = core.counters();
    assert!(core.claimant().is_none());
    assert_eq!((counters.populate_errors.get(), counters.dropped_bytes.get()), (1, 4 * KIB));
    assert_eq!(core.live().unwrap().entry(0).unwrap().bits(), SubclusterBits::default());
}

#[test]
fn claims_are_free_after_storing_failed() {
    let (dir, path) = new_image(None);
    let core = Arc::new(core_that_cannot_write(&path, &dir.path().join("live")));
    let range = ByteRange { start: 0, len: 4 * KIB };
    let claimed: Vec<_> = super::plan::plan(&core, range).into_iter().collect();
    let held = core.live().unwrap().claims(0).unwrap().iter().flat_map(|claim| claim.holder());
    let before = held.count();
    drop(claimed);
    let held = core.live().unwrap().claims(0).unwrap().iter().flat_map(|claim| claim.holder());
    assert_eq!((before, held.count()), (2, 0));
}

/// What is left to be done for the first 4 KiB of a cluster.
fn first_step(engine: &Engine, cluster: u64) -> Step {
    engine.plan(ByteRange { start: cluster * 64 * KIB, len: 2 * KIB }).pop().unwrap().step
}

#[test]
fn dead_owner_is_noticed_before_the_wait_begins() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, 2 * KIB);
    let live = engine.core.live().unwrap();
    let dead = live.slot(9).take(9, 1);
    live.claims(1).unwrap()[0].try_claim(dead).unwrap();
    let Step::Wait(ticket) = first_step(&engine, 1) else { panic!("nobody to wait for") };
    assert!(!engine.wait(ticket, || {}));
    assert!(matches!(first_step(&engine, 1), Step::Fetch(_)));
}

#[test]
fn waits_that_follow_each_other_all_end_long_before_the_deadline() {
    let (_dir, path) = new_image(None);
    let owner = filled(&path, 2 * KIB);
    let waiter = Engine::open(&path, &Options::default()).unwrap();
    let (wake, woken) = mpsc::channel();
    let started = Instant::now();
    for _ in 0..100 {
        let Step::Fetch(fetch) = first_step(&owner, 1) else { panic!("not to be fetched") };
        let Step::Wait(ticket) = first_step(&waiter, 1) else { panic!("nobody to wait for") };
        let wake = wake.clone();
        assert!(waiter.wait(ticket, move || wake.send(()).unwrap()));
        drop(fetch);
        woken.recv_timeout(HANG).unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn quota_is_settled_to_what_the_file_occupies() {
    let (_dir, path) = new_image(Some(32 * MIB));
    let engine = filled(&path, 4 * MIB);
    checkpoint::write(&engine.core, HANG);
    let used = engine.core.live().unwrap().space().used();
    let occupied = engine.core.image.occupied().unwrap();
    assert_eq!(used, occupied);
    assert_eq!(engine.core.slot().unwrap().in_flight(), 0);
}

#[test]
fn quota_does_not_count_the_bytes_on_their_way_twice() {
    let (_dir, path) = new_image(Some(8 * MIB));
    let engine = Arc::new(Engine::open(&path, &Options::default()).unwrap());
    let ones = |buf: &mut [u8], _: u64| {
        buf.fill(1);
        Ok(())
    };
    let reader = Reader::new(Arc::clone(&engine), ones);
    (0..16).for_each(|index| reader.read(&mut vec![0; MIB as usize], index * MIB).unwrap());
    engine.close();
    let stored = engine.counters().populated_bytes.get();
    assert!(stored > 7 * MIB + 512 * KIB, "only {stored} bytes");
}

#[test]
fn second_checkpoint_without_news_writes_nothing() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, MIB);
    checkpoint::write(&engine.core, HANG);
    let first = engine.core.image.read_checkpoints().unwrap();
    checkpoint::write(&engine.core, HANG);
    assert_eq!(engine.counters().checkpoints.get(), 1);
    assert_eq!(engine.core.image.read_checkpoints().unwrap(), first);
}

#[test]
fn checkpoint_that_another_process_is_writing_is_left_to_it() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, MIB);
    let other = Image::open(&path, Access::ReadWrite).unwrap();
    let _lock = other.lock_checkpoint(HANG).unwrap().unwrap();
    checkpoint::write(&engine.core, Duration::ZERO);
    assert_eq!(engine.counters().checkpoints.get(), 0);
    assert!(engine.core.live().unwrap().is_dirty());
}

#[test]
fn joining_during_a_checkpoint_finds_the_live_state_valid() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, MIB);
    let live = engine.core.live().unwrap();
    let number = live.begin_checkpoint();
    let before = join::join(&path, &Options::default()).unwrap();
    engine.core.image.write_checkpoints(number).unwrap();
    let between = join::join(&path, &Options::default()).unwrap();
    live.end_checkpoint(number);
    let after = join::join(&path, &Options::default()).unwrap();
    assert!([before, between, after].iter().all(|core| core.active().is_some()));
}

#[test]
fn state_that_one_process_gave_up_is_not_used_by_the_next() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, MIB);
    engine.core.fail("could not sync");
    let newcomer = Engine::open(&path, &Options::default()).unwrap();
    assert!(!engine.is_active());
    assert!(!newcomer.is_active());
}

#[test]
fn state_that_was_given_up_is_made_anew_by_a_lone_user() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, MIB);
    engine.hit_failed(&std::io::Error::from_raw_os_error(libc::EIO));
    drop(engine);
    assert!(Engine::open(&path, &Options::default()).unwrap().is_active());
}

#[test]
fn status_of_an_image_counts_whole_subclusters() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, MIB);
    let status = Status::read(&path).unwrap();
    assert_eq!((status.cached_bytes, status.zero_bytes), (MIB, 0));
    assert_eq!(status.processes.len(), 1);
    drop(engine);
}

#[test]
fn what_an_open_did_is_not_what_its_slots_former_holder_did() {
    let (_dir, path) = new_image(None);
    let first = filled(&path, MIB);
    let did = first.counts();
    drop(first);
    let second = Engine::open(&path, &Options::default()).unwrap();

    assert_eq!(COUNTERS[7], "populated-bytes");
    assert_eq!(did[7], MIB);
    assert_eq!(second.counters().populated_bytes.get(), MIB);
    assert_eq!(second.counts(), [0; COUNTERS.len()]);
}

#[test]
fn place_out_of_range_in_the_map_is_read_from_the_base() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, 64 * KIB);
    let live = engine.core.live().unwrap();
    let bits = SubclusterBits::new(1, 0);
    live.entry(1).unwrap().restore(L2Entry { host: Some(HostOffset(u64::MAX)), bits }, bits);
    engine.core.seen.add(1, 1);
    let plan = engine.plan(ByteRange { start: 64 * KIB, len: 512 });
    let hit = engine.begin(ByteRange { start: 64 * KIB, len: 512 });
    let shown = engine.status_of(ByteRange { start: 64 * KIB, len: 512 });
    assert!(matches!(plan[0].step, Step::Base));
    assert_eq!(hit, None);
    assert_eq!(shown.0, super::Presence::Absent);
}

/// Where a plan finds a read in one piece.
fn planned_hit(engine: &Engine, range: ByteRange) -> Option<HostOffset> {
    match engine.plan(range).as_slice() {
        [Part { step: Step::Hit(host), .. }] => Some(*host),
        _ => None,
    }
}

#[test]
fn hits_are_where_the_plan_finds_them_within_a_cluster() {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, 130 * KIB);
    // Clusters of 64 KiB and subclusters of 2 KiB, of which 65 are stored.
    let ranges = (0..140 * 2).flat_map(|start| [1, 4, 9, 128].map(|len| (start * 512, len * 512)));
    for (start, len) in ranges {
        let range = ByteRange { start, len };
        let in_one_cluster = start / (64 * KIB) == (start + len - 1) / (64 * KIB);
        let planned = planned_hit(&engine, range).filter(|_| in_one_cluster);
        assert_eq!(engine.begin(range), planned, "{range:?}");
    }
}

#[test]
fn what_was_not_looked_at_since_the_open_is_no_hit() {
    let (_dir, path) = new_image(None);
    drop(filled(&path, 64 * KIB));
    let engine = Engine::open(&path, &Options::default()).unwrap();
    assert_eq!(engine.begin(ByteRange { start: 0, len: 512 }), None);
}

/// Opens an image again that holds clusters of ones, with one byte of its sixth subcluster flipped, and
/// reads four of each cluster one by one; waits until the rest of the first was looked at.
fn looked_ahead(path: &Path) -> (Arc<Engine>, u32) {
    drop(filled(path, 8 * 64 * KIB));
    let engine = Arc::new(Engine::open(path, &Options::default()).unwrap());
    let host = engine.core.live().unwrap().entry(0).unwrap().host().unwrap();
    std::os::unix::fs::FileExt::write_at(
        &fs::OpenOptions::new().write(true).open(path).unwrap(),
        &[0],
        host.0 + 5 * 2 * KIB,
    )
    .unwrap();
    let reader = Reader::new(Arc::clone(&engine), |_: &mut [u8], _: u64| panic!("a base read"));
    for piece in 0..8 * 4 {
        let (cluster, subcluster) = (piece / 4, 6 + 3 * (piece % 4));
        reader.read(&mut [0; 512], cluster * 64 * KIB + subcluster * 2 * KIB).unwrap();
    }
    let started = Instant::now();
    while engine.core.seen.mask(0).count_ones() < 31 && started.elapsed() < HANG {
        std::thread::yield_now();
    }
    let seen = engine.core.seen.mask(0);
    (engine, seen)
}

#[test]
fn what_is_sound_in_a_cluster_read_piece_by_piece_is_seen_before_it_is_read() {
    let (_dir, path) = new_image(None);
    let (_engine, seen) = looked_ahead(&path);
    assert_eq!(seen, !(1 << 5));
}

#[test]
fn a_few_reads_of_a_cluster_do_not_pay_for_the_rest_of_it() {
    let (_dir, path) = new_image(None);
    drop(filled(&path, 16 * 64 * KIB));
    let engine = Arc::new(Engine::open(&path, &Options::default()).unwrap());
    let reader = Reader::new(Arc::clone(&engine), |_: &mut [u8], _: u64| panic!("a base read"));
    // As a boot does, and in order.
    let boot = [(0, 2), (2, 2), (8, 2), (16, 8), (40, 16)].as_slice();
    let in_order: Vec<_> = (0..32).map(|piece| (2 * piece, 2)).collect();
    for cluster in 0..16 {
        for (start, len) in if cluster % 2 == 0 { boot } else { &in_order } {
            let start = cluster * 64 + start;
            reader.read(&mut vec![0; len * KIB as usize], start * KIB).unwrap();
            assert_eq!(engine.pool.threads(), 0, "after {len} KiB at {start} KiB");
        }
    }
}

#[test]
fn what_is_bad_is_left_to_the_read_that_comes_to_it() {
    let (_dir, path) = new_image(None);
    let (engine, _) = looked_ahead(&path);
    let before = engine.counters().bad_bytes.get();
    let mut read = [0; 512];
    let ones = |buf: &mut [u8], _: u64| {
        buf.fill(1);
        Ok(())
    };
    Reader::new(Arc::clone(&engine), ones).read(&mut read, 5 * 2 * KIB).unwrap();
    assert_eq!((before, engine.counters().bad_bytes.get()), (0, 2 * KIB));
    assert_eq!(read, [1; 512]);
}

/// What a checkpoint leaves of an image whose live file shows an entry that cannot be.
fn is_refused_by_the_checkpoint(entry: L2Entry) {
    let (_dir, path) = new_image(None);
    let engine = filled(&path, 64 * KIB);
    let live = engine.core.live().unwrap();
    live.entry(1).unwrap().restore(entry, entry.bits);
    live.entry(1).unwrap().set_on_disk(SubclusterBits::default());
    live.mark_dirty(1);
    let before = fs::read(&path).unwrap();
    engine.close();
    assert!(fs::read(&path).unwrap() == before, "the checkpoint wrote to the image");
    assert!(live.has_failed());
}

#[test]
fn place_beyond_the_file_in_the_map_does_not_reach_the_disk() {
    let bits = SubclusterBits::new(1, 0);
    is_refused_by_the_checkpoint(L2Entry { host: Some(HostOffset(1 << 40)), bits });
}

#[test]
fn place_among_the_tables_in_the_map_does_not_reach_the_disk() {
    let bits = SubclusterBits::new(1, 0);
    is_refused_by_the_checkpoint(L2Entry { host: Some(HostOffset(64 * KIB)), bits });
}

#[test]
fn subcluster_that_is_two_things_in_the_map_does_not_reach_the_disk() {
    is_refused_by_the_checkpoint(L2Entry { host: None, bits: SubclusterBits::new(1, 1) });
}

#[test]
fn live_file_without_the_blocks_it_speaks_of_is_not_joined() {
    let (_dir, path) = new_image(None);
    drop(filled(&path, 64 * KIB));
    let image = Image::open(&path, Access::ReadWrite).unwrap();
    let identity = join::identity(&image, &Surroundings::default()).unwrap();
    let live = fs::OpenOptions::new().write(true).open(image.live_path()).unwrap();
    let (groups, end) = (8 * 20 * KIB as i64, live.metadata().unwrap().len() as i64);
    let sound = join::find_live(&image, &identity, true).unwrap();
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&live, how, end - groups, groups).unwrap();
    let hollow = join::find_live(&image, &identity, true).unwrap();
    assert!(sound.is_some() && hollow.is_none());
}

#[test]
fn fetches_of_a_long_read_are_bounded() {
    let (_dir, path) = new_image(None);
    let engine = Engine::open(&path, &Options::default()).unwrap();
    (0..3).for_each(|group| engine.core.ensure(group * 128));
    let plan = engine.plan(ByteRange { start: 1, len: 9 * MIB });
    let fetches: Vec<Fetch> = plan
        .into_iter()
        .map(|part| match part.step {
            Step::Fetch(fetch) => fetch,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(fetches.iter().all(|fetch| fetch.range().len <= 2 * MIB));
    assert_eq!(fetches.iter().map(|fetch| fetch.range().len).sum::<u64>(), 9 * MIB + 2 * KIB);
}

#[test]
fn pool_does_every_job() {
    let pool = Pool::default();
    let (done, count) = mpsc::channel();
    for _ in 0..1000 {
        let done = done.clone();
        assert!(pool.run(Box::new(move || done.send(()).unwrap())));
    }
    drop(done);
    assert_eq!(count.iter().count(), 1000);
}

#[test]
fn pool_runs_jobs_that_wait_for_each_other_side_by_side() {
    let pool = Pool::default();
    let barrier = Arc::new(std::sync::Barrier::new(21));
    for _ in 0..20 {
        let barrier = Arc::clone(&barrier);
        pool.run(Box::new(move || {
            barrier.wait();
        }));
    }
    barrier.wait();
}

#[test]
fn pool_survives_jobs_that_panic() {
    let pool = Pool::default();
    (0..100).for_each(|_| assert!(pool.run(Box::new(|| panic!("a job that panics")))));
    let (done, finished) = mpsc::channel();
    pool.run(Box::new(move || done.send(()).unwrap()));
    assert!(finished.recv_timeout(HANG).is_ok());
}

#[test]
fn pool_that_is_dropped_does_what_was_queued() {
    let pool = Pool::default();
    let (done, count) = (Arc::new(AtomicU32::new(0)), 200);
    let (last, finished) = mpsc::channel::<()>();
    for _ in 0..count {
        let (done, last) = (Arc::clone(&done), last.clone());
        pool.run(Box::new(move || {
            done.fetch_add(1, Ordering::Relaxed);
            drop(last);
        }));
    }
    drop((pool, last));
    assert_eq!(finished.recv_timeout(HANG), Err(mpsc::RecvTimeoutError::Disconnected));
    assert_eq!(done.load(Ordering::Relaxed), count);
}
