//! Who may only read the image: he sees what others store and leaves no trace; and live files that
//! somebody else may have written to.
//!
//! A read-only mount stands for missing permission, so that this needs no second user; those are in
//! `tests/qemu/trust.rs`.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::thread;
use std::time::{Duration, Instant};

use vmcache::engine::{Engine, Options, Part, Reader, Step, Surroundings};
use vmcache::error::ErrorKind;
use vmcache::format::{BaseIdentity, ByteRange};
use vmcache::image::{Access, CreateOptions, Image, Use, create};

use crate::child::{Child, Role};
use crate::fixture::{CountedBase, Fixture, KIB, MIB, full_content};

/// Bytes of the one group of clusters that the disks here have in the live file: its end.
const GROUP: u64 = 20 * KIB;

/// An engine that has stored the whole disk, and written nothing of it into the tables.
fn filled(fixture: &Fixture) -> Reader<CountedBase> {
    let options = Options {
        surroundings: Surroundings {
            checkpoint_interval: Some(Duration::from_secs(3600)),
            ..Surroundings::default()
        },
        ..Options::default()
    };
    let engine = Engine::open(&fixture.image(), &options).unwrap();
    let reader = Reader::new(engine.into(), fixture.counted_base());
    fixture.read_everything(&reader);
    until_stored(reader.engine(), fixture.size());
    reader
}

fn until_stored(engine: &Engine, bytes: u64) {
    let started = Instant::now();
    while engine.counters().populated_bytes.get() < bytes {
        assert!(started.elapsed() < Duration::from_secs(30), "the fills are not stored");
        thread::yield_now();
    }
}

/// An image that holds its whole disk, in use by nobody.
fn closed() -> Fixture {
    let fixture = Fixture::new(64 * KIB, 4 * MIB);
    fixture.read_everything(&fixture.reader());
    fixture
}

/// What an open of the image serves, which must be right, and whether it uses the cache.
fn uses_the_cache(fixture: &Fixture) -> bool {
    let reader = fixture.reader();
    fixture.read_everything(&reader);
    reader.engine().is_active()
}

fn mode_of_the_live_file(fixture: &Fixture) -> u32 {
    fs::metadata(fixture.live()).unwrap().permissions().mode() & 0o777
}

#[test]
fn reader_sees_what_no_table_shows_yet_and_leaves_no_trace() {
    let fixture = Fixture::with(64 * KIB, full_content(4 * MIB), None);
    let _filling = filled(&fixture);
    let before = [fixture.image(), fixture.live()].map(|path| fs::read(path).unwrap());
    let mut child = Child::spawn_read_only(Role::Serve, &fixture, 4 * MIB);
    assert_eq!(child.wait_for("@done"), "0 base reads");
    child.wait_for("test result: ok");
    assert!(before == [fixture.image(), fixture.live()].map(|path| fs::read(path).unwrap()));
}

#[test]
fn reader_waits_for_nobody_s_fetch_and_marks_no_claim() {
    let fixture = Fixture::with(64 * KIB, full_content(4 * MIB), None);
    let filling = fixture.engine();
    Reader::new(filling.clone(), fixture.counted_base()).read(&mut [0; 512], MIB).unwrap();
    until_stored(&filling, 2 * KIB);
    let plan = filling.plan(ByteRange { start: 0, len: 64 * KIB });
    assert!(matches!(plan.as_slice(), [Part { step: Step::Fetch(_), .. }]), "{plan:?}");
    let group = || {
        let live = File::open(fixture.live()).unwrap();
        let mut bytes = vec![0; GROUP as usize];
        live.read_exact_at(&mut bytes, live.metadata().unwrap().len() - GROUP).unwrap();
        bytes
    };
    let before = group();
    let mut child = Child::spawn_read_only(Role::Serve, &fixture, 64 * KIB);
    assert_eq!(child.wait_for("@done"), "1 base reads");
    assert!(group() == before);
}

#[test]
fn live_file_that_more_users_may_write_to_than_the_image_is_made_anew() {
    let fixture = closed();
    fs::set_permissions(fixture.live(), Permissions::from_mode(0o666)).unwrap();
    assert!(uses_the_cache(&fixture));
    assert_eq!(mode_of_the_live_file(&fixture), 0o644);
}

#[test]
fn live_file_that_more_users_may_write_to_takes_no_new_users_while_it_is_in_use() {
    let fixture = closed();
    let first = fixture.reader();
    fs::set_permissions(fixture.live(), Permissions::from_mode(0o666)).unwrap();
    assert!(!uses_the_cache(&fixture));
    fixture.read_everything(&first);
    assert!(first.engine().is_active());
}

#[test]
fn readers_keep_nobody_from_populating_after_all_who_did_have_gone() {
    let fixture = closed();
    let reader = Image::open(&fixture.image(), Access::ReadOnly).unwrap();
    assert!(reader.lock_use(Use::Shared, Duration::ZERO).unwrap());
    assert!(uses_the_cache(&fixture));
}

#[test]
fn live_file_that_lost_its_map_is_not_joined_however_many_read_it() {
    let fixture = closed();
    let live = File::options().write(true).open(fixture.live()).unwrap();
    let end = live.metadata().unwrap().len();
    live.write_all_at(&[0; GROUP as usize], end - GROUP).unwrap();
    let reader = Image::open(&fixture.image(), Access::ReadOnly).unwrap();
    assert!(reader.lock_use(Use::Shared, Duration::ZERO).unwrap());
    assert!(!uses_the_cache(&fixture));
    drop(reader);
    assert!(uses_the_cache(&fixture));
    fixture.assert_sound();
}

/// Tries to create an image under a name that is a symlink to `target`.
fn create_over_symlink(fixture: &Fixture, target: &str, force: bool) -> vmcache::error::Result<()> {
    let link = fixture.dir.path().join("link");
    symlink(target, &link).unwrap();
    let options = CreateOptions {
        backing_file: fixture.base().to_str().unwrap().into(),
        backing_format: "raw".into(),
        geometry: fixture.geometry,
        quota: None,
        base: BaseIdentity::default(),
        mode: 0o600,
        force,
    };
    create(&link, &options)
}

#[test]
fn creating_an_image_over_a_symlink_replaces_that_and_not_what_it_leads_to() {
    let fixture = closed();
    let victim = fixture.dir.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    create_over_symlink(&fixture, "victim", true).unwrap();
    assert_eq!(fs::read(victim).unwrap(), b"untouched");
    assert!(fixture.dir.path().join("link").symlink_metadata().unwrap().is_file());
}

#[test]
fn creating_an_image_under_the_name_of_a_symlink_that_leads_nowhere_is_refused() {
    let fixture = closed();
    let refused = create_over_symlink(&fixture, "nowhere", false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Exists);
    assert!(!fixture.dir.path().join("nowhere").exists());
}
