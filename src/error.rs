//! The one error type of the library: what kind of failure, the errno that QEMU gets, what was
//! being tried and on which file, and what to do about it.
//!
//! Used by every module; uses none.

use std::fmt;
use std::io;
use std::path::Path;

/// What went wrong, coarsely: stable enough to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A system call failed.
    Io,
    /// An argument or option makes no sense.
    Invalid,
    /// The file is not a vmcache image (not a qcow2, or a qcow2 that vmcache did not make).
    NotACache,
    /// A vmcache or qcow2 file with a version or feature that this build does not know.
    Unsupported,
    /// Something other than vmcache has written to the image since; nothing in it is trusted.
    Foreign,
    /// The image contradicts itself.
    Damaged,
    /// The base is not what the cache was made from.
    Stale,
    /// The target is already there.
    Exists,
    /// Somebody else holds the file.
    Busy,
    /// The quota or the filesystem is used up.
    Full,
}

/// An error with its context, ready to be shown to a person.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    errno: i32,
    message: String,
}

/// Shorthand for results of this library.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` with a complete sentence for its reader.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let errno = match kind {
            ErrorKind::Io | ErrorKind::Damaged => libc::EIO,
            ErrorKind::Invalid | ErrorKind::NotACache | ErrorKind::Foreign => libc::EINVAL,
            ErrorKind::Unsupported => libc::ENOTSUP,
            ErrorKind::Stale => libc::ESTALE,
            ErrorKind::Exists => libc::EEXIST,
            ErrorKind::Busy => libc::EBUSY,
            ErrorKind::Full => libc::ENOSPC,
        };
        Error { kind, errno, message: message.into() }
    }

    /// A failed system call: `tried` is the attempt in the infinitive ("open", "write 16 bytes at
    /// offset 4096 of").
    pub fn io(tried: &str, path: &Path, err: &io::Error) -> Self {
        Error {
            kind: if err.raw_os_error() == Some(libc::EEXIST) {
                ErrorKind::Exists
            } else {
                ErrorKind::Io
            },
            errno: err.raw_os_error().unwrap_or(libc::EIO),
            message: format!("could not {tried} '{}': {err}", path.display()),
        }
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The positive errno value that fits best.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// The same error with the name of the file it is about in front.
    pub fn on(self, path: &Path) -> Self {
        Error { message: format!("'{}': {}", path.display(), self.message), ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
