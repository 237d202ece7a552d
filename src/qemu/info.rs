//! What a node tells about itself and its image, for the C file in QEMU's tree, which makes QAPI
//! objects of it (`query-blockstats`, `qemu-img info`).
//!
//! Used by QEMU's C alone, in the main thread. Promises: as much is written as both sides know; a
//! panic ends here.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

use super::driver::guarded;
use super::layout::ffi::{self, vmcache_node_info as Info, vmcache_node_stats as Stats};
use super::node::Node;
use crate::engine::{Engine, ImageState, Status};

/// `vmcache_node_stats` of `include/vmcache.h`.
///
/// # Safety
/// `opaque` must be NULL or what a node of this driver has there after its open; `stats` NULL or a
/// structure that starts with its own size, as in the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmcache_node_stats(opaque: *const c_void, stats: *mut Stats) -> c_int {
    // SAFETY: as promised by the caller; made of integers without padding.
    unsafe { tell(opaque, stats, |engine| Ok(stats_of(engine))) }
}

/// `vmcache_node_info` of `include/vmcache.h`.
///
/// # Safety
/// As for [`vmcache_node_stats`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmcache_node_info(opaque: *const c_void, info: *mut Info) -> c_int {
    // SAFETY: as promised by the caller; made of integers without padding.
    unsafe { tell(opaque, info, info_of) }
}

/// The definitions above have the types that `include/vmcache.h` declares.
const _: () = {
    let _: [unsafe extern "C" fn(*const c_void, *mut Stats) -> c_int; 2] =
        [ffi::vmcache_node_stats, vmcache_node_stats];
    let _: [unsafe extern "C" fn(*const c_void, *mut Info) -> c_int; 2] =
        [ffi::vmcache_node_info, vmcache_node_info];
};

/// Answers a question about a node: 0, or a negative errno.
///
/// # Safety
/// As for [`vmcache_node_stats`], with `T` one of the header's structures that start with their
/// size and have no padding.
unsafe fn tell<T>(
    opaque: *const c_void,
    answer: *mut T,
    question: impl FnOnce(&Engine) -> Result<T, c_int>,
) -> c_int {
    let told = guarded(|| {
        if opaque.is_null() || answer.is_null() {
            return Err(libc::EINVAL);
        }
        // SAFETY: a node's opaque holds a pointer to its state (`driver::place`), which lives
        // until its close.
        let node = unsafe { opaque.cast::<*const Node>().read().as_ref() };
        let engine = node.ok_or(libc::EINVAL)?.engine();
        // SAFETY: the structure starts with its size (caller).
        let room = unsafe { answer.cast::<u32>().read() } as usize;
        if room <= size_of::<u32>() {
            return Err(libc::EINVAL);
        }
        let value = question(engine)?;
        // SAFETY: both are at least this long, and apart; the size in front stays.
        unsafe {
            let (from, to) = ((&raw const value).cast::<u8>(), answer.cast::<u8>());
            let (start, end) = (size_of::<u32>(), room.min(size_of::<T>()));
            std::ptr::copy_nonoverlapping(from.add(start), to.add(start), end - start);
        }
        Ok(())
    });
    told.map_or(-libc::EFAULT, |told| told.map_or_else(|errno| -errno, |()| 0))
}

fn stats_of(engine: &Engine) -> Stats {
    let [
        reads,
        hit_bytes,
        zero_bytes,
        miss_bytes,
        waited_bytes,
        base_reads,
        base_bytes,
        populated_bytes,
        dropped_bytes,
        populate_errors,
        checkpoints,
        bad_bytes,
        repaired_bytes,
    ] = engine.counts();
    Stats {
        size: 0,
        reserved: 0,
        reads,
        hit_bytes,
        zero_bytes,
        miss_bytes,
        waited_bytes,
        base_reads,
        base_bytes,
        populated_bytes,
        dropped_bytes,
        populate_errors,
        checkpoints,
        bad_bytes,
        repaired_bytes,
    }
}

fn info_of(engine: &Engine) -> Result<Info, c_int> {
    let status = Status::read(engine.image().path()).map_err(|err| err.errno())?;
    let header = &status.header;
    if header.cache.uuid != engine.header().cache.uuid {
        // Its name belongs to another image by now.
        return Err(libc::ESTALE);
    }
    Ok(Info {
        size: 0,
        state: match status.state {
            ImageState::Empty => ffi::VMCACHE_STATE_EMPTY,
            ImageState::Filling => ffi::VMCACHE_STATE_FILLING,
            ImageState::Full => ffi::VMCACHE_STATE_FULL,
            ImageState::Stale => ffi::VMCACHE_STATE_STALE,
            ImageState::Damaged => ffi::VMCACHE_STATE_DAMAGED,
        },
        cluster_size: header.geometry.cluster_size(),
        subcluster_size: header.geometry.subcluster_size(),
        quota: header.cache.quota.unwrap_or(0),
        cached_bytes: status.cached_bytes,
        zero_bytes: status.zero_bytes,
        actual_size: status.actual_size,
        processes: u32::try_from(status.processes.len()).unwrap_or(u32::MAX),
        bypassed: u32::from(!engine.is_active()),
        uuid: header.cache.uuid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_told_about_no_node() {
        // SAFETY: integers alone, for which all zero bits are a value.
        let mut stats: Stats = unsafe { std::mem::zeroed() };
        stats.size = size_of::<Stats>() as u32;
        let unopened: *const Node = std::ptr::null();

        // SAFETY: NULL is allowed.
        let told = unsafe {
            [
                vmcache_node_stats(std::ptr::null(), &raw mut stats),
                vmcache_node_stats((&raw const unopened).cast(), &raw mut stats),
                vmcache_node_info(std::ptr::null(), std::ptr::null_mut()),
            ]
        };

        assert_eq!(told, [-libc::EINVAL; 3]);
    }

    #[test]
    fn structures_have_no_padding() {
        assert_eq!(size_of::<Stats>(), 2 * 4 + 13 * 8);
        assert_eq!(size_of::<Info>(), 2 * 4 + 6 * 8 + 2 * 4 + 16);
    }
}
