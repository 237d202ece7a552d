//! The command line, run as its users run it, with QEMU's own tools as the judge of what it makes.
//!
//! `dir.rs` has what the tests share. qemu-img, qemu-io and qemu-nbd have to be installed.

mod bad_image;
mod bad_input;
mod boot;
mod check;
mod create;
mod dir;
mod drive;
mod exec;
mod help;
mod info;
mod opennebula;
mod publish;
mod units;
