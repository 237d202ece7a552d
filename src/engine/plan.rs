//! Planning a read: which bytes are where. Takes no lock and makes no system call.
//!
//! A plan claims what nobody has and nobody fetches, in whole subclusters, before anything is read.
//! Its holder fetches what it claimed before it waits for others, so that two readers that each
//! wait for the other's part both get on.
//!
//! Used by `Engine`.

use std::sync::Arc;

use smallvec::SmallVec;

use super::core::Core;
use super::verify::Check;
use crate::format::{ByteRange, Geometry, GuestOffset, HostOffset, SUBCLUSTERS, SubclusterBits};
use crate::live::claim::{Claim, Owner};
use crate::live::{LiveFile, MapEntry};

/// Bytes fetched in one request to the base at the most: bounds the buffer.
pub const FETCH_MAX: u64 = 2 << 20;
/// Bytes checked in one piece at the most, or one subcluster: what is read, looked at and copied
/// stays in the processor's cache meanwhile.
const CHECK_MAX: u64 = 64 << 10;

/// How often a claim is broken and tried for before the base is read without one: others may be
/// faster once or twice, and only a live file that somebody tampers with goes on like that.
const CLAIM_TRIES: u32 = 8;

/// The parts of a read, in order, without gaps.
pub type Plan = SmallVec<[Part; 2]>;

/// A run of bytes of the read that are got in one way.
#[derive(Debug)]
pub struct Part {
    /// Which bytes.
    pub guest: ByteRange,
    /// How to get them.
    pub step: Step,
}

/// How to get the bytes of a part.
#[derive(Debug)]
pub enum Step {
    /// From the image file, from this place on.
    Hit(HostOffset),
    /// From the image file, after a look at the checksums: see [`Check`].
    Check(Check),
    /// They are zero.
    Zero,
    /// From the base, the whole of [`Fetch::range`], which goes to [`super::Engine::fill`].
    Fetch(Fetch),
    /// Later: see [`super::Engine::wait`].
    Wait(Ticket),
    /// From the base, and not to be stored.
    Base,
}

/// What a [`Step::Wait`] waits for.
#[derive(Debug)]
pub struct Ticket(pub(super) Waiting);

#[derive(Debug)]
pub(super) enum Waiting {
    /// Somebody's claim.
    Claim { cluster: u64, subcluster: u32 },
    /// Room in the live file for the state of the clusters around.
    Group { cluster: u64 },
}

/// What the cache has of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Data, at this place of the image file.
    Data(HostOffset),
    /// Zeros.
    Zero,
    /// Nothing.
    Absent,
}

/// Subclusters claimed by this open, to be fetched from the base. Dropping it gives them up.
#[derive(Debug)]
pub struct Fetch {
    core: Arc<Core>,
    first: u64,
    count: u64,
}

impl Fetch {
    /// The bytes to read from the base: whole subclusters, cut at the end of the disk.
    pub fn range(&self) -> ByteRange {
        self.core.image.geometry().subcluster_range(self.first, self.count)
    }

    /// Number of the first subcluster, from the start of the disk, and how many there are.
    pub(super) fn subclusters(&self) -> (u64, u64) {
        (self.first, self.count)
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        // Also where the cache was given up meanwhile: others may still be waiting.
        let (Some(live), Some(me)) = (self.core.live(), self.core.owner()) else { return };
        let mut waited_for = false;
        for subcluster in self.first..self.first + self.count {
            let cluster = subcluster / u64::from(SUBCLUSTERS);
            if let Some(claim) = claim_of(live, cluster, subcluster % u64::from(SUBCLUSTERS)) {
                waited_for |= claim.release(me);
            }
        }
        if waited_for {
            live.event().ring();
        }
    }
}

fn claim_of(live: &LiveFile, cluster: u64, subcluster: u64) -> Option<&Claim> {
    live.claims(cluster)?.get(subcluster as usize)
}

/// Plans a read of a range within the disk.
pub fn plan(core: &Arc<Core>, range: ByteRange) -> Plan {
    let mut planner = Planner { core, geometry: core.image.geometry(), plan: Plan::new() };
    match core.active() {
        Some(live) => {
            if let Some(slot) = core.slot() {
                slot.clear_stalled();
            }
            planner.plan(live, range);
        }
        None => planner.push(range, Step::Base),
    }
    planner.count();
    planner.plan
}

/// Counts a read. Where its bytes lie in the image file, where they are data of one cluster that was
/// seen to be sound: what a warm cache is asked for most. `None`: see [`plan`].
pub fn begin(core: &Core, range: ByteRange) -> Option<HostOffset> {
    let live = core.active();
    // Looked for once: each look asks which thread this is.
    let slot = live.and_then(|live| core.slot_of(live));
    let counters = slot.map_or_else(|| core.counters(), |slot| &slot.counters);
    counters.reads.add(1);
    let host = hit(core, live?, range)?;
    if let Some(slot) = slot {
        slot.clear_stalled();
    }
    counters.hit_bytes.add(range.len);
    Some(host)
}

fn hit(core: &Core, live: &LiveFile, range: ByteRange) -> Option<HostOffset> {
    let geometry = core.image.geometry();
    let cluster = geometry.cluster_of(GuestOffset(range.start));
    let cluster_start = bytes_end(geometry, cluster, 0);
    if range.end() - cluster_start > geometry.cluster_size() {
        return None;
    }
    let (first, end) = subclusters(geometry, cluster, range.start, range.end());
    let entry = live.entry(cluster)?;
    let sound = entry.bits().data() & core.seen.mask(cluster);
    if (first..end).any(|subcluster| sound >> subcluster & 1 == 0) {
        return None;
    }
    // After the bits, which say that there is one.
    let host = entry.host().filter(|host| core.image.layout().is_data_cluster(*host))?;
    Some(HostOffset(host.0 + (range.start - cluster_start)))
}

/// The state of the first bytes of a range and how many bytes share it, at least one.
pub fn presence(core: &Core, range: ByteRange) -> (Presence, u64) {
    let geometry = core.image.geometry();
    let mut found: Option<Presence> = None;
    let mut at = range.start;
    let Some(live) = core.active() else { return (Presence::Absent, range.len) };
    while at < range.end() {
        let cluster = geometry.cluster_of(GuestOffset(at));
        let entry = live.entry(cluster);
        let bits = entry.map_or(SubclusterBits::default(), MapEntry::bits);
        let (first, end) = subclusters(geometry, cluster, at, range.end());
        let (class, run_end) = run(bits, u32::MAX, first, end);
        let here = match (class, entry.and_then(MapEntry::host)) {
            (Class::Data, Some(host)) if core.image.layout().is_data_cluster(host) => {
                Presence::Data(HostOffset(host.0 + at % geometry.cluster_size()))
            }
            (Class::Zero, _) => Presence::Zero,
            _ => Presence::Absent,
        };
        let goes_on = match (found, here) {
            (None, _) => true,
            (Some(Presence::Data(start)), Presence::Data(host)) => {
                start.0 + (at - range.start) == host.0
            }
            (Some(before), here) => before == here,
        };
        if !goes_on {
            break;
        }
        found.get_or_insert(here);
        at = bytes_end(geometry, cluster, run_end).min(range.end());
    }
    (found.unwrap_or(Presence::Absent), at - range.start)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Data,
    Unseen,
    Zero,
    Missing,
}

fn class(bits: SubclusterBits, seen: u32, subcluster: u32) -> Class {
    if bits.data() & seen & 1 << subcluster != 0 {
        Class::Data
    } else if bits.data() >> subcluster & 1 != 0 {
        Class::Unseen
    } else if bits.zero() >> subcluster & 1 != 0 {
        Class::Zero
    } else {
        Class::Missing
    }
}

/// The class of a subcluster and one past the last of the same class, up to `end`. Data that is not
/// in the mask `seen` has a class of its own.
fn run(bits: SubclusterBits, seen: u32, first: u32, end: u32) -> (Class, u32) {
    let kind = class(bits, seen, first);
    let mask = match kind {
        Class::Data => bits.data() & seen,
        Class::Unseen => bits.data() & !seen,
        Class::Zero => bits.zero(),
        Class::Missing => !bits.present(),
    };
    let len = (!(mask >> first)).trailing_zeros();
    (kind, (first + len).min(end))
}

/// The subclusters of a cluster that the bytes from `at` to `end` touch: first and one past last.
fn subclusters(geometry: &Geometry, cluster: u64, at: u64, end: u64) -> (u32, u32) {
    let start = cluster << geometry.cluster_bits();
    let within = end.min(start + geometry.cluster_size()) - start;
    let first = (at - start) >> geometry.subcluster_bits();
    (first as u32, within.div_ceil(geometry.subcluster_size()) as u32)
}

/// Guest offset at which a subcluster of a cluster starts.
fn bytes_end(geometry: &Geometry, cluster: u64, subcluster: u32) -> u64 {
    (cluster << geometry.cluster_bits()) + (u64::from(subcluster) << geometry.subcluster_bits())
}

struct Planner<'a> {
    core: &'a Arc<Core>,
    geometry: &'a Geometry,
    plan: Plan,
}

impl Planner<'_> {
    fn plan(&mut self, live: &LiveFile, range: ByteRange) {
        let claimant = self.core.claimant();
        let mut at = range.start;
        while at < range.end() {
            let cluster = self.geometry.cluster_of(GuestOffset(at));
            let end = bytes_end(self.geometry, cluster, SUBCLUSTERS).min(range.end());
            let here = ByteRange { start: at, len: end - at };
            match (live.entry(cluster), live.claims(cluster)) {
                (Some(entry), Some(claims)) => {
                    self.plan_cluster(live, claimant, cluster, entry, claims, here);
                }
                _ if claimant.is_some() => {
                    self.push(here, Step::Wait(Ticket(Waiting::Group { cluster })));
                }
                _ => self.push(here, Step::Base),
            }
            at = end;
        }
    }

    fn plan_cluster(
        &mut self,
        live: &LiveFile,
        claimant: Option<Owner>,
        cluster: u64,
        entry: &MapEntry,
        claims: &[Claim; SUBCLUSTERS as usize],
        range: ByteRange,
    ) {
        let (mut at, end) = subclusters(self.geometry, cluster, range.start, range.end());
        let mut bits = entry.bits();
        let seen = self.core.seen.mask(cluster);
        while at < end {
            let (class, mut run_end) = run(bits, seen, at, end);
            if class == Class::Missing {
                run_end = at + 1;
                if let Some(step) = self.take_missing(live, claimant, cluster, at, claims) {
                    self.push(self.bytes(cluster, at, run_end, range), step);
                } else if entry.bits().present() >> at & 1 == 0 {
                    // Claimed, and on the second look nobody was faster.
                    self.push_fetch(cluster, at, self.bytes(cluster, at, run_end, range));
                } else {
                    self.let_go(live, &claims[at as usize]);
                    bits = entry.bits();
                    if bits.present() >> at & 1 != 0 {
                        continue;
                    }
                    // Only a live file that somebody tampers with forgets what it had.
                    self.push(self.bytes(cluster, at, run_end, range), Step::Base);
                }
            } else {
                if class == Class::Unseen {
                    run_end = run_end.min(at + self.most_checked() as u32);
                }
                let bytes = self.bytes(cluster, at, run_end, range);
                let step = match (class, entry.host()) {
                    (Class::Zero, _) => Step::Zero,
                    (_, Some(host)) if self.core.image.layout().is_data_cluster(host) => {
                        if class == Class::Unseen {
                            self.push_check(cluster, at, run_end, host, bytes);
                            at = run_end;
                            continue;
                        }
                        Step::Hit(HostOffset(host.0 + bytes.start % self.geometry.cluster_size()))
                    }
                    // Only a live file that somebody tampered with shows data nowhere.
                    _ => Step::Base,
                };
                self.push(bytes, step);
            }
            at = run_end;
        }
    }

    /// Claims a missing subcluster (`None`), or says what to do where that cannot be.
    fn take_missing(
        &self,
        live: &LiveFile,
        claimant: Option<Owner>,
        cluster: u64,
        subcluster: u32,
        claims: &[Claim; SUBCLUSTERS as usize],
    ) -> Option<Step> {
        let claim = &claims[subcluster as usize];
        for _ in 0..CLAIM_TRIES {
            let held = match claimant {
                Some(me) => match claim.try_claim(me) {
                    Ok(()) => return None,
                    Err(held) => held,
                },
                None => match claim.holder() {
                    // To wait is to mark the claim, and to break it when its owner is gone.
                    Some(held) if live.is_writable() => held,
                    _ => return Some(Step::Base),
                },
            };
            let owner = held.owner();
            if self.core.owner() == Some(owner) && self.core.is_stuck() {
                // The bytes came long ago and cannot be stored; the base has them.
                return Some(Step::Base);
            }
            if !live.slot(owner.slot()).is_stalled(owner) {
                return Some(Step::Wait(Ticket(Waiting::Claim { cluster, subcluster })));
            }
            if claim.break_claim(held) {
                live.event().ring();
            }
        }
        Some(Step::Base)
    }

    fn let_go(&self, live: &LiveFile, claim: &Claim) {
        if let Some(me) = self.core.owner()
            && claim.release(me)
        {
            live.event().ring();
        }
    }

    /// The bytes of the request that lie in some subclusters of a cluster.
    fn bytes(&self, cluster: u64, first: u32, end: u32, range: ByteRange) -> ByteRange {
        let start = bytes_end(self.geometry, cluster, first).max(range.start);
        let end = bytes_end(self.geometry, cluster, end).min(range.end());
        ByteRange { start, len: end - start }
    }

    fn push_fetch(&mut self, cluster: u64, subcluster: u32, bytes: ByteRange) {
        let number = cluster * u64::from(SUBCLUSTERS) + u64::from(subcluster);
        let most = (FETCH_MAX >> self.geometry.subcluster_bits()).max(1);
        if let Some(Part { guest, step: Step::Fetch(fetch) }) = self.plan.last_mut()
            && fetch.first + fetch.count == number
            && fetch.count < most
        {
            fetch.count += 1;
            guest.len += bytes.len;
            return;
        }
        let fetch = Fetch { core: Arc::clone(self.core), first: number, count: 1 };
        self.plan.push(Part { guest: bytes, step: Step::Fetch(fetch) });
    }

    /// Subclusters that are checked in one piece.
    fn most_checked(&self) -> u64 {
        (CHECK_MAX >> self.geometry.subcluster_bits()).max(1)
    }

    /// Adds subclusters of a cluster that lies at `host` to be checked.
    fn push_check(
        &mut self,
        cluster: u64,
        start: u32,
        end: u32,
        host: HostOffset,
        bytes: ByteRange,
    ) {
        let first = cluster * u64::from(SUBCLUSTERS) + u64::from(start);
        let count = u64::from(end - start);
        let host = HostOffset(host.0 + (u64::from(start) << self.geometry.subcluster_bits()));
        let most = self.most_checked();
        if let Some(Part { guest, step: Step::Check(check) }) = self.plan.last_mut()
            && check.first + check.count == first
            && check.host.0 + check.data().1 as u64 == host.0
            && check.count + count <= most
        {
            check.count += count;
            guest.len += bytes.len;
            return;
        }
        let check = Check { core: Arc::clone(self.core), first, count, host };
        self.plan.push(Part { guest: bytes, step: Step::Check(check) });
    }

    /// Adds a part, or makes the last one longer where the new one goes on in the same way.
    fn push(&mut self, bytes: ByteRange, step: Step) {
        if let Some(last) = self.plan.last_mut() {
            let goes_on = match (&last.step, &step) {
                (Step::Hit(start), Step::Hit(host)) => start.0 + last.guest.len == host.0,
                (Step::Zero, Step::Zero) | (Step::Base, Step::Base) => true,
                // One ticket at a time: the rest is planned again afterwards anyway.
                (Step::Wait(Ticket(Waiting::Claim { .. })), Step::Wait(Ticket(new))) => {
                    matches!(new, Waiting::Claim { .. })
                }
                _ => false,
            };
            if goes_on {
                last.guest.len += bytes.len;
                return;
            }
        }
        self.plan.push(Part { guest: bytes, step });
    }

    fn count(&self) {
        let counters = self.core.counters();
        for Part { guest, step } in &self.plan {
            let counter = match step {
                Step::Hit(_) => &counters.hit_bytes,
                Step::Zero => &counters.zero_bytes,
                Step::Fetch(_) | Step::Base => &counters.miss_bytes,
                Step::Wait(Ticket(Waiting::Claim { .. })) => &counters.waited_bytes,
                // Counted when it is known what they are.
                Step::Wait(Ticket(Waiting::Group { .. })) | Step::Check(_) => continue,
            };
            counter.add(guest.len);
        }
    }
}
