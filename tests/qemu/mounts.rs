//! Small filesystems that only the test and its children see. All need root.
//!
//! Used by `quota` and `faults`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs a test in a thread with a mount namespace of its own, in which a tmpfs of some bytes is
/// mounted on a directory. It goes with the thread and the children it started.
pub fn with_tmpfs<T: Send>(directory: &Path, bytes: u64, test: impl FnOnce() -> T + Send) -> T {
    in_namespace(|| {
        mount_tmpfs(directory, MsFlags::empty(), bytes);
        test()
    })
}

/// Gives the tmpfs that is mounted on a directory another size.
pub fn resize_tmpfs(directory: &Path, bytes: u64) {
    mount_tmpfs(directory, MsFlags::MS_REMOUNT, bytes);
}

fn mount_tmpfs(directory: &Path, flags: MsFlags, bytes: u64) {
    let size = format!("size={bytes}");
    mount(Some("tmpfs"), directory, Some("tmpfs"), flags, Some(size.as_str())).expect("a tmpfs");
}

/// The same with an ext4 on a loop device that an error makes read-only.
pub fn with_ext4<T: Send>(directory: &Path, bytes: u64, test: impl FnOnce() -> T + Send) -> T {
    let disk = tempfile::NamedTempFile::new().expect("a disk");
    disk.as_file().set_len(bytes).expect("a disk");
    in_namespace(|| {
        run(Command::new("mkfs.ext4").arg("-q").arg(disk.path()));
        run(Command::new("mount").arg("-oloop,errors=remount-ro").args([disk.path(), directory]));
        test()
    })
}

/// Makes the ext4 on a directory read-only while it is in use, as an error of its disk does.
pub fn fail_ext4(directory: &Path) {
    let device = run(Command::new("findmnt").args(["-no", "SOURCE"]).arg(directory));
    let name = Path::new(device.trim()).file_name().expect("a device's name");
    let trigger = Path::new("/sys/fs/ext4").join(name).join("trigger_fs_error");
    fs::write(trigger, "vmcache test").expect("an error in the filesystem");
}

/// Allows or forbids writing to what is mounted on a directory, while nobody has a file open for
/// that.
pub fn set_read_only(directory: &Path, read_only: bool) {
    let how = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let nothing = None::<&str>;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | how;
    mount(nothing, directory, nothing, flags, nothing).expect("another mount");
}

fn run(command: &mut Command) -> String {
    let said = command.output().expect("a program");
    assert!(said.status.success(), "{command:?}: {said:?}");
    String::from_utf8(said.stdout).expect("text")
}

fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (needs root)");
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
            .expect("private mounts");
        test()
    };
    thread::scope(|scope| {
        scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
