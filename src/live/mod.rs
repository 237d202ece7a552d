//! The live state of an image, `<image>.live`: shared memory in which every process that has the
//! image open finds what is cached, who is fetching what, and what it may still allocate.
//!
//! The file is volatile. It belongs to one boot of the machine and one image (see
//! [`LiveIdentity`]) and is made anew from the image where it does not. Each part has its protocol
//! at the head of its file: [`map`], [`claim`], [`dirty`], [`slot`], [`space`], [`event`]. The parts are plain
//! structs of atomics and know nothing of the mapping; [`mod@file`] lays them over the shared file and
//! is, with the futex in [`event`] and the signal handler in [`sigbus`], the only place with `unsafe`.
//!
//! Used by `engine`; uses `format`, `lock` and `error`.

pub mod claim;
pub mod dirty;
pub mod event;
pub mod file;
pub mod map;
mod regions;
pub mod sigbus;
pub mod slot;
pub mod space;
mod sync;

pub use claim::{Claim, Owner};
pub use file::{LiveFile, LiveIdentity};
pub use map::MapEntry;
pub use slot::{Counters, Slot, SlotGuard};
