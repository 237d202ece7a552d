//! `vmcache exec`: runs a QEMU program with the driver library preloaded. So does a link to vmcache
//! that is called qemu-NAME-vmcache, with the program qemu-NAME: a wrapper for whoever starts QEMU
//! by one name, as libvirt does.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use clap::ValueHint;

use crate::output::Failure;

/// Exit codes of env(1), which a caller knows how to read.
pub const FAILED: u8 = 125;
const NOT_RUN: u8 = 126;
pub const NOT_FOUND: u8 = 127;

const LIBRARY_VARIABLE: &str = "VMCACHE_LIBRARY";
/// What is installed has its soname; a build has only the other.
const LIBRARIES: [&str; 2] = [env!("VMCACHE_SONAME"), "libvmcache.so"];
const PRELOAD: &str = "LD_PRELOAD";

const LONG_ABOUT: &str = "\
Run a program with the vmcache driver loaded.

Any QEMU program of an unmodified QEMU that is built with modules, as those of
the distributions are: qemu-system-*, qemu-img, qemu-io, qemu-nbd. The library
is preloaded (LD_PRELOAD) and does nothing in a program that is not QEMU, so a
shell or a script that starts QEMU works as well. It is looked for beside
vmcache and in ../lib, or where VMCACHE_LIBRARY says.";

const EXAMPLES: &str = "\
Examples:
  vmcache exec qemu-system-x86_64 -m 1G \\
      -drive \"$(vmcache drive --overlay vm1.qcow2 debian12.cache)\"
  vmcache exec qemu-img convert --image-opts \\
      driver=vmcache,file.filename=debian12.cache -O raw copy.raw
  vmcache exec qemu-nbd --read-only --image-opts \\
      driver=vmcache,file.filename=debian12.cache

A program started by another, as libvirt starts QEMU, gets a wrapper: a link to
vmcache that is called like the program, with -vmcache behind it. An installation
has qemu-system-x86_64-vmcache, qemu-img-vmcache, qemu-io-vmcache and
qemu-nbd-vmcache; others are made with
  ln -s vmcache /usr/local/bin/qemu-system-i386-vmcache

Exit status: the program's own; 125 where the library is missing, 126 where the
program could not be run, 127 where it was not found.";

/// Run a QEMU program with the vmcache driver loaded
#[derive(Debug, clap::Args)]
#[command(
    long_about = LONG_ABOUT,
    after_long_help = EXAMPLES,
    override_usage = "vmcache exec PROGRAM [ARG]..."
)]
pub struct Args {
    /// The program and its arguments, all of them as they are
    // One list, since what comes after the program is never an option of ours.
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_name = "PROGRAM",
        value_hint = ValueHint::CommandWithArguments
    )]
    command: Vec<OsString>,
}

impl Args {
    /// Of a wrapper: a command line in which this program is called qemu-NAME-vmcache.
    pub fn of_wrapper(mut command_line: impl Iterator<Item = OsString>) -> Option<Self> {
        let called = command_line.next()?;
        let name = Path::new(&called).file_name()?.as_bytes();
        let program = name.strip_suffix(b"-vmcache").filter(|name| name.starts_with(b"qemu-"))?;
        let program = OsStr::from_bytes(program).to_owned();
        Some(Args { command: std::iter::once(program).chain(command_line).collect() })
    }
}

/// Becomes the program; returns only where that fails.
pub fn run(args: &Args) -> Result<u8> {
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(failure(FAILED, "there is no program to run".into()));
    };
    Err(replace_by(command(program, arguments)?))
}

/// A program with the library loaded.
pub fn command(program: &OsStr, arguments: &[OsString]) -> Result<Command> {
    let mut command = Command::new(program);
    command.args(arguments).env(PRELOAD, preload(&find_library()?, env::var_os(PRELOAD)));
    Ok(command)
}

/// Becomes a program; returns why that did not work.
pub fn replace_by(mut command: Command) -> anyhow::Error {
    let err = command.exec();
    let code = if err.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUN };
    let program = command.get_program().display();
    failure(code, format!("could not run '{program}': {err}"))
}

fn failure(code: u8, message: String) -> anyhow::Error {
    Failure { code, message }.into()
}

/// The library's absolute path.
fn find_library() -> Result<PathBuf> {
    let unusable = |path: &Path, why: &dyn std::fmt::Display| {
        failure(FAILED, format!("could not use the driver library '{}': {why}", path.display()))
    };
    let found = match env::var_os(LIBRARY_VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => beside_this_program()?,
    };
    let is_file = fs::metadata(&found).map_err(|err| unusable(&found, &err))?.is_file();
    let path = place_of(&found).map_err(|err| unusable(&found, &err))?;
    if !is_file {
        return Err(unusable(&path, &"not a file"));
    }
    if path.as_os_str().as_bytes().iter().any(|byte| b" \t\n:".contains(byte)) {
        return Err(unusable(
            &path,
            &"the dynamic linker takes no path with spaces or colons; install it elsewhere",
        ));
    }
    Ok(path)
}

/// The absolute path of a file, by the name it has: the file behind that name may be replaced by an
/// update while a program lives whose children are to be given the library, too.
fn place_of(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(directory), Some(name)) => Ok(directory.canonicalize()?.join(name)),
        _ => Ok(path),
    }
}

/// Where an installation or a build has it.
fn beside_this_program() -> Result<PathBuf> {
    let program = env::current_exe()
        .map_err(|err| failure(FAILED, format!("could not find out where vmcache is: {err}")))?;
    let directory = program.parent().unwrap_or(Path::new("/"));
    let multiarch = format!("../lib/{}-linux-gnu", env::consts::ARCH);
    let places = ["../lib", "../lib64", multiarch.as_str(), "../lib/vmcache", "."];
    places
        .iter()
        .flat_map(|place| LIBRARIES.map(|library| directory.join(place).join(library)))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            failure(
                FAILED,
                format!(
                    "could not find {} in '{}' or in lib beside it; install it there, or set \
                     {LIBRARY_VARIABLE} to its path",
                    LIBRARIES.join(" or "),
                    directory.display()
                ),
            )
        })
}

/// The library in front of what is preloaded already, once.
fn preload(library: &Path, before: Option<OsString>) -> OsString {
    let mut list = library.as_os_str().to_owned();
    let before = before.unwrap_or_default();
    let others = before.as_bytes().split(|byte| b" :".contains(byte));
    for other in
        others.filter(|other| !other.is_empty() && *other != library.as_os_str().as_bytes())
    {
        list.push(":");
        list.push(OsStr::from_bytes(other));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapper_runs_the_program_it_is_called_after_with_all_arguments() {
        let wrapper = |words: &[&str]| {
            Args::of_wrapper(words.iter().map(OsString::from)).map(|args| args.command)
        };
        assert_eq!(
            wrapper(&["/usr/bin/qemu-img-vmcache", "--help", "a b"]),
            Some(["qemu-img", "--help", "a b"].map(OsString::from).to_vec())
        );
        assert_eq!(wrapper(&["/usr/bin/vmcache", "info"]), None);
        assert_eq!(wrapper(&["my-vmcache", "info"]), None);
        assert_eq!(wrapper(&[]), None);
    }

    #[test]
    fn the_library_is_preloaded_once_and_before_all_others() {
        let library = Path::new("/lib/libvmcache.so");
        let list = |before: &str| preload(library, Some(before.into()));
        assert_eq!(preload(library, None), "/lib/libvmcache.so");
        assert_eq!(list(""), "/lib/libvmcache.so");
        assert_eq!(list("/a.so /b.so"), "/lib/libvmcache.so:/a.so:/b.so");
        assert_eq!(list("/a.so:/lib/libvmcache.so"), "/lib/libvmcache.so:/a.so");
    }
}
