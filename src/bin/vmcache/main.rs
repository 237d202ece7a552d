//! The command line `vmcache`: makes cache images, looks at them, and starts QEMU programs that can
//! use them. In `qemu-img`'s manner: its option letters, its sizes, its exit codes.
//!
//! One file per subcommand, each with its arguments and a `run` that writes to standard output and
//! returns an exit code. Errors go to standard error through [`main`] alone.

mod base;
mod boot;
mod check;
mod completions;
mod create;
mod domain;
mod drive;
mod exec;
mod info;
mod options;
mod output;
mod places;
mod progress;
mod publish;
mod published;
mod stats;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind as UsageErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use vmcache::size;

use output::Failure;

/// Environment variable with the log filter.
const LOG_VARIABLE: &str = "VMCACHE_LOG";

const ABOUT: &str = "Keep what virtual machines read of a shared base image in a small local cache";

const LONG_ABOUT: &str = "\
Keep what virtual machines read of a shared base image in a small local cache.

A cache image stands between a base image, usually on another machine, and the
overlays of all the virtual machines on this one. The first read of a block
fetches it from the base and stores it; every later read, by any of them, is
served from here. The cache is an ordinary qcow2 file that holds base data and
nothing else: deleting it is always safe.";

const EXAMPLES: &str = "\
Shortest path, with an unmodified QEMU:
  vmcache create -b nfs://storage/images/debian12.raw -F raw debian12.cache
  qemu-img create -f qcow2 -b nfs://storage/images/debian12.raw -F raw vm1.qcow2
  vmcache exec qemu-system-x86_64 -m 1G \\
      -drive \"$(vmcache drive --overlay vm1.qcow2 debian12.cache)\"

The same in one command, which makes cache and overlay where they are not there:
  vmcache boot -b nfs://storage/images/debian12.raw -F raw vm1 -- -m 1G

The overlay's header names the base, never the cache. While machines run:
  vmcache stats debian12.cache
  vmcache info debian12.cache

Exit status:
  0  done; for check: the image is clean
  1  failed; for check: could not check
  2  command line not understood; for check: the image is damaged, or stale
  3  for check: leaked clusters, no other damage
  exec, boot: the program's own; 125 no driver library, 126 could not run it,
  127 not found

Environment:
  VMCACHE_LOG      what to log, in env_logger's syntax (default: warn)
  VMCACHE_LIBRARY  the driver library that 'vmcache exec' and 'boot' load";

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "vmcache",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = "'vmcache --help' shows examples, 'vmcache COMMAND --help' the details.",
    after_long_help = EXAMPLES,
    max_term_width = 100,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Args),
    Info(info::Args),
    Check(check::Args),
    Stats(stats::Args),
    Drive(drive::Args),
    Exec(exec::Args),
    Completions(completions::Args),
    Boot(boot::Args),
    Publish(publish::Args),
}

impl Command {
    fn run(&self, out: &mut dyn Write) -> anyhow::Result<u8> {
        match self {
            Command::Create(args) => create::run(args, out),
            Command::Info(args) => info::run(args, out),
            Command::Check(args) => check::run(args, out),
            Command::Stats(args) => stats::run(args, out),
            Command::Drive(args) => drive::run(args, out),
            Command::Exec(args) => exec::run(args),
            Command::Completions(args) => completions::run(args, Cli::command(), out),
            Command::Boot(args) => boot::run(args, out),
            Command::Publish(args) => publish::run(args, out),
        }
    }
}

fn main() -> ExitCode {
    start_log();
    let cli = match exec::Args::of_wrapper(std::env::args_os()) {
        Some(args) => Cli { command: Command::Exec(args) },
        None => match Cli::try_parse() {
            Ok(cli) => cli,
            Err(err) => return usage(&err),
        },
    };
    let mut out = io::stdout().lock();
    let done = cli.command.run(&mut out).and_then(|code| {
        out.flush()?;
        Ok(code)
    });
    match done {
        Ok(code) => code.into(),
        // Whoever read our output has seen enough of it.
        Err(err) if is_broken_pipe(&err) => ExitCode::SUCCESS,
        Err(err) => {
            complain(&err);
            err.downcast_ref::<Failure>().map_or(1, |failure| failure.code).into()
        }
    }
}

/// Log lines in the form of our error messages, warnings and worse unless the user wants more.
fn start_log() {
    let filter = env_logger::Env::new().filter_or(LOG_VARIABLE, "warn");
    let started = env_logger::Builder::from_env(filter)
        .format(|to, record| {
            let level = match record.level() {
                log::Level::Warn => "warning".to_owned(),
                level => level.as_str().to_lowercase(),
            };
            writeln!(to, "vmcache: {level}: {}", record.args())
        })
        .try_init();
    // Nobody else can have started one; and a missing log is no reason to fail.
    debug_assert!(started.is_ok());
}

/// Shows help, the version or what is wrong with the command line.
fn usage(err: &clap::Error) -> ExitCode {
    // Where nobody can read the message there is nobody to tell.
    let _ = err.print();
    match err.kind() {
        UsageErrorKind::DisplayHelp | UsageErrorKind::DisplayVersion => ExitCode::SUCCESS,
        // Codes of their own, which must not pass for a finding or for the program's.
        _ => match std::env::args_os().nth(1) {
            Some(command) if command == "check" => 1.into(),
            Some(command) if command == "exec" => exec::FAILED.into(),
            _ => 2.into(),
        },
    }
}

fn complain(err: &anyhow::Error) {
    // Output fails without a context, and without another cause.
    let what = match err.downcast_ref::<io::Error>() {
        Some(_) if err.chain().nth(1).is_none() => "could not write to standard output: ",
        _ => "",
    };
    let _ = writeln!(io::stderr(), "vmcache: {what}{}", output::explain(err));
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
}
