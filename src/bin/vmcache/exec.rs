//! `vmcache exec`: runs a QEMU program with the driver library preloaded.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::output::Failure;

/// Exit codes of env(1), which a caller knows how to read.
pub const FAILED: u8 = 125;
const NOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

const LIBRARY_VARIABLE: &str = "VMCACHE_LIBRARY";
const LIBRARY: &str = "libvmcache.so";
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

A program started by another, as libvirt starts QEMU, gets a wrapper for its name:
  #!/bin/sh
  exec vmcache exec /usr/bin/qemu-system-x86_64 \"$@\"

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
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

/// Becomes the program; returns only where that fails.
pub fn run(args: &Args) -> Result<u8> {
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(failure(FAILED, "there is no program to run".into()));
    };
    let library = find_library()?;
    let err = Command::new(program)
        .args(arguments)
        .env(PRELOAD, preload(&library, env::var_os(PRELOAD)))
        .exec();
    let code = if err.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUN };
    Err(failure(code, format!("could not run '{}': {err}", program.display())))
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
    let path = found.canonicalize().map_err(|err| unusable(&found, &err))?;
    if !path.is_file() {
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

/// Where an installation or a build has it.
fn beside_this_program() -> Result<PathBuf> {
    let program = env::current_exe()
        .map_err(|err| failure(FAILED, format!("could not find out where vmcache is: {err}")))?;
    let directory = program.parent().unwrap_or(Path::new("/"));
    let multiarch = format!("../lib/{}-linux-gnu", env::consts::ARCH);
    let places = ["../lib", "../lib64", multiarch.as_str(), "../lib/vmcache", "."];
    places
        .iter()
        .map(|place| directory.join(place).join(LIBRARY))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            failure(
                FAILED,
                format!(
                    "could not find {LIBRARY} in '{}' or in lib beside it; install it there, or \
                     set {LIBRARY_VARIABLE} to its path",
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
        list.push(std::ffi::OsStr::from_bytes(other));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

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
