//! The QEMU functions that the driver calls, looked up in the running program.
//!
//! Used by every file of `qemu`. None of these functions is linked: the library also lands in
//! programs that are not QEMU, where an undefined symbol would keep them from starting. So they
//! are looked up by `dlsym`, all at once, before the driver is registered; one that is missing
//! means no driver, never a failure later.
//!
//! Signatures are those of QEMU 7.2 and 10.0, which agree for everything here. A `GRAPH_RDLOCK` in
//! QEMU's headers (8.1 and later) is a condition on the caller, noted at the field.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::marker::{PhantomData, PhantomPinned};

/// Types of QEMU's that are only ever handled by address. They cannot be made, moved or shared
/// between threads by Rust code; what is in them is reached through the layout's offsets.
macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            pub(crate) struct $name {
                data: [u8; 0],
                marker: PhantomData<(*mut u8, PhantomPinned)>,
            }
        )*
    };
}

opaque! {
    /// `BlockDriver`, a table of callbacks (block/block_int-common.h).
    BlockDriver;
    /// `BlockDriverState`, a node of the block graph (block/block_int-common.h).
    BlockDriverState;
    /// `BdrvChild`, an edge of the block graph (block/block_int-common.h).
    BdrvChild;
    /// `BDRVReopenState` (block/block-common.h).
    BDRVReopenState;
    /// `BlockReopenQueue` (block/block-common.h).
    BlockReopenQueue;
    /// `BlockDriverInfo` (block/block-common.h).
    BlockDriverInfo;
    /// `QEMUIOVector` (qemu/iov.h).
    QEMUIOVector;
    /// `QDict` (qobject/qdict.h).
    QDict;
    /// `Error` (qapi/error.h).
    QemuError;
    /// `Coroutine` (qemu/coroutine-core.h).
    Coroutine;
    /// `AioContext` (block/aio.h).
    AioContext;
}

/// A function that the driver needs and the running program does not export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MissingSymbol(pub(crate) &'static CStr);

impl fmt::Display for MissingSymbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it does not export {}", self.0.to_string_lossy())
    }
}

impl std::error::Error for MissingSymbol {}

/// The address of `name` in the global scope of the running program, the executable first.
pub(super) fn lookup(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: `name` is NUL-terminated, and dlsym takes any string with RTLD_DEFAULT.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// A C string literal from an identifier.
macro_rules! c_name {
    ($name:ident) => {
        match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("an identifier holds no NUL"),
        }
    };
}

macro_rules! symbols {
    (
        required { $($(#[$doc:meta])* $name:ident: $type:ty;)* }
        optional { $($(#[$odoc:meta])* $oname:ident: $otype:ty;)* }
    ) => {
        /// QEMU's functions, by their own names.
        ///
        /// Calling one is unsafe: pointers must be QEMU's own, and the caller must be where the
        /// function may be called (main thread, coroutine), as the field says.
        pub(crate) struct Symbols {
            $($(#[$doc])* pub(crate) $name: $type,)*
            $($(#[$odoc])* pub(crate) $oname: Option<$otype>,)*
        }

        impl Symbols {
            /// Looks up all of them. Fails with the first one that is missing.
            pub(crate) fn load() -> Result<Symbols, MissingSymbol> {
                Ok(Symbols {
                    $($name: {
                        const NAME: &CStr = c_name!($name);
                        let address = lookup(NAME).ok_or(MissingSymbol(NAME))?;
                        // SAFETY: the program exports a function of this name, and every
                        // supported series declares it with this type; a function pointer and a
                        // data pointer have one size and form on every system with dlsym.
                        unsafe { std::mem::transmute::<*mut c_void, $type>(address) }
                    },)*
                    $($oname: {
                        const NAME: &CStr = c_name!($oname);
                        // SAFETY: as for the required ones.
                        lookup(NAME).map(|address| unsafe {
                            std::mem::transmute::<*mut c_void, $otype>(address)
                        })
                    },)*
                })
            }

            /// The names that must be there.
            #[cfg(test)]
            pub(super) const REQUIRED: &'static [&'static CStr] = &[$(c_name!($name)),*];
        }
    };
}

symbols! {
    required {
        /// block/block_int-global-state.h; main thread.
        bdrv_register: unsafe extern "C" fn(*mut BlockDriver);
        /// block/block-global-state.h; main thread.
        bdrv_find_format: unsafe extern "C" fn(*const c_char) -> *mut BlockDriver;
        /// block/block-global-state.h; main thread. (filename, options, key, parent, errp):
        /// opens the child named by `key.*` in the options and sets the parent's `file`.
        bdrv_open_file_child: unsafe extern "C" fn(
            *const c_char, *mut QDict, *const c_char, *mut BlockDriverState, *mut *mut QemuError,
        ) -> c_int;
        /// block/block-global-state.h; main thread. (node, parent's options, key, errp).
        bdrv_open_backing_file: unsafe extern "C" fn(
            *mut BlockDriverState, *mut QDict, *const c_char, *mut *mut QemuError,
        ) -> c_int;
        /// block/block_int-global-state.h: a `bdrv_child_perm` callback; (node, child, role,
        /// queue, permissions, shared, out permissions, out shared).
        bdrv_default_perms: unsafe extern "C" fn(
            *mut BlockDriverState, *mut BdrvChild, u32, *mut BlockReopenQueue, u64, u64,
            *mut u64, *mut u64,
        );
        /// block/block_int-io.h: the child whose data the node is made of. Graph lock (reading).
        bdrv_primary_child: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BdrvChild;
        /// block/block_int-io.h: the backing child of a node that is no filter. Graph lock
        /// (reading).
        bdrv_cow_child: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BdrvChild;
        /// block/block-io.h; coroutine, graph lock (reading). (child, offset, bytes, vector, flags).
        bdrv_co_preadv: unsafe extern "C" fn(
            *mut BdrvChild, i64, i64, *mut QEMUIOVector, c_int,
        ) -> c_int;
        /// block/block-io.h: works in a coroutine or outside. (child, offset, bytes, buffer, flags).
        bdrv_pread: unsafe extern "C" fn(*mut BdrvChild, i64, i64, *mut c_void, c_int) -> c_int;
        /// block/block-io.h: bytes, or a negative errno; works in a coroutine or outside.
        bdrv_getlength: unsafe extern "C" fn(*mut BlockDriverState) -> i64;
        /// block/block-io.h: units of 512 bytes, rounded up, or a negative errno.
        bdrv_nb_sectors: unsafe extern "C" fn(*mut BlockDriverState) -> i64;
        /// block/block-global-state.h; main thread, graph lock (reading).
        bdrv_refresh_filename: unsafe extern "C" fn(*mut BlockDriverState);
        /// block/block-io.h: the address of the node's `node_name`.
        bdrv_get_node_name: unsafe extern "C" fn(*const BlockDriverState) -> *const c_char;
        /// block/block-global-state.h; main thread. The node of this name, or NULL.
        bdrv_find_node: unsafe extern "C" fn(*const c_char) -> *mut BlockDriverState;
        /// block/block-global-state.h; main thread, graph lock (reading). Makes the node read-only
        /// when its user allowed that, otherwise fails with the message.
        bdrv_apply_auto_read_only: unsafe extern "C" fn(
            *mut BlockDriverState, *const c_char, *mut *mut QemuError,
        ) -> c_int;
        /// block/block-io.h: copies the node's `backing_file` into a buffer. (node, buffer, size).
        bdrv_get_backing_filename: unsafe extern "C" fn(*mut BlockDriverState, *mut c_char, c_int);
        /// block/block-io.h: the event loop that the node belongs to.
        bdrv_get_aio_context: unsafe extern "C" fn(*mut BlockDriverState) -> *mut AioContext;
        /// block/aio.h: resumes a coroutine in the event loop it yielded in; any thread.
        aio_co_wake: unsafe extern "C" fn(*mut Coroutine);
        /// qemu/coroutine-core.h.
        qemu_coroutine_self: unsafe extern "C" fn() -> *mut Coroutine;
        /// qemu/coroutine-core.h; coroutine.
        qemu_coroutine_yield: unsafe extern "C" fn();
        /// qapi/error.h, what `error_setg` stands for: (errp, file, line, function, format, ...).
        error_setg_internal: unsafe extern "C" fn(
            *mut *mut QemuError, *const c_char, c_int, *const c_char, *const c_char, ...
        );
        /// qobject/qdict.h: the string at the key, owned by the dictionary, or NULL.
        qdict_get_try_str: unsafe extern "C" fn(*const QDict, *const c_char) -> *const c_char;
        /// qobject/qdict.h: the bool at the key, or the given one; NOT for an option that came as
        /// text (`-drive`, `--image-opts`), which is a string.
        qdict_get_try_bool: unsafe extern "C" fn(*const QDict, *const c_char, bool) -> bool;
        /// qobject/qdict.h: the number at the key, or the given one; NOT for an option that came as
        /// text.
        qdict_get_try_int: unsafe extern "C" fn(*const QDict, *const c_char, i64) -> i64;
        /// qobject/qdict.h.
        qdict_haskey: unsafe extern "C" fn(*const QDict, *const c_char) -> c_int;
        /// qobject/qdict.h.
        qdict_del: unsafe extern "C" fn(*mut QDict, *const c_char);
        /// qemu/iov.h: a vector over the caller's array; (vector, iov, niov).
        qemu_iovec_init_external:
            unsafe extern "C" fn(*mut QEMUIOVector, *mut libc::iovec, c_int);
    }
    optional {
        /// block/graph-lock.h, since 8.0: takes the graph lock for reading; main thread, outside
        /// coroutines. Before 8.0 there is no such lock.
        bdrv_graph_rdlock_main_loop: unsafe extern "C" fn();
        /// block/graph-lock.h, since 8.0.
        bdrv_graph_rdunlock_main_loop: unsafe extern "C" fn();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_qemu_misses_the_first_symbol() {
        let missing = Symbols::load().err().expect("a test program is not QEMU");

        assert_eq!(missing, MissingSymbol(Symbols::REQUIRED[0]));
        assert_eq!(missing.to_string(), "it does not export bdrv_register");
    }

    #[test]
    fn lookup_finds_what_is_there() {
        assert!(lookup(c"malloc").is_some());
    }
}
