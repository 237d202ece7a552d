//! Limits: the quota, the filesystem's end, the memory behind a request.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmcache::engine::{Engine, ImageState, Options, Reader, Status};
use vmcache::format::Geometry;

use crate::child::{Child, Role};
use crate::fixture::{Fixture, KIB, MIB, create_image, full_content, mixed_content};

/// Runs `work` and gives the most that the image occupied meanwhile and afterwards.
fn most_occupied(fixture: &Fixture, work: impl FnOnce()) -> u64 {
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                most.fetch_max(fixture.occupied(), Ordering::Relaxed);
            }
        });
        work();
        done.store(true, Ordering::Release);
    });
    most.into_inner().max(fixture.occupied())
}

fn fills_up_to(cluster_size: u64, content: Vec<u8>, quota: u64) {
    let fixture = Fixture::with(cluster_size, content, Some(quota));
    let most = most_occupied(&fixture, || {
        for _ in 0..2 {
            let reader = fixture.reader();
            thread::scope(|scope| {
                (0..4).for_each(|_| drop(scope.spawn(|| fixture.read_everything(&reader))));
            });
        }
    });
    assert!(most <= quota, "{most} bytes of {quota}");
    assert!(most > quota / 10 * 8, "only {most} bytes of {quota}");
    fixture.assert_sound();
}

#[test]
fn image_stays_below_its_quota_with_clusters_of_16_kib() {
    fills_up_to(16 * KIB, mixed_content(24 * MIB, 3), 6 * MIB);
}

#[test]
fn image_stays_below_its_quota_with_clusters_of_128_kib() {
    fills_up_to(128 * KIB, full_content(24 * MIB), 6 * MIB);
}

#[test]
fn image_stays_below_its_quota_with_clusters_of_2_mib() {
    fills_up_to(2 * MIB, full_content(40 * MIB), 16 * MIB);
}

#[test]
fn image_stays_below_its_quota_with_scattered_small_reads() {
    let quota = 4 * MIB;
    let fixture = Fixture::with(64 * KIB, full_content(32 * MIB), Some(quota));
    let most = most_occupied(&fixture, || {
        let reader = fixture.reader();
        let starts = (0..fixture.size()).step_by(8 * KIB as usize);
        starts.for_each(|at| fixture.read(&reader, at, 512));
    });
    assert!(most <= quota, "{most} bytes of {quota}");
    fixture.assert_sound();
}

#[test]
fn image_stays_below_its_quota_with_several_processes() {
    let quota = 6 * MIB;
    let fixture = Fixture::with(64 * KIB, full_content(24 * MIB), Some(quota));
    let most = most_occupied(&fixture, || {
        let mut children = [0, 100, 200].map(|seed| Child::spawn(Role::ReadAll, &fixture, seed));
        children.iter_mut().for_each(|child| drop(child.wait_for("@open")));
        children.iter_mut().for_each(Child::go);
        children.iter_mut().for_each(|child| drop(child.wait_for("@done")));
    });
    assert!(most <= quota, "{most} bytes of {quota}");
    fixture.assert_sound();
}

#[test]
fn image_stays_below_its_quota_on_a_wide_disk_of_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let (base, image) = (dir.path().join("base.raw"), dir.path().join("cache.qcow2"));
    let geometry = Geometry::with_cluster_size(16 * KIB, 16 << 30).unwrap();
    fs::File::create(&base).unwrap().set_len(16 << 30).unwrap();
    let quota = 4 * MIB;
    create_image(&image, &base, geometry, Some(quota));
    let engine = Arc::new(Engine::open(&image, &Options::default()).unwrap());
    let zeros = |buf: &mut [u8], _: u64| {
        buf.fill(0);
        Ok(())
    };
    let reader = Reader::new(engine, zeros);
    let starts = (0..16u64 << 30).step_by(2 << 20);
    starts.for_each(|at| reader.read(&mut [1; 512], at).unwrap());
    drop(reader);
    let occupied = fs::metadata(&image).unwrap().blocks() * 512;
    assert!(occupied <= quota, "{occupied} bytes of {quota}");
}

#[test]
fn full_image_says_so_in_use() {
    let fixture = Fixture::with(64 * KIB, full_content(8 * MIB), Some(3 * MIB));
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    // The last fills are on their way.
    let queued = || reader.engine().counters().dropped_bytes.get() == 0;
    let started = Instant::now();
    while queued() {
        assert!(started.elapsed() < Duration::from_secs(30), "nothing is ever dropped");
        thread::yield_now();
    }
    assert_eq!(Status::read(&fixture.image()).unwrap().state, ImageState::Full);
}

#[test]
fn full_image_says_so_when_nobody_uses_it() {
    let fixture = Fixture::with(64 * KIB, full_content(8 * MIB), Some(3 * MIB));
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    drop(reader);
    assert_eq!(Status::read(&fixture.image()).unwrap().state, ImageState::Full);
}

#[test]
fn full_image_still_serves_what_it_holds() {
    let fixture = Fixture::with(64 * KIB, full_content(8 * MIB), Some(4 * MIB));
    drop({
        let reader = fixture.reader();
        fixture.read_everything(&reader);
        reader
    });
    let counted = fixture.counted_base();
    let reader = Reader::new(fixture.engine(), counted.clone());
    fixture.read(&reader, 0, 2 * MIB);
    assert_eq!(counted.reads(), 0);
}

#[test]
fn quota_counts_no_clusters_that_nothing_refers_to() {
    let fixture = Fixture::with(64 * KIB, full_content(8 * MIB), Some(4 * MIB));
    // What a power cut leaves: data that was written and not yet referred to.
    let file = fs::OpenOptions::new().write(true).open(fixture.image()).unwrap();
    let end = file.metadata().unwrap().len();
    file.write_all_at(&full_content(4 * MIB), end).unwrap();
    let reader = fixture.reader();
    fixture.read(&reader, 0, 2 * MIB);
    reader.engine().close();
    assert_eq!(reader.engine().counters().populated_bytes.get(), 2 * MIB);
    fixture.assert_sound();
}

#[test]
fn queue_without_room_drops_fills_and_counts_them() {
    let fixture = Fixture::with(64 * KIB, full_content(2 * MIB), None);
    let options = Options { queue_bytes: 16 * KIB, ..Options::default() };
    let engine = Arc::new(Engine::open(&fixture.image(), &options).unwrap());
    let reader = Reader::new(engine, fixture.counted_base());
    fixture.read_everything(&reader);
    reader.engine().close();
    let counters = reader.engine().counters();
    assert_eq!(counters.dropped_bytes.get(), 2 * MIB);
    assert_eq!(counters.populated_bytes.get(), 0);
}

#[test]
fn queue_with_room_for_some_stores_what_it_can() {
    let fixture = Fixture::with(64 * KIB, full_content(8 * MIB), None);
    let options = Options { queue_bytes: 256 * KIB, ..Options::default() };
    let engine = Arc::new(Engine::open(&fixture.image(), &options).unwrap());
    let reader = Reader::new(engine, fixture.counted_base());
    thread::scope(|scope| {
        (0..8).for_each(|_| drop(scope.spawn(|| fixture.read_everything(&reader))));
    });
    reader.engine().close();
    drop(reader);
    fixture.assert_sound();
    fixture.read_everything(&fixture.reader());
}

#[test]
fn full_filesystem_fails_no_read() {
    let fixture = Fixture::with(64 * KIB, full_content(8 * MIB), None);
    let setup = "mkdir \"$0/small\"; mount -t tmpfs -o size=3m tmpfs \"$0/small\"; \
         cp --sparse=always \"$0/cache.qcow2\" \"$0/small\"; cd \"$0/small\"; set -- \"$@\""
        .to_string();
    let image = fixture.dir.path().join("cache.qcow2");
    let mut child = Child::spawn_after(&setup, Role::FillSmall, &image, &fixture.base(), 0);
    assert_eq!(child.wait_for("@done"), "sound");
}

#[test]
fn full_filesystem_under_the_live_file_fails_no_read() {
    let fixture = Fixture::with(16 * KIB, full_content(8 * MIB), None);
    let setup = "mkdir \"$0/small\"; mount -t tmpfs -o size=480k tmpfs \"$0/small\"; \
                 cp --sparse=always \"$0/cache.qcow2\" \"$0/small\"; set -- \"$@\"";
    let image = fixture.dir.path().join("cache.qcow2");
    let mut child = Child::spawn_after(setup, Role::FillSmall, &image, &fixture.base(), 0);
    assert_eq!(child.wait_for("@done"), "sound");
}

#[test]
fn opening_a_tebibyte_costs_nothing_in_proportion() {
    let dir = tempfile::tempdir().unwrap();
    let (base, image) = (dir.path().join("base.raw"), dir.path().join("cache.qcow2"));
    fs::File::create(&base).unwrap().set_len(1 << 40).unwrap();
    let geometry = Geometry::with_cluster_size(128 * KIB, 1 << 40).unwrap();
    create_image(&image, &base, geometry, None);
    let engine = Engine::open(&image, &Options::default()).unwrap();
    let live = fs::metadata(dir.path().join("cache.qcow2.live")).unwrap().blocks() * 512;
    assert!(engine.is_active());
    assert!(live <= MIB, "{live} bytes");
    assert!(fs::metadata(&image).unwrap().blocks() * 512 <= MIB);
}
