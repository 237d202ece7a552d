//! Cached data is held against its checksums when it is first read after an open. What is not what
//! was stored (bit rot, a torn copy, a stray writer) is read from the base and stored anew in its
//! place.
//!
//! ```text
//!   plan            data that this open has not seen yet       -> Step::Check
//!   the caller      reads the data from the image file
//!   fits_known      the checksums around were read lately: served without reading them again
//!   is_sound        with the checksums from the file; all fits: served, and a plain hit from then on
//!                   something does not: the caller serves the base's bytes ...
//!   repair          ... and hands them over; the populating thread rewrites what is bad
//! ```
//!
//! What was seen is remembered for each open on its own: nobody has to believe another process, and
//! a hit looks at memory that nobody else writes to.
//!
//! Where neither what was stored nor its checksum fits the base's bytes, both are bad; where there is
//! much of that, the base is most likely another one than the cache was made from, though nothing
//! else showed it (see `image::identity`), and the cache is given up.
//!
//! Used by `plan`, `ahead`, `populate` and `Engine`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::buffer::Buffer;
use super::core::Core;
use crate::error::Result;
use crate::format::{ByteRange, Checksum, Geometry, HostOffset, SUBCLUSTERS};
use crate::image::decode_checksums;

/// Entries of each level of [`Seen`].
const FAN: u64 = 1024;

/// For each guest cluster the subclusters whose data this open has seen to be sound: a tree that
/// grows where something is read, since a disk may have billions of clusters.
#[derive(Debug)]
pub struct Seen {
    top: Box<[OnceLock<Box<[Leaf]>>]>,
}

type Leaf = OnceLock<Box<[AtomicU32]>>;

impl Seen {
    pub fn new(geometry: &Geometry) -> Self {
        let len = geometry.clusters().div_ceil(FAN * FAN);
        Seen { top: (0..len).map(|_| OnceLock::new()).collect() }
    }

    /// The mask of a cluster. Takes no lock and touches nothing that other processes write.
    pub fn mask(&self, cluster: u64) -> u32 {
        self.top
            .get((cluster / (FAN * FAN)) as usize)
            .and_then(OnceLock::get)
            .and_then(|leaves| leaves.get((cluster / FAN % FAN) as usize)?.get())
            .and_then(|leaf| leaf.get((cluster % FAN) as usize))
            .map_or(0, |mask| mask.load(Ordering::Relaxed))
    }

    /// Adds subclusters to a cluster's mask.
    pub fn add(&self, cluster: u64, mask: u32) {
        let Some(leaves) = self.top.get((cluster / (FAN * FAN)) as usize) else { return };
        let leaves = leaves.get_or_init(|| (0..FAN).map(|_| OnceLock::new()).collect());
        let Some(leaf) = leaves.get((cluster / FAN % FAN) as usize) else { return };
        let leaf = leaf.get_or_init(|| (0..FAN).map(|_| AtomicU32::new(0)).collect());
        if let Some(seen) = leaf.get((cluster % FAN) as usize) {
            seen.fetch_or(mask, Ordering::Relaxed);
        }
    }
}

/// Subclusters that may fit neither their checksums nor the base.
const MOST_NEITHER: u64 = 64;
/// Subclusters whose checksums are read and kept together: 16 KiB of them. A disk takes no longer for
/// these than for fewer, and each time is one that a guest's read waits twice.
const WINDOW: u64 = 4096;
/// Windows that are kept at the most: 2 MiB of checksums, of 2 GiB of the guest's disk by default.
const WINDOWS: u64 = 128;

/// Checksums that were read lately, so that a block need not cost a read of its own for them. What
/// is in here may be older than the file, or another subcluster's whose window lay in the same place
/// before; it proves that data is sound, never that it is not. A checksum depends on the number of
/// its subcluster, so another's fits no more likely than any wrong one, and nothing has to be locked
/// or come in an order.
#[derive(Debug)]
pub struct Known {
    /// By window, modulo [`WINDOWS`]; each made when it is first needed.
    windows: Box<[OnceLock<Box<[AtomicU32]>>]>,
}

impl Known {
    pub fn new() -> Self {
        Known { windows: (0..WINDOWS).map(|_| OnceLock::new()).collect() }
    }

    /// The checksum that was read for a subcluster, or something else.
    pub fn get(&self, number: u64) -> Option<Checksum> {
        let window = self.windows.get((number / WINDOW % WINDOWS) as usize)?.get()?;
        let kept = window.get((number % WINDOW) as usize)?;
        Some(Checksum::decode(kept.load(Ordering::Relaxed).to_ne_bytes()))
    }

    /// Keeps the checksums of some windows.
    fn keep(&self, windows: std::ops::Range<u64>, checksums: &[Checksum]) {
        for (window, part) in windows.zip(checksums.chunks(WINDOW as usize)) {
            let Some(place) = self.windows.get((window % WINDOWS) as usize) else { continue };
            let place = place.get_or_init(|| (0..WINDOW).map(|_| AtomicU32::new(0)).collect());
            for (kept, checksum) in place.iter().zip(part) {
                kept.store(u32::from_ne_bytes(checksum.encode()), Ordering::Relaxed);
            }
        }
    }
}

/// Cached subclusters that have to be held against their checksums before they are served.
#[derive(Debug)]
pub struct Check {
    pub(super) core: Arc<Core>,
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) host: HostOffset,
}

impl Check {
    /// The guest's bytes in them: whole subclusters, cut at the end of the disk.
    pub fn range(&self) -> ByteRange {
        self.core.image.geometry().subcluster_range(self.first, self.count)
    }

    /// Where their data stands in the image file, and how many bytes: whole subclusters. What lies
    /// beyond the end of a file that was cut off counts as zeros.
    pub fn data(&self) -> (HostOffset, usize) {
        (self.host, (self.count << self.core.image.geometry().subcluster_bits()) as usize)
    }

    /// Where their checksums stand in the image file, and how many bytes: with those around them,
    /// which are likely to be asked for next.
    pub fn checksums(&self) -> (HostOffset, usize) {
        let windows = self.windows();
        let at = self.core.image.layout().checksum_offset(windows.start * WINDOW);
        (at, ((windows.end - windows.start) * WINDOW) as usize * Checksum::SIZE)
    }

    /// The windows that its subclusters lie in.
    fn windows(&self) -> std::ops::Range<u64> {
        self.first / WINDOW..(self.first + self.count).div_ceil(WINDOW)
    }

    /// Whether all data fits checksums that were read before. If so it is a hit from now on;
    /// otherwise the ones in the file tell.
    pub fn fits_known(&self, data: &[u8]) -> bool {
        let fits = data.len() == self.data().1
            && self.subclusters(data).all(|(number, data)| {
                // Asked for first: it comes from memory while the data's is worked out.
                let kept = self.core.known.get(number);
                kept == Some(Checksum::of(number, data))
            });
        if fits {
            (self.first..self.first + self.count).for_each(|number| see(&self.core, number));
        }
        fits
    }

    /// Whether all data fits its checksums, both as they are in the file. If so it is a hit from
    /// now on.
    pub fn is_sound(&self, checksums: &[u8], data: &[u8]) -> bool {
        let around = decode_checksums(checksums);
        let windows = self.windows();
        let skip = (self.first - windows.start * WINDOW) as usize;
        let expected: Vec<Checksum> =
            around.iter().copied().skip(skip).take(self.count as usize).collect();
        // Buffers of other sizes than those asked for prove nothing.
        let whole = data.len() == self.data().1 && expected.len() as u64 == self.count;
        let (mut bad, mut first_bad) =
            if whole { (0, None) } else { (self.count, Some(self.first)) };
        for ((number, data), expected) in self.subclusters(data).zip(expected) {
            if Checksum::of(number, data) != expected {
                first_bad = first_bad.or(Some(number));
                bad += 1;
            }
        }
        match first_bad {
            None => {
                self.core.known.keep(windows, &around);
                (self.first..self.first + self.count).for_each(|number| see(&self.core, number));
            }
            Some(number) => self.core.note_bad(number, bad),
        }
        bad == 0
    }

    /// Notes that data or checksums could not be read: they are lost, and repaired like what is bad.
    pub fn note_unreadable(&self) {
        self.core.note_bad(self.first, self.count);
    }

    /// Rewrites what does not fit its checksum with the base's bytes, the whole of
    /// [`Check::range`]; returns how many bytes that were. `write` stores data where there is room
    /// for it, and says whether there was. Blocks.
    pub(super) fn repair(
        &self,
        base: &mut Buffer,
        mut write: impl FnMut(&[u8], HostOffset) -> Result<bool>,
    ) -> Result<u64> {
        let image = &self.core.image;
        let (host, len) = self.data();
        // Beyond the end of the disk there is nothing, which a subcluster stores as zeros.
        base.pad(len);
        let mut found = vec![0; len];
        if image.read_or_zero(&mut found, host).is_err() {
            // What cannot be read is lost; writing it may be what the disk waits for.
            found.fill(0);
        }
        let unknown = vec![Checksum::NONE; self.count as usize];
        let checksums = image.read_checksums(self.first, self.count).unwrap_or(unknown);
        let mut repaired = 0;
        let parts = self.subclusters(&found).zip(self.subclusters(base)).zip(checksums);
        for (((number, found), (_, base)), checksum) in parts {
            if Checksum::of(number, found) == checksum {
                // Sound, or somebody else was faster.
                continue;
            }
            let right = Checksum::of(number, base);
            let neither = found != base && checksum != right && checksum != Checksum::NONE;
            if neither && self.core.neither.fetch_add(1, Ordering::Relaxed) >= MOST_NEITHER {
                self.core.bypass(
                    "much cached data fits neither its checksum nor the base, which must have changed \
                     (if not, 'vmcache check --repair' drops the data)",
                );
                break;
            }
            let place = HostOffset(host.0 + (number - self.first) * base.len() as u64);
            if !write(base, place)? {
                break;
            }
            image.write_checksums(number, &[right])?;
            see(&self.core, number);
            repaired += base.len() as u64;
        }
        Ok(repaired)
    }

    fn subclusters<'a>(&self, data: &'a [u8]) -> impl Iterator<Item = (u64, &'a [u8])> {
        let size = self.core.image.geometry().subcluster_size() as usize;
        (self.first..).zip(data.chunks_exact(size))
    }
}

fn see(core: &Core, number: u64) {
    core.seen.add(number / u64::from(SUBCLUSTERS), 1 << (number % u64::from(SUBCLUSTERS)));
}
