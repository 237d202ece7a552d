//! Losing the live file: when it is cut off, or its filesystem fails, the kernel answers the next
//! touch of its mapping with SIGBUS, which ends a process. Here that touch finds zeros instead and
//! the mapping is marked lost, so that the process goes on with the base.
//!
//! # Protocol
//!
//! Every mapping of a live file is registered ([`Watch::new`]) in a table that a signal handler can
//! read: one word for each mapping with its first page and its length, so that it is never seen
//! half-written, and a flag. The handler, when a fault lies in a registered mapping, sets the flag
//! and then maps anonymous, zeroed memory over the whole of it; the interrupted access is tried
//! again by the processor and succeeds. A second thread that faulted at the same time does the same
//! once more, which changes nothing that counts.
//!
//! The flag is set before the first zero can be seen. So whoever takes something out of the mapping
//! and then finds the flag unset ([`Watch::is_lost`]) has taken nothing but what was shared. Nothing
//! that was taken may reach the image before that question. The flag is this process's own memory:
//! nothing that happens to the file takes it back.
//!
//! A fault on a blocked signal ends the process whatever the handler, and QEMU blocks SIGBUS in its
//! threads. So each thread lets it through before it touches a mapping ([`let_through`]).
//!
//! What is not ours goes on as if this were not here:
//!
//! - a fault elsewhere is given to the handler that was there before, or the default;
//! - a SIGBUS that somebody sent, or the early notice of a broken memory page (`BUS_MCEERR_AO`),
//!   QEMU expects at the signalfd(2) of its main loop, which calls the handler again, without a
//!   context. Where the signal used to be blocked it is blocked again and sent again, and then waits
//!   there; the thread lets it through again at its next touch of a mapping.
//!
//! QEMU's emulators set their handler (`qemu_init_sigbus`) before they open the first drive, its
//! tools set none, and `qemu_prealloc_mem` replaces the handler only for a moment and calls the one
//! it found. So ours is set once; each later registration looks whether it was reset to the default
//! since, and leaves any other handler in its place: its owner could see ours.
//!
//! The handler makes system calls and touches atomics, nothing else (signal-safety(7)); nobody can
//! be told from there. Whoever finds the flag logs (`engine::core`).
//!
//! Used by `file`; `engine` lets the signal through.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use parking_lot::Mutex;

/// Mappings that one process can have.
const MAPPINGS: usize = 1024;
const PAGE_BITS: u32 = 12;
/// Bits of a word that hold the length in pages; those above hold the number of the first page.
const LENGTH_BITS: u32 = 28;
/// The word of an entry that somebody is about to fill: no pages.
const RESERVED: u64 = 1 << LENGTH_BITS;

static MAPPED: [Entry; MAPPINGS] = [const { Entry::new() }; MAPPINGS];

/// One mapping.
#[derive(Debug)]
struct Entry {
    /// First page and length; zero where the entry is free.
    pages: AtomicU64,
    lost: AtomicBool,
}

impl Entry {
    const fn new() -> Self {
        Entry { pages: AtomicU64::new(0), lost: AtomicBool::new(false) }
    }

    /// The addresses of the mapping, where `address` is one of them.
    fn range_around(&self, address: usize) -> Option<(usize, usize)> {
        let word = self.pages.load(Ordering::Acquire);
        let start = (word >> LENGTH_BITS << PAGE_BITS) as usize;
        let len = ((word & ((1 << LENGTH_BITS) - 1)) << PAGE_BITS) as usize;
        (address.wrapping_sub(start) < len).then_some((start, len))
    }
}

/// The first page and the length of a mapping in one word; `None` where they do not fit.
fn encode(start: usize, len: usize) -> Option<u64> {
    let (first, pages) = (start as u64 >> PAGE_BITS, (len as u64).div_ceil(1 << PAGE_BITS));
    let fits = first < 1 << (u64::BITS - LENGTH_BITS) && pages < 1 << LENGTH_BITS;
    fits.then_some(first << LENGTH_BITS | pages)
}

/// A mapping whose loss does not end the process, until this is dropped.
#[derive(Debug)]
pub struct Watch {
    entry: &'static Entry,
}

impl Watch {
    /// Registers a mapping that starts at a page and is dropped after this. An error says that it
    /// must not be touched: there are too many, it is too large, or there can be no handler.
    pub fn new(start: *const u8, len: usize) -> io::Result<Self> {
        Self::in_table(&MAPPED, start, len)
    }

    fn in_table(table: &'static [Entry], start: *const u8, len: usize) -> io::Result<Self> {
        let word = encode(start.expose_provenance(), len).ok_or(io::ErrorKind::FileTooLarge)?;
        install()?;
        let free = |entry: &&Entry| {
            let (free, reserved) = (Ordering::AcqRel, Ordering::Relaxed);
            entry.pages.compare_exchange(0, RESERVED, free, reserved).is_ok()
        };
        let entry = table.iter().find(free).ok_or_else(|| io::Error::other("too many mappings"))?;
        entry.lost.store(false, Ordering::Relaxed);
        entry.pages.store(word, Ordering::Release);
        let_through();
        Ok(Watch { entry })
    }

    /// Whether what was read from the mapping before this question may be zeros that were never
    /// there.
    pub fn is_lost(&self) -> bool {
        // The reads before stay before.
        fence(Ordering::Acquire);
        self.entry.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.entry.pages.store(0, Ordering::Release);
    }
}

/// Grows when threads have to let the signal through once more.
static ROUND: AtomicU32 = AtomicU32::new(1);
/// Whether the signal was blocked where it was let through: somebody waits for it elsewhere.
static EXPECTED_ELSEWHERE: AtomicBool = AtomicBool::new(false);

thread_local! {
    static LET_THROUGH: Cell<u32> = const { Cell::new(0) };
}

/// Lets SIGBUS through in this thread, as every thread has to before it touches a mapping. Costs a
/// comparison where that is done.
// Not inlined: a coroutine may go on in another thread, whose thread-local memory this must find.
#[inline(never)]
pub fn let_through() {
    let round = ROUND.load(Ordering::Relaxed);
    if LET_THROUGH.get() != round {
        LET_THROUGH.set(round);
        unblock();
    }
}

#[cold]
fn unblock() {
    let mut before = sigbus_alone();
    // SAFETY: two signal sets on the stack.
    let failed = unsafe {
        let alone = sigbus_alone();
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &alone, &mut before)
    };
    // SAFETY: a set that was written just now, or made above.
    if failed == 0 && unsafe { libc::sigismember(&before, libc::SIGBUS) } == 1 {
        EXPECTED_ELSEWHERE.store(true, Ordering::Relaxed);
    }
}

fn sigbus_alone() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the set is made by the first call and good for the second.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGBUS);
        set.assume_init()
    }
}

/// The handler that was there before, and its flags.
static BEFORE: (AtomicUsize, AtomicI32) = (AtomicUsize::new(libc::SIG_DFL), AtomicI32::new(0));

/// Sets the handler, unless there is one that came later and knows it.
fn install() -> io::Result<()> {
    static ONE_AT_A_TIME: Mutex<bool> = Mutex::new(false);
    let mut installed = ONE_AT_A_TIME.lock();
    // SAFETY: all zero is a valid action; the addresses are those of live values.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, ptr::null(), &mut now) != 0 {
            return Err(io::Error::last_os_error());
        }
        if *installed && now.sa_sigaction != libc::SIG_DFL {
            return Ok(());
        }
        BEFORE.0.store(now.sa_sigaction, Ordering::Relaxed);
        BEFORE.1.store(now.sa_flags, Ordering::Release);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = handle as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&mut ours.sa_mask);
        if libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    *installed = true;
    Ok(())
}

/// The signal handler.
extern "C" fn handle(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: errno is this thread's own; the kernel, or QEMU's main loop, gives a valid siginfo.
    unsafe {
        let errno = *libc::__errno_location();
        let (code, address) = ((*info).si_code, (*info).si_addr().addr());
        // Sent by somebody, or about a page that nobody has touched yet.
        let is_fault = code > 0 && code != libc::BUS_MCEERR_AO;
        if !(is_fault && replace(&MAPPED, address)) {
            let again = !is_fault && !context.is_null();
            if !(again && EXPECTED_ELSEWHERE.load(Ordering::Relaxed) && hand_back(info, context)) {
                chain(signal, info, context, is_fault);
            }
        }
        *libc::__errno_location() = errno;
    }
}

/// Puts zeros in the place of the mapping around an address; `false` where there is none or no
/// memory can be had. Async-signal-safe.
fn replace(table: &[Entry], address: usize) -> bool {
    let found = table.iter().find_map(|entry| Some((entry, entry.range_around(address)?)));
    let Some((entry, (start, len))) = found else { return false };
    entry.lost.store(true, Ordering::SeqCst);
    // SAFETY: the range is a mapping of a live file, which stays registered while it is touched,
    // and atomics in it may change at any time.
    let mapped = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Leaves a signal that is no fault to whoever reads it from a descriptor: sends it to the process
/// once more and blocks it here again; whether that was possible.
///
/// # Safety
/// The arguments must be those of a signal handler. Async-signal-safe.
unsafe fn hand_back(info: *mut siginfo_t, context: *mut c_void) -> bool {
    // SAFETY: a siginfo from the kernel (caller); a process may send itself any signal. The kernel
    // lets only the main thread repeat the word of another.
    let sent = unsafe {
        libc::syscall(libc::SYS_rt_sigqueueinfo, libc::getpid(), libc::SIGBUS, info) == 0
            || (*info).si_code == libc::SI_USER && libc::kill(libc::getpid(), libc::SIGBUS) == 0
    };
    if sent {
        // SAFETY: the context of this signal, whose mask is set when the handler returns; the
        // signal is blocked until then.
        unsafe {
            libc::sigaddset(&mut (*context.cast::<ucontext_t>()).uc_sigmask, libc::SIGBUS);
        }
        ROUND.fetch_add(1, Ordering::Relaxed);
    }
    sent
}

/// Does what would have happened without this handler.
///
/// # Safety
/// The arguments must be those of a signal handler. Async-signal-safe, as far as the handler before
/// this one is.
unsafe fn chain(signal: c_int, info: *mut siginfo_t, context: *mut c_void, is_fault: bool) {
    let flags = BEFORE.1.load(Ordering::Acquire);
    match BEFORE.0.load(Ordering::Relaxed) {
        libc::SIG_IGN if !is_fault => {}
        // Read from a descriptor: the default has not happened, and nobody asks for it.
        libc::SIG_DFL if context.is_null() => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: all zero is the default action. A fault comes again when this returns.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &default, ptr::null_mut());
                if !is_fault {
                    libc::raise(signal);
                }
            }
        }
        // SAFETY: the address of a handler of the kind that its flags say.
        handler => unsafe {
            if flags & libc::SA_SIGINFO != 0 {
                let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            } else {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use memmap2::{MmapOptions, MmapRaw};

    use super::*;

    const LEN: usize = 64 << 10;

    fn mapped_file() -> (std::fs::File, MmapRaw) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN as u64).unwrap();
        let map = MmapOptions::new().len(LEN).map_raw(&file).unwrap();
        (file, map)
    }

    fn byte(map: &MmapRaw, at: usize) -> &AtomicU8 {
        assert!(at < LEN);
        // SAFETY: within the mapping, which outlives the reference.
        unsafe { &*map.as_mut_ptr().add(at).cast() }
    }

    #[test]
    fn what_a_cut_off_file_no_longer_has_reads_as_zeros_and_is_lost() {
        let (file, map) = mapped_file();
        let watch = Watch::new(map.as_ptr(), LEN).unwrap();
        byte(&map, LEN - 1).store(7, Ordering::Relaxed);
        assert!(!watch.is_lost());
        file.set_len(4096).unwrap();
        assert_eq!(byte(&map, LEN - 1).load(Ordering::Relaxed), 0);
        assert!(watch.is_lost());
    }

    #[test]
    fn one_lost_mapping_leaves_the_others_alone() {
        let (file, map) = mapped_file();
        let (_other_file, other_map) = mapped_file();
        let watch = Watch::new(map.as_ptr(), LEN).unwrap();
        let other = Watch::new(other_map.as_ptr(), LEN).unwrap();
        byte(&other_map, 0).store(7, Ordering::Relaxed);
        file.set_len(0).unwrap();
        byte(&map, 0).store(9, Ordering::Relaxed);
        assert!(watch.is_lost() && !other.is_lost());
        assert_eq!(byte(&other_map, 0).load(Ordering::Relaxed), 7);
    }

    #[test]
    fn many_threads_that_touch_a_cut_off_file_at_once_all_go_on() {
        let (file, map) = mapped_file();
        let watch = Watch::new(map.as_ptr(), LEN).unwrap();
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let map = &map;
                scope.spawn(move || {
                    let_through();
                    byte(map, thread * 8192).fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        assert!(watch.is_lost());
    }

    #[test]
    fn a_table_without_a_free_entry_refuses() {
        static TABLE: [Entry; 2] = [const { Entry::new() }; 2];
        let (_file, map) = mapped_file();
        let first = Watch::in_table(&TABLE, map.as_ptr(), LEN).unwrap();
        let _second = Watch::in_table(&TABLE, map.as_ptr(), LEN).unwrap();
        assert!(Watch::in_table(&TABLE, map.as_ptr(), LEN).is_err());
        drop(first);
        assert!(Watch::in_table(&TABLE, map.as_ptr(), LEN).is_ok());
    }

    #[test]
    fn an_entry_knows_its_first_and_last_byte() {
        let entry = Entry::new();
        entry.pages.store(encode(0x7f00_0000_0000, 0x5001).unwrap(), Ordering::Relaxed);
        let found = Some((0x7f00_0000_0000, 0x6000));
        assert_eq!(entry.range_around(0x7f00_0000_0000), found);
        assert_eq!(entry.range_around(0x7f00_0000_5fff), found);
        assert_eq!(entry.range_around(0x7f00_0000_6000), None);
        assert_eq!(entry.range_around(0x7eff_ffff_ffff), None);
    }

    #[test]
    fn a_free_or_reserved_entry_has_no_addresses() {
        let entry = Entry::new();
        assert_eq!(entry.range_around(0), None);
        entry.pages.store(RESERVED, Ordering::Relaxed);
        assert_eq!(entry.range_around(1 << PAGE_BITS), None);
    }

    #[test]
    fn a_mapping_that_no_word_can_name_is_refused() {
        assert_eq!(encode(0x7f00_0000_0000, 1 << 40), None);
    }
}
