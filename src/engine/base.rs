//! Holding the base against what the cache was made from: at opening all that can be seen of it and
//! a few places of its content, which the caller reads; afterwards the files that it consists of.
//! What that can notice, and when, is said at the head of `image::identity`.
//!
//! Used by the caller of the engine, between opening it and the first read.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Engine;
use super::signals::NoFileSizeSignal;
use crate::error::Result;
use crate::format::{BaseChange, BaseIdentity, Checksum, HostOffset, SUBCLUSTERS};
use crate::image::{self, BaseState, BaseWatch, PROBE_BYTES, PROBES};

/// How long an open waits for a checkpoint before it leaves something unnoted.
const PATIENCE: Duration = Duration::from_millis(100);

/// Why a cache is given up whose base has another sample than the one noted by somebody else.
pub const OTHER_SAMPLE: &str = "the base's content is not what others fill the cache from";

/// A base that was opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenBase<'a> {
    /// Its bytes, as the caller sees them.
    pub size: u64,
    /// The local file that it is, if it is one.
    pub file: Option<&'a Path>,
    /// Whether it is the one that the image names, so that what is found is true for everybody.
    pub is_named: bool,
}

impl Engine {
    /// Holds a base against what the cache was made from: its size, its file's identity, a sample
    /// of its content against the one that the first reader noted (or notes it), and some places
    /// against the data that is cached of them. It is read by the caller's `read`, a few kilobytes;
    /// where that fails nothing is known of the content.
    pub fn check_base(
        &self,
        base: &OpenBase<'_>,
        mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> BaseState {
        let header = self.header();
        let noted = header.cache.base;
        let seen = match BaseState::of_size(header, base.size) {
            BaseState::Same => BaseState::of_file(header, base.file),
            other => other,
        };
        if matches!(seen, BaseState::Changed(_)) {
            self.note_change(base, BaseChange::Whole);
            return seen;
        }
        if self.is_bypassed() {
            return seen;
        }
        let Ok(sample) = image::sample_base(header.geometry.virtual_size(), &mut read) else {
            return BaseState::Unknown;
        };
        let sampled = BaseState::of_sample(header, sample);
        if sampled != BaseState::Same {
            self.note_change(base, BaseChange::Whole);
            return sampled;
        }
        match self.find_contradiction(&mut read) {
            Ok(None) => {}
            Ok(Some(offset)) => {
                self.note_change(base, BaseChange::Data(offset));
                return BaseState::Changed(format!(
                    "the base's content at {offset:#x} is not what is cached of it"
                ));
            }
            Err(_) => return BaseState::Unknown,
        }
        self.core.set_sample(sample);
        if noted.sample == Some(sample) && noted.changed.is_none() {
            return sampled;
        }
        match self.note_sample(sample) {
            Ok(true) => sampled,
            Ok(false) => BaseState::Changed(OTHER_SAMPLE.to_owned()),
            Err(err) => {
                log::warn!("{err}; a base that changes may go unnoticed");
                sampled
            }
        }
    }

    /// Notes the sample in the header, unless another one was noted since the image was opened;
    /// whether none was.
    fn note_sample(&self, sample: [u8; 32]) -> Result<bool> {
        let mut agreed = true;
        self.note(|base| {
            agreed = base.sample.is_none_or(|other| other == sample);
            let right = BaseIdentity { sample: Some(sample), changed: None, ..base };
            if agreed { right } else { base }
        })?;
        Ok(agreed)
    }

    /// Gives the cache up because its base is another one: everybody does, where that is the one
    /// which the image names.
    pub fn base_changed(&self, how: &str, is_named: bool) {
        match is_named {
            true => self.core.fail(how),
            false => self.core.bypass(how),
        }
    }

    /// Watches the files that the base consists of from now on.
    pub fn watch_base(&self, files: impl IntoIterator<Item = PathBuf>) {
        let watch = BaseWatch::new(files);
        if !watch.is_empty() && !self.core.is_off() {
            self.core.watch_base(watch);
            self.keeper.start();
        }
    }

    /// Notes that the base is another one, for those who cannot see that without reading it.
    fn note_change(&self, base: &OpenBase<'_>, change: BaseChange) {
        let seen = BaseState::seen(self.header(), self.image().path());
        let is_news = !matches!(seen, BaseState::Changed(_))
            && self.header().cache.base.changed != Some(change);
        if base.is_named
            && is_news
            && let Err(err) = self.note(|noted| BaseIdentity { changed: Some(change), ..noted })
        {
            log::debug!("{err}");
        }
    }

    /// Notes something of the base in the header, where this open may write to the image.
    fn note(&self, update: impl FnOnce(BaseIdentity) -> BaseIdentity) -> Result<()> {
        if !self.core.populates() {
            return Ok(());
        }
        let _writes = NoFileSizeSignal::new();
        match self.core.image.lock_checkpoint(PATIENCE)? {
            Some(_lock) => self.core.image.update_base(update),
            // The next open will.
            None => Ok(()),
        }
    }

    /// Holds what is cached against the base where they differed before, and at some random places.
    /// Gives a guest offset at which they differ.
    fn find_contradiction(
        &self,
        read: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<Option<u64>> {
        let known = match self.header().cache.base.changed {
            Some(BaseChange::Data(offset)) => Some(offset),
            _ => None,
        };
        let some = (0..PROBES).map_while(|_| self.some_cached_data());
        for offset in known.into_iter().chain(some) {
            let found = self.probe(offset, read)?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Holds the cached data at the guest offset of a subcluster against the base. Gives the offset
    /// if the data is what was stored and differs.
    fn probe(
        &self,
        offset: u64,
        read: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<Option<u64>> {
        let geometry = self.core.image.geometry();
        let number = offset >> geometry.subcluster_bits();
        let Some(data) = self.cached_data(number) else { return Ok(None) };
        let range = geometry.subcluster_range(number, 1);
        let mut base = vec![0; range.len.min(PROBE_BYTES) as usize];
        read(&mut base, range.start)?;
        Ok((!data.starts_with(&base)).then_some(range.start))
    }

    /// The guest offset of some subcluster whose data is cached.
    fn some_cached_data(&self) -> Option<u64> {
        let live = self.core.active()?;
        let geometry = self.core.image.geometry();
        let random = RandomState::new().hash_one(0);
        let start = random % geometry.clusters().max(1);
        let behind = live.known_clusters().skip_while(|cluster| *cluster < start);
        let before = live.known_clusters().take_while(|cluster| *cluster < start);
        behind.chain(before).find_map(|cluster| {
            let data = live.entry(cluster)?.bits().data();
            let turn = (random >> 59) as u32;
            let index = data.rotate_right(turn).trailing_zeros();
            let number = cluster * u64::from(SUBCLUSTERS) + u64::from((index + turn) % SUBCLUSTERS);
            (data != 0).then_some(number << geometry.subcluster_bits())
        })
    }

    /// The data of a subcluster, if it is cached and is what was stored.
    fn cached_data(&self, number: u64) -> Option<Vec<u8>> {
        let geometry = self.core.image.geometry();
        let (cluster, index) = (number / u64::from(SUBCLUSTERS), number % u64::from(SUBCLUSTERS));
        if number << geometry.subcluster_bits() >= geometry.virtual_size() {
            // The header says what it likes.
            return None;
        }
        let (image, entry) = (&self.core.image, self.core.active()?.entry(cluster)?);
        let host = entry.host().filter(|host| image.layout().is_data_cluster(*host))?;
        if entry.bits().data() >> index & 1 == 0 {
            return None;
        }
        let mut data = vec![0; geometry.subcluster_size() as usize];
        let place = HostOffset(host.0 + (index << geometry.subcluster_bits()));
        image.read(&mut data, place).ok()?;
        let checksums = image.read_checksums(number, 1).ok()?;
        (checksums == [Checksum::of(number, &data)]).then_some(data)
    }
}
