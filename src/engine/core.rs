//! What all parts of an engine share: the image, the live state, this open's slot, and whether the
//! cache may be used at all.
//!
//! Used by the rest of `engine`.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::status::{Counts, values};
use super::verify::{Known, Seen};
use super::{Options, Surroundings};
use crate::image::{BaseWatch, Image};
use crate::live::claim::Owner;
use crate::live::slot::{Counters, Slot, SlotGuard};
use crate::live::{LiveFile, sigbus, slot};

/// How long storing pauses after it failed.
const PAUSE: Duration = Duration::from_secs(1);
/// Bounds of the time that a reader waits for somebody else's fetch.
const PATIENCE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(500)..=Duration::from_secs(2);

/// Why a live state that failed is of no use.
fn why_failed(live: &LiveFile) -> &'static str {
    match live.is_lost() {
        true => "its live file was cut off or can no longer be read",
        false => "another process found it unreliable; close all users and open it again",
    }
}

/// An open image and its place among the others.
#[derive(Debug)]
pub struct Core {
    pub image: Image,
    pub surroundings: Surroundings,
    /// Both are there from the start, or come later where others were in the way then.
    live: OnceLock<LiveFile>,
    slot: OnceLock<SlotGuard>,
    /// Counters of an open without a slot.
    own: Box<Counters>,
    /// The slot's counters as its former holders left them.
    before: OnceLock<Counts>,
    populate: bool,
    /// Whether joining was put off, to be tried again.
    may_join_later: AtomicBool,
    off: AtomicBool,
    /// End of the current pause in storing, in milliseconds since `started`.
    paused_until: AtomicU64,
    started: Instant,
    /// Since when something is being stored, in milliseconds since `started` and one; zero for not.
    storing_since: AtomicU64,
    /// Clusters of the file that were handed out to this process and not used.
    pub spare: Mutex<Vec<u64>>,
    /// The data that this open has held against its checksums.
    pub seen: Seen,
    pub known: Known,
    /// Subclusters of which neither the data nor the checksum fitted the base.
    pub neither: AtomicU64,
    found_bad: OnceLock<()>,
    /// The sample of the base, once it is taken.
    sample: OnceLock<[u8; 32]>,
    /// The files of the base, once it is known.
    base: OnceLock<BaseWatch>,
    /// Moving average of the time that reading the base takes, in nanoseconds.
    latency: AtomicU64,
    complained: OnceLock<()>,
}

impl Core {
    /// A core without a live state, which passes reads through until it gets one.
    pub fn new(image: Image, options: &Options) -> Self {
        Core {
            surroundings: options.surroundings.clone(),
            seen: Seen::new(image.geometry()),
            known: Known::new(),
            neither: AtomicU64::new(0),
            found_bad: OnceLock::new(),
            sample: OnceLock::new(),
            base: OnceLock::new(),
            image,
            populate: options.populate,
            live: OnceLock::new(),
            slot: OnceLock::new(),
            own: Box::default(),
            before: OnceLock::new(),
            may_join_later: AtomicBool::new(false),
            off: AtomicBool::new(false),
            paused_until: AtomicU64::new(0),
            started: Instant::now(),
            storing_since: AtomicU64::new(0),
            spare: Mutex::default(),
            latency: AtomicU64::new(0),
            complained: OnceLock::new(),
        }
    }

    /// Starts to use a live state, and to populate where there is a slot. Once.
    pub fn use_live(&self, live: LiveFile, slot: Option<SlotGuard>) {
        // In this order: who sees a live state finds the slot that goes with it.
        if let Some(slot) = &slot {
            self.before.get_or_init(|| values(&live.slot(slot.owner().slot()).counters));
        }
        let taken = slot.map_or(Ok(()), |slot| self.slot.set(slot)).is_ok();
        if !taken || self.live.set(live).is_err() {
            log::error!("{}: joined twice", self.image.path().display());
        }
        self.may_join_later.store(false, Ordering::Release);
    }

    /// Reads pass through for now; see [`Core::may_join_later`].
    pub fn join_later(&self, reason: &str) {
        self.may_join_later.store(true, Ordering::Release);
        log::warn!(
            "{}: {reason}; reading from the base until that is over",
            self.image.path().display()
        );
    }

    /// Whether there is no live state because others were in the way, and the cache was not given up.
    pub fn may_join_later(&self) -> bool {
        self.may_join_later.load(Ordering::Acquire) && !self.off.load(Ordering::Acquire)
    }

    /// Whether the cache was given up, or this open has ended.
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::Acquire)
    }

    /// The live state, where the cache is in use.
    pub fn active(&self) -> Option<&LiveFile> {
        let live = self.live()?;
        if self.is_off() {
            return None;
        }
        if live.has_failed() {
            let changed = self.base.get().and_then(BaseWatch::change);
            self.bypass(changed.as_deref().unwrap_or(why_failed(live)));
            return None;
        }
        Some(live)
    }

    /// The live state, whether the cache is in use or not.
    pub fn live(&self) -> Option<&LiveFile> {
        let live = self.live.get();
        if live.is_some() {
            sigbus::let_through();
        }
        live
    }

    /// The name under which to claim, where storing makes sense now.
    pub fn claimant(&self) -> Option<Owner> {
        let live = self.live()?;
        let makes_sense = !live.space().is_full() && !self.is_paused() && !self.is_stuck();
        (self.populate && makes_sense).then(|| self.owner())?
    }

    /// The name under which this open claims, whether it makes sense now or not.
    pub fn owner(&self) -> Option<Owner> {
        self.slot.get().map(SlotGuard::owner)
    }

    /// This open's slot.
    pub fn slot(&self) -> Option<&Slot> {
        self.slot_of(self.live()?)
    }

    /// This open's slot in its live state.
    pub fn slot_of<'a>(&self, live: &'a LiveFile) -> Option<&'a Slot> {
        Some(live.slot(self.owner()?.slot()))
    }

    /// This open's counters.
    pub fn counters(&self) -> &Counters {
        self.slot().map_or(&self.own, |slot| &slot.counters)
    }

    /// What this open did, with a slot and before it had one.
    pub fn counts(&self) -> Counts {
        let mut counts = values(&self.own);
        if let (Some(slot), Some(before)) = (self.slot(), self.before.get()) {
            for ((count, now), before) in counts.iter_mut().zip(values(&slot.counters)).zip(before)
            {
                *count += now.saturating_sub(*before);
            }
        }
        counts
    }

    /// Whether this open stores what it fetches.
    pub fn populates(&self) -> bool {
        self.populate && self.slot.get().is_some()
    }

    /// Whether the holder of a claim is still there.
    pub fn is_alive(&self, owner: Owner) -> bool {
        let Some(live) = self.live() else { return false };
        live.slot(owner.slot()).is_alive(owner, || self.is_slot_held(owner.slot()))
    }

    /// Whether a slot has a holder.
    pub fn is_slot_held(&self, index: u32) -> bool {
        let Some(live) = self.live() else { return false };
        // A lock does not show to the descriptor that holds it.
        self.owner().is_some_and(|me| me.slot() == index) || slot::is_held(live.file(), index)
    }

    /// Stops using the cache, for this open.
    pub fn bypass(&self, reason: &str) {
        if !self.off.swap(true, Ordering::AcqRel) {
            log::warn!("{}: {reason}; reading from the base", self.image.path().display());
        }
    }

    /// Stops using the cache because this open ends.
    pub fn retire(&self) {
        self.off.store(true, Ordering::Release);
    }

    /// Stops using the cache, for everybody; who may only read the live state, for this open.
    pub fn fail(&self, reason: &str) {
        // In this order: who sees the live state failed before this line is out gives no reason.
        self.bypass(reason);
        if let Some(live) = self.live()
            && live.is_writable()
        {
            live.fail();
        }
    }

    /// Notes the sample of the base that was opened. Once.
    pub fn set_sample(&self, sample: [u8; 32]) {
        if self.sample.set(sample).is_err() {
            log::error!("{}: the base was sampled twice", self.image.path().display());
        }
    }

    /// The sample of the base that was opened, if one could be taken.
    pub fn sample(&self) -> Option<[u8; 32]> {
        self.sample.get().copied()
    }

    /// From now on the base is looked at. Once.
    pub fn watch_base(&self, base: BaseWatch) {
        if self.base.set(base).is_err() {
            log::error!("{}: the base was opened twice", self.image.path().display());
        }
    }

    /// Looks whether the base is what it was when it was opened. What was read from it before may be
    /// stored if so; otherwise the cache is given up.
    pub fn is_base_same(&self) -> bool {
        let Some(how) = self.base.get().and_then(BaseWatch::change) else { return true };
        // The same file for everybody, if its identity was noted.
        match self.image.header().cache.base.local {
            Some(_) => self.fail(&how),
            None => self.bypass(&how),
        }
        false
    }

    /// Notes that storing failed: it pauses, and the first time is worth a line.
    pub fn store_failed(&self, reason: &dyn std::fmt::Display) {
        if self.active().is_none() {
            // No wonder, and the line for that is out.
            return;
        }
        self.counters().populate_errors.add(1);
        let until = self.started.elapsed() + PAUSE;
        self.paused_until.store(until.as_millis() as u64, Ordering::Relaxed);
        if self.complained.set(()).is_ok() {
            log::warn!(
                "{}: {reason}; what cannot be stored is read from the base",
                self.image.path().display()
            );
        }
    }

    /// Notes that some subclusters, the first of them by number, are not what was stored: the first
    /// time is worth a line.
    pub fn note_bad(&self, first: u64, subclusters: u64) {
        let bits = self.image.geometry().subcluster_bits();
        self.counters().bad_bytes.add(subclusters << bits);
        if self.found_bad.set(()).is_ok() {
            log::warn!(
                "{}: cached data at guest offset {:#x} is not what was stored; reading it from the \
                 base, and the same wherever else that shows",
                self.image.path().display(),
                first << bits
            );
        }
    }

    fn is_paused(&self) -> bool {
        let until = self.paused_until.load(Ordering::Relaxed);
        until != 0 && (self.started.elapsed().as_millis() as u64) < until
    }

    /// Notes that storing something begins or has ended.
    pub fn set_storing(&self, now: bool) {
        let since = if now { self.started.elapsed().as_millis() as u64 + 1 } else { 0 };
        self.storing_since.store(since, Ordering::Relaxed);
    }

    /// Whether storing has been at the same thing for too long: the image's disk does not answer.
    pub fn is_stuck(&self) -> bool {
        let since = self.storing_since.load(Ordering::Relaxed);
        let stuck = since + PATIENCE.start().as_millis() as u64;
        since != 0 && self.started.elapsed().as_millis() as u64 > stuck
    }

    /// Makes sure that a cluster has a map entry; where that fails storing pauses.
    pub fn ensure(&self, cluster: u64) {
        if let Some(live) = self.active()
            && let Err(err) = live.ensure(cluster)
        {
            self.store_failed(&format!("could not extend the live file: {err}"));
        }
    }

    /// Takes note of how long a read of the base took.
    pub fn note_latency(&self, took: Duration) {
        let took = took.as_nanos() as u64;
        let before = self.latency.load(Ordering::Relaxed);
        let after = if before == 0 { took } else { before - before / 8 + took / 8 };
        self.latency.store(after, Ordering::Relaxed);
    }

    /// How long to wait for somebody else's fetch: several times what reading the base takes.
    pub fn patience(&self) -> Duration {
        let latency = Duration::from_nanos(self.latency.load(Ordering::Relaxed));
        (latency * 8).clamp(*PATIENCE.start(), *PATIENCE.end())
    }
}
