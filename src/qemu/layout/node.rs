//! Proves a layout on a node of the block graph that is being opened or reopened.
//!
//! Used by `driver.rs`, through `layout`. What the comparison of drivers cannot show, the places
//! of things in `BlockDriverState` and `BdrvChild`, shows here: QEMU is asked for what should be
//! there. Promises: nothing is written, and no read faults, whatever the layout says.

use std::ffi::{CStr, c_int};

use super::WORD;
use super::program::Object;
use crate::error::{Error, ErrorKind, Result};
use crate::qemu::register::Api;
use crate::qemu::symbols::{BDRVReopenState, BdrvChild, BlockDriverState};

/// `QTYPE_QDICT` of qapi/qobject.json, the first member of a dictionary; the same in all series.
const QTYPE_QDICT: i32 = 4;

fn misfit(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("this QEMU's block nodes are not those that vmcache was made for: {what}"),
    )
}

/// Proves the layout on a node that is being opened; for the start of `bdrv_open`, before anything
/// of the node is read or written by the layout's offsets.
///
/// Holds what block.c does before it calls `bdrv_open` (`bdrv_open_common`, `bdrv_open_driver`)
/// against the node: it has a name, its driver is vmcache's, it has its `opaque`, its flags are
/// the given ones but for those that block.c keeps from drivers, both its file names are the same,
/// it has no children and no length.
///
/// # Safety
/// `bs` must be the node that QEMU passed to `bdrv_open`, in that call, in the main thread.
///
/// # Errors
/// `Unsupported`, with the first thing that does not fit.
pub(crate) unsafe fn verify_open(api: &Api, bs: *mut BlockDriverState, flags: c_int) -> Result<()> {
    let layout = &api.layout;
    // The order matters: this asks QEMU and reads nothing, and proves the place of everything up
    // to the name.
    // SAFETY: `bs` is a live node (caller).
    let name = unsafe { (api.symbols.bdrv_get_node_name)(bs) };
    if name.addr().wrapping_sub(bs.addr()) != layout.bs_node_name as usize {
        return Err(misfit("node_name is elsewhere"));
    }
    // SAFETY: the node outlives the call that opens it.
    let Some(node) = (unsafe { Object::new(bs, layout.bs_sizeof as usize) }) else {
        return Err(misfit("the node is smaller"));
    };
    if node.pointer(layout.bs_drv) != Some(api.driver.addr()) {
        return Err(misfit("drv is elsewhere"));
    }
    // QEMU has just allocated it, zeroed; no allocation is smaller than a word. Of its neighbours,
    // the driver begins with a pointer, and the event loop is known.
    let opaque = node.pointer(layout.bs_opaque).unwrap_or(0);
    // SAFETY: `bs` is a live node (caller).
    let aio_context = unsafe { (api.symbols.bdrv_get_aio_context)(bs) };
    // SAFETY: nothing is read unless it is mapped; if it is `opaque`, the node holds it.
    let opaque = unsafe { Object::new(opaque as *const usize, WORD) };
    if opaque.and_then(|opaque| opaque.pointer(0)) != Some(0)
        || node.pointer(layout.bs_opaque) == Some(aio_context.addr())
    {
        return Err(misfit("opaque is elsewhere"));
    }
    let visible = !(layout.o_internal as i32);
    if node.int(layout.bs_open_flags).map(|f| f & visible) != Some(flags & visible) {
        return Err(misfit("open_flags are elsewhere"));
    }
    for (field, offset, size) in [
        ("filename", layout.bs_filename, layout.bs_filename_size),
        ("backing_file", layout.bs_backing_file, layout.bs_backing_file_size),
        ("auto_backing_file", layout.bs_auto_backing_file, layout.bs_auto_backing_file_size),
        ("backing_format", layout.bs_backing_format, layout.bs_backing_format_size),
        ("exact_filename", layout.bs_exact_filename, layout.bs_exact_filename_size),
    ] {
        if node.string(offset, size).is_none() {
            return Err(misfit(format_args!("{field} is no string")));
        }
    }
    let filename = node.string(layout.bs_filename, layout.bs_filename_size);
    if filename != node.string(layout.bs_exact_filename, layout.bs_exact_filename_size) {
        return Err(misfit("filename and exact_filename differ"));
    }
    if node.string(layout.bs_node_name, layout.bs_node_name_size).is_none_or(|name| name.is_empty())
    {
        return Err(misfit("node_name is no name"));
    }
    if !node.int(layout.bs_refcnt).is_some_and(|count| (1..=1 << 16).contains(&count)) {
        return Err(misfit("refcnt is elsewhere"));
    }
    for (field, offset) in [("file", layout.bs_file), ("backing", layout.bs_backing)] {
        if node.pointer(offset) != Some(0) {
            return Err(misfit(format_args!("{field} is set before it was opened")));
        }
    }
    if node.long(layout.bs_total_sectors) != Some(0) {
        return Err(misfit("total_sectors is elsewhere"));
    }
    Ok(())
}

/// Proves the rest of the layout on the child that `bdrv_open_file_child` has just attached to
/// `bs`, and returns that child (`bs->file`).
///
/// The child's node is finished, so its name, size and alignment are known to QEMU.
///
/// # Safety
/// `bs` must have passed [`verify_open`], and `bdrv_open_file_child` must have succeeded on it;
/// in the main thread, outside coroutines, within `bdrv_open`.
///
/// # Errors
/// `Unsupported`, with the first thing that does not fit.
pub(crate) unsafe fn verify_file(api: &Api, bs: *mut BlockDriverState) -> Result<*mut BdrvChild> {
    let (layout, symbols) = (&api.layout, &api.symbols);
    // SAFETY: `bs` is a live node, and the graph does not change here (caller).
    let child = unsafe { api.with_graph_locked(|| (symbols.bdrv_primary_child)(bs)) };
    // SAFETY: the node outlives this call.
    let node = unsafe { Object::new(bs, layout.bs_sizeof as usize) };
    let place = |offset| node.as_ref().and_then(|node| node.pointer(offset));
    if child.is_null() || place(layout.bs_file) != Some(child.addr()) {
        return Err(misfit("file is elsewhere"));
    }
    if place(layout.bs_backing) != Some(0) {
        return Err(misfit("backing is set before it was opened"));
    }
    // SAFETY: QEMU gave the child, which is attached to `bs`.
    let edge = unsafe { Object::new(child, layout.child_bs as usize + WORD) };
    let file =
        edge.and_then(|edge| edge.pointer(layout.child_bs)).unwrap_or(0) as *mut BlockDriverState;
    // SAFETY: nothing is read unless it is mapped; if it is a node at all, the child holds it.
    let Some(node) = (unsafe { Object::new(file, layout.bs_sizeof as usize) }) else {
        return Err(misfit("a child's bs is elsewhere"));
    };
    let name = node.string(layout.bs_node_name, layout.bs_node_name_size);
    // SAFETY: the name is a string; bdrv_find_node compares it with those of the live nodes.
    if name.is_none_or(|name| unsafe { (symbols.bdrv_find_node)(name.as_ptr()) } != file) {
        return Err(misfit("a child's bs is no node"));
    }
    // SAFETY: it is a live node: QEMU has it under its name.
    let sectors = unsafe { (symbols.bdrv_nb_sectors)(file) };
    if sectors >= 0 && node.long(layout.bs_total_sectors) != Some(sectors) {
        return Err(misfit("total_sectors is elsewhere"));
    }
    let alignment = node.int(layout.bl_request_alignment);
    if !alignment.is_some_and(|bytes| bytes > 0 && (bytes as u32).is_power_of_two()) {
        return Err(misfit("bl.request_alignment is elsewhere"));
    }
    Ok(child)
}

/// Proves `backing_file` and `backing` of a node whose backing file has been opened, and returns
/// that child; `None` when the node has none. For any time after `bdrv_open_backing_file`.
///
/// # Safety
/// As for [`verify_file`], which must have succeeded, but also after `bdrv_open`.
///
/// # Errors
/// `Unsupported` when QEMU's answer is not what stands at the offset.
pub(crate) unsafe fn verify_backing(
    api: &Api,
    bs: *mut BlockDriverState,
) -> Result<Option<*mut BdrvChild>> {
    let layout = &api.layout;
    // SAFETY: `bs` is a live node, and the graph does not change here (caller).
    let child = unsafe { api.with_graph_locked(|| (api.symbols.bdrv_cow_child)(bs)) };
    // SAFETY: the node outlives this call.
    let node = unsafe { Object::new(bs, layout.bs_sizeof as usize) };
    let Some(node) = node.filter(|n| n.pointer(layout.bs_backing) == Some(child.addr())) else {
        return Err(misfit("backing is elsewhere"));
    };
    let mut name = vec![0u8; layout.bs_backing_file_size as usize];
    let room = c_int::try_from(name.len()).map_err(|_| misfit("backing_file is too long"))?;
    // SAFETY: the buffer has the size given; QEMU ends the string within it.
    unsafe { (api.symbols.bdrv_get_backing_filename)(bs, name.as_mut_ptr().cast(), room) };
    let living = node.string(layout.bs_backing_file, layout.bs_backing_file_size);
    if living.is_none() || living != CStr::from_bytes_until_nul(&name).ok() {
        return Err(misfit("backing_file is elsewhere"));
    }
    Ok((!child.is_null()).then_some(child))
}

/// The node that a reopen is about, proven to be one of vmcache's; for `bdrv_reopen_prepare`.
///
/// # Safety
/// `state` must be what QEMU passed to `bdrv_reopen_prepare`, in that call.
///
/// # Errors
/// `Unsupported` when what stands at the offset is no node of this driver.
pub(crate) unsafe fn verify_reopen(
    api: &Api,
    state: *mut BDRVReopenState,
) -> Result<*mut BlockDriverState> {
    let layout = &api.layout;
    let size = [layout.reopen_bs, layout.reopen_flags, layout.reopen_options];
    let size = size.into_iter().fold(0, u32::max) as usize + WORD;
    // SAFETY: QEMU's object lives for the call.
    let state = unsafe { Object::new(state, size) };
    let place = |offset| state.as_ref().and_then(|state| state.pointer(offset)).unwrap_or(0);
    let bs = place(layout.reopen_bs) as *mut BlockDriverState;
    // SAFETY: nothing is read unless it is mapped; if it is a node, the reopen holds it.
    let node = unsafe { Object::new(bs, layout.bs_sizeof as usize) };
    if node.and_then(|node| node.pointer(layout.bs_drv)) != Some(api.driver.addr()) {
        return Err(misfit("a reopen's bs is elsewhere"));
    }
    // SAFETY: nothing is read unless it is mapped; if it is a dictionary, the reopen holds it.
    let options = unsafe { Object::new(place(layout.reopen_options) as *const usize, 2 * WORD) };
    if options.and_then(|options| options.int(0)) != Some(QTYPE_QDICT) {
        return Err(misfit("a reopen's options are elsewhere"));
    }
    Ok(bs)
}
