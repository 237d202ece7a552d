//! `fallocate` as it should be: begun again where a signal cut it off, as tmpfs and ext4 let happen.
//!
//! Used by `image` and `live`; uses only the system.

use std::fs::File;
use std::io;

use nix::errno::Errno;
pub use nix::fcntl::FallocateFlags;

/// Changes how the bytes from `at` on are allocated; see fallocate(2).
pub fn fallocate(file: &File, how: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
    loop {
        match nix::fcntl::fallocate(file, how, at as libc::off_t, len as libc::off_t) {
            Err(Errno::EINTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}
