//! What all parts of an engine share: the image, the live state, this open's slot, and whether the
//! cache may be used at all.
//!
//! Used by the rest of `engine`.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::verify::Seen;
use crate::image::Image;
use crate::live::claim::Owner;
use crate::live::slot::{Counters, Slot, SlotGuard};
use crate::live::{LiveFile, slot};

/// How long storing pauses after it failed.
const PAUSE: Duration = Duration::from_secs(1);
/// Bounds of the time that a reader waits for somebody else's fetch.
const PATIENCE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(200)..=Duration::from_secs(2);

/// An open image and its place among the others.
#[derive(Debug)]
pub struct Core {
    pub image: Image,
    live: Option<LiveFile>,
    slot: Option<SlotGuard>,
    /// Counters of an open without a slot.
    own: Box<Counters>,
    populate: bool,
    off: AtomicBool,
    /// End of the current pause in storing, in milliseconds since `started`.
    paused_until: AtomicU64,
    started: Instant,
    /// Clusters of the file that were handed out to this process and not used.
    pub spare: Mutex<Vec<u64>>,
    /// The data that this open has held against its checksums.
    pub seen: Seen,
    found_bad: OnceLock<()>,
    /// Moving average of the time that reading the base takes, in nanoseconds.
    latency: AtomicU64,
    complained: OnceLock<()>,
}

impl Core {
    /// A core that populates where it has a slot and is told to, and otherwise only reads.
    pub fn new(
        image: Image,
        live: Option<LiveFile>,
        slot: Option<SlotGuard>,
        populate: bool,
    ) -> Self {
        Core {
            seen: Seen::new(image.geometry()),
            found_bad: OnceLock::new(),
            image,
            populate: populate && slot.is_some(),
            live,
            slot,
            own: Box::default(),
            off: AtomicBool::new(false),
            paused_until: AtomicU64::new(0),
            started: Instant::now(),
            spare: Mutex::default(),
            latency: AtomicU64::new(0),
            complained: OnceLock::new(),
        }
    }

    /// The live state, where the cache is in use.
    pub fn active(&self) -> Option<&LiveFile> {
        let live = self.live.as_ref()?;
        (!self.off.load(Ordering::Acquire) && !live.has_failed()).then_some(live)
    }

    /// The live state, whether the cache is in use or not.
    pub fn live(&self) -> Option<&LiveFile> {
        self.live.as_ref()
    }

    /// The name under which to claim, where storing makes sense now.
    pub fn claimant(&self) -> Option<Owner> {
        let live = self.live.as_ref()?;
        (self.populate && !live.space().is_full() && !self.is_paused())
            .then(|| self.slot.as_ref().map(SlotGuard::owner))?
    }

    /// The name under which this open claims, whether it makes sense now or not.
    pub fn owner(&self) -> Option<Owner> {
        self.slot.as_ref().map(SlotGuard::owner)
    }

    /// This open's slot.
    pub fn slot(&self) -> Option<&Slot> {
        Some(self.live.as_ref()?.slot(self.owner()?.slot()))
    }

    /// This open's counters.
    pub fn counters(&self) -> &Counters {
        self.slot().map_or(&self.own, |slot| &slot.counters)
    }

    /// Whether this open stores what it fetches.
    pub fn populates(&self) -> bool {
        self.populate
    }

    /// Whether the holder of a claim is still there.
    pub fn is_alive(&self, owner: Owner) -> bool {
        let Some(live) = &self.live else { return false };
        let same = Owner::new(owner.slot(), live.slot(owner.slot()).generation()) == owner;
        same && self.is_slot_held(owner.slot())
    }

    /// Whether a slot has a holder.
    pub fn is_slot_held(&self, index: u32) -> bool {
        let Some(live) = &self.live else { return false };
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

    /// Stops using the cache, for everybody.
    pub fn fail(&self, reason: &str) {
        if let Some(live) = &self.live {
            live.fail();
        }
        self.bypass(reason);
    }

    /// Notes that storing failed: it pauses, and the first time is worth a line.
    pub fn store_failed(&self, reason: &dyn std::fmt::Display) {
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

    /// Notes that subclusters from about a guest offset on are not what was stored: the first time
    /// is worth a line.
    pub fn note_bad(&self, offset: u64, subclusters: u64) {
        self.counters().bad_bytes.add(subclusters << self.image.geometry().subcluster_bits());
        if self.found_bad.set(()).is_ok() {
            log::warn!(
                "{}: cached data at guest offset {offset:#x} is not what was stored; reading it \
                 from the base, and the same wherever else that shows",
                self.image.path().display()
            );
        }
    }

    fn is_paused(&self) -> bool {
        let until = self.paused_until.load(Ordering::Relaxed);
        until != 0 && (self.started.elapsed().as_millis() as u64) < until
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
