//! The qcow2 file of a cache image as bytes and types. Pure: no I/O, no shared state, no unsafe.
//!
//! A cache image is a qcow2 version 3 file with extended L2 entries whose clusters stand in one
//! fixed order ([`Layout`]), so that nothing but refcounts, L2 entries and data changes after
//! creation; a [`Published`] one is a copy that never changes. Section names in these docs are those of QEMU's `docs/interop/qcow2.txt`.
//!
//! Used by `image`, `live` and `engine`; uses only `error`.

mod checksum;
mod extension;
mod geometry;
mod header;
mod l2;
mod layout;
mod published;

pub use checksum::Checksum;
pub use extension::{BaseChange, BaseIdentity, CacheExtension};
pub use geometry::{ByteRange, Geometry, GuestOffset, HostOffset, SECTOR, SUBCLUSTERS};
pub use header::{HEADER_MAX, Header, PublishedMark};
pub use l2::{L2Entry, SubclusterBits};
pub use layout::Layout;
pub use published::Published;

#[cfg(test)]
mod tests;
