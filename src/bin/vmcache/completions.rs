//! `vmcache completions`: what a shell needs to complete command lines, from the definition that
//! reads them.

use std::io::Write;

use anyhow::Result;
use clap_complete::Shell;

const LONG_ABOUT: &str = "\
Print the completions of vmcache's command line for a shell.

An installation has them in place for bash, zsh and fish.";

const EXAMPLES: &str = "\
Examples:
  vmcache completions bash > ~/.local/share/bash-completion/completions/vmcache
  vmcache completions fish > ~/.config/fish/completions/vmcache.fish
  vmcache completions zsh > _vmcache     # into a directory of $fpath";

/// Print the completions of the command line for a shell
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Prints them; `command` is the whole command line.
pub fn run(args: &Args, mut command: clap::Command, out: &mut dyn Write) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "vmcache", &mut script);
    out.write_all(&script)?;
    Ok(0)
}
