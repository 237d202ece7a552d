//! Small filesystems that only the test and its children see.
//!
//! Used by `quota`.

use std::path::Path;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs a test in a thread with a mount namespace of its own, in which a tmpfs of some bytes is
/// mounted on a directory. It goes with the thread and the children it started. Needs root.
pub fn with_tmpfs<T: Send>(directory: &Path, bytes: u64, test: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (needs root)");
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
            .expect("private mounts");
        let size = format!("size={bytes}");
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .expect("a tmpfs");
        test()
    };
    thread::scope(|scope| {
        scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
