//! Power cuts: every state that a disk may hold after one is a sound image, shows no wrong byte and
//! has all that the last checkpoint promised.
//!
//! Real engines do their work on a real file while a recorder hears of each change they make
//! (`recorder`). From the record all states of the disk at all instants are made (`medium`), or a
//! sample where there are too many, and each is held against what an image promises (`checker`):
//!
//! 1. `qemu-img check` finds no error, and leaks only from a cut inside a checkpoint;
//! 2. `qemu-img compare` finds no difference from the base;
//! 3. an engine in another boot reads what the base holds, and what the last completed checkpoint
//!    had is not fetched again;
//! 4. when it is closed the image has no leaks either.
//!
//! For 1, 2 and 4 a qcow2 reader of the tests' own (`qcow2`) judges every state; the real `qemu-img`
//! judges a part of them and has to agree.
//!
//! # What a disk may do
//!
//! - When a sync returns, everything is on the disk that was done before it was called.
//! - Of what was done since then, or is under way, any subset may be there, whatever the order.
//! - A write is torn at will into sectors of 512 bytes, each of which is there whole or not at all.
//! - Of a discarded range any blocks of 4 KiB may be gone, the others still hold what they held.
//! - Of two changes that overlap either may be the one that stays.
//! - Allocations change no byte. The file has its final length from creation, and the name it has
//!   was synced with it.
//! - Nothing that lies beside the image (the live file) counts for anything after a reboot.
//!
//! The seed of each run is printed. `VMCACHE_TEST_SEED` repeats one, `VMCACHE_CRASH_STATES` sets how
//! many states are tried for each record.

mod checker;
mod medium;
mod qcow2;
mod recorder;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vmcache::engine::{Engine, OpenBase, Options, Presence, Reader, Surroundings, check_observed};
use vmcache::format::{ByteRange, Geometry, Layout};
use vmcache::image::{Access, Image};

use crate::fixture::{CountedBase, Fixture, KIB, MIB, create_image, full_content, mixed_content};
use checker::{Checker, Outcome, install};
use medium::{State, for_each_cut};
use recorder::{Change, Log, Process, Recorder, Stage};

/// States tried for each record.
const STATES: u64 = 500;
/// One of so many goes through `qemu-img` as well.
const BY_QEMU_IMG: u64 = 16;

/// An image whose users are recorded.
struct Scene {
    fixture: Fixture,
    recorder: Recorder,
    start: State,
    /// What the image has to hold from the start.
    keeps: Arc<Vec<ByteRange>>,
    seed: u64,
}

/// One process that uses it.
struct Node {
    reader: Reader<CountedBase>,
    process: Arc<Process>,
}

impl Scene {
    fn new(cluster_size: u64, content: Vec<u8>, quota: Option<u64>) -> Self {
        // In memory where that can be: what counts is recorded, not what some disk does.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let fixture = Fixture {
            dir: tempfile::tempdir_in(dir).unwrap(),
            geometry: Geometry::with_cluster_size(cluster_size, content.len() as u64).unwrap(),
            content: Arc::new(content),
        };
        fs::write(fixture.base(), fixture.content.as_slice()).unwrap();
        create_image(&fixture.image(), &fixture.base(), fixture.geometry, quota);
        let seed = std::env::var("VMCACHE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        Scene::starting(fixture, seed.unwrap_or_else(rand::random), Arc::default())
    }

    /// A new record that starts with the image as it is.
    fn starting(fixture: Fixture, seed: u64, keeps: Arc<Vec<ByteRange>>) -> Self {
        let start = State::new(fs::read(fixture.image()).unwrap());
        Scene { fixture, recorder: Recorder::default(), start, keeps, seed }
    }

    /// The same image, recorded anew from here on.
    fn restarted(self) -> Self {
        Scene::starting(self.fixture, self.seed, self.keeps)
    }

    fn open(&self) -> Node {
        self.open_in_boot(None)
    }

    fn open_in_boot(&self, boot_id: Option<[u8; 16]>) -> Node {
        let process = self.recorder.process();
        let surroundings = Surroundings {
            observer: Some(process.clone()),
            boot_id,
            // Only when the test says so.
            checkpoint_interval: Some(Duration::from_secs(3600)),
        };
        let options = Options { surroundings, ..Options::default() };
        let engine = Engine::open(&self.fixture.image(), &options).unwrap();
        assert!(engine.is_active());
        let reader = Reader::new(Arc::new(engine), self.fixture.counted_base());
        Node { reader, process }
    }

    /// Reads some bytes and waits until they are stored.
    fn fill(&self, node: &Node, at: u64, len: u64) {
        self.fixture.read(&node.reader, at, len);
        let started = Instant::now();
        let engine = node.reader.engine();
        let (mut from, end) = (at, at + len);
        while from < end {
            assert!(started.elapsed() < Duration::from_secs(60), "{from:#x} is never stored");
            match engine.status_of(ByteRange { start: from, len: end - from }) {
                (Presence::Absent, _) => thread::yield_now(),
                (_, stored) => from += stored,
            }
        }
    }

    fn fill_at_random(&self, node: &Node, rng: &mut StdRng, times: u32) {
        for _ in 0..times {
            let at = rng.random_range(0..self.fixture.size());
            let longest = rng.random_range(9..=17);
            let len = rng.random_range(1..=1u64 << longest).min(self.fixture.size() - at);
            self.fill(node, at, len);
        }
    }

    fn note_sample(&self, node: &Node) {
        let content = &self.fixture.content;
        let base = OpenBase { size: content.len() as u64, file: None, is_named: true };
        node.reader.engine().check_base(&base, |buf, offset| {
            buf.copy_from_slice(&content[offset as usize..][..buf.len()]);
            Ok(())
        });
    }

    /// Lets another process come and go, which writes a checkpoint of what `node` has stored.
    fn checkpoint(&self, node: &Node) {
        let held = self.fixture.present(node.reader.engine());
        self.close_with(self.open(), held);
    }

    fn close(&self, node: Node) {
        let held = self.fixture.present(node.reader.engine());
        self.close_with(node, held);
    }

    fn close_with(&self, node: Node, held: Vec<ByteRange>) {
        self.recorder.enter(Stage::Checkpoint);
        node.reader.engine().close();
        drop(node);
        self.recorder.keeps(held);
        self.recorder.enter(Stage::Filling);
    }

    fn repair(&self, process: Arc<Process>) {
        self.recorder.enter(Stage::Repair);
        check_observed(&self.fixture.image(), true, Some(process), |_, _| {}).unwrap();
        self.recorder.enter(Stage::Filling);
    }

    /// Tries all cuts of what was recorded.
    fn outcome(&self, name: &str) -> Outcome {
        self.outcome_of(name, &self.recorder.log())
    }

    fn outcome_of(&self, name: &str, log: &Log) -> Outcome {
        let wanted = std::env::var("VMCACHE_CRASH_STATES").ok().and_then(|most| most.parse().ok());
        let states = wanted.unwrap_or(STATES);
        let started = Instant::now();
        let mut checker = Checker::new(&self.fixture, self.seed, states, BY_QEMU_IMG);
        checker.run(&self.start, &self.keeps, log);
        let outcome = checker.outcome;
        println!(
            "crash: {name}, {} KiB clusters: {} cuts, {} states, {} different, {} of them through \
             qemu-img, {} failures, {:.1} s, VMCACHE_TEST_SEED={}",
            self.fixture.geometry.cluster_size() / KIB,
            outcome.cuts,
            outcome.states,
            outcome.different,
            outcome.by_qemu_img,
            outcome.failures.len(),
            started.elapsed().as_secs_f64(),
            self.seed,
        );
        outcome
    }

    fn assert_survives(&self, name: &str) {
        let outcome = self.outcome(name);
        assert!(outcome.failures.is_empty(), "{:#?}", outcome.failures);
        assert!(outcome.by_qemu_img != 0, "qemu-img saw none of the states");
    }
}

/// Several checkpoints, some of them of clusters that are on the disk already, and in between fills
/// that none of them has.
fn populated(cluster_size: u64, content: Vec<u8>) -> Scene {
    let scene = Scene::new(cluster_size, content, None);
    let mut rng = StdRng::seed_from_u64(scene.seed);
    let node = scene.open();
    scene.note_sample(&node);
    scene.fill(&node, 5 * KIB, 512);
    scene.fill(&node, 100 * KIB, 40 * KIB);
    scene.checkpoint(&node);
    scene.fill(&node, 8 * KIB, 2 * KIB);
    scene.fill(&node, 90 * KIB, 60 * KIB);
    scene.checkpoint(&node);
    scene.fill_at_random(&node, &mut rng, 6);
    scene.checkpoint(&node);
    scene.fill_at_random(&node, &mut rng, 6);
    scene.close(node);
    scene
}

#[test]
fn cut_while_populating_loses_nothing_with_clusters_of_16_kib() {
    populated(16 * KIB, mixed_content(MIB + 512, 5)).assert_survives("populate");
}

#[test]
fn cut_while_populating_loses_nothing_with_clusters_of_64_kib() {
    populated(64 * KIB, mixed_content(2 * MIB, 6)).assert_survives("populate");
}

#[test]
fn cut_while_populating_a_disk_of_many_sectors_of_tables_loses_nothing() {
    let scene = Scene::new(16 * KIB, mixed_content(5 * MIB, 7), None);
    let node = scene.open();
    let far_apart = || (0..5 * MIB - 50 * KIB).step_by(392 * KIB as usize);
    far_apart().for_each(|at| scene.fill(&node, at, 20 * KIB));
    scene.checkpoint(&node);
    far_apart().for_each(|at| scene.fill(&node, at + 30 * KIB, 20 * KIB));
    scene.close(node);
    scene.assert_survives("populate widely");
}

#[test]
fn cut_while_zeros_are_noted_loses_nothing() {
    populated(16 * KIB, vec![0; MIB as usize]).assert_survives("zeros");
}

#[test]
fn cut_between_checkpoints_of_one_cluster_loses_nothing() {
    let mut content = full_content(MIB);
    content[512..1024].fill(0);
    let scene = Scene::new(16 * KIB, content, None);
    let node = scene.open();
    scene.fill(&node, 512, 512);
    scene.checkpoint(&node);
    (2..10).for_each(|sector| {
        scene.fill(&node, sector * 512, 512);
        scene.checkpoint(&node);
    });
    scene.close(node);
    scene.assert_survives("one cluster");
}

#[test]
fn cut_while_one_process_populates_and_others_write_checkpoints_loses_nothing() {
    let scene = Scene::new(16 * KIB, mixed_content(MIB, 12), None);
    let node = scene.open();
    thread::scope(|scope| {
        let all = scope.spawn(|| {
            (0..MIB - 2 * KIB)
                .step_by(3 * KIB as usize)
                .for_each(|at| scene.fill(&node, at, 2 * KIB));
        });
        (0..20).for_each(|_| scene.checkpoint(&node));
        all.join().unwrap();
    });
    scene.close(node);
    scene.assert_survives("checkpoints while populating");
}

#[test]
fn cut_when_the_quota_is_reached_loses_nothing() {
    let quota = MIB + 512 * KIB;
    let scene = Scene::new(64 * KIB, full_content(2 * MIB), Some(quota));
    for _ in 0..2 {
        let node = scene.open();
        scene.fixture.read_everything(&node.reader);
        wait_until_full(&node);
        scene.close(node);
    }
    scene.assert_survives("quota reached");
}

/// Waits until the last fill is stored or dropped.
fn wait_until_full(node: &Node) {
    let counters = node.reader.engine().counters();
    let sums = || (counters.populated_bytes.get(), counters.dropped_bytes.get());
    let (started, mut before) = (Instant::now(), None);
    while before != Some(sums()) {
        assert!(started.elapsed() < Duration::from_secs(60), "fills go on for ever");
        before = Some(sums());
        thread::sleep(Duration::from_millis(200));
    }
}

/// The first process dies after so many operations of its checkpoint, the second one, which has the
/// image open as well, does it again.
fn handed_over(operations: u64) -> Scene {
    let scene = Scene::new(16 * KIB, mixed_content(MIB, 8), None);
    let (first, second) = (scene.open(), scene.open());
    scene.fill(&first, 0, 100 * KIB);
    scene.checkpoint(&first);
    scene.fill(&first, 90 * KIB, 50 * KIB);
    scene.fill(&first, 600 * KIB, 30 * KIB);
    scene.recorder.enter(Stage::Checkpoint);
    kill(first, operations);
    scene.fill(&second, 700 * KIB, 10 * KIB);
    scene.close(second);
    scene
}

/// Lets a process die while it closes the image, after so many operations.
fn kill(node: Node, operations: u64) {
    node.process.dies_after(operations);
    let closed = catch_unwind(AssertUnwindSafe(|| node.reader.engine().close()));
    assert!(closed.is_err(), "it outlived {operations} operations");
    // Once more, when it is dropped.
    assert!(catch_unwind(AssertUnwindSafe(|| drop(node))).is_err());
}

#[test]
fn cut_after_the_checkpoint_lock_was_handed_over_loses_nothing() {
    let whole = handed_over_operations();
    for operations in 0..whole {
        handed_over(operations).assert_survives(&format!("hand-over after {operations}"));
    }
}

/// Operations of the checkpoint that is handed over.
fn handed_over_operations() -> u64 {
    let scene = Scene::new(16 * KIB, mixed_content(MIB, 8), None);
    let node = scene.open();
    scene.fill(&node, 0, 100 * KIB);
    scene.checkpoint(&node);
    scene.fill(&node, 90 * KIB, 50 * KIB);
    scene.fill(&node, 600 * KIB, 30 * KIB);
    let before = scene.recorder.operations();
    scene.close(node);
    (scene.recorder.operations() - before) as u64
}

#[test]
fn cut_after_a_killed_process_left_its_checkpoint_to_the_next_user_loses_nothing() {
    for operations in [2, 4, 6] {
        let scene = Scene::new(16 * KIB, mixed_content(MIB, 9), None);
        let first = scene.open();
        scene.fill(&first, 0, 200 * KIB);
        scene.recorder.enter(Stage::Checkpoint);
        kill(first, operations);
        let second = scene.open();
        scene.fill(&second, 100 * KIB, 200 * KIB);
        scene.close(second);
        scene.assert_survives(&format!("killed after {operations}"));
    }
}

/// States that a cut left and that the next open has something to do with: leaked clusters.
fn states_with_leaks(scene: &Scene, most: usize) -> Vec<(State, Arc<Vec<ByteRange>>)> {
    let mut rng = StdRng::seed_from_u64(scene.seed);
    let mut found = Vec::new();
    for_each_cut(&scene.start, Arc::default(), &scene.recorder.log(), |cut| {
        let leaks = |state: &State| qcow2::examine(&state.bytes, &scene.fixture.content).leaks;
        let mut states = Vec::new();
        cut.for_each_state(8, &mut rng, |state| states.push(state.clone()));
        let state = states.into_iter().max_by_key(leaks).filter(|state| leaks(state) != 0);
        found.extend(state.map(|state| (state, Arc::clone(&cut.keeps))));
    });
    let step = found.len().div_ceil(most).max(1);
    found.into_iter().step_by(step).collect()
}

#[test]
fn cut_while_an_open_clears_up_after_a_cut_loses_nothing() {
    let mut scene = populated(16 * KIB, mixed_content(MIB, 10));
    let states = states_with_leaks(&scene, 4);
    assert!(!states.is_empty());
    for (index, (state, keeps)) in states.into_iter().enumerate() {
        install(&scene.fixture, &state);
        scene = Scene { keeps, ..scene.restarted() };
        scene.recorder.enter(Stage::Checkpoint);
        let node = scene.open_in_boot(Some([index as u8 + 1; 16]));
        scene.recorder.enter(Stage::Filling);
        scene.fill(&node, 300 * KIB, 100 * KIB);
        scene.close(node);
        scene.assert_survives("reopen after a cut");
    }
}

#[test]
fn cut_while_an_open_clears_up_after_a_killed_process_without_its_live_file_loses_nothing() {
    for operations in [3, 5, 7] {
        let scene = Scene::new(16 * KIB, mixed_content(MIB, 11), None);
        let first = scene.open();
        scene.fill(&first, 0, 200 * KIB);
        scene.recorder.enter(Stage::Checkpoint);
        kill(first, operations);
        fs::remove_file(scene.fixture.live()).unwrap();
        let second = scene.open();
        scene.fill(&second, 300 * KIB, 100 * KIB);
        scene.close(second);
        scene.assert_survives(&format!("live file gone after {operations}"));
    }
}

/// A full image with some damage.
fn damaged(damage: impl Fn(&Image)) -> Scene {
    let scene = Scene::new(16 * KIB, full_content(MIB), None);
    let node = scene.open();
    scene.fill(&node, 0, MIB);
    scene.close(node);
    let image = Image::open(&scene.fixture.image(), Access::ReadWrite).unwrap();
    damage(&image);
    drop(image);
    fs::remove_file(scene.fixture.live()).unwrap();
    scene.restarted()
}

fn copy_entry(image: &Image, from: u64, to: u64) {
    let mut entry = [0; 16];
    image.read(&mut entry, image.layout().l2_entry_offset(from)).unwrap();
    image.write(&entry, image.layout().l2_entry_offset(to)).unwrap();
}

/// Two clusters that show each other's data, which nobody can see, and one entry that is broken.
fn swap_entries(image: &Image) {
    let layout = image.layout();
    let (mut one, mut other) = ([0; 16], [0; 16]);
    image.read(&mut one, layout.l2_entry_offset(3)).unwrap();
    image.read(&mut other, layout.l2_entry_offset(40)).unwrap();
    image.write(&other, layout.l2_entry_offset(3)).unwrap();
    image.write(&one, layout.l2_entry_offset(40)).unwrap();
    image.write(&[0xff; 16], layout.l2_entry_offset(50)).unwrap();
}

fn break_refcounts(image: &Image) {
    let data = image.layout().data;
    image.write_refcounts(data + 3, 7, 0).unwrap();
    image.write_refcounts(data + 20, 1, 5).unwrap();
    image.write_refcounts(2, 1, 0).unwrap();
}

fn break_the_l1_table(image: &Image) {
    image.write(&[0; 8], image.layout().offset(image.layout().l1_table)).unwrap();
}

fn survives_cuts_of_a_repair(name: &str, damage: impl Fn(&Image)) {
    let scene = damaged(damage);
    scene.repair(scene.recorder.process());
    scene.assert_survives(name);
}

#[test]
fn cut_while_entries_with_one_place_are_repaired_leaves_no_wrong_byte() {
    survives_cuts_of_a_repair("repair one place", |image| copy_entry(image, 3, 40));
}

#[test]
fn cut_while_neighbours_with_one_place_are_repaired_leaves_no_wrong_byte() {
    survives_cuts_of_a_repair("repair neighbours", |image| copy_entry(image, 3, 4));
}

#[test]
fn cut_while_swapped_entries_are_repaired_leaves_no_wrong_byte() {
    survives_cuts_of_a_repair("repair swapped", swap_entries);
}

#[test]
fn cut_while_refcounts_are_repaired_leaves_no_wrong_byte() {
    survives_cuts_of_a_repair("repair refcounts", break_refcounts);
}

#[test]
fn cut_while_the_l1_table_is_repaired_leaves_no_wrong_byte() {
    survives_cuts_of_a_repair("repair L1 table", break_the_l1_table);
}

#[test]
fn cut_while_a_repair_that_was_cut_off_is_done_again_leaves_no_wrong_byte() {
    for operations in [8, 40, 68] {
        let scene = damaged(swap_entries);
        let process = scene.recorder.process();
        process.dies_after(operations);
        assert!(catch_unwind(AssertUnwindSafe(|| scene.repair(process))).is_err());
        let scene = scene.restarted();
        scene.repair(scene.recorder.process());
        scene.assert_survives(&format!("repair again after {operations}"));
    }
}

/// A part of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Data,
    Refcounts,
    L2,
}

/// Whether any of the changes writes to a part of the file.
fn touches(scene: &Scene, changes: &[&Change], part: Part) -> bool {
    let layout = Layout::new(&scene.fixture.geometry);
    let (l1, l2) = (layout.offset(layout.l1_table).0, layout.offset(layout.l2_tables).0);
    let checksums = layout.offset(layout.checksums).0;
    let data = layout.offset(layout.data).0;
    let range = match part {
        Part::Data => data..u64::MAX,
        Part::Refcounts => layout.refcount_offset(0).0..l1,
        Part::L2 => l2..checksums,
    };
    changes.iter().any(|change| matches!(change, Change::Write { at, .. } if range.contains(at)))
}

/// What the checker says of a record in which some syncs were left out.
fn failures_without_syncs_of(parts: &[Part]) -> Vec<String> {
    let scene = populated(16 * KIB, full_content(MIB));
    let log = scene
        .recorder
        .log()
        .without_syncs(|changes| parts.iter().any(|part| touches(&scene, changes, *part)));
    scene.outcome_of("broken on purpose", &log).failures
}

fn contains(failures: &[String], what: &str) -> bool {
    failures.iter().any(|failure| failure.contains(what))
}

#[test]
fn checker_catches_entries_that_reach_the_disk_before_their_data() {
    let failures = failures_without_syncs_of(&[Part::Data, Part::Refcounts]);
    assert!(contains(&failures, "differs from the base"), "{failures:#?}");
    assert!(!contains(&failures, "disagrees"), "{failures:#?}");
}

#[test]
fn checker_catches_entries_that_reach_the_disk_before_their_refcounts() {
    let failures = failures_without_syncs_of(&[Part::Refcounts]);
    assert!(contains(&failures, "against the refcount"), "{failures:#?}");
    assert!(!contains(&failures, "disagrees"), "{failures:#?}");
}

#[test]
fn checker_catches_a_checkpoint_that_ends_before_its_entries_are_on_the_disk() {
    let failures = failures_without_syncs_of(&[Part::L2]);
    assert!(contains(&failures, "is lost"), "{failures:#?}");
    assert!(!contains(&failures, "disagrees"), "{failures:#?}");
}
