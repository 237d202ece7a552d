//! An observer may refuse, shorten and interrupt what is done to a file.

use std::collections::VecDeque;
use std::fs;

use parking_lot::Mutex;
use tempfile::NamedTempFile;

use super::*;

/// Answers operations with what it was given, one after the other, and then lets all pass.
#[derive(Debug)]
struct Script {
    answers: Mutex<VecDeque<io::Result<usize>>>,
    done: Mutex<Vec<String>>,
}

impl Observer for Script {
    fn before(&self, _: Operation<'_>) -> io::Result<usize> {
        self.answers.lock().pop_front().unwrap_or(Ok(usize::MAX))
    }

    fn after(&self, operation: Operation<'_>) {
        self.done.lock().push(format!("{operation:?}"));
    }
}

fn errno(errno: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(errno))
}

fn disk(
    answers: impl IntoIterator<Item = io::Result<usize>>,
) -> (Disk, NamedTempFile, Arc<Script>) {
    let file = NamedTempFile::new().unwrap();
    let answers = Mutex::new(answers.into_iter().collect());
    let script = Arc::new(Script { answers, done: Mutex::default() });
    (Disk::new(file.reopen().unwrap(), Some(script.clone())), file, script)
}

#[test]
fn shortened_write_goes_on_where_it_ended() {
    let (disk, file, script) = disk([Ok(2), Ok(1)]);
    disk.write_all_at(b"abcdef", 3).unwrap();
    assert_eq!(fs::read(file.path()).unwrap(), b"\0\0\0abcdef");
    assert_eq!(script.done.lock().len(), 3);
}

#[test]
fn write_of_nothing_is_an_error() {
    let (disk, _file, _script) = disk([Ok(0)]);
    let refused = disk.write_all_at(b"abc", 0).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::WriteZero);
}

#[test]
fn interrupted_operation_is_done_again() {
    let (disk, _file, script) = disk([errno(libc::EINTR), errno(libc::EINTR)]);
    disk.sync_data().unwrap();
    assert_eq!(*script.done.lock(), ["Sync"]);
}

#[test]
fn refused_operation_is_not_done() {
    let (disk, file, script) = disk([errno(libc::ENOSPC)]);
    let refused = disk.write_all_at(b"abc", 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(fs::read(file.path()).unwrap(), b"");
    assert!(script.done.lock().is_empty());
}

#[test]
fn every_kind_of_change_is_heard_of() {
    let (disk, _file, script) = disk([]);
    disk.set_len(8192).unwrap();
    disk.allocate(0, 4096).unwrap();
    disk.write_all_at(b"a", 1).unwrap();
    disk.discard(0, 4096).unwrap();
    disk.sync_data().unwrap();
    let expected = [
        "SetLength(8192)",
        "Allocate { at: 0, len: 4096 }",
        "Write { at: 1, bytes: [97] }",
        "Discard { at: 0, len: 4096 }",
        "Sync",
    ];
    assert_eq!(*script.done.lock(), expected);
}
