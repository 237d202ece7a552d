//! Looking at an image from outside, while it is in use or not: what `vmcache info`, `stats` and
//! `check` show. Takes no slot, and no lock that would hold anybody up.
//!
//! Used by the command line.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::populate::is_used_up;
use super::{Surroundings, join};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, SUBCLUSTERS, SubclusterBits};
use crate::image::{self, Access, BaseState, Image, Observer, Scan, Use};
use crate::live::LiveFile;
use crate::live::slot::{Counters, SLOTS, is_held};

/// How long a check waits for a checkpoint that is being written.
const CHECK_PATIENCE: Duration = Duration::from_secs(10);

/// What an image is good for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Nothing is cached yet.
    Empty,
    /// Something is cached and there is room for more.
    Filling,
    /// The quota is reached.
    Full,
    /// The base is not what the cache was made from.
    Stale,
    /// The image contradicts itself or something else has written to it.
    Damaged,
}

impl ImageState {
    /// The state's name in `vmcache info`.
    pub fn name(self) -> &'static str {
        match self {
            ImageState::Empty => "empty",
            ImageState::Filling => "filling",
            ImageState::Full => "full",
            ImageState::Stale => "stale",
            ImageState::Damaged => "damaged",
        }
    }
}

/// One process that has the image open.
#[derive(Clone, Debug)]
pub struct ProcessStats {
    /// Its process id, in its own pid namespace.
    pub pid: u32,
    /// What it, and those before it in the same slot, did; in the order of [`COUNTERS`].
    pub counters: Counts,
}

/// Names of the counters, as `vmcache stats` prints them.
pub const COUNTERS: [&str; 13] = [
    "reads",
    "hit-bytes",
    "zero-bytes",
    "miss-bytes",
    "waited-bytes",
    "base-reads",
    "base-bytes",
    "populated-bytes",
    "dropped-bytes",
    "populate-errors",
    "checkpoints",
    "bad-bytes",
    "repaired-bytes",
];

/// Values of the counters, in the order of [`COUNTERS`].
pub type Counts = [u64; COUNTERS.len()];

/// An image as it is now.
#[derive(Debug)]
pub struct Status {
    /// Its header.
    pub header: Header,
    /// What it is good for.
    pub state: ImageState,
    /// Why, where that is not plain.
    pub reason: Option<String>,
    /// Guest bytes that the cache holds as data.
    pub cached_bytes: u64,
    /// Guest bytes that the cache knows to be zero.
    pub zero_bytes: u64,
    /// Bytes that the file occupies.
    pub actual_size: u64,
    /// Who has it open.
    pub processes: Vec<ProcessStats>,
    /// Sums since the live state was made, in the order of [`COUNTERS`].
    pub totals: Counts,
}

impl Status {
    /// Looks at an image.
    pub fn read(path: &Path) -> Result<Self> {
        let image = Image::open(path, Access::ReadOnly)?;
        let header = image.header().clone();
        let live = open_live(&image)?;
        let actual_size =
            image.occupied().map_err(|err| Error::io("examine", image.path(), &err))?;
        let mut status = Status {
            header,
            state: ImageState::Filling,
            reason: None,
            cached_bytes: 0,
            zero_bytes: 0,
            actual_size,
            processes: Vec::new(),
            totals: [0; COUNTERS.len()],
        };
        if let Err(err) = image.require_trusted() {
            return Ok(status.with_state(ImageState::Damaged, Some(err.to_string())));
        }
        let (damage, full) = match &live {
            Some(live) => {
                status.read_live(live);
                status.read_slots(live);
                (None, live.space().is_full())
            }
            None => {
                let scan = Scan::read(&image, |_, _| {})?;
                for (cluster, entry) in &scan.entries {
                    status.add(*cluster, entry.bits);
                }
                (scan.findings.into_iter().next(), false)
            }
        };
        let empty = status.cached_bytes + status.zero_bytes == 0;
        Ok(match (damage, BaseState::of(&status.header, image.path())) {
            (Some(damage), _) => status.with_state(ImageState::Damaged, Some(damage)),
            (_, BaseState::Changed(how)) => status.with_state(ImageState::Stale, Some(how)),
            _ if full || is_used_up(&image, actual_size) => {
                status.with_state(ImageState::Full, None)
            }
            _ if empty => status.with_state(ImageState::Empty, None),
            _ => status,
        })
    }

    fn with_state(self, state: ImageState, reason: Option<String>) -> Self {
        Status { state, reason, ..self }
    }

    fn add(&mut self, cluster: u64, bits: SubclusterBits) {
        self.cached_bytes += self.guest_bytes(cluster, bits.data());
        self.zero_bytes += self.guest_bytes(cluster, bits.zero());
    }

    /// Bytes of the guest's disk in some subclusters of a cluster; the last one ends with the disk.
    fn guest_bytes(&self, cluster: u64, subclusters: u32) -> u64 {
        let geometry = &self.header.geometry;
        if (cluster + 1) << geometry.cluster_bits() <= geometry.virtual_size() {
            return u64::from(subclusters.count_ones()) * geometry.subcluster_size();
        }
        let first = cluster * u64::from(SUBCLUSTERS);
        (0..SUBCLUSTERS)
            .filter(|index| subclusters >> index & 1 != 0)
            .map(|index| geometry.subcluster_range(first + u64::from(index), 1).len)
            .sum()
    }

    fn read_live(&mut self, live: &LiveFile) {
        for cluster in live.known_clusters() {
            if let Some(entry) = live.entry(cluster) {
                self.add(cluster, entry.bits());
            }
        }
    }

    fn read_slots(&mut self, live: &LiveFile) {
        for index in 0..SLOTS {
            let slot = live.slot(index);
            if slot.generation() == 0 {
                continue;
            }
            let counters = values(&slot.counters);
            for (total, value) in self.totals.iter_mut().zip(counters) {
                *total = total.saturating_add(value);
            }
            if is_held(live.file(), index) {
                self.processes.push(ProcessStats { pid: slot.pid(), counters });
            }
        }
    }
}

/// The counters' values, in the order of [`COUNTERS`].
pub(super) fn values(counters: &Counters) -> Counts {
    [
        counters.reads.get(),
        counters.hit_bytes.get(),
        counters.zero_bytes.get(),
        counters.miss_bytes.get(),
        counters.waited_bytes.get(),
        counters.base_reads.get(),
        counters.base_bytes.get(),
        counters.populated_bytes.get(),
        counters.dropped_bytes.get(),
        counters.populate_errors.get(),
        counters.checkpoints.get(),
        counters.bad_bytes.get(),
        counters.repaired_bytes.get(),
    ]
}

/// The live state of an image, if there is a current one.
pub(super) fn open_live(image: &Image) -> Result<Option<LiveFile>> {
    let identity = join::identity(image, &Surroundings::default())?;
    let live = match join::find_live(image, &identity, false) {
        Err(err) if err.kind() == ErrorKind::Foreign => {
            log::warn!("{err}");
            None
        }
        found => found?,
    };
    Ok(live.filter(|live| !live.has_failed()))
}

/// What checking an image found.
#[derive(Debug)]
pub struct CheckReport {
    /// The contradictions and leaks, and what is cached.
    pub scan: Scan,
    /// Whether the base still is what the cache was made from.
    pub base: BaseState,
    /// Whether what was found has been put right.
    pub repaired: bool,
}

/// Checks all tables of an image and all cached data, and puts them right where `repair` says so;
/// that only where nobody uses it. `progress` hears of bytes of cached data done and in all.
pub fn check(path: &Path, repair: bool, progress: impl FnMut(u64, u64)) -> Result<CheckReport> {
    check_observed(path, repair, None, progress)
}

/// The same, with somebody who hears of every change to the file.
#[doc(hidden)]
pub fn check_observed(
    path: &Path,
    repair: bool,
    observer: Option<Arc<dyn Observer>>,
    progress: impl FnMut(u64, u64),
) -> Result<CheckReport> {
    let open = |access| Image::open_observed(path, access, observer.clone());
    let image = match open(Access::ReadWrite) {
        Err(err) if !repair && err.kind() == ErrorKind::Io => {
            open(Access::ReadOnly).map(|image| (image, false))
        }
        opened => opened.map(|image| (image, true)),
    };
    let (image, writable) = image?;
    image.require_trusted()?;
    let busy = |what: &str| Error::new(ErrorKind::Busy, what).on(image.path());
    let lock = if writable { image.lock_checkpoint(CHECK_PATIENCE)? } else { None };
    if writable && lock.is_none() {
        return Err(busy("a checkpoint is being written for too long; try again"));
    }
    let base = BaseState::of(image.header(), image.path());
    if !repair {
        let mut scan = Scan::read(&image, |_, _| {})?;
        // Data does not change any more, and a checkpoint need not wait until it is read.
        drop(lock);
        scan.verify_data(&image, progress)?;
        return Ok(CheckReport { scan, base, repaired: false });
    }
    let _join = image
        .lock_join(CHECK_PATIENCE)?
        .ok_or_else(|| busy("another process is opening the image; try again"))?;
    if !image.lock_use(Use::Alone, Duration::from_millis(500))? || image.is_read_by_others()? {
        return Err(busy("in use; an image is repaired only when no process has it open"));
    }
    let mut scan = Scan::read(&image, |_, _| {})?;
    scan.verify_data(&image, progress)?;
    let wrong = scan.damages != 0 || !scan.leaks.is_empty() || !scan.bad.is_empty();
    if wrong {
        // The live state was made from the damaged tables.
        image.disown_live_files()?;
        // Worthless now; whether it can be removed does not matter.
        let _ = std::fs::remove_file(image.live_path());
        image::repair(&image, &scan)?;
    }
    Ok(CheckReport { scan, base, repaired: wrong })
}
