//! QEMU's side: everything that knows QEMU, and the only room besides `live` with `unsafe`.
//!
//! [`register`] gets the driver into a QEMU, [`layout`] and [`symbols`] know its structures and
//! functions, [`driver`] has the callbacks, [`node`] one open node, [`io`] the read path in a
//! coroutine, [`file_read`] and [`scratch`] how it reads the image file, [`info`] what a node tells
//! about itself, [`call`] the small conversions between C and Rust.
//!
//! Used by QEMU alone; uses `engine`.

mod call;
mod driver;
mod file_read;
mod info;
mod io;
mod layout;
mod node;
mod register;
mod scratch;
mod symbols;

use register::{Api, api};
