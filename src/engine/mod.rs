//! The core as the outside sees it: one open cache image, asked for a plan of every read.
//!
//! ```text
//!   plan(range) -> hits | checks | zeros | fetches | waits | base      plan.rs
//!   check  the caller reads data and checksums; is_sound() or repair()   verify.rs
//!   hit    the caller reads the image file at the place the plan names
//!   fetch  the caller reads the base, answers its request, and hands the bytes to fill()
//!   wait   somebody else is fetching: wait() says when to plan again     wait.rs
//!   fill   a worker stores the bytes and publishes them       populate.rs
//!   every few seconds and on close a checkpoint               checkpoint.rs, keeper.rs
//! ```
//!
//! The engine never reads the base and knows nothing of QEMU: it can be driven by anything that
//! has a base to read, as [`Reader`] does.
//!
//! Nothing here fails a read. Where the cache is of no use (full, broken, stale, lost), plans say
//! "base" and one line of log says why.
//!
//! Used by `qemu` and the command line; uses `image`, `live`, `format`, `lock` and `error`.

mod ahead;
mod base;
mod buffer;
mod checkpoint;
mod core;
mod join;
mod keeper;
mod plan;
mod pool;
mod populate;
mod publish;
mod reader;
mod signals;
mod started;
mod status;
mod verify;
mod wait;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::format::{ByteRange, Header, HostOffset};
use crate::image::{Image, Observer};
use crate::live::slot::Counters;

use self::ahead::Ahead;
pub use self::base::OpenBase;
pub use self::buffer::Buffer;
use self::buffer::Room;
use self::core::Core;
use keeper::Keeper;
pub use plan::{FETCH_MAX, Fetch, Part, Plan, Presence, Step, Ticket};
use pool::Pool;
use populate::Populator;
pub use publish::publish;
pub use reader::{Base, Reader, WAIT_LIMIT};
use signals::NoFileSizeSignal;
use started::Started;
pub use status::{
    COUNTERS, CheckReport, Counts, ImageState, ProcessStats, Status, check, check_observed,
};
pub use verify::Check;
use wait::Waiter;

/// How to open an engine.
#[derive(Clone, Debug)]
pub struct Options {
    /// Store what is fetched from the base.
    pub populate: bool,
    /// Bytes of the base that may be in memory on their way into the cache, those being read
    /// included; more is not stored.
    pub queue_bytes: u64,
    /// For tests alone.
    #[doc(hidden)]
    pub surroundings: Surroundings,
}

/// What a test may put in place of the machine around an engine.
#[doc(hidden)]
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Hears of every change to the image file, and may refuse it.
    pub observer: Option<Arc<dyn Observer>>,
    /// The boot that the machine is said to be in, instead of the kernel's own boot id.
    pub boot_id: Option<[u8; 16]>,
    /// How often this engine looks whether a checkpoint is due.
    pub checkpoint_interval: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Options { populate: true, queue_bytes: 64 << 20, surroundings: Surroundings::default() }
    }
}

/// One open of a cache image. Shared by all threads that read through it.
#[derive(Debug)]
pub struct Engine {
    core: Arc<Core>,
    pool: Arc<Pool>,
    started: Arc<Started>,
    ahead: Arc<Ahead>,
    room: Arc<Room>,
    populator: Populator,
    waiter: Waiter,
    keeper: Keeper,
}

impl Engine {
    /// Opens an image and joins those who use it. An error is an image that cannot be understood;
    /// whatever else stands in the way of caching only makes this engine pass reads through.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let _writes = NoFileSizeSignal::new();
        let core = Arc::new(join::join(path, options)?);
        let pool = Arc::<Pool>::default();
        Ok(Engine {
            started: Started::new(Arc::clone(&pool)),
            pool,
            ahead: Ahead::new(Arc::clone(&core)),
            room: Room::new(options.queue_bytes),
            populator: Populator::new(Arc::clone(&core)),
            waiter: Waiter::new(Arc::clone(&core)),
            keeper: Keeper::new(Arc::clone(&core), options.surroundings.checkpoint_interval),
            core,
        })
    }

    /// The image's header.
    pub fn header(&self) -> &Header {
        self.core.image.header()
    }

    /// The image, whose file the caller reads hits from.
    pub fn image(&self) -> &Image {
        &self.core.image
    }

    /// This open's counters, for what the caller alone knows.
    pub fn counters(&self) -> &Counters {
        self.core.counters()
    }

    /// What this open did, in the order of [`COUNTERS`].
    pub fn counts(&self) -> Counts {
        self.core.counts()
    }

    /// Stops using the cache for good, with the reason for the log.
    pub fn bypass(&self, reason: &str) {
        self.core.bypass(reason);
    }

    /// Whether the cache is in use; otherwise every plan says "base".
    pub fn is_active(&self) -> bool {
        self.core.active().is_some()
    }

    /// Whether the cache was given up for good.
    pub fn is_bypassed(&self) -> bool {
        self.core.is_off()
    }

    /// Begins a read within the disk. Where its bytes lie in the image file, where they are all in one
    /// place and need no look at their checksums any more; otherwise see [`Engine::plan`], which
    /// this spares most reads of a warm cache.
    pub fn begin(&self, range: ByteRange) -> Option<HostOffset> {
        plan::begin(&self.core, range)
    }

    /// Plans a read of a range within the disk. Claims what nobody has and nobody is fetching.
    pub fn plan(&self, range: ByteRange) -> Plan {
        plan::plan(&self.core, range)
    }

    /// The state of the bytes from the start of `range` on, and how many of them share it.
    pub fn status_of(&self, range: ByteRange) -> (plan::Presence, u64) {
        plan::presence(&self.core, range)
    }

    /// Memory for the base's bytes of a fetch or a check, which are as many as its range has. `None`
    /// where as much as may be is on its way into the cache.
    pub fn buffer(&self, range: ByteRange) -> Option<Buffer> {
        let subcluster = self.core.image.geometry().subcluster_size();
        let capacity = range.len.checked_next_multiple_of(subcluster)?;
        self.room.buffer(range.len.try_into().ok()?, capacity.try_into().ok()?)
    }

    /// Notes bytes of the base that were read for the guest alone, for want of memory.
    pub fn note_dropped(&self, bytes: u64) {
        self.core.counters().dropped_bytes.add(bytes);
    }

    /// Takes what was read from the base for a fetch: the whole of [`Fetch::range`]. Never blocks.
    pub fn fill(&self, fetch: Fetch, data: Buffer, took: Duration) {
        if data.len() as u64 != fetch.range().len {
            log::error!("{} bytes for {:?} are not stored", data.len(), fetch.range());
            return;
        }
        self.core.note_latency(took);
        let counters = self.core.counters();
        counters.base_reads.add(1);
        counters.base_bytes.add(data.len() as u64);
        self.populator.push(fetch, data);
    }

    /// Notes that a check of data that the page cache had was sound: what is around it may be looked
    /// at in another thread before it is read.
    pub fn note_sound(&self, check: &Check) {
        self.ahead.look(check, &self.pool);
    }

    /// Takes the base's bytes for a check that was not sound, the whole of [`Check::range`], to be
    /// stored in place of what is bad. Never blocks.
    pub fn repair(&self, check: Check, base: Buffer) {
        let counters = self.core.counters();
        counters.base_reads.add(1);
        counters.base_bytes.add(base.len() as u64);
        if self.core.populates() && base.len() as u64 == check.range().len {
            self.populator.push_repair(check, base);
        }
    }

    /// Calls `wake` when it is time to plan again what a ticket stands for, from another thread.
    /// `false`, and no call, where that is now.
    pub fn wait(&self, ticket: Ticket, wake: impl FnOnce() + Send + 'static) -> bool {
        match ticket.0 {
            plan::Waiting::Claim { cluster, subcluster } => {
                self.waiter.wait(cluster, subcluster, Box::new(wake))
            }
            plan::Waiting::Group { cluster } => {
                let core = Arc::clone(&self.core);
                let runs = self.pool.run(Box::new(move || {
                    core.ensure(cluster);
                    wake();
                }));
                if !runs {
                    self.core.ensure(cluster);
                }
                runs
            }
        }
    }

    /// Runs something that may block in a thread of its own; `false`, and it is dropped, where no
    /// thread can be had.
    #[must_use = "where no thread can be had the caller has to do it"]
    pub fn run_blocking(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.pool.run(Box::new(job))
    }

    /// Runs a job that waits for a read which was begun already, in a thread that it shares with others
    /// of the kind; `false`, and it is dropped, where no thread can be had.
    #[must_use = "where no thread can be had the caller has to do it"]
    pub fn run_started(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.started.push(Box::new(job))
    }

    /// Notes that the image file could not be read: from now on the base answers. Others go on,
    /// since what they need may be readable; whoever opens the image next repairs what is not.
    pub fn hit_failed(&self, err: &impl std::fmt::Display) {
        self.core.bypass(&format!("could not read cached data: {err}"));
    }

    /// Stores what is queued, writes a last checkpoint and leaves. Further plans say "base".
    pub fn close(&self) {
        let started = Instant::now();
        self.keeper.stop();
        self.populator.stop();
        self.waiter.stop();
        self.ahead.stop();
        let writes = NoFileSizeSignal::new();
        checkpoint::last(&self.core);
        drop(writes);
        self.core.retire();
        log::debug!("{}: closed in {:?}", self.core.image.path().display(), started.elapsed());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
