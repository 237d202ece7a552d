//! A guest's read, in its coroutine: hits by `preadv2(RWF_NOWAIT)` from the image file straight
//! into the guest's vector (through a buffer where checksums have to be looked at), fetches from
//! the `backing` child, everything that may block in another thread while the coroutine yields.
//!
//! A coroutine is woken by the thread that has its result with `aio_co_wake`, which may be called
//! before it has yielded: the wake-up is scheduled in the coroutine's own thread. See [`Sleep`].
//!
//! Used by `driver`.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::c_int;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::time::Instant;

use libc::iovec;
use smallvec::{SmallVec, smallvec};

use super::api;
use super::call::field;
use super::file_read::{self, END_OF_FILE, Errno, IoVec, Rest};
use super::node::Node;
use super::scratch::Scratch;
use super::symbols::{BdrvChild, BlockDriverState, Coroutine, QEMUIOVector};
use crate::engine::{Buffer, Check, Fetch, Part, Step, Ticket, WAIT_LIMIT};
use crate::format::{ByteRange, HostOffset};

/// Bytes of a read that may wait for others in the thread that takes what the disk was asked for.
const STARTED_MAX: usize = 128 << 10;

/// Reads a range of an open node into a vector, from wherever its parts are.
///
/// # Safety
/// In a coroutine of QEMU's, with the graph locked for reading where there is such a lock; `bs` is
/// the node, `qiov` has `range.len` bytes from `qiov_offset` on and outlives the call.
pub(super) unsafe fn read(
    node: &Node,
    bs: *mut BlockDriverState,
    range: ByteRange,
    qiov: *mut QEMUIOVector,
    qiov_offset: usize,
) -> Result<(), Errno> {
    // SAFETY: an open node in a coroutine with the graph locked (caller).
    unsafe { node.watch_base(bs) };
    // SAFETY: a vector of QEMU's (caller).
    let vector = unsafe { Vector::new(qiov, qiov_offset, range) };
    let request = Request { node, bs, vector, waited: Cell::new(false) };
    // SAFETY: as promised by the caller.
    unsafe {
        match node.engine().begin(range) {
            Some(host) => request.hit(range, host),
            None => request.read(range),
        }
    }
}

/// Reads a range from the backing child alone.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn read_base(
    bs: *mut BlockDriverState,
    range: ByteRange,
    qiov: *mut QEMUIOVector,
    qiov_offset: usize,
) -> Result<(), Errno> {
    // SAFETY: as promised by the caller.
    unsafe { Vector::new(qiov, qiov_offset, range).read_base(bs, range) }
}

/// The guest's memory for a request.
struct Vector {
    iov: *const iovec,
    count: usize,
    /// Bytes of the vector before the request's first.
    skip: u64,
    /// Guest offset of the request's first byte.
    start: u64,
}

impl Vector {
    /// # Safety
    /// As for [`read`].
    unsafe fn new(qiov: *mut QEMUIOVector, skip: usize, range: ByteRange) -> Self {
        let layout = &api().layout;
        // SAFETY: a live vector; the layout is verified.
        unsafe {
            Vector {
                iov: field::<_, *const iovec>(qiov, layout.qiov_iov).read(),
                count: field::<_, c_int>(qiov, layout.qiov_niov).read() as usize,
                skip: skip as u64,
                start: range.start,
            }
        }
    }

    /// The memory of the request, where it is one element that has just its bytes.
    fn as_one(&self, part: ByteRange) -> Option<&[iovec]> {
        // SAFETY: QEMU's array of `count` elements, alive and unchanged during the request.
        let all = unsafe { std::slice::from_raw_parts(self.iov, self.count) };
        let is_whole = |one: &iovec| self.skip == 0 && one.iov_len as u64 == part.len;
        (all.len() == 1 && part.start == self.start && all.first().is_some_and(is_whole))
            .then_some(all)
    }

    /// The memory for a part of the request.
    fn slice(&self, part: ByteRange) -> IoVec {
        let mut skip = (self.skip + part.start - self.start) as usize;
        let mut left = part.len as usize;
        let mut slices = IoVec::new();
        // SAFETY: QEMU's array of `count` elements, alive and unchanged during the request.
        for element in unsafe { std::slice::from_raw_parts(self.iov, self.count) } {
            if left == 0 {
                break;
            }
            if skip >= element.iov_len {
                skip -= element.iov_len;
                continue;
            }
            let len = left.min(element.iov_len - skip);
            slices.push(iovec { iov_base: element.iov_base.wrapping_byte_add(skip), iov_len: len });
            left -= len;
            skip = 0;
        }
        slices
    }

    /// Copies bytes to a part of the request.
    fn fill(&self, part: ByteRange, mut data: &[u8]) {
        for element in self.slice(part) {
            let (here, rest) = data.split_at(element.iov_len.min(data.len()));
            // SAFETY: guest memory that QEMU gave for this request, `here.len()` bytes of it, which
            // no Rust reference points at.
            unsafe {
                std::ptr::copy_nonoverlapping(here.as_ptr(), element.iov_base.cast(), here.len());
            }
            data = rest;
        }
    }

    fn zero(&self, part: ByteRange) {
        for element in self.slice(part) {
            // SAFETY: guest memory that QEMU gave for this request.
            unsafe { std::ptr::write_bytes(element.iov_base.cast::<u8>(), 0, element.iov_len) };
        }
    }

    /// Reads a part from the backing child; zeros where there is none.
    ///
    /// # Safety
    /// As for [`read`].
    unsafe fn read_base(&self, bs: *mut BlockDriverState, part: ByteRange) -> Result<(), Errno> {
        // SAFETY: as promised by the caller.
        if !unsafe { read_backing(bs, part, &mut self.slice(part)) }? {
            self.zero(part);
        }
        Ok(())
    }
}

/// Reads from the backing child into a vector; `false` where there is none.
///
/// # Safety
/// As for [`read`], the memory being good for writing `range.len` bytes.
unsafe fn read_backing(
    bs: *mut BlockDriverState,
    range: ByteRange,
    iov: &mut [iovec],
) -> Result<bool, Errno> {
    let api = api();
    // SAFETY: the graph does not change while it is locked; the layout is verified.
    let child = unsafe { field::<_, *mut BdrvChild>(bs, api.layout.bs_backing).read() };
    if child.is_null() {
        return Ok(false);
    }
    // Larger than any QEMUIOVector; the layout's size was checked when it was chosen.
    let mut qiov = [0u64; 16];
    assert!(api.layout.qiov_sizeof as usize <= size_of_val(&qiov));
    let qiov = qiov.as_mut_ptr().cast::<QEMUIOVector>();
    // SAFETY: room for a vector; the array lives until the read is done; a coroutine with the
    // graph locked (caller).
    let ret = unsafe {
        (api.symbols.qemu_iovec_init_external)(qiov, iov.as_mut_ptr(), iov.len() as c_int);
        (api.symbols.bdrv_co_preadv)(child, range.start as i64, range.len as i64, qiov, 0)
    };
    if ret < 0 { Err(-ret) } else { Ok(true) }
}

/// Parts that wait for somebody else's fetch.
type Later = SmallVec<[(ByteRange, Ticket); 2]>;

struct Request<'a> {
    node: &'a Node,
    bs: *mut BlockDriverState,
    vector: Vector,
    /// Whether the page cache did not have all of it.
    waited: Cell<bool>,
}

impl Request<'_> {
    /// # Safety
    /// As for [`read`].
    unsafe fn read(&self, range: ByteRange) -> Result<(), Errno> {
        let mut to_plan: SmallVec<[ByteRange; 2]> = smallvec![range];
        let mut waiting_since = None;
        while !to_plan.is_empty() {
            let mut later = Later::new();
            for range in to_plan.drain(..) {
                // SAFETY: as promised by the caller.
                unsafe { self.read_planned(range, &mut later) }?;
            }
            // Others are waited for only when nothing that they may wait for is left to do here.
            for (part, ticket) in later {
                let since: &mut Instant = waiting_since.get_or_insert_with(Instant::now);
                if since.elapsed() > WAIT_LIMIT {
                    // SAFETY: as promised by the caller.
                    unsafe { self.base(part) }?;
                    continue;
                }
                let sleep = Sleep::new();
                let waker = sleep.waker();
                if self.node.engine().wait(ticket, move || drop(waker)) {
                    // SAFETY: in the coroutine that made it (caller).
                    unsafe { sleep.until_done() };
                }
                to_plan.push(part);
            }
        }
        Ok(())
    }

    /// Does what a plan says at once; what has to wait is left in `later`.
    ///
    /// # Safety
    /// As for [`read`].
    unsafe fn read_planned(&self, range: ByteRange, later: &mut Later) -> Result<(), Errno> {
        for Part { guest, step } in self.node.engine().plan(range) {
            // SAFETY: as promised by the caller.
            unsafe {
                match step {
                    Step::Hit(host) => self.hit(guest, host)?,
                    Step::Check(check) => self.check(guest, check)?,
                    Step::Zero => self.vector.zero(guest),
                    Step::Fetch(fetch) => self.fetch(guest, fetch)?,
                    Step::Base => self.base(guest)?,
                    Step::Wait(ticket) => later.push((guest, ticket)),
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`read`].
    unsafe fn base(&self, part: ByteRange) -> Result<(), Errno> {
        let counters = self.node.engine().counters();
        counters.base_reads.add(1);
        counters.base_bytes.add(part.len);
        // SAFETY: as promised by the caller.
        unsafe { self.vector.read_base(self.bs, part) }
    }

    /// Reads what was claimed, which is more than the guest asked for; where that cannot be had,
    /// what it asked for.
    ///
    /// # Safety
    /// As for [`read`].
    unsafe fn fetch(&self, part: ByteRange, fetch: Fetch) -> Result<(), Errno> {
        let range = fetch.range();
        let engine = self.node.engine();
        let started = Instant::now();
        let buffer = engine.buffer(range);
        if buffer.is_none() {
            engine.note_dropped(part.len);
        }
        // SAFETY: as promised by the caller.
        let data = buffer.and_then(|buffer| unsafe { self.read_claimed(range, buffer) });
        let Some(data) = data else {
            // The claims first: others need not wait for this request.
            drop(fetch);
            // SAFETY: as promised by the caller.
            return unsafe { self.base(part) };
        };
        let from = (part.start - range.start) as usize;
        if let Some(wanted) = data.get(from..from + part.len as usize) {
            self.vector.fill(part, wanted);
        }
        engine.fill(fetch, data, started.elapsed());
        Ok(())
    }

    /// The bytes of a range of the base; `None` where there is no base, or an error, which may lie
    /// outside what the guest wants.
    ///
    /// # Safety
    /// As for [`read`].
    unsafe fn read_claimed(&self, range: ByteRange, mut data: Buffer) -> Option<Buffer> {
        let mut iov = [iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }];
        // SAFETY: as promised by the caller; the buffer outlives the read.
        let read = unsafe { read_backing(self.bs, range, &mut iov) };
        matches!(read, Ok(true)).then_some(data)
    }

    /// # Safety
    /// As for [`read`].
    unsafe fn hit(&self, part: ByteRange, host: HostOffset) -> Result<(), Errno> {
        // SAFETY: guest memory that QEMU gave for this request, until it completes.
        let read = unsafe {
            match self.vector.as_one(part) {
                Some(memory) => self.read_image(memory, host),
                None => self.read_image(&self.vector.slice(part), host),
            }
        };
        match read {
            Ok(()) => Ok(()),
            Err(errno) => {
                self.note_failed_read(errno);
                // SAFETY: as promised by the caller.
                unsafe { self.base(part) }
            }
        }
    }

    /// Serves cached data that this open has not seen yet, or the base's bytes where it is not what
    /// was stored.
    ///
    /// # Safety
    /// As for [`read`].
    unsafe fn check(&self, part: ByteRange, check: Check) -> Result<(), Errno> {
        let range = check.range();
        let from = (part.start - range.start) as usize;
        let wanted = from..from + part.len as usize;
        // SAFETY: as promised by the caller.
        let found = unsafe {
            match self.read_bytes(check.data()) {
                Ok(data) if check.fits_known(&data) => Ok((true, data)),
                Ok(data) => self
                    .read_bytes(check.checksums())
                    .map(|checksums| (check.is_sound(&checksums, &data), data)),
                Err(errno) => Err(errno),
            }
        };
        // Asked for now: this may be another thread than before.
        let counters = self.node.engine().counters();
        match found {
            Ok((true, data)) => {
                counters.hit_bytes.add(part.len);
                self.vector.fill(part, data.get(wanted).unwrap_or_default());
                if !self.waited.get() {
                    self.node.engine().note_sound(&check);
                }
                return Ok(());
            }
            Ok(_) => {}
            Err(libc::EIO) => check.note_unreadable(),
            Err(errno) => {
                self.note_failed_read(errno);
                counters.miss_bytes.add(part.len);
                // SAFETY: as promised by the caller.
                return unsafe { self.base(part) };
            }
        }
        counters.miss_bytes.add(part.len);
        // SAFETY: as promised by the caller.
        let base = self
            .node
            .engine()
            .buffer(range)
            .and_then(|buffer| unsafe { self.read_claimed(range, buffer) });
        let Some(base) = base else {
            // SAFETY: as promised by the caller.
            return unsafe { self.base(part) };
        };
        self.vector.fill(part, base.get(wanted).unwrap_or_default());
        self.node.engine().repair(check, base);
        Ok(())
    }

    /// The bytes at a place of the image file; zeros beyond its end.
    ///
    /// # Safety
    /// As for [`read`].
    unsafe fn read_bytes(&self, (at, len): (HostOffset, usize)) -> Result<Scratch, Errno> {
        let mut bytes = Scratch::new(len).ok_or(libc::ENOMEM)?;
        let iov = [iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len }];
        // SAFETY: the buffer outlives the reads; the rest as promised by the caller.
        unsafe {
            match self.read_image(&iov, at) {
                Err(END_OF_FILE) => bytes.fill(0),
                read => return read.map(|()| bytes),
            }
            match self.read_image(&iov, at) {
                Ok(()) | Err(END_OF_FILE) => Ok(bytes),
                Err(errno) => Err(errno),
            }
        }
    }

    /// Gives the cache up where the image could not be read; some errors are about the guest's
    /// memory or this process alone.
    fn note_failed_read(&self, errno: Errno) {
        match errno {
            END_OF_FILE => self.node.engine().hit_failed(&"the image file has become shorter"),
            libc::EFAULT | libc::ENOMEM | libc::EAGAIN | libc::ECANCELED => {}
            _ => self.node.engine().hit_failed(&io::Error::from_raw_os_error(errno)),
        }
    }

    /// Reads from a place of the image file, in this thread what can be had without waiting.
    ///
    /// # Safety
    /// As for [`read`]; the memory must be good for writing until this returns.
    unsafe fn read_image(&self, iov: &[iovec], at: HostOffset) -> Result<(), Errno> {
        let fd = self.node.engine().image().file().as_raw_fd();
        let mut read = None;
        if self.node.may_read_now() {
            // SAFETY: as promised by the caller.
            match unsafe { file_read::read_now(fd, iov, at.0) } {
                Ok(bytes) if bytes == file_read::len(iov) => return Ok(()),
                Ok(bytes) => read = Some(bytes),
                Err(libc::EOPNOTSUPP) => self.node.set_no_read_now(),
                Err(errno) => return Err(errno),
            }
        }
        let rest = Rest::after(read.unwrap_or(0), fd, iov, at.0);
        // SAFETY: the same; the coroutine does not complete before the thread is done.
        unsafe { self.read_in_thread(rest, read.is_some()) }
    }

    /// Reads what is left, which the disk may be at already.
    ///
    /// # Safety
    /// As for [`read`], `rest` being memory of this request.
    unsafe fn read_in_thread(&self, mut rest: Rest, is_begun: bool) -> Result<(), Errno> {
        self.waited.set(true);
        // What stands if the thread does not get to say otherwise.
        let result = Arc::new(AtomicI32::new(libc::ECANCELED));
        let sleep = Sleep::new();
        let waker = sleep.waker();
        let (mut job, told, len) = (rest.clone(), Arc::clone(&result), rest.len());
        let job = move || {
            // SAFETY: the request, and with it its memory, waits until the waker is dropped.
            let read = unsafe { job.read_all() };
            told.store(read.err().unwrap_or(0), Ordering::Relaxed);
            drop(waker);
        };
        let engine = self.node.engine();
        // What takes long to copy has a thread of its own too.
        let runs = match is_begun && len <= STARTED_MAX {
            true => engine.run_started(job),
            false => engine.run_blocking(job),
        };
        if !runs {
            // SAFETY: as promised by the caller. It blocks, where no thread can be had at all.
            return unsafe { rest.read_all() };
        }
        // SAFETY: in the coroutine that made it (caller).
        unsafe { sleep.until_done() };
        match result.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(errno),
        }
    }
}

/// A coroutine that goes to sleep until another thread is done, whichever of the two is first.
struct Sleep {
    coroutine: *mut Coroutine,
    state: Arc<AtomicU8>,
}

/// The other thread is at it, and the coroutine does not sleep yet.
const AWAKE: u8 = 0;
/// The coroutine sleeps: the other thread has to wake it.
const ASLEEP: u8 = 1;
/// The other thread is done.
const DONE: u8 = 2;

/// Held by the other thread; dropping it, for whatever reason, is being done. So a guest's read
/// does not sleep for ever even if that thread panics.
struct Waker {
    coroutine: *mut Coroutine,
    state: Arc<AtomicU8>,
}

// SAFETY: aio_co_wake may be called from any thread (block/aio.h), and nothing else is done with
// the coroutine.
unsafe impl Send for Waker {}

impl Drop for Waker {
    fn drop(&mut self) {
        // Releases what this thread wrote to the coroutine, which acquires it in `until_done`.
        if self.state.swap(DONE, Ordering::AcqRel) == ASLEEP {
            // SAFETY: the coroutine has yielded or is about to, and is woken only here.
            unsafe { (api().symbols.aio_co_wake)(self.coroutine) };
        }
    }
}

impl Sleep {
    fn new() -> Self {
        // SAFETY: reads of this driver run in coroutines.
        let coroutine = unsafe { (api().symbols.qemu_coroutine_self)() };
        Sleep { coroutine, state: Arc::new(AtomicU8::new(AWAKE)) }
    }

    fn waker(&self) -> Waker {
        Waker { coroutine: self.coroutine, state: Arc::clone(&self.state) }
    }

    /// Yields until the one waker that was made is dropped.
    ///
    /// # Safety
    /// In the coroutine that made this.
    unsafe fn until_done(self) {
        if self.state.swap(ASLEEP, Ordering::AcqRel) == AWAKE {
            // SAFETY: in a coroutine (caller), which the waker wakes.
            unsafe { (api().symbols.qemu_coroutine_yield)() };
        }
    }
}
