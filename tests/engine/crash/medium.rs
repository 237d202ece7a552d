//! What a disk may hold after a power cut, from a record of what was done to it. The model stands
//! at the head of `crash.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use vmcache::format::ByteRange;

use super::recorder::{Change, Event, Log, Stage};

const SECTOR: u64 = 512;
/// What a filesystem gives back at once.
const BLOCK: u64 = 4096;

/// The content of a file and its hash.
#[derive(Clone)]
pub struct State {
    pub bytes: Vec<u8>,
    pub hash: u64,
}

impl State {
    pub fn new(bytes: Vec<u8>) -> Self {
        let sectors = (0u64..).zip(bytes.chunks(SECTOR as usize));
        let hash = sectors.fold(0, |sum, (number, sector)| sum ^ sector_hash(number, sector));
        State { bytes, hash }
    }

    /// Does a change to a part of the file.
    fn apply(&mut self, change: &Change, part: &ByteRange) {
        let sectors = part.start / SECTOR..part.end().div_ceil(SECTOR);
        self.hash ^= self.hash_of(sectors.clone());
        let here = &mut self.bytes[part.start as usize..part.end() as usize];
        match change {
            Change::Write { at, bytes } => {
                here.copy_from_slice(&bytes[(part.start - at) as usize..][..part.len as usize]);
            }
            Change::Discard { .. } => here.fill(0),
            Change::Sync | Change::Nothing => {}
        }
        self.hash ^= self.hash_of(sectors);
    }

    fn hash_of(&self, sectors: std::ops::Range<u64>) -> u64 {
        sectors.fold(0, |sum, number| {
            let end = ((number + 1) * SECTOR).min(self.bytes.len() as u64);
            sum ^ sector_hash(number, &self.bytes[(number * SECTOR) as usize..end as usize])
        })
    }
}

fn sector_hash(number: u64, sector: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (number, sector).hash(&mut hasher);
    hasher.finish()
}

fn extent(change: &Change) -> ByteRange {
    match change {
        Change::Write { at, bytes } => ByteRange { start: *at, len: bytes.len() as u64 },
        Change::Discard { at, len } => ByteRange { start: *at, len: *len },
        Change::Sync | Change::Nothing => ByteRange { start: 0, len: 0 },
    }
}

/// An instant at which the power may go.
pub struct Cut<'a> {
    /// Its place in the record.
    pub number: usize,
    pub stage: Stage,
    /// What a completed checkpoint has promised.
    pub keeps: Arc<Vec<ByteRange>>,
    /// What is on the disk for certain.
    pub durable: &'a State,
    /// What may be there, whole or in part, in the order in which it was done.
    pub window: Vec<&'a Change>,
}

/// Goes through all instants at which something is new: a change under way, or a promise.
pub fn for_each_cut(
    start: &State,
    keeps: Arc<Vec<ByteRange>>,
    log: &Log,
    mut visit: impl FnMut(Cut<'_>),
) {
    let mut durable = start.clone();
    let (mut stage, mut keeps) = (Stage::Filling, keeps);
    // By number; whether it is done.
    let mut window: BTreeMap<usize, bool> = BTreeMap::new();
    let mut covered: HashMap<usize, BTreeSet<usize>> = HashMap::new();
    for (number, event) in log.events.iter().enumerate() {
        let is_new = match event {
            Event::Begin(change) => match &log.changes[*change] {
                Change::Sync => {
                    let done = window.iter().filter(|(_, done)| **done).map(|(change, _)| *change);
                    covered.insert(*change, done.collect());
                    false
                }
                Change::Nothing => false,
                Change::Write { .. } | Change::Discard { .. } => {
                    window.insert(*change, false);
                    true
                }
            },
            Event::End(change) => {
                for old in covered.remove(change).into_iter().flatten() {
                    window.remove(&old);
                    durable.apply(&log.changes[old], &extent(&log.changes[old]));
                }
                window.entry(*change).and_modify(|done| *done = true);
                false
            }
            Event::Stage(new) => {
                stage = *new;
                false
            }
            Event::Keeps(held) => {
                keeps = Arc::clone(held);
                true
            }
        };
        if is_new || number + 1 == log.events.len() {
            let window = window.keys().map(|change| &log.changes[*change]).collect();
            visit(Cut { number, stage, keeps: Arc::clone(&keeps), durable: &durable, window });
        }
    }
}

/// A part of a change that is on the disk or not, never in part.
struct Atom {
    change: usize,
    part: ByteRange,
}

/// Which changes are on the disk, each as a whole.
#[derive(Clone, Copy)]
enum Choice {
    Nothing,
    Everything,
    Only(usize),
    AllBut(usize),
}

impl Choice {
    fn has(self, change: usize) -> bool {
        match self {
            Choice::Nothing => false,
            Choice::Everything => true,
            Choice::Only(only) => change == only,
            Choice::AllBut(lost) => change != lost,
        }
    }
}

impl Cut<'_> {
    /// Goes through all states that the disk may hold, or `most` of them chosen at random with the
    /// plainest ones among them; some may be equal.
    pub fn for_each_state(&self, most: u64, rng: &mut StdRng, mut visit: impl FnMut(&State)) {
        let mut state = self.durable.clone();
        let atoms = self.atoms();
        let orders = self.orders();
        let subsets = 1u64.checked_shl(atoms.len() as u32).unwrap_or(0);
        if (1..=most / orders.len() as u64).contains(&subsets) {
            for (subset, order) in
                (0..subsets).flat_map(|subset| orders.iter().map(move |order| (subset, order)))
            {
                self.make(&mut state, &atoms, order, |index| subset >> index & 1 != 0);
                visit(&state);
            }
            return;
        }
        let mut plain = self.plain_choices();
        plain[2..].shuffle(rng);
        plain.truncate((most / 2).max(2) as usize);
        for chosen in &plain {
            self.make(&mut state, &atoms, &orders[0], |index| chosen.has(atoms[index].change));
            visit(&state);
        }
        for _ in plain.len() as u64..most {
            self.make_random(&mut state, &atoms, &orders, rng);
            visit(&state);
        }
    }

    /// Nothing, everything, each change alone and everything but each change.
    fn plain_choices(&self) -> Vec<Choice> {
        let changes = 0..self.window.len();
        [Choice::Nothing, Choice::Everything]
            .into_iter()
            .chain(changes.clone().map(Choice::Only))
            .chain(changes.map(Choice::AllBut))
            .collect()
    }

    /// Of each change nothing, all, the front, the back or any parts.
    fn make_random(
        &self,
        state: &mut State,
        atoms: &[Atom],
        orders: &[Vec<usize>],
        rng: &mut StdRng,
    ) {
        let mut chosen = vec![false; atoms.len()];
        // Few lost, or few there, or half.
        let whole = [0.1, 0.5, 0.9][rng.random_range(0..3)];
        let mut rest = chosen.as_mut_slice();
        for run in atoms.chunk_by(|one, next| one.change == next.change) {
            let (here, after) = rest.split_at_mut(run.len());
            rest = after;
            let edge = rng.random_range(0..=run.len());
            match rng.random_range(0..10) {
                0 => here[..edge].fill(true),
                1 => here[edge..].fill(true),
                2 => here.fill_with(|| rng.random_bool(0.5)),
                _ => here.fill(rng.random_bool(whole)),
            }
        }
        let order = &orders[rng.random_range(0..orders.len())];
        self.make(state, atoms, order, |index| chosen[index]);
    }

    /// Makes the state in which some of the atoms are on the disk.
    fn make(
        &self,
        state: &mut State,
        atoms: &[Atom],
        order: &[usize],
        chosen: impl Fn(usize) -> bool,
    ) {
        state.bytes.copy_from_slice(&self.durable.bytes);
        state.hash = self.durable.hash;
        for change in order {
            let first = atoms.partition_point(|atom| atom.change < *change);
            for (index, atom) in (first..).zip(&atoms[first..]) {
                if atom.change != *change {
                    break;
                }
                if chosen(index) {
                    state.apply(self.window[*change], &atom.part);
                }
            }
        }
    }

    /// The parts of all changes that matter, in the order of the changes: sectors of writes, blocks
    /// of discards.
    fn atoms(&self) -> Vec<Atom> {
        let mut atoms = Vec::new();
        for (change, what) in self.window.iter().enumerate() {
            let unit = if matches!(what, Change::Write { .. }) { SECTOR } else { BLOCK };
            let whole = extent(what);
            let mut at = whole.start;
            while at < whole.end() {
                let end = ((at / unit + 1) * unit).min(whole.end());
                let part = ByteRange { start: at, len: end - at };
                if self.matters(change, &part) {
                    atoms.push(Atom { change, part });
                }
                at = end;
            }
        }
        atoms
    }

    /// Whether it makes a difference if a part of a change is on the disk.
    fn matters(&self, change: usize, part: &ByteRange) -> bool {
        let durable = &self.durable.bytes[part.start as usize..part.end() as usize];
        let differs = match self.window[change] {
            Change::Write { at, bytes } => {
                *durable != bytes[(part.start - at) as usize..][..part.len as usize]
            }
            Change::Discard { .. } => durable.iter().any(|byte| *byte != 0),
            Change::Sync | Change::Nothing => false,
        };
        let others = self.window.iter().enumerate().filter(|(index, _)| *index != change);
        differs || others.into_iter().any(|(_, other)| overlap(&extent(other), part))
    }

    /// The orders in which the changes may reach the disk, as far as it makes a difference: where
    /// two overlap, also the other way round.
    fn orders(&self) -> Vec<Vec<usize>> {
        let done: Vec<usize> = (0..self.window.len()).collect();
        let overlaps = self.window.iter().enumerate().any(|(index, one)| {
            self.window[..index].iter().any(|other| overlap(&extent(one), &extent(other)))
        });
        let reversed = done.iter().rev().copied().collect();
        if overlaps { vec![done, reversed] } else { vec![done] }
    }
}

fn overlap(one: &ByteRange, other: &ByteRange) -> bool {
    one.start < other.end() && other.start < one.end()
}
