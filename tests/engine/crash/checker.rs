//! Holds each state that a disk may have against what an image promises, by all who read it.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use vmcache::engine::{Engine, OpenBase, Options, Reader, Surroundings, check};
use vmcache::format::{ByteRange, Layout};
use vmcache::image::BaseState;

use super::medium::{Cut, State, for_each_cut};
use super::qcow2::{Verdict, examine};
use super::recorder::{Change, Log, Stage};
use crate::fixture::{Fixture, KIB, qemu_img};

/// After so many nothing new is to be learnt.
const FAILURES: usize = 50;
const BLOCK: usize = 4096;

/// What came out.
#[derive(Debug, Default)]
pub struct Outcome {
    pub cuts: u64,
    pub states: u64,
    pub different: u64,
    pub by_qemu_img: u64,
    pub failures: Vec<String>,
}

/// A machine that is started again and again on another disk.
pub struct Checker<'a> {
    fixture: &'a Fixture,
    seed: u64,
    /// States to try.
    states: u64,
    /// One of so many goes through `qemu-img` as well.
    one_in: u64,
    boots: u64,
    seen: HashSet<(u64, usize, Stage)>,
    pub outcome: Outcome,
}

impl<'a> Checker<'a> {
    pub fn new(fixture: &'a Fixture, seed: u64, states: u64, one_in: u64) -> Self {
        let (seen, outcome) = (HashSet::new(), Outcome::default());
        Checker { fixture, seed, states, one_in, boots: 0, seen, outcome }
    }

    /// Tries states of all cuts of a record that starts with an image in this state.
    pub fn run(&mut self, start: &State, keeps: &Arc<Vec<ByteRange>>, log: &Log) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let data = self.data_starts_at(start);
        let weight = |cut: &Cut<'_>| if changes_tables(cut, data) { 8 } else { 1 };
        let mut all = 0;
        for_each_cut(start, Arc::clone(keeps), log, |cut| all += weight(&cut));
        for_each_cut(start, Arc::clone(keeps), log, |cut| {
            self.outcome.cuts += 1;
            let most = (self.states * weight(&cut) / all).max(2);
            cut.for_each_state(most, &mut rng, |state| {
                self.outcome.states += 1;
                let key = (state.hash, Arc::as_ptr(&cut.keeps) as usize, cut.stage);
                if self.outcome.failures.len() < FAILURES && self.seen.insert(key) {
                    self.outcome.different += 1;
                    if let Err(what) = self.try_state(state, &cut) {
                        self.outcome.failures.push(format!("event {}: {what}", cut.number));
                    }
                }
            });
        });
    }

    /// Where the tables end and clusters of data start in the file.
    fn data_starts_at(&self, start: &State) -> u64 {
        let layout = Layout::new(&self.fixture.geometry);
        assert_eq!(layout.offset(layout.end).0, start.bytes.len() as u64, "not the final length");
        layout.offset(layout.data).0
    }

    fn try_state(&mut self, state: &State, cut: &Cut<'_>) -> Result<(), String> {
        let asks_qemu = self.outcome.different <= 3 || state.hash.is_multiple_of(self.one_in);
        self.boots += 1;
        install(self.fixture, state);
        if cut.stage == Stage::Repair {
            self.read_everything(&[])?;
            install(self.fixture, state);
            self.repair()?;
        } else {
            self.look(asks_qemu, cut.stage == Stage::Checkpoint, &cut.keeps, "after the cut")?;
        }
        self.boots += 1;
        let kept: &[ByteRange] = if cut.stage == Stage::Repair { &[] } else { &cut.keeps };
        if !self.read_everything(kept)? {
            return Err("the image is passed by".into());
        }
        self.look(asks_qemu, false, kept, "after the next open and close")
    }

    /// The image as others see it: no error, no leak but where it is allowed, no difference, and
    /// all of what it has to hold.
    fn look(
        &mut self,
        asks_qemu: bool,
        leaks_allowed: bool,
        keeps: &[ByteRange],
        when: &str,
    ) -> Result<(), String> {
        let found = examine(&fs::read(self.fixture.image()).unwrap(), &self.fixture.content);
        if asks_qemu {
            self.ask_qemu(&found)?;
        }
        let (error, leaks) = (found.errors.first(), found.leaks);
        if let Some(error) = error {
            return Err(format!("{when}: {error}"));
        }
        if let Some(at) = found.differs_at {
            return Err(format!("{when}: the disk differs from the base at {at:#x}"));
        }
        if leaks != 0 && !leaks_allowed {
            return Err(format!("{when}: {leaks} leaked clusters"));
        }
        found.lacks(keeps).map_or(Ok(()), |at| Err(format!("{when}: {at:#x} is lost")))
    }

    /// The real `qemu-img` has to come to the same verdict.
    fn ask_qemu(&mut self, found: &Verdict) -> Result<(), String> {
        self.outcome.by_qemu_img += 1;
        let (image, base) = (self.fixture.image(), self.fixture.base());
        let code = |args: &[&str], files: &[&Path]| qemu_img(args, files).status.code();
        let checked = code(&["check", "-q", "-f", "qcow2"], &[&image]);
        let compared = code(&["compare", "-q", "-f", "qcow2", "-F", "raw"], &[&image, &base]);
        let expected = (Some(found.code()), Some(i32::from(found.differs_at.is_some())));
        // What differs in an image with errors depends on how far one reads.
        if checked != expected.0 || (found.errors.is_empty() && compared != expected.1) {
            return Err(format!("qemu-img disagrees: {checked:?} {compared:?} on {found:?}"));
        }
        Ok(())
    }

    /// Opens the image in another boot and reads all of the disk; from the base only what the image
    /// did not have to keep. Returns whether the cache was used.
    fn read_everything(&self, keeps: &[ByteRange]) -> Result<bool, String> {
        let mut boot_id = [0; 16];
        boot_id[..8].copy_from_slice(&self.boots.to_le_bytes());
        let surroundings = Surroundings { boot_id: Some(boot_id), ..Surroundings::default() };
        let options = Options { surroundings, ..Options::default() };
        let engine =
            Engine::open(&self.fixture.image(), &options).map_err(|err| err.to_string())?;
        let content = &self.fixture.content;
        let from_base = Mutex::new(Vec::new());
        let base = |buf: &mut [u8], offset: u64| {
            from_base.lock().push(ByteRange { start: offset, len: buf.len() as u64 });
            buf.copy_from_slice(&content[offset as usize..][..buf.len()]);
            Ok(())
        };
        let reader = Reader::new(Arc::new(engine), base);
        let base = OpenBase { size: content.len() as u64, file: None, is_named: true };
        let sample = reader.engine().check_base(&base, |buf, offset| {
            buf.copy_from_slice(&content[offset as usize..][..buf.len()]);
            Ok(())
        });
        if matches!(sample, BaseState::Changed(_)) {
            return Err(format!("the sample of the base: {sample:?}"));
        }
        let mut found = vec![0xa5; 128 * KIB as usize];
        for at in (0..content.len()).step_by(found.len()) {
            let len = found.len().min(content.len() - at);
            reader.read(&mut found[..len], at as u64).map_err(|err| err.to_string())?;
            if found[..len] != content[at..at + len] {
                return Err(format!("wrong bytes read near {at:#x}"));
            }
        }
        let active = reader.engine().is_active();
        reader.engine().close();
        drop(reader);
        let refetched = from_base.into_inner().into_iter().find(|fetched| {
            keeps.iter().any(|kept| kept.start < fetched.end() && fetched.start < kept.end())
        });
        refetched.map_or(Ok(active), |fetched| {
            Err(format!("{:#x}+{:#x} was fetched again", fetched.start, fetched.len))
        })
    }

    fn repair(&self) -> Result<(), String> {
        let repaired = check(&self.fixture.image(), true, |_, _| {});
        repaired.map(drop).map_err(|err| format!("not repaired: {err}"))
    }
}

/// Makes the image file what the disk holds, in the same file, with holes where there is
/// nothing. The live file of another boot lies beside it, but for some times.
pub fn install(fixture: &Fixture, state: &State) {
    let file = OpenOptions::new().write(true).open(fixture.image()).unwrap();
    let len = state.bytes.len();
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, how, 0, len as libc::off_t).unwrap();
    let blocks = (0..).step_by(BLOCK).zip(state.bytes.chunks(BLOCK));
    for (at, block) in blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0)) {
        file.write_all_at(block, at).unwrap();
    }
    if state.hash.is_multiple_of(4) {
        let _ = fs::remove_file(fixture.live());
    }
}

fn changes_tables(cut: &Cut<'_>, data: u64) -> bool {
    cut.window.iter().any(|change| matches!(change, Change::Write { at, .. } if *at < data))
}
