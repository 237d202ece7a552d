//! Reading through an engine without QEMU: for tests, tools and benchmarks that have a base of
//! their own. QEMU's driver does the same with coroutines.
//!
//! Used by the tests and by whoever links the library from Rust.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::bounded;

use super::{Check, Engine, Fetch, Part, Step, Ticket};
use crate::format::{ByteRange, HostOffset};

/// How long a read waits for others, all in all, before it turns to the base: more than the
/// deadlines of two waits one after the other.
pub const WAIT_LIMIT: Duration = Duration::from_secs(5);

/// What a [`Reader`] reads where the cache has nothing.
pub trait Base {
    /// Fills the buffer from an offset on; beyond the end there are zeros.
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

impl<F: Fn(&mut [u8], u64) -> io::Result<()>> Base for F {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self(buf, offset)
    }
}

/// An engine and a base.
#[derive(Debug)]
pub struct Reader<B> {
    engine: Arc<Engine>,
    base: B,
}

impl<B: Base> Reader<B> {
    /// Reads through `engine`, and from `base` where that has nothing.
    pub fn new(engine: Arc<Engine>, base: B) -> Self {
        Reader { engine, base }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Fills the buffer from a guest offset on; the range must lie within the disk. Fails only
    /// where the base does.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(host) = self.engine.begin(ByteRange { start: offset, len: buf.len() as u64 }) {
            return self.read_hit(buf, offset, host);
        }
        let mut to_plan = vec![(buf, offset)];
        let mut waiting_since = None;
        while !to_plan.is_empty() {
            let mut later = Vec::new();
            for (buf, offset) in to_plan.drain(..) {
                self.read_planned(buf, offset, &mut later)?;
            }
            // Others are waited for only when nothing that they may wait for is left to do here.
            for (buf, offset, ticket) in later {
                let since: &mut Instant = waiting_since.get_or_insert_with(Instant::now);
                if since.elapsed() > WAIT_LIMIT {
                    self.read_base(buf, offset)?;
                } else {
                    self.wait(ticket);
                    to_plan.push((buf, offset));
                }
            }
        }
        Ok(())
    }

    /// Does what a plan says at once; what has to wait is left in `later`.
    fn read_planned<'b>(
        &self,
        buf: &'b mut [u8],
        offset: u64,
        later: &mut Vec<(&'b mut [u8], u64, Ticket)>,
    ) -> io::Result<()> {
        let plan = self.engine.plan(ByteRange { start: offset, len: buf.len() as u64 });
        let mut rest = buf;
        for Part { guest, step } in plan {
            let (here, after) = rest.split_at_mut(guest.len as usize);
            rest = after;
            match step {
                Step::Hit(host) => self.read_hit(here, guest.start, host)?,
                Step::Check(check) => self.check(here, guest.start, check)?,
                Step::Zero => here.fill(0),
                Step::Base => self.read_base(here, guest.start)?,
                Step::Fetch(fetch) => self.fetch(here, guest.start, fetch)?,
                Step::Wait(ticket) => later.push((here, guest.start, ticket)),
            }
        }
        Ok(())
    }

    fn read_hit(&self, buf: &mut [u8], offset: u64, host: HostOffset) -> io::Result<()> {
        match self.engine.image().file().read_exact_at(buf, host.0) {
            Ok(()) => Ok(()),
            Err(err) => {
                self.engine.hit_failed(&err);
                self.read_base(buf, offset)
            }
        }
    }

    fn fetch(&self, buf: &mut [u8], offset: u64, fetch: Fetch) -> io::Result<()> {
        let range = fetch.range();
        let Some(mut data) = self.engine.buffer(range) else {
            // The claims first: others need not wait for this read.
            drop(fetch);
            self.engine.note_dropped(buf.len() as u64);
            return self.read_base(buf, offset);
        };
        let started = Instant::now();
        self.base.read(&mut data, range.start)?;
        let from = (offset - range.start) as usize;
        if let Some(wanted) = data.get(from..from + buf.len()) {
            buf.copy_from_slice(wanted);
        }
        self.engine.fill(fetch, data, started.elapsed());
        Ok(())
    }

    fn check(&self, buf: &mut [u8], offset: u64, check: Check) -> io::Result<()> {
        let counters = self.engine.counters();
        let (range, len) = (check.range(), buf.len() as u64);
        let from = (offset - range.start) as usize;
        let image = self.engine.image();
        let read = |(at, len): (HostOffset, usize)| {
            let mut bytes = vec![0; len];
            image.read_or_zero(&mut bytes, at).map(|()| bytes)
        };
        let is_sound = |data: &[u8]| {
            Ok(check.fits_known(data) || check.is_sound(&read(check.checksums())?, data))
        };
        let data = read(check.data()).and_then(|data| Ok((is_sound(&data)?, data)));
        match data {
            Ok((true, data)) => {
                counters.hit_bytes.add(len);
                self.engine.note_sound(&check);
                buf.copy_from_slice(data.get(from..from + buf.len()).unwrap_or_default());
                Ok(())
            }
            Ok(_) => {
                counters.miss_bytes.add(len);
                let Some(mut base) = self.engine.buffer(range) else {
                    return self.read_base(buf, offset);
                };
                self.base.read(&mut base, range.start)?;
                buf.copy_from_slice(base.get(from..from + buf.len()).unwrap_or_default());
                self.engine.repair(check, base);
                Ok(())
            }
            Err(err) => {
                counters.miss_bytes.add(len);
                self.engine.hit_failed(&err);
                self.read_base(buf, offset)
            }
        }
    }

    fn wait(&self, ticket: Ticket) {
        let (wake, woken) = bounded(1);
        let waiting = self.engine.wait(ticket, move || {
            // Nobody listens any more where the reader is gone.
            let _ = wake.send(());
        });
        if waiting {
            // An error says that the engine is closing; then the plan says "base".
            let _ = woken.recv();
        }
    }

    fn read_base(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let counters = self.engine.counters();
        counters.base_reads.add(1);
        counters.base_bytes.add(buf.len() as u64);
        self.base.read(buf, offset)
    }
}
