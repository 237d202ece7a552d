//! The callbacks that QEMU calls, in the order of a node's life. Each is a thin shell: it converts,
//! catches panics, and calls safe or at least Rust code. A panic poisons the node, which then reads
//! from the base alone; it never reaches C.
//!
//! QEMU calls them from the main thread and, for reads, from several threads and many coroutines at
//! once; all they share is `&Node`.
//!
//! Used by `register`.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_uint};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::call::{field, set_error};
use super::layout::verify_reopen;
use super::node::{Node, OpenError};
use super::register::Callbacks;
use super::symbols::{
    BDRVReopenState, BdrvChild, BlockDriverInfo, BlockDriverState, BlockReopenQueue, QDict,
    QEMUIOVector, QemuError,
};
use super::{Api, api, io};
use crate::engine::Presence;
use crate::error::{Error, ErrorKind, Result};
use crate::format::ByteRange;

/// Largest request that QEMU passes down in one piece: bounds what one read claims and buffers.
const MAX_TRANSFER: u32 = 2 << 20;

/// What is registered.
pub(super) static CALLBACKS: Callbacks = Callbacks {
    instance_size: size_of::<*mut Node>() as c_int,
    open,
    close,
    reopen_prepare,
    refresh_limits,
    co_preadv_part,
    co_block_status,
    getlength,
    get_info,
};

/// Runs the inside of a callback; `None` where it panicked, which QEMU must never see.
pub(super) fn guarded<R>(inside: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(inside)).ok()
}

/// The place in a node's `opaque` where its [`Node`] is kept.
///
/// # Safety
/// `bs` must be a live node of this driver.
unsafe fn place(bs: *mut BlockDriverState) -> *mut *mut Node {
    // SAFETY: `opaque` points at instance_size zeroed bytes, enough for one pointer.
    unsafe { field::<_, *mut *mut Node>(bs, api().layout.bs_opaque).read() }
}

/// The node's state. Shared only: QEMU calls from several threads at once.
///
/// # Safety
/// `bs` must be a node of this driver between its open and its close, which QEMU does not call
/// before all other callbacks have returned.
unsafe fn node<'a>(bs: *mut BlockDriverState) -> &'a Node {
    // SAFETY: set by `open`, freed by `close` (caller).
    unsafe { &**place(bs) }
}

unsafe extern "C" fn open(
    bs: *mut BlockDriverState,
    options: *mut QDict,
    flags: c_int,
    errp: *mut *mut QemuError,
) -> c_int {
    let opened = guarded(|| {
        init_log();
        // SAFETY: QEMU's own arguments.
        let node = match unsafe { Node::open(bs, options, flags, errp) } {
            Ok(node) => node,
            Err(OpenError::Told(ret)) => return ret,
            // SAFETY: QEMU's errp, which is empty where the error is ours.
            Err(OpenError::Ours(err)) => return unsafe { set_error(api(), errp, &err) },
        };
        // SAFETY: the layout is verified and `opaque` is there; nobody else knows it yet.
        unsafe { place(bs).write(Box::into_raw(Box::new(node))) };
        0
    });
    // block.c words an error of its own where none is set.
    opened.unwrap_or(-libc::EFAULT)
}

unsafe extern "C" fn close(bs: *mut BlockDriverState) {
    let closed = guarded(|| {
        // SAFETY: the last call for this node; the place is emptied so that nothing finds it again.
        let node = unsafe { place(bs).replace(std::ptr::null_mut()) };
        if !node.is_null() {
            // SAFETY: made by Box::into_raw in `open`, taken out just now.
            drop(unsafe { Box::from_raw(node) });
        }
    });
    if closed.is_none() {
        let _ = guarded(|| log::error!("internal error while closing"));
    }
}

unsafe extern "C" fn reopen_prepare(
    state: *mut BDRVReopenState,
    _queue: *mut BlockReopenQueue,
    errp: *mut *mut QemuError,
) -> c_int {
    let prepared = guarded(|| {
        // SAFETY: QEMU's reopen state and its empty errp.
        unsafe { check_reopen(state).map_or_else(|err| set_error(api(), errp, &err), |()| 0) }
    });
    prepared.unwrap_or(-libc::EFAULT)
}

/// Whether a node can be reopened in this way: read-only, and on the image that it has.
///
/// # Safety
/// `state` must be what QEMU passed to `bdrv_reopen_prepare`.
unsafe fn check_reopen(state: *mut BDRVReopenState) -> Result<()> {
    let Api { symbols, layout, .. } = api();
    // SAFETY: QEMU's reopen state (caller); its layout is verified before it is used, and that of
    // the node and its child was when it was opened. The names live until the reopen has ended.
    let (flags, same_file) = unsafe {
        let bs = verify_reopen(api(), state)?;
        let flags = field::<_, c_int>(state, layout.reopen_flags).read();
        let options = field::<_, *mut QDict>(state, layout.reopen_options).read();
        let file = (symbols.qdict_get_try_str)(options, c"file".as_ptr());
        let child = field::<_, *mut BdrvChild>(bs, layout.bs_file).read();
        let now = field::<_, *mut BlockDriverState>(child, layout.child_bs).read();
        let now = (symbols.bdrv_get_node_name)(now);
        (flags, file.is_null() || CStr::from_ptr(file) == CStr::from_ptr(now))
    };
    let refused = |what: &str| Err(Error::new(ErrorKind::Invalid, what));
    if flags & layout.o_rdwr as c_int != 0 {
        return refused("vmcache is read-only and cannot be reopened for writing");
    }
    if !same_file {
        return refused("a vmcache node keeps its cache image: add another node for another image");
    }
    Ok(())
}

unsafe extern "C" fn refresh_limits(bs: *mut BlockDriverState, _errp: *mut *mut QemuError) {
    // Without a limit requests only are longer.
    let _ = guarded(|| {
        let layout = &api().layout;
        // SAFETY: a live node of ours; the layout is verified, the size is the field's.
        unsafe {
            match layout.bl_max_transfer_size {
                4 => field::<_, u32>(bs, layout.bl_max_transfer).write(MAX_TRANSFER),
                8 => field::<_, u64>(bs, layout.bl_max_transfer).write(u64::from(MAX_TRANSFER)),
                _ => {}
            }
        }
    });
}

unsafe extern "C" fn co_preadv_part(
    bs: *mut BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut QEMUIOVector,
    qiov_offset: usize,
    _flags: c_int,
) -> c_int {
    let range = ByteRange { start: offset as u64, len: bytes as u64 };
    let status = |read: std::result::Result<(), c_int>| read.map_or_else(|errno| -errno, |()| 0);
    let read = guarded(|| {
        // SAFETY: a read of an open node.
        let node = unsafe { node(bs) };
        if node.is_poisoned() {
            return None;
        }
        // SAFETY: in a coroutine, graph locked for reading, the vector is QEMU's.
        let read = guarded(|| unsafe { io::read(node, bs, range, qiov, qiov_offset) });
        if read.is_none() {
            node.poison();
        }
        read.map(status)
    });
    // SAFETY: as above.
    let base = || unsafe { io::read_base(bs, range, qiov, qiov_offset) };
    read.flatten().or_else(|| guarded(base).map(status)).unwrap_or(-libc::EIO)
}

unsafe extern "C" fn co_block_status(
    bs: *mut BlockDriverState,
    _want_zero: c_uint,
    offset: i64,
    bytes: i64,
    pnum: *mut i64,
    map: *mut i64,
    file: *mut *mut BlockDriverState,
) -> c_int {
    let range = ByteRange { start: offset as u64, len: bytes as u64 };
    let found = guarded(|| {
        let layout = &api().layout;
        // SAFETY: a query of an open node.
        let (presence, len) = unsafe { node(bs) }.engine().status_of(range);
        // SAFETY: QEMU's places for the answer, never NULL for a driver (block/io.c).
        unsafe {
            pnum.write(len as i64);
            match presence {
                Presence::Data(host) => {
                    let child = field::<_, *mut BdrvChild>(bs, layout.bs_file).read();
                    map.write(host.0 as i64);
                    file.write(field::<_, *mut BlockDriverState>(child, layout.child_bs).read());
                    (layout.block_data | layout.block_offset_valid) as c_int
                }
                Presence::Zero => layout.block_zero as c_int,
                Presence::Absent => 0,
            }
        }
    });
    found.unwrap_or_else(|| {
        // SAFETY: as above. The base knows all of it.
        unsafe { pnum.write(bytes) };
        0
    })
}

unsafe extern "C" fn getlength(bs: *mut BlockDriverState) -> i64 {
    // SAFETY: a query of an open node.
    guarded(|| unsafe { node(bs) }.length() as i64).unwrap_or(i64::from(-libc::EIO))
}

unsafe extern "C" fn get_info(bs: *mut BlockDriverState, info: *mut BlockDriverInfo) -> c_int {
    // SAFETY: a query of an open node, and QEMU's place for the answer.
    let told = guarded(|| unsafe {
        let unit = node(bs).engine().header().geometry.subcluster_size();
        field::<_, c_int>(info, api().layout.bdi_cluster_size).write(unit as c_int);
    });
    told.map_or(-libc::ENOTSUP, |()| 0)
}

/// Starts the log once, on standard error, with the words of `VMCACHE_LOG`.
fn init_log() {
    use std::io::Write;
    let env = env_logger::Env::new().filter_or("VMCACHE_LOG", "vmcache=warn");
    let started = env_logger::Builder::from_env(env)
        .format(|to, record| writeln!(to, "vmcache: {}", record.args()))
        .try_init();
    // An error says that there is a log already.
    drop(started);
}
