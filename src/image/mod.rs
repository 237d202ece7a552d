//! One cache image on disk: creating it, opening and locking it, reading all its tables, and the
//! few writes that ever happen to it.
//!
//! What this module assumes of the disk: a write of less than 512 bytes within a sector is done
//! whole or not at all; writes before an `fdatasync` are on the disk when it returns without error,
//! and in any order, in part or not at all when the power goes before it.
//!
//! Used by `engine` and the command line; uses `format`, `lock` and `error`.

mod create;
mod disk;
mod file;
mod identity;
mod repair;
mod scan;

pub use create::{CreateOptions, create};
pub use disk::{Observer, Operation};
pub use file::{Access, Image, Use, decode_checksums};
pub use identity::{BaseFile, BaseState, sample_base};
pub use repair::{discard_unused, free_leaks, repair};
pub use scan::{Leak, Scan};

#[cfg(test)]
mod tests;
