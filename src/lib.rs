//! vmcache: a small cache image between each virtual machine's overlay and the base image it
//! shares with many others, filled at the first read and served from at every later one.
//!
//! The map of the house; what is above uses what is below, never the other way round:
//!
//! | module | what is in it |
//! |---|---|
//! | `qemu` | QEMU's side: the layout of its structures, its functions, the driver's callbacks |
//! | [`engine`] | the core as the outside sees it: plan a read, take what was fetched, checkpoint |
//! | [`image`] and [`live`] | one cache image on disk; the state its users share in memory |
//! | [`mod@format`] | bytes and types of the qcow2 file |
//! | [`lock`], [`fallocate`], [`size`], [`error`] | byte locks that cross processes; allocation; sizes as text; the one error type |
//!
//! The command line (`src/bin/vmcache`) stands beside `qemu`, on the engine.
//!
//! After R. Razavi and T. Kielmann, "Scalable virtual machine deployment using VM image caches",
//! SC'13, doi 10.1145/2503210.2503274.

pub mod engine;
pub mod error;
pub mod fallocate;
pub mod format;
pub mod image;
pub mod live;
pub mod lock;
mod qemu;
pub mod size;
