//! A base that is changed, between two opens or while the cache is in use: nothing of it gets into
//! the image, and what is cached is not served beside it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmcache::engine::{Engine, ImageState, OpenBase, Options, Reader, Status, Surroundings};
use vmcache::format::BaseIdentity;
use vmcache::image::{Access, BaseState, Image};

use crate::fixture::{Fixture, KIB, MIB, create_image, file_base, full_content};

const HALF: u64 = 4 * MIB;

/// A fixture whose cache holds the first half of the base.
fn half_warm() -> Fixture {
    let fixture = Fixture::with(64 * KIB, full_content(2 * HALF), None);
    let engine = open(&fixture, &Options::default());
    let reader = Reader::new(engine, file_base(&fixture.base()));
    fixture.read(&reader, 0, HALF);
    fixture
}

/// An engine that watches its base.
fn open(fixture: &Fixture, options: &Options) -> Arc<Engine> {
    let engine = Arc::new(Engine::open(&fixture.image(), options).unwrap());
    engine.watch_base([fixture.base()]);
    assert_eq!(check(fixture, &engine), BaseState::Same);
    engine
}

/// Holds the base against the cache as an open does.
fn check(fixture: &Fixture, engine: &Engine) -> BaseState {
    let base = File::open(fixture.base()).unwrap();
    let size = base.metadata().unwrap().len();
    let open = OpenBase { size, file: None, is_named: true };
    engine.check_base(&open, |buf, offset| base.read_exact_at(buf, offset))
}

fn is_changed(state: &BaseState) -> bool {
    matches!(state, BaseState::Changed(_))
}

/// Turns over all bytes of the base, or puts them back.
fn turn_over(fixture: &Fixture, range: std::ops::Range<u64>) {
    let base = OpenOptions::new().read(true).write(true).open(fixture.base()).unwrap();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    base.read_exact_at(&mut bytes, range.start).unwrap();
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    base.write_all_at(&bytes, range.start).unwrap();
}

fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_true() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn often() -> Options {
    let checkpoint_interval = Some(Duration::from_millis(20));
    let surroundings = Surroundings { checkpoint_interval, ..Surroundings::default() };
    Options { surroundings, ..Options::default() }
}

fn state(fixture: &Fixture) -> ImageState {
    Status::read(&fixture.image()).unwrap().state
}

#[test]
fn nothing_that_was_read_after_a_change_is_stored() {
    let fixture = half_warm();
    let reader = Reader::new(open(&fixture, &Options::default()), file_base(&fixture.base()));
    let present = fixture.present(reader.engine());
    turn_over(&fixture, 0..2 * HALF);
    let mut found = vec![0; HALF as usize];
    reader.read(&mut found, HALF).unwrap();
    eventually("the cache is given up", || !reader.engine().is_active());
    drop(reader);
    turn_over(&fixture, 0..2 * HALF);
    assert_eq!(fixture.present(&fixture.engine()), present);
    fixture.assert_sound();
}

#[test]
fn after_a_miss_that_shows_a_change_all_reads_are_of_the_new_base() {
    let fixture = half_warm();
    let reader = Reader::new(open(&fixture, &Options::default()), file_base(&fixture.base()));
    turn_over(&fixture, 0..2 * HALF);
    reader.read(&mut [0; 512], HALF).unwrap();
    eventually("the cache is given up", || !reader.engine().is_active());
    let mut found = vec![0; 2 * HALF as usize];
    reader.read(&mut found, 0).unwrap();
    assert!(found == fs::read(fixture.base()).unwrap());
}

#[test]
fn a_change_is_noticed_without_a_miss() {
    let fixture = half_warm();
    let engine = open(&fixture, &often());
    turn_over(&fixture, 0..512);
    eventually("the cache is given up", || engine.is_bypassed());
}

#[test]
fn a_change_is_noticed_by_who_does_not_populate() {
    let fixture = half_warm();
    let engine = open(&fixture, &Options { populate: false, ..often() });
    turn_over(&fixture, 0..512);
    eventually("the cache is given up", || engine.is_bypassed());
}

#[test]
fn a_base_that_becomes_shorter_in_use_costs_the_cache() {
    let fixture = half_warm();
    let engine = open(&fixture, &often());
    let base = OpenOptions::new().write(true).open(fixture.base()).unwrap();
    base.set_len(HALF).unwrap();
    eventually("the cache is given up", || engine.is_bypassed());
}

#[test]
fn names_owners_and_modes_of_the_base_are_no_change() {
    let fixture = half_warm();
    let reader = Reader::new(open(&fixture, &Options::default()), file_base(&fixture.base()));
    fs::hard_link(fixture.base(), fixture.dir.path().join("other name")).unwrap();
    fs::set_permissions(fixture.base(), Permissions::from_mode(0o400)).unwrap();
    fs::remove_file(fixture.base()).unwrap();
    fixture.read_everything(&reader);
    reader.engine().close();
    let status = Status::read(&fixture.image()).unwrap();
    assert_eq!(status.cached_bytes, fixture.size());
}

#[test]
fn who_finds_another_base_at_opening_stops_those_who_opened_it_before() {
    let fixture = half_warm();
    let before = Arc::new(Engine::open(&fixture.image(), &Options::default()).unwrap());
    turn_over(&fixture, 0..2 * HALF);
    let newcomer = Engine::open(&fixture.image(), &Options::default()).unwrap();
    assert!(is_changed(&check(&fixture, &newcomer)));
    newcomer.base_changed("another base", true);
    assert!(!before.is_active());
}

#[test]
fn another_base_under_another_name_is_the_business_of_its_user_alone() {
    let fixture = half_warm();
    let before = Engine::open(&fixture.image(), &Options::default()).unwrap();
    let newcomer = Engine::open(&fixture.image(), &Options::default()).unwrap();
    let open = OpenBase { size: fixture.size(), file: None, is_named: false };
    let found = newcomer.check_base(&open, |buf, _| {
        buf.fill(0x5a);
        Ok(())
    });
    assert!(is_changed(&found));
    newcomer.base_changed("another base", false);
    assert!(before.is_active() && !newcomer.is_active());
    assert_eq!(state(&fixture), ImageState::Filling);
}

#[test]
fn a_base_that_only_a_reading_shows_to_be_another_is_noted_until_it_is_right_again() {
    let fixture = half_warm();
    turn_over(&fixture, 0..512);
    assert!(is_changed(&check(&fixture, &fixture.engine())));
    assert_eq!(state(&fixture), ImageState::Stale);
    turn_over(&fixture, 0..512);
    assert_eq!(check(&fixture, &fixture.engine()), BaseState::Same);
    assert_eq!(state(&fixture), ImageState::Filling);
}

/// A sixteenth of what is cached, where no sample is taken.
fn turn_over_between_samples(fixture: &Fixture) {
    turn_over(fixture, MIB + 64 * KIB..MIB + 320 * KIB);
}

#[test]
fn another_base_with_the_same_sample_contradicts_what_is_cached() {
    let fixture = half_warm();
    turn_over_between_samples(&fixture);
    let mut opens = (0..100).map(|_| check(&fixture, &fixture.engine()));
    assert!(opens.any(|state| is_changed(&state)));
}

#[test]
fn what_contradicted_the_cache_once_is_looked_at_again() {
    let fixture = half_warm();
    turn_over_between_samples(&fixture);
    eventually("an open finds it", || is_changed(&check(&fixture, &fixture.engine())));
    let opens = (0..16).map(|_| check(&fixture, &fixture.engine()));
    assert!(opens.into_iter().all(|state| is_changed(&state)));
    turn_over_between_samples(&fixture);
    assert_eq!(check(&fixture, &fixture.engine()), BaseState::Same);
    assert_eq!(state(&fixture), ImageState::Filling);
}

/// Holds bytes against the cache as an open of a remote base of these bytes does.
fn sampled(engine: &Engine, content: &[u8]) -> BaseState {
    let open = OpenBase { size: content.len() as u64, file: None, is_named: true };
    engine.check_base(&open, |buf, offset| {
        buf.copy_from_slice(&content[offset as usize..][..buf.len()]);
        Ok(())
    })
}

#[test]
fn two_that_open_an_empty_cache_at_once_cannot_fill_it_from_two_bases() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let other: Vec<u8> = fixture.content.iter().map(|byte| !byte).collect();
    let [first, second] = [(); 2].map(|()| fixture.engine());
    assert_eq!(sampled(&first, &fixture.content), BaseState::Same);
    assert!(is_changed(&sampled(&second, &other)));
}

/// An engine that could not join at its open, and what holds it up.
fn held_up(fixture: &Fixture) -> (Arc<Engine>, Image) {
    let joining = Image::open(&fixture.image(), Access::ReadWrite).unwrap();
    std::mem::forget(joining.lock_join(Duration::ZERO).unwrap().unwrap());
    let engine = Arc::new(Engine::open(&fixture.image(), &often()).unwrap());
    assert!(!engine.is_active());
    (engine, joining)
}

#[test]
fn late_joiner_notes_the_sample_that_it_took_at_its_open() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let (late, joining) = held_up(&fixture);
    assert_eq!(sampled(&late, &fixture.content), BaseState::Same);
    drop(joining);
    eventually("the cache is used", || late.is_active());
    let other: Vec<u8> = fixture.content.iter().map(|byte| !byte).collect();
    assert!(is_changed(&sampled(&fixture.engine(), &other)));
}

#[test]
fn late_joiner_with_another_base_than_the_others_does_not_join() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let (late, joining) = held_up(&fixture);
    let other: Vec<u8> = fixture.content.iter().map(|byte| !byte).collect();
    assert_eq!(sampled(&late, &other), BaseState::Same);
    let image = Image::open(&fixture.image(), Access::ReadWrite).unwrap();
    image.update_base(|noted| BaseIdentity { sample: Some([7; 32]), ..noted }).unwrap();
    drop(joining);
    eventually("the cache is given up", || late.is_bypassed());
    assert!(!late.is_active());
}

#[test]
fn late_joiner_of_an_image_that_was_replaced_leaves_the_new_one_alone() {
    let fixture = Fixture::with(64 * KIB, full_content(MIB), None);
    let (late, joining) = held_up(&fixture);
    fs::remove_file(fixture.image()).unwrap();
    create_image(&fixture.image(), &fixture.base(), fixture.geometry, None);
    let user = fixture.engine();
    drop(joining);
    eventually("the old image is given up", || late.is_bypassed());
    assert!(user.is_active() && fixture.engine().is_active());
}
