//! A file that is there as a whole or not at all: it is written and synced without a name, or under
//! another one where the filesystem knows no files without (`O_TMPFILE`, open(2)), and gets its own
//! in one step. Nobody ever opens half of it, and where the writer is killed nothing of it stays.
//!
//! Used by `create` and `export`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::unistd::linkat;

use super::disk::Disk;
use crate::error::{Error, ErrorKind, Result};

/// What becomes of a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replace {
    /// It stays, and the new one is refused.
    No,
    /// It goes; who has it open keeps it.
    Yes,
    /// It stays under the name with `.old` behind it, in place of an earlier one: who reads it over
    /// NFS, where an open does not keep a file, does so by its inode.
    KeepOld,
}

/// Makes a file with the permission bits `mode`, less what umask takes away. `write` fills it.
pub(super) fn make_whole<T>(
    path: &Path,
    mode: u32,
    replace: Replace,
    write: impl FnOnce(&Disk) -> Result<T>,
) -> Result<T> {
    // The name that the user gave tells him more than ours, in every error.
    let failed = |err: io::Error| Error::io("create", path, &err);
    if replace == Replace::No && path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    let mut draft = Draft::new(path, mode).map_err(failed)?;
    let disk = Disk::new(draft.file.try_clone().map_err(failed)?, None);
    let written = write(&disk)?;
    // A power cut must not leave a name without its contents behind.
    disk.sync_all().map_err(|err| Error::io("write", path, &err))?;
    match draft.publish(path, replace) {
        Ok(()) => Ok(written),
        Err(err) if err.raw_os_error() == Some(libc::EEXIST) => Err(exists(path)),
        Err(err) => Err(failed(err)),
    }
}

/// The error of a name that is taken.
fn exists(path: &Path) -> Error {
    Error::new(
        ErrorKind::Exists,
        format!("'{}' exists; choose another name, or --force to replace it", path.display()),
    )
}

/// A file that is being written.
struct Draft {
    file: File,
    /// A name beside the final one that nobody else has.
    beside: PathBuf,
    /// Whether it has that name, which goes with this value.
    is_named: bool,
}

impl Draft {
    fn new(path: &Path, mode: u32) -> io::Result<Self> {
        let beside = with_suffix(path, &format!(".{}.new", uuid::Uuid::new_v4().simple()));
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut options = OpenOptions::new();
        options.write(true).mode(mode);
        match options.custom_flags(libc::O_CLOEXEC | libc::O_TMPFILE).open(directory) {
            Ok(file) => Ok(Draft { file, beside, is_named: false }),
            Err(err) if knows_no_unnamed(&err) => {
                options.create_new(true).custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW);
                let file = options.open(&beside)?;
                Ok(Draft { file, beside, is_named: true })
            }
            Err(err) => Err(err),
        }
    }

    fn publish(&mut self, path: &Path, replace: Replace) -> io::Result<()> {
        if replace == Replace::No {
            return if self.is_named { self.rename_to_free(path) } else { self.link(path) };
        }
        if !self.is_named {
            self.link(&self.beside)?;
            self.is_named = true;
        }
        if replace == Replace::KeepOld {
            self.keep_old(path)?;
        }
        fs::rename(&self.beside, path)?;
        self.is_named = false;
        Ok(())
    }

    /// Gives the file that has the name now its second one, which stays when the first is taken.
    fn keep_old(&self, path: &Path) -> io::Result<()> {
        let beside = with_suffix(&self.beside, ".old");
        match fs::hard_link(path, &beside) {
            Ok(()) => {
                let renamed = fs::rename(&beside, with_suffix(path, ".old"));
                // Still there where that failed, or where both are names of one file.
                let _ = fs::remove_file(&beside);
                renamed
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(err),
        }
    }

    /// Gives the file a name that is free.
    fn link(&self, name: &Path) -> io::Result<()> {
        let file = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        Ok(linkat(AT_FDCWD, &file, AT_FDCWD, name, AtFlags::AT_SYMLINK_FOLLOW)?)
    }

    fn rename_to_free(&mut self, path: &Path) -> io::Result<()> {
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(AT_FDCWD, &self.beside, AT_FDCWD, path, flags) {
            Ok(()) => {
                self.is_named = false;
                Ok(())
            }
            // Filesystems without the flag have links, or nothing that would help.
            Err(Errno::EINVAL) => fs::hard_link(&self.beside, path),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_named {
            // Nothing to add to the error that is on its way.
            let _ = fs::remove_file(&self.beside);
        }
    }
}

/// Whether an error says that the filesystem, or the kernel, has no files without a name.
fn knows_no_unnamed(err: &io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &'static str) -> impl FnOnce(&Disk) -> Result<()> {
        move |disk| {
            disk.write_all_at(text.as_bytes(), 0).unwrap();
            Ok(())
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_that_is_being_written_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let seen = make_whole(&dir.path().join("a"), 0o600, Replace::Yes, |disk| {
            disk.write_all_at(b"half", 0).unwrap();
            Ok(names(dir.path()))
        });
        assert_eq!(seen.unwrap(), [""; 0]);
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_file_whose_writing_fails_leaves_nothing_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "old").unwrap();
        let failed = make_whole(&path, 0o600, Replace::KeepOld, |_| {
            Err::<(), _>(Error::new(ErrorKind::Full, "full"))
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Full);
        assert_eq!(names(dir.path()), ["a"]);
        assert_eq!(fs::read_to_string(path).unwrap(), "old");
    }

    #[test]
    fn a_name_that_is_taken_while_the_file_is_written_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let failed = make_whole(&path, 0o600, Replace::No, |_| {
            fs::write(&path, "faster").unwrap();
            Ok(())
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(names(dir.path()), ["a"]);
        assert_eq!(fs::read_to_string(path).unwrap(), "faster");
    }

    #[test]
    fn one_earlier_file_keeps_a_name_and_its_inode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        make_whole(&path, 0o600, Replace::KeepOld, write("one")).unwrap();
        make_whole(&path, 0o600, Replace::KeepOld, write("two")).unwrap();
        make_whole(&path, 0o600, Replace::KeepOld, write("three")).unwrap();
        assert_eq!(names(dir.path()), ["a", "a.old"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(fs::read_to_string(dir.path().join("a.old")).unwrap(), "two");
    }
}
