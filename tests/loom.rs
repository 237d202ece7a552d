//! The state machines of the live state under every order of steps that the memory model allows:
//! claims, the map, the event, dirty marks, allocation.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --test loom
//! ```
//!
//! Without that flag there is nothing in here. What loom cannot show: it explores at most three
//! threads here, knows no timeouts, and treats sequentially consistent accesses as acquire-release.
#![cfg(loom)]

use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use loom::thread;
use vmcache::format::{HostOffset, SubclusterBits};
use vmcache::live::dirty::Marks;
use vmcache::live::event::Event;
use vmcache::live::space::Space;
use vmcache::live::{Claim, MapEntry, Owner};

const LONG: Duration = Duration::from_secs(3600);
const HOST: HostOffset = HostOffset(1 << 20);
const DATA: SubclusterBits = SubclusterBits(1);

/// One subcluster as all processes see it, with its data in the file.
#[derive(Default)]
struct Subcluster {
    claim: Claim,
    entry: MapEntry,
    event: Event,
    file: File,
    /// Claims held at this moment, and fetches in all.
    owners: AtomicUsize,
    fetches: AtomicUsize,
}

/// The bytes in the file: the checker reports a read that may run beside a write.
struct File(UnsafeCell<u32>);

// SAFETY: that nobody reads while another writes is what the models are there to show.
#[allow(unsafe_code)]
unsafe impl Sync for File {}

impl Default for File {
    fn default() -> Self {
        File(UnsafeCell::new(0))
    }
}

#[allow(unsafe_code)]
impl File {
    fn write(&self, value: u32) {
        // SAFETY: checked by the model.
        self.0.with_mut(|at| unsafe { *at = value });
    }

    fn read(&self) -> u32 {
        // SAFETY: checked by the model.
        self.0.with(|at| unsafe { *at })
    }
}

const FETCHED: u32 = 7;

impl Subcluster {
    fn is_present(&self) -> bool {
        self.entry.bits().present() & 1 != 0
    }

    /// What a hit does.
    fn read_if_present(&self) -> bool {
        let present = self.is_present();
        if present {
            assert_eq!(self.entry.host(), Some(HOST));
            assert_eq!(self.file.read(), FETCHED);
        }
        present
    }

    /// What the owner of a claim does: fetch, store, publish, let go.
    fn fetch_and_release(&self, me: Owner) {
        assert_eq!(self.owners.fetch_add(1, Ordering::Relaxed), 0, "two owners");
        if !self.is_present() {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            self.file.write(FETCHED);
            let _ = self.entry.place(HOST);
            self.entry.publish(DATA);
        }
        self.owners.fetch_sub(1, Ordering::Relaxed);
        if self.claim.release(me) {
            self.event.ring();
        }
    }

    /// What a reader does, with the step for a claim that somebody else has.
    fn read(&self, me: Owner) {
        while !self.read_if_present() {
            match self.claim.try_claim(me) {
                Ok(()) => self.fetch_and_release(me),
                Err(_) => self.wait(),
            }
        }
    }

    /// What the waiting thread does: ticket, mark, look, sleep.
    fn wait(&self) {
        let ticket = self.event.ticket();
        if self.claim.mark_waiting().is_some() && self.claim.holder().is_some() {
            self.event.wait(ticket, LONG);
        }
    }
}

fn owner(slot: u32) -> Owner {
    Owner::new(slot, 1)
}

#[test]
fn two_readers_fetch_once_and_both_see_the_data() {
    loom::model(|| {
        let shared = Arc::new(Subcluster::default());
        let other = Arc::clone(&shared);
        let reader = thread::spawn(move || other.read(owner(1)));
        shared.read(owner(2));
        reader.join().unwrap();
        assert_eq!(shared.fetches.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn three_readers_fetch_once_and_all_wake_up() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let shared = Arc::new(Subcluster::default());
        let readers = [1, 2].map(|slot| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.read(owner(slot)))
        });
        shared.read(owner(3));
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert_eq!(shared.fetches.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn waiter_wakes_up_when_the_owner_gives_up_without_data() {
    loom::model(|| {
        let shared = Arc::new(Subcluster::default());
        shared.claim.try_claim(owner(1)).unwrap();
        let other = Arc::clone(&shared);
        let waiter = thread::spawn(move || other.read(owner(2)));
        if shared.claim.release(owner(1)) {
            shared.event.ring();
        }
        waiter.join().unwrap();
        assert!(shared.is_present());
    });
}

#[test]
fn claim_of_the_dead_that_two_find_gets_one_owner() {
    loom::model(|| {
        let shared = Arc::new(Subcluster::default());
        shared.claim.try_claim(owner(9)).unwrap();
        let heirs = [1, 2].map(|slot| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                if let Some(held) = shared.claim.holder().filter(|held| held.owner() == owner(9)) {
                    if shared.claim.break_claim(held) {
                        shared.event.ring();
                    }
                }
                shared.read(owner(slot));
            })
        });
        heirs.into_iter().for_each(|heir| heir.join().unwrap());
        assert_eq!(shared.fetches.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn release_of_a_broken_claim_leaves_the_new_owner_alone() {
    loom::model(|| {
        let claim = Arc::new(Claim::default());
        claim.try_claim(owner(1)).unwrap();
        let late = {
            let claim = Arc::clone(&claim);
            thread::spawn(move || claim.release(owner(1)))
        };
        // Free afterwards either way, by its owner or by force.
        let _ = claim.holder().is_some_and(|held| claim.break_claim(held));
        let claimed = claim.try_claim(owner(2));
        let _ = late.join().unwrap();
        assert_eq!(claimed, Ok(()));
        assert_eq!(claim.holder().map(|held| held.owner()), Some(owner(2)));
    });
}

#[test]
fn late_owner_and_its_heir_publish_the_same_data_once() {
    loom::model(|| {
        let entry = Arc::new(MapEntry::default());
        let publish = |entry: &MapEntry| {
            let _ = entry.place(HOST);
            u32::from(entry.publish(DATA).0 != 0)
        };
        let other = Arc::clone(&entry);
        let late = thread::spawn(move || publish(&other));
        let news = publish(&entry) + late.join().unwrap();
        assert_eq!(news, 1);
    });
}

#[test]
fn two_places_for_a_cluster_end_as_one_and_the_loser_keeps_its_own() {
    loom::model(|| {
        let entry = Arc::new(MapEntry::default());
        let other = Arc::clone(&entry);
        let placed = thread::spawn(move || other.place(HostOffset(1)));
        let mine = entry.place(HostOffset(2));
        let theirs = placed.join().unwrap();
        assert_ne!(mine.is_ok(), theirs.is_ok());
        let place = entry.host().unwrap();
        assert_eq!(mine.err().unwrap_or(HostOffset(2)), place);
        assert_eq!(theirs.err().unwrap_or(HostOffset(1)), place);
    });
}

#[test]
fn subcluster_published_as_data_and_as_zero_is_one_of_them() {
    loom::model(|| {
        let entry = Arc::new(MapEntry::default());
        let other = Arc::clone(&entry);
        let zero = thread::spawn(move || other.publish(SubclusterBits::new(0, 1)));
        let data = entry.publish(SubclusterBits::new(1, 0));
        let news = data.0 | zero.join().unwrap().0;
        let bits = entry.bits();
        assert_eq!(bits.data() & bits.zero(), 0);
        assert_eq!(bits.present(), 1);
        assert_eq!(bits.0, news);
    });
}

#[test]
fn publications_of_different_subclusters_are_not_lost() {
    loom::model(|| {
        let entry = Arc::new(MapEntry::default());
        let others = [1, 2].map(|index| {
            let entry = Arc::clone(&entry);
            thread::spawn(move || entry.publish(SubclusterBits::new(1 << index, 0)))
        });
        entry.publish(SubclusterBits::new(0, 1));
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(entry.bits(), SubclusterBits::new(6, 1));
    });
}

#[test]
fn what_a_checkpoint_misses_stays_marked() {
    loom::model(|| {
        let shared = Arc::new((MapEntry::default(), Marks::default()));
        shared.1.mark(3);
        let other = Arc::clone(&shared);
        let publisher = thread::spawn(move || {
            other.0.publish(DATA);
            other.1.mark(3);
        });
        let taken = shared.1.take(3);
        let seen = shared.0.bits();
        publisher.join().unwrap();
        assert!(taken);
        assert!(seen == DATA || shared.1.has(3), "published, missed and not marked");
    });
}

#[test]
fn what_two_publish_during_a_checkpoint_is_seen_or_marked() {
    loom::model(|| {
        let shared = Arc::new(([MapEntry::default(), MapEntry::default()], Marks::default()));
        let publishers = [0, 1].map(|index| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.0[index].publish(DATA);
                shared.1.mark(0);
            })
        });
        shared.1.take(0);
        let seen = [0, 1].map(|index: usize| shared.0[index].bits() == DATA);
        publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
        assert!(seen == [true, true] || shared.1.has(0));
    });
}

#[test]
fn no_cluster_is_handed_out_twice() {
    loom::model(|| {
        let space = Arc::new((Space::default(), [AtomicU64::new(40)]));
        space.0.restore(100, 102, 0, 1);
        let others = [(); 2].map(|()| {
            let space = Arc::clone(&space);
            thread::spawn(move || space.0.take_cluster(&space.1))
        });
        let mut taken = vec![space.0.take_cluster(&space.1)];
        taken.extend(others.map(|other| other.join().unwrap()));
        taken.push(space.0.take_cluster(&space.1));
        taken.sort_unstable();
        assert_eq!(taken, [None, Some(40), Some(100), Some(101)]);
    });
}

#[test]
fn quota_is_never_promised_twice() {
    loom::model(|| {
        let space = Arc::new(Space::default());
        space.restore(0, 0, 0, 0);
        let others = [(); 2].map(|()| {
            let space = Arc::clone(&space);
            thread::spawn(move || space.reserve(0, 4, 1, 10).unwrap_or(0))
        });
        let mine = space.reserve(0, 4, 1, 10).unwrap_or(0);
        let got = mine + others.map(|other| other.join().unwrap()).iter().sum::<u64>();
        assert_eq!(got, 10);
        assert_eq!(space.used(), 10);
    });
}

/// The model has to find what it is there to find.
#[test]
#[should_panic(expected = "Causality violation")]
fn publishing_before_the_data_is_found_by_the_checker() {
    loom::model(|| {
        let shared = Arc::new(Subcluster::default());
        let other = Arc::clone(&shared);
        let reader = thread::spawn(move || other.read_if_present());
        let _ = shared.entry.place(HOST);
        shared.entry.publish(DATA);
        shared.file.write(FETCHED);
        reader.join().unwrap();
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn waiter_that_takes_its_ticket_too_late_is_found_by_the_checker() {
    loom::model(|| {
        // Leaked, since the checker aborts when it has to unwind through destructors of its own.
        let shared: &Subcluster = Box::leak(Box::default());
        shared.claim.try_claim(owner(1)).unwrap();
        let waiter = thread::spawn(|| {
            if shared.claim.mark_waiting().is_some() {
                let ticket = shared.event.ticket();
                shared.event.wait(ticket, LONG);
            }
        });
        if shared.claim.release(owner(1)) {
            shared.event.ring();
        }
        waiter.join().unwrap();
    });
}
