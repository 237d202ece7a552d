//! Records what real engines do to an image file, in order, and ends "processes" at any point.

use std::collections::HashMap;
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ThreadId};

use parking_lot::Mutex;
use vmcache::format::ByteRange;
use vmcache::image::{Observer, Operation};

/// What an operation does to the bytes of the file.
#[derive(Clone, Debug)]
pub enum Change {
    Write {
        at: u64,
        bytes: Vec<u8>,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Sync,
    /// Allocations; a change of length, which never is one.
    Nothing,
}

/// What is being done, which decides what a cut may leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Filling,
    /// From the beginning of a checkpoint until one is complete, or in an open that gives back what
    /// such a one has left: clusters may be leaked.
    Checkpoint,
    /// The image was damaged before and is being repaired: it may still be damaged.
    Repair,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// A change, by number, is under way.
    Begin(usize),
    /// It is done.
    End(usize),
    Stage(Stage),
    /// A checkpoint has been completed: from here on the image holds these bytes, whatever comes.
    Keeps(Arc<Vec<ByteRange>>),
}

/// Everything that happened.
#[derive(Clone, Debug, Default)]
pub struct Log {
    pub changes: Vec<Change>,
    pub events: Vec<Event>,
}

impl Log {
    /// The same without some of the syncs: those for which `is_dropped` says so of the changes since
    /// the sync before.
    pub fn without_syncs(&self, is_dropped: impl Fn(&[&Change]) -> bool) -> Log {
        let mut since = Vec::new();
        let mut dropped = vec![false; self.changes.len()];
        for (change, dropped) in self.changes.iter().zip(&mut dropped) {
            if matches!(change, Change::Sync) {
                *dropped = is_dropped(&since);
                since.clear();
            } else {
                since.push(change);
            }
        }
        let stays = |event: &&Event| match event {
            Event::Begin(number) | Event::End(number) => !dropped[*number],
            _ => true,
        };
        let events = self.events.iter().filter(stays).cloned().collect();
        Log { changes: self.changes.clone(), events }
    }
}

#[derive(Debug, Default)]
struct Recording {
    log: Log,
    under_way: HashMap<ThreadId, usize>,
}

/// The one record of all processes that have an image open.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Recording>>);

impl Recorder {
    pub fn enter(&self, stage: Stage) {
        self.0.lock().log.events.push(Event::Stage(stage));
    }

    pub fn keeps(&self, held: Vec<ByteRange>) {
        self.0.lock().log.events.push(Event::Keeps(Arc::new(held)));
    }

    pub fn log(&self) -> Log {
        self.0.lock().log.clone()
    }

    /// Operations so far.
    pub fn operations(&self) -> usize {
        self.0.lock().log.changes.len()
    }

    /// The observer of one more process.
    pub fn process(&self) -> Arc<Process> {
        Arc::new(Process { recorder: self.clone(), left: AtomicU64::new(u64::MAX) })
    }
}

/// One process, as far as it changes the image.
#[derive(Debug)]
pub struct Process {
    recorder: Recorder,
    left: AtomicU64,
}

impl Process {
    /// Lets the process do some more operations and then no other: its threads unwind, which drops
    /// its locks as the kernel would.
    pub fn dies_after(&self, operations: u64) {
        self.left.store(operations, Ordering::Relaxed);
    }
}

impl Observer for Process {
    fn before(&self, operation: Operation<'_>) -> io::Result<usize> {
        let take = |left: u64| match left {
            u64::MAX => Some(left),
            left => left.checked_sub(1),
        };
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            resume_unwind(Box::new("the process is dead"));
        }
        let change = match operation {
            Operation::Write { at, bytes } => Change::Write { at, bytes: bytes.to_vec() },
            Operation::Discard { at, len } => Change::Discard { at, len },
            Operation::Sync => Change::Sync,
            Operation::Allocate { .. } | Operation::SetLength(_) => Change::Nothing,
        };
        let mut recording = self.recorder.0.lock();
        let number = recording.log.changes.len();
        recording.log.changes.push(change);
        recording.log.events.push(Event::Begin(number));
        recording.under_way.insert(thread::current().id(), number);
        Ok(usize::MAX)
    }

    fn after(&self, operation: Operation<'_>) {
        let mut recording = self.recorder.0.lock();
        let number = recording.under_way.remove(&thread::current().id());
        let number = number.expect("an operation was done that nobody announced");
        if let (Operation::Write { bytes, .. }, Change::Write { bytes: announced, .. }) =
            (operation, &recording.log.changes[number])
        {
            assert_eq!(bytes.len(), announced.len(), "a short write, recorded as a whole one");
        }
        recording.log.events.push(Event::End(number));
    }
}
