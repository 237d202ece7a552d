//! Reading through an engine without QEMU: for tests, tools and benchmarks that have a base of
//! their own. QEMU's driver does the same with coroutines.
//!
//! Used by the tests and by whoever links the library from Rust.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::bounded;

use super::{Engine, Part, Step};
use crate::format::ByteRange;

/// How often a read waits for others before it turns to the base.
pub const MAX_WAITS: u32 = 8;

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
        self.engine.counters().reads.add(1);
        self.read_part(buf, offset, MAX_WAITS)
    }

    fn read_part(&self, buf: &mut [u8], offset: u64, waits: u32) -> io::Result<()> {
        let plan = self.engine.plan(ByteRange { start: offset, len: buf.len() as u64 });
        let mut rest = buf;
        let mut later = Vec::new();
        for Part { guest, step } in plan {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(guest.len as usize);
            rest = after;
            match step {
                Step::Hit(host) => {
                    let read = self.engine.image().file().read_exact_at(here, host.0);
                    if let Err(err) = read {
                        self.engine.hit_failed(&err);
                        self.read_base(here, guest.start)?;
                    }
                }
                Step::Zero => here.fill(0),
                Step::Base => self.read_base(here, guest.start)?,
                Step::Fetch(fetch) => {
                    let range = fetch.range();
                    let mut data = vec![0; range.len as usize];
                    let started = Instant::now();
                    self.base.read(&mut data, range.start)?;
                    let from = (guest.start - range.start) as usize;
                    if let Some(wanted) = data.get(from..from + here.len()) {
                        here.copy_from_slice(wanted);
                    }
                    self.engine.fill(fetch, data, started.elapsed());
                }
                Step::Wait(ticket) => later.push((here, guest, ticket)),
            }
        }
        for (here, guest, ticket) in later {
            if waits == 0 {
                self.read_base(here, guest.start)?;
                continue;
            }
            let (wake, woken) = bounded(1);
            let waiting = self.engine.wait(ticket, move || {
                // Nobody listens any more where the reader is gone.
                let _ = wake.send(());
            });
            if waiting {
                let _ = woken.recv();
            }
            self.read_part(here, guest.start, waits - 1)?;
        }
        Ok(())
    }

    fn read_base(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let counters = self.engine.counters();
        counters.base_reads.add(1);
        counters.base_bytes.add(buf.len() as u64);
        self.base.read(buf, offset)
    }
}
