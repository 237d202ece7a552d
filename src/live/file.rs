//! The live file itself: making, opening and mapping it, and the typed view of the mapped bytes.
//!
//! A live file is made under another name and renamed into place when it is complete, so a name
//! `<image>.live` never shows a half-made state. It says in its first page what it belongs to; all
//! else in it is atomics, which is why `&` of them may be handed out while other processes write.
//!
//! # Who may write to it
//!
//! What a live file says is served as the image's content, so nobody may be able to write to it who
//! may not write to the image. A new one gets the image's owner and mode; one that is found is used
//! only if owner, group and mode show that this holds (`Ownership::refuses`). Who may only read
//! the image maps the live file for reading and never calls what writes to it
//! ([`LiveFile::is_writable`]); a store through such a mapping would end the process.
//!
//! Used by `engine` through `live`.
#![allow(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use nix::time::{ClockId, clock_gettime};

use super::claim::Claim;
use super::dirty::Marks;
use super::event::Event;
use super::map::MapEntry;
use super::regions::{GROUP_BYTES, GROUP_CLUSTERS, Regions};
use super::sigbus::Watch;
use super::slot::{SLOTS, Slot};
use super::space::{FREE_LIST, Space};
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::error::{Error, ErrorKind, Result};
use crate::fallocate::{FallocateFlags, fallocate};
use crate::format::{Geometry, SUBCLUSTERS};

const MAGIC: [u8; 8] = *b"vmclive\n";
/// Changes whenever anything about the live file's contents or protocols does.
const VERSION: u32 = 3;
const IDENTITY_BYTES: usize = 80;

/// What a live file belongs to: one boot of one kernel, one image file. A live file that names
/// anything else is left over and worthless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveIdentity {
    /// The kernel's boot id.
    pub boot_id: [u8; 16],
    /// UUID in the image's header.
    pub uuid: [u8; 16],
    /// Device of the image file.
    pub device: u64,
    /// Inode of the image file.
    pub inode: u64,
    /// Virtual size and cluster size.
    pub geometry: Geometry,
}

impl LiveIdentity {
    /// The identity of the live state of an open image in this boot.
    pub fn of(image: &File, uuid: [u8; 16], geometry: Geometry) -> io::Result<Self> {
        let meta = image.metadata()?;
        let boot_id = boot_id()?;
        Ok(LiveIdentity { boot_id, uuid, device: meta.dev(), inode: meta.ino(), geometry })
    }

    /// The first bytes of a live file with inode `live_inode`; a copy of a live file has another
    /// inode and does not pass for it.
    fn encode(&self, live_inode: u64) -> [u8; IDENTITY_BYTES] {
        let mut bytes = Vec::with_capacity(IDENTITY_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.geometry.cluster_bits().to_le_bytes());
        bytes.extend(self.geometry.virtual_size().to_le_bytes());
        bytes.extend(self.boot_id);
        bytes.extend(self.uuid);
        bytes.extend(self.device.to_le_bytes());
        bytes.extend(self.inode.to_le_bytes());
        bytes.extend(live_inode.to_le_bytes());
        let mut array = [0; IDENTITY_BYTES];
        array.copy_from_slice(&bytes);
        array
    }
}

/// Milliseconds on a clock that all processes share; zero where there is none.
fn since_boot() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    now.as_millis() as u64
}

fn boot_id() -> io::Result<[u8; 16]> {
    let mut text = String::new();
    File::open("/proc/sys/kernel/random/boot_id")?.read_to_string(&mut text)?;
    uuid::Uuid::parse_str(text.trim())
        .map(uuid::Uuid::into_bytes)
        .map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

/// Words that all processes share beside [`Space`] and [`Event`].
#[derive(Debug)]
#[repr(C, align(64))]
struct Shared {
    event: Line<Event>,
    space: Line<Space>,
    checkpoints_begun: AtomicU64,
    checkpoints_done: AtomicU64,
    failed: AtomicU32,
    /// Not zero from before the first mark of a checkpoint is taken until all of them are either
    /// written or set again.
    checkpointing: AtomicU32,
    /// When the last checkpoint ended, or this file was made, in milliseconds since the boot.
    checkpointed_at: AtomicU64,
}

#[derive(Debug)]
#[repr(C, align(64))]
struct Line<T>(T);

/// A mapped live file.
#[derive(Debug)]
pub struct LiveFile {
    path: PathBuf,
    file: File,
    /// Before the mapping: it must not outlive that.
    watch: Watch,
    map: MmapRaw,
    regions: Regions,
    clusters: u64,
    writable: bool,
    /// Where it was made and still has to be renamed to [`LiveFile::path`] from.
    made_at: Option<PathBuf>,
}

impl LiveFile {
    /// Makes an empty live state that becomes visible with [`LiveFile::install`]. It gets the
    /// image's owner and mode. `checkpoints` is the number in the image's header.
    pub fn make(
        path: &Path,
        image: &File,
        identity: &LiveIdentity,
        checkpoints: u64,
    ) -> Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.new", uuid::Uuid::new_v4().simple()));
        let made_at = PathBuf::from(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(&made_at)
            .map_err(|err| Error::io("create the live file", &made_at, &err))?;
        let filled = copy_ownership(image, &file)
            .and_then(|()| Self::fill(path, file, identity, checkpoints, Some(made_at.clone())));
        filled.map_err(|err| {
            // What is left is a useless file under a name nobody looks for.
            let _ = std::fs::remove_file(&made_at);
            Error::io("set up the live file", &made_at, &err)
        })
    }

    /// Makes a live state of this process alone, in anonymous memory, for an image that cannot
    /// have a shared one.
    pub fn make_private(path: &Path, identity: &LiveIdentity) -> Result<Self> {
        // SAFETY: memfd_create takes a C string and flags; a non-negative result is a new
        // descriptor that nothing else owns.
        let file = unsafe {
            match libc::memfd_create(c"vmcache".as_ptr(), libc::MFD_CLOEXEC) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(File::from_raw_fd(fd)),
            }
        };
        file.and_then(|file| Self::fill(path, file, identity, 0, None))
            .map_err(|err| Error::io("make a private live state for", path, &err))
    }

    fn fill(
        path: &Path,
        file: File,
        identity: &LiveIdentity,
        checkpoints: u64,
        made_at: Option<PathBuf>,
    ) -> io::Result<Self> {
        let regions = Regions::new(&identity.geometry);
        file.set_len(regions.len)?;
        fallocate(&file, FallocateFlags::empty(), 0, regions.groups)?;
        file.write_all_at(&identity.encode(file.metadata()?.ino()), 0)?;
        let map = MmapOptions::new().len(regions.len as usize).map_raw(&file)?;
        let watch = Watch::new(map.as_ptr(), map.len())?;
        let clusters = identity.geometry.clusters();
        let (path, writable) = (path.to_owned(), true);
        let live = LiveFile { path, file, watch, map, regions, clusters, writable, made_at };
        live.shared().checkpointed_at.store(since_boot(), Ordering::Relaxed);
        live.shared().checkpoints_begun.store(checkpoints, Ordering::Relaxed);
        live.shared().checkpoints_done.store(checkpoints, Ordering::Relaxed);
        Ok(live)
    }

    /// Gives a live file its name, in place of one that is left over.
    pub fn install(&mut self) -> Result<()> {
        if let Some(made_at) = self.made_at.take() {
            std::fs::rename(&made_at, &self.path).map_err(|err| {
                let _ = std::fs::remove_file(&made_at);
                Error::io("rename the new live file to", &self.path, &err)
            })?;
        }
        Ok(())
    }

    /// Opens the live file of an image if it is there and belongs to it; `checkpoints` reads the
    /// number in the image's header. `Ok(None)` where there is none or it is left over, an error of
    /// kind `Foreign` where others may have written to it than those who may write to the image.
    pub fn open(
        path: &Path,
        image: &File,
        identity: &LiveIdentity,
        checkpoints: impl FnOnce() -> Result<u64>,
        writable: bool,
    ) -> Result<Option<Self>> {
        let io_error = |err: io::Error| Error::io("read the live file", path, &err);
        let of_image = Ownership::of(&image.metadata().map_err(io_error)?);
        // SAFETY: geteuid(2) has no arguments and cannot fail.
        let user = unsafe { libc::geteuid() };
        // Who writes believes himself, too; who reads might be deceived by a neighbour.
        let me = writable.then_some(user);
        let examine = |meta: &Metadata| {
            if !meta.is_file() {
                return Err(Error::new(ErrorKind::Damaged, "not a regular file").on(path));
            }
            let Some(why) = of_image.refuses(&Ownership::of(meta), me) else { return Ok(()) };
            let what = format!("the live file is not used: {why}");
            Err(Error::new(ErrorKind::Foreign, what).on(path))
        };
        // The name may come from the image: opening a device can do something by itself. And a
        // stranger's file may not even let itself be opened.
        path.symlink_metadata().map_or(Ok(()), |meta| examine(&meta))?;
        let opened = OpenOptions::new()
            .read(true)
            .write(writable)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(Error::io("open the live file", path, &err)),
        };
        let meta = file.metadata().map_err(io_error)?;
        examine(&meta)?;
        let regions = Regions::new(&identity.geometry);
        let mut found = [0; IDENTITY_BYTES];
        let read = file.read_at(&mut found, 0).map_err(io_error)?;
        if meta.len() != regions.len
            || read != IDENTITY_BYTES
            || found != identity.encode(meta.ino())
        {
            return Ok(None);
        }
        let options = MmapOptions::new().len(regions.len as usize).clone();
        let map_error = |err: io::Error| Error::io("map the live file", path, &err);
        let map = if writable { options.map_raw(&file) } else { options.map_raw_read_only(&file) }
            .map_err(map_error)?;
        let watch = Watch::new(map.as_ptr(), map.len()).map_err(map_error)?;
        let (path, clusters) = (path.to_owned(), identity.geometry.clusters());
        let live = LiveFile { path, file, watch, map, regions, clusters, writable, made_at: None };
        if !live.is_allocated().map_err(io_error)? {
            return Ok(None);
        }
        // An image of another age, copied over this one, has another number of checkpoints. In this
        // order, since a checkpoint may be written meanwhile: done <= header's <= begun.
        let done = live.shared().checkpoints_done.load(Ordering::Acquire);
        let number = checkpoints()?;
        let begun = live.shared().checkpoints_begun.load(Ordering::Acquire);
        Ok((done..=begun).contains(&number).then_some(live))
    }

    /// Whether there are blocks under the fixed part and under each group that is said to be there,
    /// as [`LiveFile::make`] and [`LiveFile::ensure`] see to. Where there are none this is the work
    /// of others: touching it may raise SIGBUS, and looking through it takes as long as they like.
    fn is_allocated(&self) -> io::Result<bool> {
        // First, since others allocate a group before they say that it is there.
        let groups = self.groups(self.regions.present).count() as u64;
        let least = self.regions.groups + groups * GROUP_BYTES;
        Ok(self.file.metadata()?.blocks() * 512 >= least)
    }

    /// Whether anything may be written to it; otherwise every call here that changes something is
    /// out of bounds.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where the file is, or would be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another descriptor for the same open file, and thus the same locks.
    pub fn try_clone_file(&self) -> Result<File> {
        self.file
            .try_clone()
            .map_err(|err| Error::io("duplicate the descriptor of", &self.path, &err))
    }

    /// The open file, for questions about its locks.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A reference to a `T` at an offset of the mapping.
    fn at<T>(&self, offset: u64) -> &T {
        let offset = offset as usize;
        assert!(
            offset.is_multiple_of(align_of::<T>()) && offset + size_of::<T>() <= self.map.len()
        );
        // SAFETY: within the mapping, which is page-aligned and lives as long as self, and aligned
        // (both asserted); every T used here consists of atomics, for which any bytes are valid
        // and which others may change at any time.
        unsafe { &*self.map.as_ptr().add(offset).cast::<T>() }
    }

    fn shared(&self) -> &Shared {
        self.at(self.regions.shared)
    }

    /// The event on which waiters sleep.
    pub fn event(&self) -> &Event {
        &self.shared().event.0
    }

    /// Allocation and quota.
    pub fn space(&self) -> &Space {
        &self.shared().space.0
    }

    /// Clusters of the file that lie free between used ones.
    pub fn free_list(&self) -> &[AtomicU64; FREE_LIST] {
        self.at(self.regions.free_list)
    }

    /// Fills the free list; before anybody else can see this file. Returns how many it took.
    pub fn fill_free_list(&self, clusters: impl Iterator<Item = u64>) -> usize {
        self.free_list()
            .iter()
            .zip(clusters)
            .map(|(entry, cluster)| entry.store(cluster, Ordering::Relaxed))
            .count()
    }

    /// A slot; `index` is below [`SLOTS`].
    pub fn slot(&self, index: u32) -> &Slot {
        self.at(self.regions.slots + u64::from(index.min(SLOTS - 1)) * size_of::<Slot>() as u64)
    }

    /// All slots, held or not.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        (0..SLOTS).map(|index| self.slot(index))
    }

    fn bit(&self, bitmap: u64, group: u64) -> (&AtomicU64, u64) {
        (self.at(bitmap + group / 64 * 8), 1 << (group % 64))
    }

    fn has_group(&self, group: u64) -> bool {
        let (word, bit) = self.bit(self.regions.present, group);
        word.load(Ordering::Acquire) & bit != 0
    }

    /// The map entry of a guest cluster; `None` where nothing around it was ever needed.
    pub fn entry(&self, cluster: u64) -> Option<&MapEntry> {
        (cluster < self.clusters && self.has_group(cluster / GROUP_CLUSTERS))
            .then(|| self.at(self.regions.entry(cluster)))
    }

    /// The claims on a guest cluster's subclusters; `None` as for [`LiveFile::entry`].
    pub fn claims(&self, cluster: u64) -> Option<&[Claim; SUBCLUSTERS as usize]> {
        (cluster < self.clusters && self.has_group(cluster / GROUP_CLUSTERS))
            .then(|| self.at(self.regions.claims(cluster)))
    }

    /// Makes sure that the cluster has a map entry and claims: allocates their pages, which may
    /// fail for want of space and may block.
    pub fn ensure(&self, cluster: u64) -> io::Result<()> {
        let group = cluster / GROUP_CLUSTERS;
        if cluster < self.clusters && !self.has_group(group) {
            let at = self.regions.group(group);
            // A file that was cut off keeps the length that gives it away.
            let how = FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&self.file, how, at, GROUP_BYTES)?;
            let (word, bit) = self.bit(self.regions.present, group);
            word.fetch_or(bit, Ordering::Release);
        }
        Ok(())
    }

    fn marks(&self, group: u64) -> (&Marks, u32) {
        (self.at(self.regions.dirty + group / 64 * 8), (group % 64) as u32)
    }

    /// Notes that something was published in a cluster, for the next checkpoint. After publishing.
    pub fn mark_dirty(&self, cluster: u64) {
        let (marks, group) = self.marks(cluster / GROUP_CLUSTERS);
        marks.mark(group);
    }

    /// Whether the next checkpoint looks at the group of a cluster.
    pub fn is_marked(&self, cluster: u64) -> bool {
        let (marks, group) = self.marks(cluster / GROUP_CLUSTERS);
        marks.has(group)
    }

    /// Whether a checkpoint would have anything to do.
    pub fn is_dirty(&self) -> bool {
        self.dirty_groups().next().is_some()
    }

    /// Groups marked dirty.
    pub fn dirty_groups(&self) -> impl Iterator<Item = u64> {
        self.groups(self.regions.dirty)
    }

    /// Takes the mark off a group and gives its clusters; `None` where it had none.
    pub fn take_dirty(&self, group: u64) -> Option<std::ops::Range<u64>> {
        let (marks, bit) = self.marks(group);
        marks.take(bit).then(|| self.group_clusters(group))
    }

    /// The clusters of all groups that were ever needed, in order.
    pub fn known_clusters(&self) -> impl Iterator<Item = u64> {
        self.groups(self.regions.present).flat_map(|group| self.group_clusters(group))
    }

    fn group_clusters(&self, group: u64) -> std::ops::Range<u64> {
        group * GROUP_CLUSTERS..((group + 1) * GROUP_CLUSTERS).min(self.clusters)
    }

    /// The groups whose bit is set in a bitmap.
    fn groups(&self, bitmap: u64) -> impl Iterator<Item = u64> {
        (0..self.regions.group_count.div_ceil(64)).flat_map(move |index| {
            let last = self.regions.group_count;
            // By the bits that are set: most words of a large disk have none.
            let mut word = self.at::<AtomicU64>(bitmap + index * 8).load(Ordering::Relaxed);
            std::iter::from_fn(move || {
                let bit = (word != 0).then(|| u64::from(word.trailing_zeros()))?;
                word &= word - 1;
                Some(index * 64 + bit)
            })
            .filter(move |group| *group < last)
        })
    }

    /// Whether somebody began a checkpoint and has not ended it: he is at it, or he died.
    pub fn is_checkpointing(&self) -> bool {
        self.shared().checkpointing.load(Ordering::SeqCst) != 0
    }

    /// Before the first mark is taken. Where the checkpoint before this one was cut off, everything
    /// is marked, since nobody knows which marks it had taken. Under the checkpoint lock.
    pub fn enter_checkpoint(&self) {
        if self.shared().checkpointing.swap(1, Ordering::SeqCst) != 0 {
            self.mark_unwritten();
        }
    }

    /// Marks the groups in which something is published and not on disk.
    pub fn mark_unwritten(&self) {
        for cluster in self.known_clusters() {
            if self.entry(cluster).is_some_and(|entry| entry.bits() != entry.on_disk()) {
                self.mark_dirty(cluster);
            }
        }
    }

    /// When all marks that were taken are dealt with. Under the checkpoint lock.
    pub fn leave_checkpoint(&self) {
        self.shared().checkpointing.store(0, Ordering::SeqCst);
        self.shared().checkpointed_at.store(since_boot(), Ordering::Relaxed);
    }

    /// How long ago anybody's last checkpoint was.
    pub fn since_checkpoint(&self) -> Duration {
        let at = self.shared().checkpointed_at.load(Ordering::Relaxed);
        Duration::from_millis(since_boot().saturating_sub(at))
    }

    /// The number that the checkpoint about to be written gets. Under the checkpoint lock.
    pub fn begin_checkpoint(&self) -> u64 {
        let next = self.shared().checkpoints_done.load(Ordering::Acquire).saturating_add(1);
        self.shared().checkpoints_begun.store(next, Ordering::Release);
        next
    }

    /// The image's header carries the number now. Under the checkpoint lock.
    pub fn end_checkpoint(&self, number: u64) {
        self.shared().checkpoints_done.store(number, Ordering::Release);
    }

    /// Whether the image was found unreliable while in use, or this state is lost: nobody may rely
    /// on it, nor on anything taken from it before.
    pub fn has_failed(&self) -> bool {
        self.shared().failed.load(Ordering::Acquire) != 0 || self.is_lost()
    }

    /// Whether the live file was cut off or can no longer be read: all that is seen here is this
    /// process's own, and was zero to begin with.
    pub fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }

    /// Tells all processes that the image is unreliable. Returns whether this was news.
    pub fn fail(&self) -> bool {
        self.shared().failed.swap(1, Ordering::AcqRel) == 0
    }
}

impl Drop for LiveFile {
    fn drop(&mut self) {
        if let Some(made_at) = &self.made_at {
            let _ = std::fs::remove_file(made_at);
        }
    }
}

/// Owner, group and permission bits of a file.
#[derive(Clone, Copy, Debug)]
struct Ownership {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Ownership {
    fn of(meta: &Metadata) -> Self {
        Ownership { uid: meta.uid(), gid: meta.gid(), mode: meta.mode() }
    }

    fn group_writes(&self) -> bool {
        self.mode & 0o020 != 0
    }

    fn everybody_writes(&self) -> bool {
        self.mode & 0o002 != 0
    }

    /// Why a live file beside this image may be the work of somebody who may not write to the image;
    /// `me` is a user to be believed in any case. A file that has the group of the image comes from
    /// a member of it: nobody else can give it that (chown(2)), but in a directory whose group its
    /// files inherit.
    fn refuses(&self, live: &Ownership, me: Option<u32>) -> Option<String> {
        if self.everybody_writes() {
            return None;
        }
        let shares_group = self.group_writes() && live.gid == self.gid;
        let known = [Some(self.uid), Some(0), me].contains(&Some(live.uid));
        if !known && !shares_group {
            return Some(format!("it belongs to user {}, who does not own the image", live.uid));
        }
        if live.everybody_writes() {
            return Some("everybody may write to it, which the image does not allow".into());
        }
        (live.group_writes() && !shares_group)
            .then(|| format!("group {} may write to it, which the image does not allow", live.gid))
    }
}

/// Gives the live file the image's owner, group and mode, as far as this process may; never more
/// than the image allows.
fn copy_ownership(image: &File, live: &File) -> io::Result<()> {
    let meta = image.metadata()?;
    let mut mode = meta.mode() & 0o666;
    let owned = fchown(live, Some(meta.uid()), Some(meta.gid()));
    if let Err(err) = owned.or_else(|_| fchown(live, None, Some(meta.gid()))) {
        log::debug!("the live file keeps this process's owner and group: {err}");
        if live.metadata()?.gid() != meta.gid() {
            // Another group than the image's has no business here.
            mode &= !0o070;
        }
    }
    live.set_permissions(Permissions::from_mode(mode))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const ME: u32 = 7;

    /// Whether a user of the image uses a live file; each is owner, group and mode.
    fn uses(image: (u32, u32, u32), live: (u32, u32, u32), me: Option<u32>) -> bool {
        let owned = |(uid, gid, mode)| Ownership { uid, gid, mode };
        owned(image).refuses(&owned(live), me).is_none()
    }

    #[test]
    fn live_file_of_the_image_s_owner_or_of_root_is_used() {
        assert!(uses((1, 1, 0o644), (1, 1, 0o644), None));
        assert!(uses((1, 1, 0o644), (0, 0, 0o644), None));
    }

    #[test]
    fn live_file_of_another_user_is_not_used_whatever_its_mode() {
        assert!(!uses((1, 1, 0o644), (2, 1, 0o644), None));
        assert!(!uses((1, 1, 0o644), (2, 2, 0o600), Some(ME)));
    }

    #[test]
    fn live_file_of_one_s_own_is_used_by_who_may_write_to_the_image_alone() {
        assert!(uses((1, 1, 0o644), (ME, ME, 0o600), Some(ME)));
        assert!(!uses((1, 1, 0o644), (ME, ME, 0o600), None));
    }

    #[test]
    fn live_file_that_more_users_may_write_to_than_the_image_is_not_used() {
        assert!(!uses((1, 1, 0o644), (1, 1, 0o646), None));
        assert!(!uses((1, 1, 0o644), (1, 1, 0o664), None));
        assert!(!uses((1, 1, 0o664), (1, 2, 0o664), None));
    }

    #[test]
    fn live_file_of_a_member_of_the_group_that_shares_the_image_is_used() {
        assert!(uses((1, 5, 0o660), (2, 5, 0o660), None));
        assert!(!uses((1, 5, 0o640), (2, 5, 0o640), None));
    }

    #[test]
    fn live_file_of_an_image_that_everybody_may_write_to_may_be_anybody_s() {
        assert!(uses((1, 1, 0o666), (2, 2, 0o666), None));
    }
}
