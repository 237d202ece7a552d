//! The state machines of the live state under every order of steps that the memory model allows:
//! claims, the map, the event, dirty marks, allocation, slots.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --test loom
//! ```
//!
//! Without that flag there is nothing in here. What loom cannot show: it explores at most three
//! threads here, knows no timeouts, and treats sequentially consistent accesses as acquire-release.
//! The lock on a slot is the kernel's; [`FileLock`] stands for it.
#![cfg(loom)]

use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use vmcache::format::{HostOffset, SubclusterBits};
use vmcache::live::claim::Held;
use vmcache::live::dirty::Marks;
use vmcache::live::event::Event;
use vmcache::live::space::Space;
use vmcache::live::{Claim, MapEntry, Owner, Slot};

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

/// The lock on a slot as the kernel has it: one holder, and free as soon as that one is dead.
#[derive(Default)]
struct FileLock(Mutex<bool>);

impl FileLock {
    fn holding() -> Self {
        FileLock(Mutex::new(true))
    }

    fn is_held(&self) -> bool {
        *self.0.lock().unwrap()
    }

    /// What closing the last descriptor does.
    fn die(&self) {
        *self.0.lock().unwrap() = false;
    }

    fn try_lock(&self) -> bool {
        !std::mem::replace(&mut *self.0.lock().unwrap(), true)
    }
}

/// The slot of one process, its first holder alive, and a subcluster that this one has claimed. The
/// other processes hold slots that are not looked at.
struct Inherited {
    slot: Slot,
    lock: FileLock,
    first: Owner,
    shared: Subcluster,
    /// Claims taken from their owner by others.
    broken: AtomicUsize,
}

const INHERITED: u32 = 5;

impl Inherited {
    fn new() -> Self {
        let slot = Slot::default();
        let first = slot.take(INHERITED, 1);
        let shared = Subcluster::default();
        shared.claim.try_claim(first).unwrap();
        Inherited { slot, lock: FileLock::holding(), first, shared, broken: AtomicUsize::new(0) }
    }

    /// The first holder's process ends, and another one takes the slot. The ring stands for the
    /// next pulse of those who asked in between and found the slot held.
    fn pass_on(&self) -> Owner {
        self.lock.die();
        assert!(self.lock.try_lock());
        let heir = self.slot.take(INHERITED, 2);
        self.shared.event.ring();
        heir
    }

    /// What a reader does, beside whom no claim is made but by holders of the slot.
    fn read(&self, me: Owner, verdict: impl Fn(&Self, Held)) {
        while !self.shared.read_if_present() {
            match self.shared.claim.try_claim(me) {
                Ok(()) => self.shared.fetch_and_release(me),
                Err(held) if held.owner().slot() == INHERITED => verdict(self, held),
                Err(_) => self.shared.wait(),
            }
        }
    }

    /// What a plan does at once where it finds the claim of somebody stalled, and the waiting
    /// thread where it does not know him to be: mark, ticket, look, ask, sleep.
    fn ask(&self, held: Held) {
        if self.slot.is_stalled(held.owner()) {
            return self.note(self.shared.claim.break_claim(held));
        }
        let Some(marked) = self.shared.claim.mark_waiting() else { return };
        let owner = marked.owner();
        let ticket = self.shared.event.ticket();
        let Some(held) = self.shared.claim.holder().filter(|held| held.owner() == owner) else {
            return;
        };
        if owner.slot() != INHERITED || self.slot.is_alive(owner, || self.lock.is_held()) {
            self.shared.event.wait(ticket, LONG);
        } else {
            self.note(self.slot.give_up_on(&self.shared.claim, held));
        }
    }

    fn note(&self, freed: bool) {
        if freed {
            self.broken.fetch_add(1, Ordering::Relaxed);
            self.shared.event.ring();
        }
    }

    fn fetches(&self) -> usize {
        self.shared.fetches.load(Ordering::Relaxed)
    }
}

/// A model with a bound on how often a thread is interrupted where it could go on.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn claim_of_the_dead_is_broken_once_while_the_slot_passes_to_its_heir() {
    check(3, || {
        let all = Arc::new(Inherited::new());
        let other = Arc::clone(&all);
        let waiter = thread::spawn(move || other.read(owner(1), Inherited::ask));
        let heir = all.pass_on();
        all.read(heir, Inherited::ask);
        waiter.join().unwrap();
        assert_eq!((all.broken.load(Ordering::Relaxed), all.fetches()), (1, 1));
        assert!(!all.slot.is_stalled(heir));
    });
}

#[test]
fn two_waiters_and_the_heir_break_the_claim_of_the_dead_once() {
    check(2, || {
        let all = Arc::new(Inherited::new());
        let waiters = [1, 2].map(|slot| {
            let all = Arc::clone(&all);
            thread::spawn(move || all.read(owner(slot), Inherited::ask))
        });
        let heir = all.pass_on();
        all.read(heir, Inherited::ask);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        assert_eq!((all.broken.load(Ordering::Relaxed), all.fetches()), (1, 1));
    });
}

#[test]
fn late_verdict_on_a_former_holder_leaves_the_present_one_alone() {
    loom::model(|| {
        let all = Arc::new(Inherited::new());
        let (late, other) = (Arc::clone(&all), Arc::clone(&all));
        let former = all.first;
        let verdict = thread::spawn(move || late.slot.set_stalled(former));
        let reader = thread::spawn(move || {
            let held = other.shared.claim.holder().filter(|held| held.owner() != former);
            held.is_none_or(|held| !other.slot.is_stalled(held.owner()))
        });
        let heir = all.pass_on();
        assert!(!all.shared.claim.release(former) && all.shared.claim.try_claim(heir).is_ok());
        assert!(reader.join().unwrap(), "no waiting for the heir");
        verdict.join().unwrap();
        assert!(!all.slot.is_stalled(heir) && all.slot.is_stalled(former));
    });
}

#[test]
fn late_verdict_on_a_former_holder_does_not_undo_one_on_the_present() {
    loom::model(|| {
        let all = Arc::new(Inherited::new());
        let (former, heir) = (all.first, all.pass_on());
        let late = Arc::clone(&all);
        let verdict = thread::spawn(move || late.slot.set_stalled(former));
        all.slot.set_stalled(heir);
        verdict.join().unwrap();
        assert!(all.slot.is_stalled(heir));
    });
}

#[test]
fn holder_that_works_again_is_waited_for_again() {
    loom::model(|| {
        let all = Arc::new(Inherited::new());
        let me = all.first;
        let others = [(); 2].map(|()| {
            let all = Arc::clone(&all);
            thread::spawn(move || all.slot.set_stalled(me))
        });
        all.slot.clear_stalled();
        others.into_iter().for_each(|other| other.join().unwrap());
        all.slot.clear_stalled();
        assert!(!all.slot.is_stalled(me));
        assert_eq!(all.slot.generation(), me.generation());
    });
}

/// A cluster with one subcluster, fetched by several who each bring a place of their own: unlike
/// [`Subcluster`], what is written twice may be read meanwhile, since both write the same.
#[derive(Default)]
struct Cluster {
    claim: Claim,
    entry: MapEntry,
    event: Event,
    places: [AtomicU32; 3],
    fetches: AtomicUsize,
    publications: AtomicUsize,
}

impl Cluster {
    fn read_if_present(&self) -> bool {
        let present = self.entry.bits().present() & 1 != 0;
        if present {
            let place = self.entry.host().unwrap().0 as usize - 1;
            assert_eq!(self.places[place].load(Ordering::Relaxed), FETCHED);
        }
        present
    }

    /// Reads the base and stores what it brought, with a claim or after having lost it.
    fn fetch_and_release(&self, me: Owner) {
        if self.entry.bits().present() & 1 == 0 {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            let mine = HostOffset(u64::from(me.slot()) + 1);
            let place = self.entry.place(mine).err().unwrap_or(mine);
            self.places[place.0 as usize - 1].store(FETCHED, Ordering::Relaxed);
            let new = self.entry.publish(DATA);
            self.publications.fetch_add(usize::from(new == DATA), Ordering::Relaxed);
        }
        if self.claim.release(me) {
            self.event.ring();
        }
    }

    fn read(&self, me: Owner, stalled: &Slot) {
        while !self.read_if_present() {
            let Err(held) = self.claim.try_claim(me) else {
                self.fetch_and_release(me);
                continue;
            };
            if held.owner().slot() == 0 && stalled.is_stalled(held.owner()) {
                if self.claim.break_claim(held) {
                    self.event.ring();
                }
                continue;
            }
            let ticket = self.event.ticket();
            if self.claim.mark_waiting().is_some() && self.claim.holder().is_some() {
                self.event.wait(ticket, LONG);
            }
        }
    }
}

#[test]
fn late_owner_publishes_and_releases_beside_those_who_gave_it_up() {
    check(2, || {
        let all = Arc::new((Cluster::default(), Slot::default()));
        let late = all.1.take(0, 1);
        all.0.claim.try_claim(late).unwrap();
        let others = Arc::clone(&all);
        let comes_back = thread::spawn(move || {
            others.0.fetch_and_release(late);
            others.1.clear_stalled();
            others.0.read(late, &others.1);
        });
        let others = Arc::clone(&all);
        let reader = thread::spawn(move || others.0.read(owner(2), &others.1));
        // Past the deadline.
        if let Some(held) = all.0.claim.mark_waiting().filter(|held| held.owner() == late) {
            if all.1.give_up_on(&all.0.claim, held) {
                all.0.event.ring();
            }
        }
        all.0.read(owner(1), &all.1);
        comes_back.join().unwrap();
        reader.join().unwrap();
        assert_eq!(all.0.publications.load(Ordering::Relaxed), 1);
        assert!(all.0.fetches.load(Ordering::Relaxed) <= 2);
        assert_eq!(all.0.claim.holder(), None);
    });
}

/// A quota, the file it is for, and one writer's slot.
struct Account {
    space: Space,
    slot: Slot,
    lock: FileLock,
    /// Bytes that the file occupies.
    file: Mutex<u64>,
}

const QUOTA: u64 = 100;

impl Account {
    /// `used` bytes are accounted for, `occupied` are in the file.
    fn new(used: u64, occupied: u64) -> Self {
        let space = Space::default();
        space.restore(0, 0, used, 0);
        let slot = Slot::default();
        slot.take(0, 1);
        Account { space, slot, lock: FileLock::holding(), file: Mutex::new(occupied) }
    }

    fn occupied(&self) -> u64 {
        *self.file.lock().unwrap()
    }

    /// What storing does: announce, take, write, end. The account must have the bytes from when
    /// they are taken on.
    fn write(&self, bytes: u64) {
        let before = self.occupied();
        self.slot.begin_write(bytes);
        assert_eq!(self.space.reserve(0, bytes, 1, QUOTA), Some(bytes));
        assert!(self.space.used() >= before + bytes, "taken and not accounted for");
        *self.file.lock().unwrap() += bytes;
        self.slot.end_write(bytes);
        assert!(self.space.used() >= before + bytes, "written and not accounted for");
    }

    fn settle(&self) {
        self.space.settle(|| {
            let announced = self.slot.in_flight();
            let in_flight = if announced != 0 && self.lock.is_held() { announced } else { 0 };
            Some(self.occupied() + in_flight)
        });
    }
}

#[test]
fn account_that_is_settled_beside_a_write_never_loses_it() {
    loom::model(|| {
        let account = Arc::new(Account::new(6, 6));
        let other = Arc::clone(&account);
        let settler = thread::spawn(move || other.settle());
        account.write(4);
        settler.join().unwrap();
        account.settle();
        assert_eq!(account.space.used(), 10);
    });
}

#[test]
fn account_that_two_settle_beside_a_write_never_loses_it() {
    check(3, || {
        // As much too high as the write is long: what is settled in between comes to the same.
        let account = Arc::new(Account::new(10, 6));
        let settlers = [(); 2].map(|()| {
            let account = Arc::clone(&account);
            thread::spawn(move || account.settle())
        });
        account.write(4);
        settlers.into_iter().for_each(|settler| settler.join().unwrap());
        account.settle();
        assert_eq!(account.space.used(), 10);
    });
}

#[test]
fn bytes_of_a_writer_that_died_do_not_hide_those_of_its_heir() {
    check(3, || {
        let account = Arc::new(Account::new(6, 6));
        // Killed after half of it.
        account.slot.begin_write(4);
        account.space.reserve(0, 4, 1, QUOTA).unwrap();
        *account.file.lock().unwrap() += 2;
        let other = Arc::clone(&account);
        let settler = thread::spawn(move || other.settle());
        account.lock.die();
        assert!(account.lock.try_lock());
        account.slot.take(0, 2);
        account.write(4);
        settler.join().unwrap();
        account.settle();
        assert_eq!(account.space.used(), 12);
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

#[test]
#[should_panic(expected = "Causality violation")]
fn breaking_whatever_claim_is_there_after_the_verdict_is_found_by_the_checker() {
    loom::model(|| {
        let all: &Inherited = Box::leak(Box::new(Inherited::new()));
        let waiter = thread::spawn(|| {
            let seen = all.shared.claim.holder();
            if seen.is_some_and(|held| !all.slot.is_alive(held.owner(), || all.lock.is_held())) {
                // Not the one the verdict was about.
                let now = all.shared.claim.holder();
                all.note(now.is_some_and(|now| all.shared.claim.break_claim(now)));
                all.read(owner(1), Inherited::ask);
            }
        });
        let heir = all.pass_on();
        all.read(heir, Inherited::ask);
        waiter.join().unwrap();
    });
}

#[test]
#[should_panic(expected = "taken and not accounted for")]
fn taking_bytes_before_announcing_them_is_found_by_the_checker() {
    loom::model(|| {
        let account: &Account = Box::leak(Box::new(Account::new(6, 6)));
        let settler = thread::spawn(|| account.settle());
        account.space.reserve(0, 4, 1, QUOTA).unwrap();
        account.slot.begin_write(4);
        assert!(account.space.used() >= 10, "taken and not accounted for");
        settler.join().unwrap();
    });
}
