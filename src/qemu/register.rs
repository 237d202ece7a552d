//! How the driver gets into QEMU: the constructor of a preloaded library, the entry point for a C
//! file in QEMU's tree, and the `BlockDriver` that both register.
//!
//! Used by QEMU, and by `driver.rs`, which supplies [`Callbacks`] and gets [`api`]. Promises: in a
//! program that is not QEMU nothing happens, without a word; in a QEMU whose structures are not
//! known for certain, one line on standard error and nothing else; the driver is registered at
//! most once, however often and by whichever way it is asked for.
//!
//! The order of events in a preloaded library: the constructor runs before `main` and asks QEMU
//! to call [`block_init`] with its other block drivers' initialisers. It is first of these, so it
//! asks to be called again, last, when all of QEMU's own drivers are there to be compared with.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::qemu::driver;
use crate::qemu::layout::{self, Layout, Living, ffi};
use crate::qemu::symbols::{
    BDRVReopenState, BlockDriver, BlockDriverInfo, BlockDriverState, BlockReopenQueue, QDict,
    QEMUIOVector, QemuError, Symbols, lookup,
};

/// The callbacks of a `BlockDriver` (block/block_int-common.h), in the order of a node's life.
/// None may unwind.
pub(super) struct Callbacks {
    /// `instance_size`: bytes that QEMU allocates, zeroed, as a node's `opaque`; at least 1.
    pub(super) instance_size: c_int,
    /// `bdrv_open`: main thread. (node, options, flags, errp); 0 or a negative errno.
    pub(super) open: unsafe extern "C" fn(
        *mut BlockDriverState,
        *mut QDict,
        c_int,
        *mut *mut QemuError,
    ) -> c_int,
    /// `bdrv_close`: main thread.
    pub(super) close: unsafe extern "C" fn(*mut BlockDriverState),
    /// `bdrv_reopen_prepare`: main thread. 0 or a negative errno.
    pub(super) reopen_prepare: unsafe extern "C" fn(
        *mut BDRVReopenState,
        *mut BlockReopenQueue,
        *mut *mut QemuError,
    ) -> c_int,
    /// `bdrv_refresh_limits`: main thread. Sets the node's `bl`.
    pub(super) refresh_limits: unsafe extern "C" fn(*mut BlockDriverState, *mut *mut QemuError),
    /// `bdrv_co_preadv_part`: coroutine. (node, offset, bytes, vector, offset in the vector,
    /// flags); 0 or a negative errno.
    pub(super) co_preadv_part: unsafe extern "C" fn(
        *mut BlockDriverState,
        i64,
        i64,
        *mut QEMUIOVector,
        usize,
        c_int,
    ) -> c_int,
    /// `bdrv_co_block_status`: coroutine. (node, what the caller wants, offset, bytes, out bytes,
    /// out offset in the file, out node); `BDRV_BLOCK_` flags or a negative errno. The second
    /// argument is a `bool` or flags, depending on the series (`block_status_has_mode`).
    pub(super) co_block_status: unsafe extern "C" fn(
        *mut BlockDriverState,
        c_uint,
        i64,
        i64,
        *mut i64,
        *mut i64,
        *mut *mut BlockDriverState,
    ) -> c_int,
    /// `bdrv_getlength` (7.2, anywhere) or `bdrv_co_getlength` (8.0, coroutine): bytes or a
    /// negative errno.
    pub(super) getlength: unsafe extern "C" fn(*mut BlockDriverState) -> i64,
    /// `bdrv_get_info` (7.2, anywhere) or `bdrv_co_get_info` (8.0, coroutine): 0 or a negative
    /// errno.
    pub(super) get_info: unsafe extern "C" fn(*mut BlockDriverState, *mut BlockDriverInfo) -> c_int,
}

/// What the driver's callbacks work with: this QEMU's functions, its layout, and the registered
/// driver. Never changes once it is there.
pub(crate) struct Api {
    /// QEMU's functions.
    pub(crate) symbols: Symbols,
    /// Where QEMU's structures have what.
    pub(crate) layout: Layout,
    /// The driver as registered.
    pub(crate) driver: *mut BlockDriver,
}

// SAFETY: function pointers and numbers, plus pointers to memory that is never freed: the series'
// name, a literal or leaked, and the driver (in the layout too), which only QEMU writes and nobody
// here reads.
unsafe impl Send for Api {}
// SAFETY: as for `Send`.
unsafe impl Sync for Api {}

impl Api {
    /// Runs `f` with the block graph locked for reading, where the series has that lock.
    ///
    /// # Safety
    /// In the main thread, outside coroutines.
    pub(crate) unsafe fn with_graph_locked<R>(&self, f: impl FnOnce() -> R) -> R {
        if let Some(lock) = self.symbols.bdrv_graph_rdlock_main_loop {
            // SAFETY: main thread, no coroutine (caller).
            unsafe { lock() };
        }
        let result = f();
        if let Some(unlock) = self.symbols.bdrv_graph_rdunlock_main_loop {
            // SAFETY: locked above: both functions came in the same release.
            unsafe { unlock() };
        }
        result
    }
}

static API: OnceLock<Api> = OnceLock::new();

/// The QEMU this library is registered in.
///
/// # Panics
/// Before registration; the driver's callbacks, which come after it, may rely on it.
pub(crate) fn api() -> &'static Api {
    API.get().expect("the driver is registered before its callbacks are called")
}

/// How far registration has come: [`FRESH`] to [`BUSY`], from there to one of the others; for good,
/// but for [`UNKNOWN`], after which QEMU's own C can still say what it is.
static STATE: AtomicU8 = AtomicU8::new(FRESH);
const FRESH: u8 = 0;
const BUSY: u8 = 1;
const REGISTERED: u8 = 2;
const REFUSED: u8 = 3;
/// No table fitted.
const UNKNOWN: u8 = 4;

/// Why there is no driver, and the errno that says so to C.
struct Refusal {
    errno: c_int,
    reason: String,
}

impl Refusal {
    fn new(errno: c_int, reason: impl Into<String>) -> Self {
        Refusal { errno, reason: reason.into() }
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

/// Runs in every program that loads the library, most of them not QEMU, before `main`.
extern "C" fn constructor() {
    call_at_block_init(block_init);
}

/// Has QEMU call `function` when it initialises its block drivers. Not QEMU: does nothing.
fn call_at_block_init(function: unsafe extern "C" fn()) {
    if let Some(address) = lookup(c"register_module_init") {
        // SAFETY: qemu/module.h declares it with this type, the same in all series.
        let register_module_init = unsafe {
            std::mem::transmute::<
                *mut std::ffi::c_void,
                unsafe extern "C" fn(unsafe extern "C" fn(), c_int),
            >(address)
        };
        // SAFETY: it appends to a list, which QEMU's own constructors do at the same time of the
        // program's life, and later QEMU's main thread.
        unsafe { register_module_init(function, layout::MODULE_INIT_BLOCK) };
    }
}

unsafe extern "C" fn block_init() {
    // A list that is being walked takes new entries at its end.
    call_at_block_init(block_init_last);
}

unsafe extern "C" fn block_init_last() {
    register_once(UNKNOWN, || {
        let symbols = load_symbols()?;
        let layout = layout::select(&Living::new(&symbols))
            .map_err(|reason| Refusal::new(libc::ENOTSUP, reason))?;
        Ok((symbols, layout))
    });
}

fn load_symbols() -> Result<Symbols, Refusal> {
    Symbols::load().map_err(|missing| Refusal::new(libc::ENOSYS, missing.to_string()))
}

/// `vmcache_register` of `include/vmcache.h`.
///
/// # Safety
/// `layout` must be NULL or point to a structure that starts with its own size, as in the header,
/// with a string in `series`; in QEMU's main thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmcache_register(layout: *const ffi::vmcache_layout) -> c_int {
    // A preloaded library that knew no table for this QEMU is told now.
    let _ = STATE.compare_exchange(UNKNOWN, FRESH, Ordering::AcqRel, Ordering::Acquire);
    register_once(REFUSED, || {
        if layout.is_null() {
            return Err(Refusal::new(libc::EINVAL, "no layout was passed"));
        }
        // SAFETY: `size` is the first field, so it is there whatever else is (caller).
        let size = unsafe { (&raw const (*layout).size).read() } as usize;
        if size < size_of::<Layout>() {
            return Err(Refusal::new(
                libc::EINVAL,
                format!("the layout passed has {size} bytes, not {}", size_of::<Layout>()),
            ));
        }
        // SAFETY: the caller's structure is at least as long as this one, and begins with it.
        let mut layout = unsafe { layout.read() };
        if layout.series.is_null() {
            return Err(Refusal::new(libc::EINVAL, "the layout passed names no series"));
        }
        let symbols = load_symbols()?;
        layout::check_passed(&layout, &Living::new(&symbols)).map_err(|reason| {
            Refusal::new(
                libc::ENOTSUP,
                format!("the layout passed is of {}, but {reason}", layout::series(&layout)),
            )
        })?;
        // The caller's string need not outlive the call.
        let series = std::ffi::CString::new(layout::series(&layout)).unwrap_or_default();
        layout.series = series.into_raw();
        Ok((symbols, layout))
    })
}

/// `vmcache_version` of `include/vmcache.h`.
#[unsafe(no_mangle)]
pub extern "C" fn vmcache_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// The definitions above have the types that `include/vmcache.h` declares.
const _: () = {
    let _: [unsafe extern "C" fn(*const ffi::vmcache_layout) -> c_int; 2] =
        [ffi::vmcache_register, vmcache_register];
    let _: unsafe extern "C" fn() -> *const c_char = ffi::vmcache_version;
};

/// Registers the driver with what `prepare` finds, unless that has been tried before. Returns 0
/// when the driver is there, otherwise a negative errno; says so, once, when it is not, and leaves
/// the state `refused`.
fn register_once(
    refused: u8,
    prepare: impl FnOnce() -> Result<(Symbols, Layout), Refusal>,
) -> c_int {
    match STATE.compare_exchange(FRESH, BUSY, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(REGISTERED) => return 0,
        Err(BUSY) => return -libc::EBUSY,
        Err(_) => return -libc::ENOTSUP,
    }
    let result = catch_unwind(AssertUnwindSafe(|| {
        let (symbols, layout) = prepare()?;
        register(symbols, layout)
    }))
    .unwrap_or_else(|_| Err(Refusal::new(libc::EFAULT, "vmcache failed while looking at it")));
    match result {
        Ok(()) => {
            STATE.store(REGISTERED, Ordering::Release);
            0
        }
        Err(refusal) => {
            STATE.store(refused, Ordering::Release);
            report(&refusal.reason);
            -refusal.errno
        }
    }
}

/// Hands the driver to QEMU.
fn register(symbols: Symbols, layout: Layout) -> Result<(), Refusal> {
    layout::check_vector(&layout, &symbols)
        .map_err(|reason| Refusal::new(libc::ENOTSUP, reason))?;
    // SAFETY: NULL or a driver as the header describes it, of the size that the layout was proven
    // to have.
    let mut given = unsafe { given_words(&layout) };
    let words = driver_words(
        &layout,
        &driver::CALLBACKS,
        take_name(&layout, &mut given)?,
        symbols.bdrv_default_perms as *const () as usize,
        given,
    )
    .ok_or_else(|| Refusal::new(libc::ENOTSUP, "its layout contradicts itself"))?;
    // QEMU keeps the driver for as long as the program runs.
    let driver: *mut BlockDriver = match layout.driver.is_null() {
        true => Box::leak(words.into_boxed_slice()).as_mut_ptr().cast(),
        false => {
            // SAFETY: the caller's driver, which is as long as its words were and which nobody
            // else uses before it is registered.
            unsafe { layout.driver.cast::<usize>().copy_from(words.as_ptr(), words.len()) };
            layout.driver.cast()
        }
    };
    let api = API.get_or_init(|| Api { symbols, layout, driver });
    // SAFETY: the driver is a whole, filled BlockDriver of this program (its layout is proven),
    // lives for ever, and QEMU is registering its block drivers, in the main thread.
    unsafe { (api.symbols.bdrv_register)(driver) };
    Ok(())
}

const WORD: usize = size_of::<usize>();

/// What a driver is made from: the caller's own as it is now, otherwise zeroes.
///
/// # Safety
/// `layout.driver` must be NULL or point to a `BlockDriver`, of `layout.drv_sizeof` bytes.
unsafe fn given_words(layout: &Layout) -> Vec<usize> {
    // It begins with a pointer, so it is made of whole words.
    let len = (layout.drv_sizeof as usize).div_ceil(WORD);
    match layout.driver.is_null() {
        true => vec![0; len],
        // SAFETY: a driver of this size (caller), which is copied and not kept.
        false => unsafe { std::slice::from_raw_parts(layout.driver.cast(), len) }.to_vec(),
    }
}

/// Takes the name out of what a driver is made from; the library's own where there is none.
fn take_name(layout: &Layout, words: &mut [usize]) -> Result<usize, Refusal> {
    const NAME: &CStr = c"vmcache";
    let given = words.get_mut(layout.drv_format_name as usize / WORD).map_or(0, std::mem::take);
    if given == 0 {
        return Ok(NAME.as_ptr().addr());
    }
    // SAFETY: the format_name of the caller's driver is a string, as the header asks for.
    match unsafe { CStr::from_ptr(given as *const c_char) } == NAME {
        true => Ok(given),
        false => Err(Refusal::new(libc::EINVAL, "the driver passed has another name")),
    }
}

/// The driver as words of memory: what was `given`, and what the layout places. `None` when a place
/// is not inside it or is taken.
fn driver_words(
    layout: &Layout,
    callbacks: &Callbacks,
    format_name: usize,
    child_perm: usize,
    mut words: Vec<usize>,
) -> Option<Vec<usize>> {
    for (offset, value) in [
        (layout.drv_format_name, format_name),
        (layout.drv_bdrv_open, callbacks.open as *const () as usize),
        (layout.drv_bdrv_close, callbacks.close as *const () as usize),
        (layout.drv_bdrv_reopen_prepare, callbacks.reopen_prepare as *const () as usize),
        (layout.drv_bdrv_refresh_limits, callbacks.refresh_limits as *const () as usize),
        (layout.drv_bdrv_child_perm, child_perm),
        (layout.drv_bdrv_co_preadv_part, callbacks.co_preadv_part as *const () as usize),
        (layout.drv_bdrv_co_block_status, callbacks.co_block_status as *const () as usize),
        (layout.drv_getlength, callbacks.getlength as *const () as usize),
        (layout.drv_get_info, callbacks.get_info as *const () as usize),
    ] {
        let offset = offset as usize;
        if !offset.is_multiple_of(WORD) {
            return None;
        }
        // A word that is taken means that two fields have one place, or that the caller's driver
        // has a callback of this library's.
        let word = words.get_mut(offset / WORD).filter(|word| **word == 0)?;
        *word = value;
    }
    let instance_size = callbacks.instance_size.to_ne_bytes();
    for (offset, bytes) in [
        (layout.drv_instance_size, &instance_size[..]),
        (layout.drv_is_format, &[1]),
        (layout.drv_supports_backing, &[1]),
    ] {
        let (index, start) = (offset as usize / WORD, offset as usize % WORD);
        let word = words.get_mut(index)?;
        let mut memory = word.to_ne_bytes();
        memory.get_mut(start..start + bytes.len())?.copy_from_slice(bytes);
        *word = usize::from_ne_bytes(memory);
    }
    Some(words)
}

/// The one line of a refusal.
fn report(reason: &str) {
    let program = std::env::current_exe()
        .map(|path| path.display().to_string())
        .or_else(|_| std::env::args_os().next().map(|a| a.to_string_lossy().into_owned()).ok_or(()))
        .unwrap_or_else(|()| "unknown program".into());
    let line = format!(
        "vmcache: this QEMU ({program}) is not supported: {reason}; supported: {}; continuing \
         without the driver\n",
        layout::supported()
    );
    // There is nobody to tell that standard error is closed.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests;
