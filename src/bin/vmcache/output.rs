//! What subcommands share in speaking to the user: the two output forms, errors that say what to
//! do, and names that are safe to show or to paste.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::io::Write;
use vmcache::engine::{COUNTERS, ProcessStats};
use vmcache::error::{Error, ErrorKind};

/// `--output`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines for people.
    #[default]
    Human,
    /// One JSON object, its numbers in bytes.
    Json,
}

/// An error with an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// A complete sentence.
    pub message: String,
}

/// Writes a value as JSON and ends the line.
pub fn write_json(out: &mut dyn Write, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(writeln!(out, "{text}")?)
}

/// An error with all its causes, and what to do about those the library cannot know.
pub fn explain(err: &anyhow::Error) -> String {
    let mut text = format!("{err:#}");
    if let Some(advice) = err.downcast_ref::<Error>().and_then(advice) {
        text.push_str("; ");
        text.push_str(advice);
    }
    text
}

/// What to do about an image that cannot be opened.
pub fn advice(err: &Error) -> Option<&'static str> {
    match err.kind() {
        ErrorKind::NotACache => Some("'vmcache create' makes a cache image"),
        ErrorKind::Damaged => Some(
            "it holds nothing that the base does not: delete it and make a new one with \
             'vmcache create'",
        ),
        ErrorKind::Unsupported => {
            Some("use the vmcache that made it, or make a new one with 'vmcache create'")
        }
        _ => None,
    }
}

/// Text from a file, with nothing in it that a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A name as a shell takes it for one word.
pub fn shell_quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    match text {
        "" => "''".into(),
        _ if text.chars().all(plain) => text.into(),
        _ => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// A path for JSON and arguments; what is not text in it is replaced.
pub fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Counters by name, in their own order.
#[derive(Clone, Copy, Debug)]
pub struct Counters<'a>(pub &'a [u64; COUNTERS.len()]);

impl Counters<'_> {
    /// One of them by its name in [`COUNTERS`].
    pub fn get(&self, name: &str) -> u64 {
        self.iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| value)
    }

    fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        COUNTERS.into_iter().zip(self.0.iter().copied())
    }
}

impl Serialize for Counters<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(COUNTERS.len()))?;
        for (name, value) in self.iter() {
            map.serialize_entry(name, &value)?;
        }
        map.end()
    }
}

/// A process in `process-list`.
#[derive(Debug, Serialize)]
pub struct Process<'a> {
    pid: u32,
    #[serde(flatten)]
    counters: Counters<'a>,
}

impl<'a> Process<'a> {
    /// All processes of an image.
    pub fn list(processes: &'a [ProcessStats]) -> Vec<Self> {
        processes
            .iter()
            .map(|process| Process { pid: process.pid, counters: Counters(&process.counters) })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_need_it_are_quoted_for_the_shell() {
        assert_eq!(shell_quoted("/a/b-c.qcow2"), "/a/b-c.qcow2");
        assert_eq!(shell_quoted("two words"), "'two words'");
        assert_eq!(shell_quoted("it's"), r"'it'\''s'");
        assert_eq!(shell_quoted(""), "''");
    }

    #[test]
    fn a_terminal_sees_no_control_characters() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
