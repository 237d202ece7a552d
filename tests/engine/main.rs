//! The engine on real files, read through [`vmcache::engine::Reader`], in one process and in many,
//! with QEMU's own tools as the oracle.
//!
//! Needs `qemu-img` and `qemu-io`. Tests that depend on chance print their seed when they fail.

mod base;
mod child;
mod crash;
mod fixture;
mod foreign;
mod processes;
mod random;
mod rot;
mod sharing;
mod slow;
mod space;
mod trust;
