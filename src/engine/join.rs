//! Opening an image and joining those who use it, or making a live state where there is none.
//!
//! Under the join lock (byte 401) so that one does it at a time:
//!
//! 1. A live file that belongs to this boot and this image is joined. Whoever finds himself alone
//!    with it gives back what dead processes had allocated and not used; but first he sees to it
//!    that it knows all that the image's tables show: one that was cut off and has its length again
//!    would give away clusters in use.
//! 2. Otherwise, who is alone on the image makes a live state from its tables.
//! 3. Otherwise others use a live file that is gone: nothing they do can be seen, so reads pass
//!    through, until they have left.
//!
//! Who may not write to the image only reads the live state, as long as that is there: he takes no
//! slot, claims nothing and waits for nobody, but holds the use lock (byte 400, shared), so that no
//! new live state gives clusters that he reads to something else. To be the first of those who
//! populate is therefore not to be alone on the image, but to find no slot held; only the making of
//! a live state has to be alone. The join lock needs a writable descriptor and is not for readers:
//! the use lock, taken before the live file is looked for, keeps them clear of one that is being
//! made.
//!
//! Who is held up by others at opening (they have lost their live file, or one was stopped in the
//! middle of this) tries again every few seconds.
//!
//! Where a shared state cannot be had at all (a network filesystem, no permission to write and
//! nobody who has left one) the tables of the image are read into a private one, which nobody
//! changes. Its user holds no use lock, so those who populate can come; what they store later he
//! does not see.
//!
//! A live file that others may have written to than those who may write to the image counts as none
//! (see `live::file`).
//!
//! Used by `Engine::open` and `keeper`.

use std::path::Path;
use std::time::Duration;

use super::base::OTHER_SAMPLE;
use super::core::Core;
use super::{Options, Surroundings};
use crate::error::{Error, ErrorKind, Result};
use crate::format::BaseIdentity;
use crate::image::{self, Access, Image, Scan, Use};
use crate::live::slot::{SLOTS, is_held};
use crate::live::{LiveFile, LiveIdentity, SlotGuard};

/// How long to wait for others.
#[derive(Clone, Copy)]
struct Patience {
    /// For another process that is joining.
    join: Duration,
    /// For a user without a live file to go: one that was killed holds its locks until the kernel
    /// has taken it apart, and so does a child between fork and exec.
    leave: Duration,
}

const AT_OPEN: Patience =
    Patience { join: Duration::from_secs(2), leave: Duration::from_millis(500) };

/// How long a late joiner waits for a checkpoint before it leaves the cache alone.
const NOTE_PATIENCE: Duration = Duration::from_secs(2);

/// Nobody waits for this one, and it must hold nobody up.
const LATER: Patience = Patience { join: Duration::ZERO, leave: Duration::ZERO };

/// Opens an image. Only what makes the image itself useless is an error: where the system stands in
/// the way, but lets the header be read, reads pass through.
pub fn join(path: &Path, options: &Options) -> Result<Core> {
    match join_image(path, options) {
        Err(err) if err.kind() == ErrorKind::Io => match Image::open(path, Access::Header) {
            Ok(image) => {
                let core = Core::new(image, options);
                core.bypass(&err.to_string());
                Ok(core)
            }
            Err(_) => Err(err),
        },
        joined => joined,
    }
}

fn join_image(path: &Path, options: &Options) -> Result<Core> {
    let surroundings = &options.surroundings;
    let open = |access| Image::open_observed(path, access, surroundings.observer.clone());
    let image = match open(Access::ReadWrite) {
        Err(err) if matches!(err.errno(), libc::EACCES | libc::EPERM | libc::EROFS) => {
            let image = open(Access::ReadOnly)?;
            log::warn!("{err}; using what is cached without adding to it");
            return Ok(read_only(image, options));
        }
        opened => opened?,
    };
    if let Err(err) = image.require_trusted() {
        let core = Core::new(image, options);
        core.bypass(&err.to_string());
        return Ok(core);
    }
    if image.is_remote() {
        log::warn!(
            "{}: on a network filesystem; using what is cached without adding to it",
            image.path().display()
        );
        return Ok(read_only(image, options));
    }
    let core = Core::new(image, options);
    match join_live(&core, AT_OPEN) {
        Ok((live, slot)) => core.use_live(live, slot),
        Err(err) if err.kind() == ErrorKind::Busy => core.join_later(&err.to_string()),
        Err(err) => core.bypass(&err.to_string()),
    }
    Ok(core)
}

/// Tries again to join, where others were in the way at opening: they have gone, or go on.
pub fn join_late(core: &Core) {
    match join_live(core, LATER) {
        Ok(_) if !fits_sample(core) => {
            core.image.unlock_use();
            core.bypass(OTHER_SAMPLE);
        }
        Ok((live, slot)) => {
            core.use_live(live, slot);
            log::warn!("{}: using the cache from now on", core.image.path().display());
        }
        Err(err) if err.kind() == ErrorKind::Busy => {}
        Err(err) => core.bypass(&err.to_string()),
    }
}

/// Whether the base that was sampled at opening is the one that others fill the cache from; notes
/// its sample where they have noted none. Nobody else notes one meanwhile.
fn fits_sample(core: &Core) -> bool {
    let Some(sample) = core.sample() else { return true };
    let fits = |noted: BaseIdentity| noted.sample.is_none_or(|noted| noted == sample);
    let image = &core.image;
    let settled = image.lock_checkpoint(NOTE_PATIENCE).and_then(|lock| match lock {
        None => Ok(false),
        Some(_lock) if !fits(image.read_base()?) => Ok(false),
        Some(_lock) => {
            image.update_base(|noted| BaseIdentity { sample: Some(sample), ..noted })?;
            Ok(true)
        }
    });
    settled.unwrap_or_else(|err| {
        log::warn!("{err}");
        false
    })
}

/// An open that writes nothing, neither to the image nor to the live file.
pub fn read_only(image: Image, options: &Options) -> Core {
    let core = Core::new(image, options);
    let image = &core.image;
    let live = image.require_trusted().and_then(|()| identity(image, &core.surroundings)).and_then(
        |identity| match shared_to_read(image, &identity) {
            Some(live) => Ok(live),
            None => private(image, &identity),
        },
    );
    match live {
        Ok(live) => core.use_live(live, None),
        Err(err) => core.bypass(&err.to_string()),
    }
    core
}

/// The live state of those who may write to the image, to be read; the image is then in use by this
/// open.
fn shared_to_read(image: &Image, identity: &LiveIdentity) -> Option<LiveFile> {
    if image.is_remote() {
        return None;
    }
    let found = image.lock_use(Use::Shared, AT_OPEN.leave).and_then(|locked| match locked {
        true => find_live(image, identity, false),
        // Somebody is making one, or repairs the image, and takes his time.
        false => Ok(None),
    });
    let live = found
        .inspect_err(|err| log::warn!("{err}; using what the image itself shows"))
        .ok()
        .flatten()
        .filter(|live| !live.has_failed());
    if live.is_none() {
        // Nobody may find the image in use by one who does not use the live state.
        image.unlock_use();
    }
    live
}

/// A live state of this open alone, as the image's tables are now.
fn private(image: &Image, identity: &LiveIdentity) -> Result<LiveFile> {
    let live = LiveFile::make_private(&image.live_path(), identity)?;
    restore(&live, image, &sound_scan(image)?)?;
    Ok(live)
}

/// What a live state of this image has to belong to.
pub fn identity(image: &Image, surroundings: &Surroundings) -> Result<LiveIdentity> {
    let here = LiveIdentity::of(image.file(), image.header().cache.uuid, *image.geometry())
        .map_err(|err| Error::io("identify", image.path(), &err))?;
    Ok(LiveIdentity { boot_id: surroundings.boot_id.unwrap_or(here.boot_id), ..here })
}

/// Joins the users of an image, or becomes the first one, with a slot if one is left. Busy is what
/// others may end; then, and after any other error, the image is not in use by this open.
fn join_live(core: &Core, patience: Patience) -> Result<(LiveFile, Option<SlotGuard>)> {
    let joined = join_live_locked(&core.image, &core.surroundings, patience);
    if joined.is_err() {
        // Nobody may find the image in use by one who does not use it.
        core.image.unlock_use();
    }
    joined
}

fn join_live_locked(
    image: &Image,
    surroundings: &Surroundings,
    patience: Patience,
) -> Result<(LiveFile, Option<SlotGuard>)> {
    let busy = |what: &str| Error::new(ErrorKind::Busy, what).on(image.path());
    let Some(_lock) = image.lock_join(patience.join)? else {
        return Err(busy("another process has been opening the image for too long"));
    };
    let identity = identity(image, surroundings)?;
    let mut alone = image.lock_use(Use::Alone, Duration::ZERO)?;
    let (mut found, foreign) = match find_live(image, &identity, true) {
        Err(err) if err.kind() == ErrorKind::Foreign => (None, Some(err)),
        found => (found?, None),
    };
    if alone {
        found = found.filter(|live| !live.has_failed());
    }
    let first = alone || !found.as_ref().is_some_and(is_populated);
    if first
        && let Some(live) = &found
        && !live.has_failed()
        && !knows_all(live, &sound_scan(image)?)
    {
        log::info!("{}: its live file was emptied; making it anew", image.path().display());
        found = None;
    }
    if found.is_none() && !alone {
        alone = image.lock_use(Use::Alone, patience.leave)?;
    }
    let live = match found {
        Some(live) if live.has_failed() => {
            return Err(busy("another process found it unreliable, and others still have it open"));
        }
        Some(live) => {
            if first {
                reclaim(&live, image)?;
            }
            live
        }
        None if alone => {
            if let Some(err) = foreign {
                log::warn!("{err}; making a new one");
            }
            make(image, &identity)?
        }
        None => {
            return Err(foreign.map_or_else(
                || busy("its live file was deleted or replaced while others have the image open"),
                |err| busy(&err.to_string()),
            ));
        }
    };
    // Before the next one joins, who looks whether he is the first.
    let slot = SlotGuard::acquire(&live)
        .inspect_err(|err| log::warn!("{err}; reading without adding to the cache"))
        .ok();
    if !image.lock_use(Use::Shared, Duration::ZERO)? {
        return Err(busy("another program uses the image alone"));
    }
    Ok((live, slot))
}

/// Whether anybody has a slot, and so may be populating.
fn is_populated(live: &LiveFile) -> bool {
    (0..SLOTS).any(|slot| is_held(live.file(), slot))
}

/// The live state of an image, if there is a current one.
pub fn find_live(
    image: &Image,
    identity: &LiveIdentity,
    writable: bool,
) -> Result<Option<LiveFile>> {
    for path in image.live_paths() {
        let checkpoints = || image.read_checkpoints();
        let found = LiveFile::open(&path, image.file(), identity, checkpoints, writable)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Makes a live state from the image's tables and gives it its name.
fn make(image: &Image, identity: &LiveIdentity) -> Result<LiveFile> {
    let scan = sound_scan(image)?;
    if !scan.leaks.is_empty() {
        log::info!(
            "{}: giving {} leaked clusters back",
            image.path().display(),
            scan.leaked_clusters()
        );
        image::free_leaks(image, &scan)?;
    }
    image::discard_unused(image, &scan);
    if !image.has_its_name()? {
        // Another image has it now, and may have a live file beside it.
        let what = "it was deleted or replaced by another one";
        return Err(Error::new(ErrorKind::Stale, what).on(image.path()));
    }
    let checkpoints = image.disown_live_files()?;
    let mut live = LiveFile::make(&image.live_path(), image.file(), identity, checkpoints)?;
    restore(&live, image, &scan)?;
    live.install()?;
    image.note_live_path();
    Ok(live)
}

fn sound_scan(image: &Image) -> Result<Scan> {
    let scan = Scan::read(image, |_, _| {})?;
    match scan.findings.first() {
        None => Ok(scan),
        Some(first) => Err(Error::new(
            ErrorKind::Damaged,
            format!(
                "{} contradictions in the image, the first: {first}; see 'vmcache check'",
                scan.damages
            ),
        )
        .on(image.path())),
    }
}

/// Fills a live state that nobody else can see yet.
fn restore(live: &LiveFile, image: &Image, scan: &Scan) -> Result<()> {
    for (cluster, entry) in &scan.entries {
        live.ensure(*cluster)
            .map_err(|err| Error::io("allocate the live file", live.path(), &err))?;
        let good = scan.good_entry(*cluster, *entry);
        if let Some(map_entry) = live.entry(*cluster) {
            map_entry.restore(good, entry.bits);
        }
        if good != *entry {
            // So that the next checkpoint puts the image right.
            live.mark_dirty(*cluster);
        }
    }
    if !scan.bad.is_empty() {
        log::warn!(
            "{}: {} subclusters are not what was stored; they are read from the base again",
            image.path().display(),
            scan.bad_subclusters()
        );
    }
    set_space(live, image, scan.free_clusters(image), scan.end)
}

/// Whether a live state has everything that the image's tables show.
fn knows_all(live: &LiveFile, scan: &Scan) -> bool {
    scan.entries.iter().all(|(cluster, entry)| {
        let entry = scan.good_entry(*cluster, *entry);
        live.entry(*cluster).is_some_and(|known| {
            let is_placed = entry.host.is_none() || known.host() == entry.host;
            is_placed && known.bits().0 & entry.bits.0 == entry.bits.0
        })
    })
}

/// Gives back what was handed out and never used, settles the account, and sees to it that the
/// next checkpoint has all that dead processes published. Only while nobody else populates.
fn reclaim(live: &LiveFile, image: &Image) -> Result<()> {
    live.mark_unwritten();
    let bits = image.geometry().cluster_bits();
    let mut used: Vec<u64> = live
        .known_clusters()
        .filter_map(|cluster| live.entry(cluster)?.host())
        .filter(|host| image.layout().is_data_cluster(*host))
        .map(|host| host.0 >> bits)
        .collect();
    used.sort_unstable();
    let end = used.last().map_or(image.layout().data, |last| last + 1);
    let starts = std::iter::once(image.layout().data).chain(used.iter().map(|used| used + 1));
    let free = starts.zip(used.iter().copied().chain([end])).flat_map(|(from, to)| from..to);
    set_space(live, image, free, end)
}

fn set_space(
    live: &LiveFile,
    image: &Image,
    free: impl Iterator<Item = u64>,
    end: u64,
) -> Result<()> {
    let occupied = image.occupied().map_err(|err| Error::io("examine", image.path(), &err))?;
    let free_len = live.fill_free_list(free);
    live.space().restore(end, image.layout().end, occupied, free_len);
    Ok(())
}
