//! One cache image on disk: creating it, opening and locking it, reading all its tables, the few
//! writes that ever happen to it, and publishing what it holds.
//!
//! What this module assumes of the disk: a write is torn only between sectors of 512 bytes; what was
//! done before an `fdatasync` is on the disk when that returns without error; of what was done since,
//! discards included, any part is there when the power goes, in any order. `tests/engine/crash.rs`
//! builds all that may come of it.
//!
//! Used by `engine` and the command line; uses `format`, `lock` and `error`.

mod create;
mod disk;
mod export;
mod file;
mod identity;
mod repair;
mod scan;
mod whole;

pub use create::{CreateOptions, create};
pub use disk::{Observer, Operation};
pub use export::{ExportOptions, Exported, export};
pub use file::{Access, Image, Use, decode_checksums, is_open_for_writing, is_remote};
pub use identity::{BaseFile, BaseState, BaseWatch, PROBE_BYTES, PROBES, sample_base};
pub use repair::{discard_unused, free_leaks, repair};
pub use scan::{Leak, Scan};

#[cfg(test)]
mod tests;
