//! Others at the files: stock QEMU programs, somebody who deletes, copies or replaces the live
//! file, a read-only mount.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use vmcache::engine::{Base, Engine, ImageState, Options, Reader, Status, check};
use vmcache::error::ErrorKind;
use vmcache::image::{Access, Image};

use crate::child::{Child, Role};
use crate::fixture::{Fixture, KIB, MIB, full_content, qemu_img, qemu_io};

/// An image that is populated in part and closed.
fn populated() -> Fixture {
    let fixture = Fixture::new(64 * KIB, 4 * MIB);
    let reader = fixture.reader();
    fixture.read(&reader, 0, 3 * MIB);
    drop(reader);
    fixture
}

fn assert_passes_through(fixture: &Fixture) {
    let counted = fixture.counted_base();
    let reader = Reader::new(fixture.engine(), counted.clone());
    fixture.read_everything(&reader);
    assert!(!reader.engine().is_active());
    assert_eq!(counted.most_reads_of_a_subcluster(), 1);
    assert!(fixture.present(reader.engine()).is_empty());
}

#[test]
fn image_that_a_stock_qemu_has_written_to_is_not_trusted() {
    let fixture = populated();
    let written = qemu_io(&["-f", "qcow2"], "write -P 0xee 1M 64k", &fixture.image());
    assert!(written.status.success(), "{written:?}");
    assert_passes_through(&fixture);
}

#[test]
fn image_that_a_stock_qemu_has_opened_for_writing_is_shown_as_damaged() {
    let fixture = populated();
    qemu_io(&["-f", "qcow2"], "write -P 0xee 1M 64k", &fixture.image());
    let status = Status::read(&fixture.image()).unwrap();
    assert_eq!(status.state, ImageState::Damaged);
}

#[test]
fn stock_qemu_cannot_open_an_image_in_use_for_writing() {
    let fixture = populated();
    let _engine = fixture.engine();
    let refused = qemu_io(&["-f", "qcow2"], "write 0 64k", &fixture.image());
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(words.contains("Failed to get \"write\" lock"), "{words}");
}

#[test]
fn stock_qemu_can_read_an_image_in_use() {
    let fixture = populated();
    let _engine = fixture.engine();
    let read = qemu_io(&["-r", "-f", "qcow2"], "read 0 1M", &fixture.image());
    assert!(read.status.success(), "{read:?}");
}

#[test]
fn stock_qemu_reads_what_the_cache_holds_without_the_base() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    drop(reader);
    fs::write(fixture.base(), vec![0; MIB as usize]).unwrap();
    let out = fixture.dir.path().join("out.raw");
    let args = ["convert", "-f", "qcow2", "-O", "raw"];
    let converted = qemu_img(&args, &[&fixture.image(), &out]);
    assert!(converted.status.success(), "{converted:?}");
    assert!(fs::read(out).unwrap() == *fixture.content);
}

#[test]
fn newcomer_passes_through_when_the_live_file_was_deleted_in_use() {
    let fixture = populated();
    let user = fixture.reader();
    fs::remove_file(fixture.live()).unwrap();
    assert_passes_through(&fixture);
    fixture.read_everything(&user);
    assert!(!fixture.live().exists());
    drop(user);
    fixture.assert_sound();
}

#[test]
fn newcomer_without_a_live_file_uses_the_cache_when_the_others_have_left() {
    let fixture = populated();
    let user = fixture.reader();
    fs::remove_file(fixture.live()).unwrap();
    let counted = fixture.counted_base();
    let newcomer = Reader::new(fixture.engine(), counted.clone());
    fixture.read(&newcomer, 0, 64 * KIB);
    let before = counted.reads();
    drop(user);
    await_use_of_the_cache(&newcomer);
    fixture.read(&newcomer, 0, 3 * MIB);
    assert!(before > 0);
    assert_eq!(counted.reads(), before);
}

#[test]
fn newcomer_held_up_by_one_stopped_in_joining_uses_the_cache_when_that_goes_on() {
    let fixture = populated();
    let stopped = Image::open(&fixture.image(), Access::ReadWrite).unwrap();
    let joining = stopped.lock_join(Duration::ZERO).unwrap().unwrap();
    let counted = fixture.counted_base();
    let newcomer = Reader::new(fixture.engine(), counted.clone());
    fixture.read(&newcomer, 0, 64 * KIB);
    let before = counted.reads();
    drop(joining);
    await_use_of_the_cache(&newcomer);
    fixture.read(&newcomer, 0, 3 * MIB);
    assert!(before > 0);
    assert_eq!(counted.reads(), before);
}

fn await_use_of_the_cache<B: Base>(reader: &Reader<B>) {
    let started = Instant::now();
    while !reader.engine().is_active() {
        assert!(started.elapsed() < Duration::from_secs(60), "the cache stays unused");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn live_file_deleted_in_use_is_made_anew_by_the_next_lone_user() {
    let fixture = populated();
    let user = fixture.reader();
    fs::remove_file(fixture.live()).unwrap();
    fixture.read_everything(&user);
    drop(user);
    let counted = fixture.counted_base();
    fixture.read_everything(&Reader::new(fixture.engine(), counted.clone()));
    assert_eq!(counted.reads(), 0);
}

#[test]
fn newcomer_does_not_take_a_copy_of_the_live_file() {
    let fixture = populated();
    let _user = fixture.reader();
    let copy = fixture.dir.path().join("copy");
    fs::copy(fixture.live(), &copy).unwrap();
    fs::rename(&copy, fixture.live()).unwrap();
    assert_passes_through(&fixture);
}

#[test]
fn copy_of_the_live_file_is_replaced_by_a_lone_user() {
    let fixture = populated();
    let copy = fixture.dir.path().join("copy");
    fs::copy(fixture.live(), &copy).unwrap();
    fs::rename(&copy, fixture.live()).unwrap();
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    assert!(reader.engine().is_active());
    drop(reader);
    fixture.assert_sound();
}

#[test]
fn live_file_of_another_image_is_not_taken() {
    let (fixture, other) = (populated(), populated());
    fs::rename(other.live(), fixture.live()).unwrap();
    let counted = fixture.counted_base();
    fixture.read(&Reader::new(fixture.engine(), counted.clone()), 0, 3 * MIB);
    assert_eq!(counted.reads(), 0);
}

#[test]
fn older_copy_of_the_image_written_over_it_is_noticed() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let empty = fs::read(fixture.image()).unwrap();
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    drop(reader);
    // In place: the inode stays.
    fs::write(fixture.image(), empty).unwrap();
    fixture.read_everything(&fixture.reader());
    fixture.assert_sound();
}

#[test]
fn live_file_with_garbage_behind_its_identity_does_no_harm() {
    let fixture = populated();
    let mut live = fs::read(fixture.live()).unwrap();
    live[4096..].fill(0xff);
    fs::write(fixture.live(), live).unwrap();
    let reader = fixture.reader();
    let _ = Status::read(&fixture.image());
    let _ = fixture.present(reader.engine());
    fixture.read_everything(&reader);
}

#[test]
fn symlink_in_place_of_the_live_file_is_not_followed() {
    let fixture = populated();
    let target = fixture.dir.path().join("victim");
    fs::write(&target, "untouched").unwrap();
    fs::remove_file(fixture.live()).unwrap();
    symlink(&target, fixture.live()).unwrap();
    fixture.read_everything(&fixture.reader());
    assert_eq!(fs::read(target).unwrap(), b"untouched");
}

#[test]
fn image_on_a_read_only_mount_serves_what_it_holds() {
    let fixture = populated();
    let mut child = Child::spawn_read_only(Role::Serve, &fixture, 3 * MIB);
    assert_eq!(child.wait_for("@done"), "0 base reads");
}

#[test]
fn image_with_damaged_tables_is_passed_by() {
    let fixture = populated();
    fs::remove_file(fixture.live()).unwrap();
    damage_an_l2_entry(&fixture);
    assert_passes_through(&fixture);
}

#[test]
fn image_with_damaged_tables_is_used_again_after_repair() {
    let fixture = populated();
    fs::remove_file(fixture.live()).unwrap();
    damage_an_l2_entry(&fixture);
    drop(fixture.engine());
    let report = check(&fixture.image(), true, |_, _| {}).unwrap();
    assert!(report.repaired);
    assert!(fixture.engine().is_active());
    fixture.assert_sound();
}

#[test]
fn image_that_somebody_reads_is_not_repaired() {
    let fixture = populated();
    damage_an_l2_entry(&fixture);
    let _reader = Image::open(&fixture.image(), Access::ReadOnly).unwrap();
    let refused = check(&fixture.image(), true, |_, _| {}).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
}

#[test]
fn image_without_room_for_a_live_file_can_still_be_joined_later() {
    let fixture = populated();
    fs::remove_file(fixture.live()).unwrap();
    // Nothing can be renamed onto a directory that is not empty.
    fs::create_dir(fixture.live()).unwrap();
    let first = fixture.engine();
    fs::remove_dir(fixture.live()).unwrap();
    let second = Engine::open(&fixture.image(), &Options::default()).unwrap();
    assert!(!first.is_active());
    assert!(second.is_active());
}

fn damage_an_l2_entry(fixture: &Fixture) {
    let image = Image::open(&fixture.image(), Access::ReadWrite).unwrap();
    image.write(&[0xff; 16], image.layout().l2_entry_offset(2)).unwrap();
}
