//! One open node: its engine, its length, and how it is opened and closed.
//!
//! Used by `driver`.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use super::call::{field, path, set_string_field, string_field, take_choice, take_size};
use super::layout::{verify_backing, verify_file, verify_open};
use super::symbols::{BdrvChild, BlockDriverState, QDict, QemuError};
use super::{Api, api};
use crate::engine::{Engine, FETCH_MAX, OpenBase, Options};
use crate::error::{Error, ErrorKind, Result};
use crate::image::BaseState;

const READ_ONLY: &CStr = c"vmcache is read-only: put an overlay on top of it \
    (driver=qcow2 with backing.driver=vmcache,backing.file.filename=CACHE), or add snapshot=on \
    or read-only=on";

/// Where a failed open stands.
pub(super) enum OpenError {
    /// QEMU has set its error itself; this is the negative errno.
    Told(c_int),
    /// To be handed to QEMU.
    Ours(Error),
}

impl From<Error> for OpenError {
    fn from(err: Error) -> Self {
        OpenError::Ours(err)
    }
}

/// What stands behind a `BlockDriverState`'s `opaque`.
pub(super) struct Node {
    engine: Engine,
    /// Bytes of the disk: the base's where the cache is bypassed.
    length: u64,
    /// The node under the backing child as it was held against the cache; NULL without one.
    base: *mut BlockDriverState,
    /// A callback panicked; the base alone is used from then on.
    poisoned: AtomicBool,
    /// The image's filesystem refuses RWF_NOWAIT.
    no_read_now: AtomicBool,
}

impl Node {
    /// Opens a node: options, the `file` child, the engine, the `backing` child.
    ///
    /// # Safety
    /// The arguments must be those of a `bdrv_open` call.
    pub(super) unsafe fn open(
        bs: *mut BlockDriverState,
        options: *mut QDict,
        flags: c_int,
        errp: *mut *mut QemuError,
    ) -> std::result::Result<Node, OpenError> {
        let api = api();
        let symbols = &api.symbols;
        // SAFETY: the node being opened, in its bdrv_open (caller).
        unsafe { verify_open(api, bs, flags) }?;
        // SAFETY: main thread, outside coroutines, graph locked.
        let ret = unsafe {
            api.with_graph_locked(|| {
                (symbols.bdrv_apply_auto_read_only)(bs, READ_ONLY.as_ptr(), errp)
            })
        };
        told(ret)?;
        // SAFETY: QEMU's dictionary.
        let (populate, bypass, queue_bytes) = unsafe {
            (
                take_choice(api, options, c"populate", ["on", "off"])?,
                take_choice(api, options, c"base-changed", ["bypass", "refuse"])?,
                take_size(api, options, c"populate-queue")?,
            )
        };
        let queue_bytes = queue_bytes.map_or(Ok(Options::default().queue_bytes), enough)?;
        // SAFETY: main thread; all arguments are QEMU's or static.
        told(unsafe {
            (symbols.bdrv_open_file_child)(std::ptr::null(), options, c"file".as_ptr(), bs, errp)
        })?;
        // SAFETY: verified above, and the file child was opened just now.
        let file = unsafe { cache_path(api, verify_file(api, bs)?) }?;
        // QEMU keeps this flag from drivers, but not from their nodes.
        // SAFETY: the node being opened; the layout is verified.
        let node_flags = unsafe { field::<_, c_int>(bs, api.layout.bs_open_flags).read() };
        let no_backing = node_flags & api.layout.o_no_backing as c_int != 0;
        let no_io = flags & api.layout.o_no_io as c_int != 0;
        // Without a base there is nothing that could be stored.
        let populate = populate && !no_io && !no_backing;
        let engine = Engine::open(&file, &Options { populate, queue_bytes, ..Options::default() })?;
        // SAFETY: the node being opened; the layout is verified.
        unsafe { name_base(api, bs, &engine) }?;
        let mut node = Node {
            length: engine.header().geometry.virtual_size(),
            engine,
            base: std::ptr::null_mut(),
            poisoned: AtomicBool::new(false),
            no_read_now: AtomicBool::new(false),
        };
        if !no_backing {
            // Opened here and not by QEMU afterwards, so that a changed base can fail the open.
            // SAFETY: main thread; all arguments are QEMU's or static.
            told(unsafe {
                (symbols.bdrv_open_backing_file)(bs, options, c"backing".as_ptr(), errp)
            })?;
            // SAFETY: verified above, and the backing file was opened just now.
            if let Some(child) = unsafe { verify_backing(api, bs) }? {
                // SAFETY: a child of the node being opened.
                unsafe { node.check_base(api, bs, child, bypass) }?;
            }
        }
        Ok(node)
    }

    /// Holds the base against what the cache was made from.
    ///
    /// # Safety
    /// `bs` must be this node and `child` its backing child; main thread, outside coroutines.
    unsafe fn check_base(
        &mut self,
        api: &Api,
        bs: *mut BlockDriverState,
        child: *mut BdrvChild,
        bypass: bool,
    ) -> Result<()> {
        // SAFETY: a live child and the node under it (caller).
        let (base, size, files) = unsafe {
            let base = field::<_, *mut BlockDriverState>(child, api.layout.child_bs).read();
            (base, (api.symbols.bdrv_getlength)(base), Files::of(api, base))
        };
        self.base = base;
        let size = u64::try_from(size).map_err(|_| {
            let err = std::io::Error::from_raw_os_error(-size as i32);
            Error::new(ErrorKind::Io, format!("could not get the length of the base: {err}"))
        })?;
        let engine = &self.engine;
        // Before it is read, so that no change falls in between.
        engine.watch_base(files.all);
        // QEMU takes the name of the base over where no option has put another one in its place.
        // SAFETY: this node (caller).
        let implicit = unsafe { string_field(bs, api.layout.bs_auto_backing_file) };
        let is_named = files.name == implicit;
        let file = path(&files.name);
        // A URL is no path that exists.
        let file = file.is_file().then_some(file.as_path());
        let state = engine.check_base(&OpenBase { size, file, is_named }, |buf, offset| {
            // SAFETY: the child (caller); the buffer has `buf.len()` bytes and outlives the read.
            let ret = unsafe {
                let (at, len) = (offset as i64, buf.len() as i64);
                (api.symbols.bdrv_pread)(child, at, len, buf.as_mut_ptr().cast(), 0)
            };
            if ret < 0 { Err(std::io::Error::from_raw_os_error(-ret)) } else { Ok(()) }
        });
        let BaseState::Changed(how) = state else { return Ok(()) };
        let what = format!("{how}; make a new cache with 'vmcache create --force'");
        if !bypass {
            // In this order: the error says it, no line of log has to.
            engine.close();
            engine.base_changed(&what, is_named);
            return Err(Error::new(ErrorKind::Stale, what).on(engine.image().path()));
        }
        engine.base_changed(&what, is_named);
        self.length = size;
        Ok(())
    }

    /// Gives the cache up when the base is no longer the one that was held against it: a reopen or
    /// a job can put another node under this one at any time.
    ///
    /// # Safety
    /// `bs` must be this node, with the graph locked for reading.
    pub(super) unsafe fn watch_base(&self, bs: *mut BlockDriverState) {
        let layout = &api().layout;
        // SAFETY: the graph does not change while it is locked; the layout is verified.
        let base = unsafe {
            let child = field::<_, *mut BdrvChild>(bs, layout.bs_backing).read();
            match child.is_null() {
                true => std::ptr::null_mut(),
                false => field::<_, *mut BlockDriverState>(child, layout.child_bs).read(),
            }
        };
        if base != self.base {
            self.engine.bypass("another node was put in the place of the base");
        }
    }

    /// Whether hits can be tried without waiting.
    pub(super) fn may_read_now(&self) -> bool {
        !self.no_read_now.load(Ordering::Relaxed)
    }

    /// Notes that the image's filesystem does not know RWF_NOWAIT.
    pub(super) fn set_no_read_now(&self) {
        self.no_read_now.store(true, Ordering::Relaxed);
    }

    /// The engine.
    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Bytes of the disk.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// From now on nothing but the base is used.
    pub(super) fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::Relaxed) {
            self.engine.bypass("an internal error (see above)");
        }
    }

    /// Whether a callback panicked before.
    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
    }
}

fn told(ret: c_int) -> std::result::Result<(), OpenError> {
    if ret < 0 { Err(OpenError::Told(ret)) } else { Ok(()) }
}

/// What a base consists of.
struct Files {
    /// What QEMU calls it.
    name: String,
    /// The files of this host that are read for it, those of its own backing files among them.
    all: Vec<PathBuf>,
}

impl Files {
    /// # Safety
    /// `base` must be a live node; main thread, outside coroutines.
    unsafe fn of(api: &Api, base: *mut BlockDriverState) -> Self {
        let layout = &api.layout;
        // SAFETY: a live node (caller); it refreshes those below it first.
        unsafe { api.with_graph_locked(|| (api.symbols.bdrv_refresh_filename)(base)) };
        let mut files = Files {
            // SAFETY: the same; the layout is verified.
            name: unsafe { string_field(base, layout.bs_exact_filename) },
            all: Vec::new(),
        };
        let mut nodes = vec![base];
        while let Some(node) = nodes.pop() {
            // SAFETY: a live node, and its children, which the main thread alone changes.
            let (children, name) = unsafe {
                let child = |offset| {
                    let child = field::<_, *mut BdrvChild>(node, offset).read();
                    (!child.is_null())
                        .then(|| field::<_, *mut BlockDriverState>(child, layout.child_bs).read())
                };
                let children = [child(layout.bs_file), child(layout.bs_backing)];
                (children, string_field(node, layout.bs_exact_filename))
            };
            let path = path(&name);
            if children == [None, None] && path.is_file() {
                files.all.push(path);
            }
            nodes.extend(children.into_iter().flatten());
        }
        files
    }
}

/// The path of the cache image.
///
/// # Safety
/// `child` must be the file child of the node being opened.
unsafe fn cache_path(api: &Api, child: *mut BdrvChild) -> Result<PathBuf> {
    // SAFETY: a live child and the node under it, whose driver is registered for ever.
    let (name, driver) = unsafe {
        let file = field::<_, *mut BlockDriverState>(child, api.layout.child_bs).read();
        api.with_graph_locked(|| (api.symbols.bdrv_refresh_filename)(file));
        let driver = field::<_, *mut super::symbols::BlockDriver>(file, api.layout.bs_drv).read();
        let format = field::<_, *const c_char>(driver, api.layout.drv_format_name).read();
        (string_field(file, api.layout.bs_exact_filename), CStr::from_ptr(format))
    };
    if driver != c"file" || name.is_empty() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the cache image must be a local file; this one is opened by the '{}' driver",
                driver.to_string_lossy()
            ),
        ));
    }
    Ok(path(&name))
}

/// A value of `populate-queue`, where a fetch has room in it.
fn enough(bytes: u64) -> Result<u64> {
    let too_small = || {
        let what =
            format!("populate-queue={bytes}: the least is {FETCH_MAX}, one read of the base");
        Error::new(ErrorKind::Invalid, what)
    };
    (bytes >= FETCH_MAX).then_some(bytes).ok_or_else(too_small)
}

/// Tells QEMU the base's name, as the header has it.
///
/// # Safety
/// `bs` must be the node being opened.
unsafe fn name_base(api: &Api, bs: *mut BlockDriverState, engine: &Engine) -> Result<()> {
    let (layout, header) = (&api.layout, engine.header());
    let strings = [
        (layout.bs_backing_file, layout.bs_backing_file_size, &header.backing_file),
        (layout.bs_auto_backing_file, layout.bs_auto_backing_file_size, &header.backing_file),
        (layout.bs_backing_format, layout.bs_backing_format_size, &header.backing_format),
    ];
    for (offset, size, text) in strings {
        // SAFETY: arrays of these sizes in a live node; the layout is verified.
        unsafe { set_string_field(bs, offset, size, text) }?;
    }
    Ok(())
}
