//! Which QEMU is this, and where do its structures have what? Picks the layout of the running
//! program and proves it; never guesses.
//!
//! Used by `register.rs` (which layout) and `driver.rs` (`verify_open`, `verify_file`,
//! `verify_backing`, `verify_reopen`). A layout comes from the tables of the supported series, or
//! from the C file in QEMU's own tree. Either is held against the living program in two steps:
//!
//! 1. **Before the driver is registered**, against drivers that QEMU itself has registered and
//!    whose initialisers are known word for word: qcow2, raw and copy-on-read. Each slot that the
//!    initialiser sets must hold code (the very function where QEMU exports it) or data, every
//!    other byte must be zero, the name must be where names are, and the object as large as the
//!    symbol table says. On top of that come functions that appeared or vanished between
//!    series, because some changes leave no trace in a structure: 9.2 and 10.0 have the same
//!    ones, and 10.1 gave an argument of a callback a new meaning.
//! 2. **When a node is opened**, against the node itself, by asking QEMU for what the offsets
//!    should have: the address of its node name, its file child, the child's size
//!    (`layout/node.rs`).
//!
//! What fits nothing, or two tables, is refused with the reason. Reads at a wrong table's offsets
//! cannot fault (`layout/program.rs`). What no program shows is taken from the table that fits:
//! the values of flags, `BlockDriverInfo`, and `auto_backing_file`, `backing_format`,
//! `bl.opt_transfer` and `bl.max_transfer`, which lie between members whose places are proven.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_int};

use crate::qemu::symbols::Symbols;
use program::{Object, Program, read_string};

pub(crate) use node::{verify_backing, verify_file, verify_open, verify_reopen};
pub(super) use program::Living;

mod node;
mod program;
mod tables;
#[cfg(test)]
mod tests;

/// `include/vmcache.h` as bindgen reads it.
#[allow(missing_docs, non_camel_case_types, dead_code, clippy::all)]
pub(crate) mod ffi {
    include!(concat!(env!("OUT_DIR"), "/vmcache.rs"));
}

pub(crate) use ffi::vmcache_layout as Layout;

/// Everything known about one series: its layout, and how to recognise it.
#[derive(Clone, Copy)]
struct Table {
    layout: Layout,
    marks: &'static [Mark],
    references: &'static [Reference],
}

// SAFETY: the pointers in it are `layout.series`, to a string literal, and `layout.driver`, NULL.
unsafe impl Sync for Table {}

/// A function that the series exports or does not; both are facts of it.
#[derive(Clone, Copy)]
struct Mark {
    function: &'static CStr,
    exported: bool,
}

/// A driver of QEMU's own, as its source initialises it.
#[derive(Clone, Copy)]
struct Reference {
    format_name: &'static CStr,
    /// The exported variable, unless it is static.
    symbol: Option<&'static CStr>,
    flags: &'static [Flag],
    /// The pointers that are set, besides `format_name` and the list's.
    slots: &'static [Slot],
}

/// A `bool` in `BlockDriver`.
struct Flag {
    offset: u32,
    field: &'static str,
    value: bool,
}

/// A pointer in `BlockDriver`.
struct Slot {
    offset: u32,
    field: &'static str,
    holds: Holds,
}

/// What a slot must hold.
enum Holds {
    /// Some function.
    Code,
    /// The address of something that is mapped.
    Data,
    /// The exported function of this name.
    Function(&'static CStr),
}

const fn mark(function: &'static CStr, exported: bool) -> Mark {
    Mark { function, exported }
}

const fn flag(offset: u32, field: &'static str, value: bool) -> Flag {
    Flag { offset, field, value }
}

const fn code(offset: u32, field: &'static str) -> Slot {
    Slot { offset, field, holds: Holds::Code }
}

const fn data(offset: u32, field: &'static str) -> Slot {
    Slot { offset, field, holds: Holds::Data }
}

const fn function(offset: u32, field: &'static str, name: &'static CStr) -> Slot {
    Slot { offset, field, holds: Holds::Function(name) }
}

const WORD: usize = size_of::<usize>();

/// `instance_size` of any driver, in bytes: above zero, and not absurd.
const INSTANCE_SIZE: std::ops::RangeInclusive<i32> = 1..=1 << 20;

/// The supported series, for messages: "7.2, 10.0".
pub(super) fn supported() -> String {
    let series: Vec<_> = tables::TABLES.iter().map(|table| series(&table.layout)).collect();
    series.join(", ")
}

/// `MODULE_INIT_BLOCK`, needed before any series is known; it is the same in all tables (a test
/// says so).
pub(super) const MODULE_INIT_BLOCK: c_int = tables::TABLES[0].layout.module_init_block as c_int;

/// The series a layout is of.
pub(super) fn series(layout: &Layout) -> String {
    // SAFETY: tables hold string literals, and a layout from C has been checked for NULL
    // (`check_passed`) and by the header's contract holds a string.
    unsafe { CStr::from_ptr(layout.series) }.to_string_lossy().into_owned()
}

/// The one table that fits the program, or why none does.
pub(super) fn select(program: &Living<'_>) -> Result<Layout, String> {
    select_from(&tables::TABLES, program)
}

fn select_from(tables: &[Table], program: &dyn Program) -> Result<Layout, String> {
    let mut fitting = Vec::new();
    let mut reasons = Vec::new();
    for table in tables {
        match table.fits(program) {
            Ok(()) => fitting.push(table),
            Err(reason) => reasons.push(format!("not {}: {reason}", series(&table.layout))),
        }
    }
    match fitting[..] {
        [table] => Ok(table.layout),
        [] => Err(reasons.join("; ")),
        _ => Err(format!(
            "it could be {} as well",
            fitting.iter().map(|t| series(&t.layout)).collect::<Vec<_>>().join(" or ")
        )),
    }
}

/// Checks a layout that came from C against the program, as far as it can be without the facts
/// that only the tables have.
pub(super) fn check_passed(layout: &Layout, program: &Living<'_>) -> Result<(), String> {
    fits_drivers(layout, program)
}

impl Table {
    fn fits(&self, program: &dyn Program) -> Result<(), String> {
        for mark in self.marks {
            if program.symbol(mark.function).is_some() != mark.exported {
                return Err(format!(
                    "it {} {}",
                    if mark.exported { "does not export" } else { "exports" },
                    mark.function.to_string_lossy()
                ));
            }
        }
        self.check_itself()?;
        fits_drivers(&self.layout, program)?;
        for reference in self.references {
            reference.fits(&self.layout, program)?;
        }
        Ok(())
    }

    /// The layout and the references name the same fields; they must place them alike.
    fn check_itself(&self) -> Result<(), String> {
        let layout = &self.layout;
        let places = [
            ("is_filter", layout.drv_is_filter),
            ("is_format", layout.drv_is_format),
            ("supports_backing", layout.drv_supports_backing),
            ("strong_runtime_opts", layout.drv_strong_runtime_opts),
            ("bdrv_open", layout.drv_bdrv_open),
            ("bdrv_close", layout.drv_bdrv_close),
            ("bdrv_reopen_prepare", layout.drv_bdrv_reopen_prepare),
            ("bdrv_refresh_limits", layout.drv_bdrv_refresh_limits),
            ("bdrv_child_perm", layout.drv_bdrv_child_perm),
            ("bdrv_co_preadv_part", layout.drv_bdrv_co_preadv_part),
            ("bdrv_co_block_status", layout.drv_bdrv_co_block_status),
            ("bdrv_getlength", layout.drv_getlength),
            ("bdrv_co_getlength", layout.drv_getlength),
            ("bdrv_get_info", layout.drv_get_info),
            ("bdrv_co_get_info", layout.drv_get_info),
        ];
        let named = self.references.iter().flat_map(|reference| {
            let flags = reference.flags.iter().map(|flag| (flag.field, flag.offset));
            flags.chain(reference.slots.iter().map(|slot| (slot.field, slot.offset)))
        });
        for (field, offset) in named {
            if places.iter().any(|(name, place)| *name == field && *place != offset) {
                return Err(format!("vmcache's table has {field} at two places"));
            }
        }
        Ok(())
    }
}

/// Lets QEMU fill a vector and finds what it put there, where the layout says.
pub(super) fn check_vector(layout: &Layout, symbols: &Symbols) -> Result<(), String> {
    /// More than any QEMUIOVector has, so that a wrong size in the layout does no harm.
    const WORDS: usize = 32;
    let mut bytes = [1u8, 2, 3];
    let mut array =
        [1usize, 2].map(|len| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len });
    let mut words = [0usize; WORDS];
    // SAFETY: the vector has room for any QEMUIOVector and is aligned for it; the array outlives
    // it. The function stores the array's address and adds up its lengths.
    unsafe {
        (symbols.qemu_iovec_init_external)(
            words.as_mut_ptr().cast(),
            array.as_mut_ptr(),
            array.len() as c_int,
        );
    }
    // SAFETY: `words` is not used by anything else while the object is.
    let vector = unsafe { Object::new(words.as_ptr(), layout.qiov_sizeof as usize) };
    let fits = layout.qiov_sizeof as usize <= size_of_val(&words)
        && vector.is_some_and(|vector| {
            vector.pointer(layout.qiov_iov) == Some(array.as_ptr().addr())
                && vector.int(layout.qiov_niov) == Some(array.len() as c_int)
                && vector.pointer(layout.qiov_size) == Some(1 + 2)
        });
    if fits { Ok(()) } else { Err("its QEMUIOVector is another".into()) }
}

/// What must be true of qcow2 and raw in every series, by the layout alone.
fn fits_drivers(layout: &Layout, program: &dyn Program) -> Result<(), String> {
    let qcow2 = Driver::of_symbol(layout, program, c"qcow2", c"bdrv_qcow2")?;
    for (offset, field, expected) in [
        (layout.drv_is_filter, "is_filter", false),
        (layout.drv_is_format, "is_format", true),
        (layout.drv_supports_backing, "supports_backing", true),
    ] {
        qcow2.check_flag(offset, field, expected)?;
    }
    for (offset, field) in [
        (layout.drv_bdrv_open, "bdrv_open"),
        (layout.drv_bdrv_close, "bdrv_close"),
        (layout.drv_bdrv_reopen_prepare, "bdrv_reopen_prepare"),
        (layout.drv_bdrv_refresh_limits, "bdrv_refresh_limits"),
        (layout.drv_bdrv_co_preadv_part, "bdrv_co_preadv_part"),
        (layout.drv_bdrv_co_block_status, "bdrv_co_block_status"),
        (layout.drv_get_info, "get_info"),
    ] {
        qcow2.check_slot(program, &code(offset, field))?;
    }
    qcow2.check_slot(
        program,
        &function(layout.drv_bdrv_child_perm, "bdrv_child_perm", c"bdrv_default_perms"),
    )?;
    qcow2.check_slot(program, &data(layout.drv_strong_runtime_opts, "strong_runtime_opts"))?;
    qcow2.check_null(layout.drv_getlength, "getlength")?;

    let raw = Driver::of_symbol(layout, program, c"raw", c"bdrv_raw")?;
    for (offset, field, expected) in [
        (layout.drv_is_filter, "is_filter", false),
        (layout.drv_is_format, "is_format", true),
        (layout.drv_supports_backing, "supports_backing", false),
    ] {
        raw.check_flag(offset, field, expected)?;
    }
    raw.check_slot(program, &code(layout.drv_getlength, "getlength"))?;
    raw.check_slot(program, &code(layout.drv_bdrv_open, "bdrv_open"))?;
    raw.check_null(layout.drv_bdrv_close, "bdrv_close")?;
    raw.check_null(layout.drv_bdrv_co_preadv_part, "bdrv_co_preadv_part")
}

impl Reference {
    /// Compares every byte of the driver with what its initialiser leaves there.
    fn fits(&self, layout: &Layout, program: &dyn Program) -> Result<(), String> {
        let driver = match self.symbol {
            Some(symbol) => Driver::of_symbol(layout, program, self.format_name, symbol)?,
            None => Driver::registered(layout, program, self.format_name)?,
        };
        let registered = program.driver(self.format_name);
        if registered != Some(driver.address) {
            return Err(format!("its driver {} is not the one it has registered", driver.name));
        }

        let mut known = vec![false; driver.bytes.len()];
        let mut know = |offset: u32, len: usize| {
            if let Some(known) = known.get_mut(offset as usize..).and_then(|k| k.get_mut(..len)) {
                known.fill(true);
            }
        };
        for flag in self.flags {
            driver.check_flag(flag.offset, flag.field, flag.value)?;
            know(flag.offset, 1);
        }
        for slot in self.slots {
            driver.check_slot(program, slot)?;
            know(slot.offset, WORD);
        }
        know(layout.drv_format_name, WORD);
        know(layout.drv_instance_size, 4);
        know(layout.drv_list, 2 * WORD);
        driver.check_list(layout, program)?;

        let stray = driver.bytes.iter().zip(&known).position(|(byte, known)| *byte != 0 && !known);
        match stray {
            Some(offset) => Err(format!(
                "{} has something at {offset:#x}, where that series leaves it empty",
                driver.name
            )),
            None => Ok(()),
        }
    }
}

/// A copy of one of the program's drivers.
struct Driver {
    name: String,
    address: usize,
    bytes: Vec<u8>,
}

impl Driver {
    fn of_symbol(
        layout: &Layout,
        program: &dyn Program,
        format_name: &CStr,
        symbol: &CStr,
    ) -> Result<Driver, String> {
        let Some(address) = program.symbol(symbol) else {
            return Err(format!("it does not export {}", symbol.to_string_lossy()));
        };
        match program.symbol_size(address) {
            Some(size) if size != layout.drv_sizeof as usize => Err(format!(
                "its BlockDriver has {size} bytes where that series has {}",
                layout.drv_sizeof
            )),
            Some(_) => Driver::read(layout, program, format_name, address),
            None => Err(format!("the size of {} is not known", symbol.to_string_lossy())),
        }
    }

    fn registered(
        layout: &Layout,
        program: &dyn Program,
        format_name: &CStr,
    ) -> Result<Driver, String> {
        match program.driver(format_name) {
            Some(address) => Driver::read(layout, program, format_name, address),
            None => Err(format!("it has no driver {}", format_name.to_string_lossy())),
        }
    }

    fn read(
        layout: &Layout,
        program: &dyn Program,
        format_name: &CStr,
        address: usize,
    ) -> Result<Driver, String> {
        let name = format_name.to_string_lossy().into_owned();
        let mut bytes = vec![0; layout.drv_sizeof as usize];
        if !address.is_multiple_of(WORD) || !program.read(address, &mut bytes) {
            return Err(format!("{name} does not lie in the program's memory"));
        }
        let driver = Driver { name, address, bytes };
        let living = driver
            .word(layout.drv_format_name)
            .and_then(|at| read_string(program, at, format_name.count_bytes() + 1));
        if living.as_deref() != Some(format_name.to_bytes()) {
            return Err(format!("{} does not have its name where expected", driver.name));
        }
        let instance_size = driver.array(layout.drv_instance_size).map(i32::from_ne_bytes);
        if !instance_size.is_some_and(|size| INSTANCE_SIZE.contains(&size)) {
            return Err(format!("{} has no instance size where expected", driver.name));
        }
        Ok(driver)
    }

    fn array<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.bytes.get(offset as usize..)?.first_chunk().copied()
    }

    fn word(&self, offset: u32) -> Option<usize> {
        self.array(offset).map(usize::from_ne_bytes)
    }

    fn check_flag(&self, offset: u32, field: &str, expected: bool) -> Result<(), String> {
        if self.array(offset) == Some([u8::from(expected)]) {
            return Ok(());
        }
        Err(format!("{}'s {field} is not {expected} at {offset:#x}", self.name))
    }

    fn check_null(&self, offset: u32, field: &str) -> Result<(), String> {
        match self.word(offset) {
            Some(0) => Ok(()),
            _ => Err(format!("{}'s {field} is not empty at {offset:#x}", self.name)),
        }
    }

    fn check_slot(&self, program: &dyn Program, slot: &Slot) -> Result<(), String> {
        let value = self.word(slot.offset).filter(|value| *value != 0);
        let fits = value.is_some_and(|value| match slot.holds {
            Holds::Code => program.is_code(value),
            Holds::Data => program.is_mapped(value) && !program.is_code(value),
            Holds::Function(name) => program.is_code(value) && program.symbol(name) == Some(value),
        });
        if fits {
            return Ok(());
        }
        let what = match slot.holds {
            Holds::Code => "a function".into(),
            Holds::Data => "data".into(),
            Holds::Function(name) => name.to_string_lossy(),
        };
        Err(format!("{}'s {} is not {what} at {:#x}", self.name, slot.field, slot.offset))
    }

    /// The list of drivers goes through this one: what is before it points to it. Where the
    /// neighbour is a driver on the heap, which cannot be read safely, this is left out.
    fn check_list(&self, layout: &Layout, program: &dyn Program) -> Result<(), String> {
        let previous = layout.drv_list.checked_add(WORD as u32).and_then(|at| self.word(at));
        let linked = match previous {
            None | Some(0) => false,
            Some(previous) => program.word(previous).is_none_or(|driver| driver == self.address),
        };
        if linked {
            return Ok(());
        }
        Err(format!("{} is not in the list of drivers at {:#x}", self.name, layout.drv_list))
    }
}
