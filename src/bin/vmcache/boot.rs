//! `vmcache boot`: from a base to a running virtual machine. Makes the node's cache of the base and the
//! machine's overlay where they are not there, and becomes QEMU.
//!
//! Any number may start at once: whichever makes a file first wins, the others use the winner's, and
//! nobody sees half of one.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use vmcache::error::{Error, ErrorKind};
use vmcache::image::{self, Access, BaseState, Image};

use crate::base::{self, QEMU_IMG};
use crate::create::NewCache;
use crate::drive::{self, Disk};
use crate::output::{Failure, printable, shell_quoted};
use crate::published::Published;
use crate::{exec, places, size};

const LONG_ABOUT: &str = "\
Start a virtual machine on a base through this machine's cache of it.

Makes the cache image if there is none for the base, and the virtual machine's
overlay if there is none for NAME, then runs QEMU with the driver loaded, the
disk and the arguments after '--'. Started again it finds both: the cache warm,
and the overlay with what the virtual machine has written. Any number can start
at once.

The overlay's header names the base, so it works without the cache too. With
--published, what this machine's cache does not have is read from a cache that
another machine has published, and from the base only what that has not either.";

const EXAMPLES: &str = "\
Examples:
  vmcache boot -b nfs://storage/images/debian12.raw -F raw -o quota=2G vm1 -- \\
      -accel kvm -m 1G -nographic
  vmcache boot -b nfs://storage/images/debian12.raw -F raw \\
      --published nfs://storage/ram/debian12.qcow2 vm2 -- -accel kvm -m 1G
  vmcache boot -b debian12.raw -F raw --id disk0 --dry-run vm3 -- \\
      -device virtio-blk-pci,drive=disk0,bootindex=1

Where things are, unless told otherwise:
  root    /var/cache/vmcache/BASE-HASH.cache  /var/lib/vmcache/NAME.qcow2
  others  ~/.cache/vmcache/...                ~/.local/state/vmcache/...
          (or $XDG_CACHE_HOME and $XDG_STATE_HOME)

Exit status: QEMU's own; 1 where something stands in the way, 125 to 127 as for
'vmcache exec'.";

/// What a name may have after its first character.
const NAME_MAX: usize = 64;

/// Start a virtual machine on a base through this machine's cache of it
#[derive(Debug, clap::Args)]
#[command(
    long_about = LONG_ABOUT,
    after_long_help = EXAMPLES,
    override_usage = "vmcache boot [OPTIONS] -b BASE -F FMT NAME [-- QEMU-ARG...]"
)]
pub struct Args {
    /// The base image: a path or URL as QEMU takes it. A relative path starts at the current
    /// directory
    #[arg(short = 'b', value_name = "BASE")]
    base: String,
    /// QEMU's name of the base's format: raw, qcow2, ...
    #[arg(short = 'F', value_name = "FMT")]
    format: String,
    #[command(flatten)]
    new: NewCache,
    /// The cache image, or the directory for it, on a local filesystem
    #[arg(long, value_name = "PATH")]
    cache: Option<PathBuf>,
    /// The machine's own qcow2 file
    #[arg(long, value_name = "OVERLAY")]
    overlay: Option<PathBuf>,
    /// What another machine has made of its cache of the base with 'vmcache publish': a path or URL
    #[arg(long, value_name = "IMAGE")]
    published: Option<String>,
    /// The QEMU program
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: OsString,
    /// Identifier of the disk's drive, for a -device of your own (default: a virtio disk)
    #[arg(long, value_name = "ID", value_parser = drive::parse_id)]
    id: Option<String>,
    /// Print the command and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Say nothing of what was made or found
    #[arg(short, long)]
    quiet: bool,
    /// The virtual machine's name, which the overlay and QEMU get
    #[arg(value_name = "NAME", value_parser = parse_name)]
    name: String,
    /// Arguments for QEMU
    #[arg(last = true, value_name = "QEMU-ARG")]
    arguments: Vec<OsString>,
}

/// A base by its full name.
struct Source<'a> {
    name: String,
    format: &'a str,
}

/// Becomes QEMU; returns only where that fails, and after a dry run.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    let source = Source { name: base::absolute_name(&args.base)?, format: &args.format };
    // What is wrong with them shows also where they are not needed.
    args.new.options()?;
    let cache = place(args.cache.as_deref(), places::caches, || {
        places::cache_name(&source.name, source.format)
    })?;
    let overlay =
        place(args.overlay.as_deref(), places::overlays, || format!("{}.qcow2", args.name))?;
    let published = args.published.as_deref().map(Published::new).transpose()?;
    if args.dry_run {
        let command = command(args, &cache, &overlay, published.as_ref())?;
        writeln!(out, "{}", in_words(&command))?;
        return Ok(0);
    }
    let image = ensure_cache(args, &source, &cache)?;
    ensure_overlay(args, &source, &overlay, &image)?;
    let virtual_size = image.geometry().virtual_size();
    drop(image);
    let published = published.filter(|published| is_of_use(args, published, &source, virtual_size));
    let err = exec::replace_by(command(args, &cache, &overlay, published.as_ref())?);
    let is_missing = |failure: &Failure| failure.code == exec::NOT_FOUND;
    match err.downcast_ref().is_some_and(is_missing) {
        true => Err(err.context("QEMU is not installed, or its name is another one (--qemu)")),
        false => Err(err),
    }
}

/// The absolute path of a file that was given by itself, by a directory or not at all.
fn place(
    given: Option<&Path>,
    directory: impl FnOnce() -> Result<PathBuf>,
    name: impl FnOnce() -> String,
) -> Result<PathBuf> {
    let path = match given {
        None => {
            directory().inspect(|directory| log::debug!("in {}", directory.display()))?.join(name())
        }
        Some(path) if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") => {
            path.join(name())
        }
        Some(path) => path.to_owned(),
    };
    std::path::absolute(&path).with_context(|| format!("could not find '{}'", path.display()))
}

/// Opens the cache image, after making it where there is none.
fn ensure_cache(args: &Args, source: &Source<'_>, path: &Path) -> Result<Image> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    places::make(directory)?;
    let opened = File::open(directory);
    if image::is_remote(
        &opened.with_context(|| format!("could not open '{}'", directory.display()))?,
    ) {
        return Err(no_remote(directory));
    }
    let made = match path.symlink_metadata() {
        Ok(_) => false,
        Err(_) => match args.new.make(path, &source.name, source.format, false) {
            Ok(_) => true,
            // Somebody else was faster.
            Err(err) if is_kind(&err, ErrorKind::Exists) => false,
            Err(err) => return Err(err),
        },
    };
    let image = Image::open(path, Access::Header)?;
    if image.is_remote() {
        return Err(no_remote(image.path()));
    }
    let shown = path.display();
    let header = image.header();
    if !base::is_same(&header.backing_file, image.path(), &source.name)
        || header.backing_format != source.format
    {
        bail!(
            "'{shown}' is a cache of base '{}' ({}), not of '{}' ({}); choose another file with \
             --cache, or leave that out",
            printable(&header.backing_file),
            printable(&header.backing_format),
            printable(&source.name),
            source.format
        );
    }
    if let BaseState::Changed(how) = BaseState::of(header, image.path()) {
        log::warn!(
            "cache '{shown}' is stale, reads will go to the base: {how}; make a new one with \
             'vmcache create -f' or delete it"
        );
    }
    let asked = args.new.options()?.quota;
    if asked.is_some() && asked != header.cache.quota {
        let quota = header
            .cache
            .quota
            .map_or("no quota".into(), |quota| format!("a quota of {}", size::human(quota)));
        log::warn!("cache '{shown}' is there with {quota}, and keeps that");
    }
    args.say(&format!("cache '{shown}' {}", if made { "made" } else { "is there" }));
    Ok(image)
}

/// Why nothing is cached on a filesystem that other machines may have.
fn no_remote(path: &Path) -> anyhow::Error {
    anyhow!(
        "'{}' is on a network filesystem, where a cache cannot be filled: its users share memory and \
         locks, which end at one machine. Choose a directory on a local one with --cache; to share a \
         warm cache with other machines there is 'vmcache publish'",
        path.display()
    )
}

/// Makes the overlay where there is none, and holds one that is there against the base.
fn ensure_overlay(args: &Args, source: &Source<'_>, path: &Path, cache: &Image) -> Result<()> {
    let shown = path.display();
    if path.symlink_metadata().is_err() {
        let directory = path.parent().unwrap_or(Path::new("/"));
        places::make(directory)?;
        if make_overlay(source, path)? {
            args.say(&format!("overlay '{shown}' made"));
            return Ok(());
        }
    }
    if !path.exists() {
        bail!(
            "the overlay '{shown}' is a symbolic link to nothing: delete it, or mount what it is on"
        );
    }
    drive::examine_overlay(path, cache)?;
    let Some(backing) = drive::backing_name(path) else {
        bail!(
            "'{shown}' is no overlay: it is not a qcow2 file, or has no backing file; choose another \
             file with --overlay, or another NAME"
        );
    };
    if !base::is_same(&backing, path, &source.name) {
        bail!(
            "the overlay '{shown}' is on base '{}', not on '{}': what is in it is worth nothing on \
             another base; give that base with -b, or another NAME, or delete the overlay",
            printable(&backing),
            printable(&source.name)
        );
    }
    if image::is_open_for_writing(path)? {
        bail!("the overlay '{shown}' is in use: does the virtual machine '{}' run?", args.name);
    }
    args.say(&format!("overlay '{shown}' is there"));
    Ok(())
}

/// Makes an overlay under another name and gives it its own in one step; whether the name was free.
fn make_overlay(source: &Source<'_>, path: &Path) -> Result<bool> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.new", uuid::Uuid::new_v4().simple()));
    let beside = Path::new(&beside);
    // It will hold what is the virtual machine's alone, so from the start nobody else may open it.
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(beside);
    // As large as the base is now, which the cache need not know.
    let made = made.map_err(anyhow::Error::from).and_then(|_| {
        base::qemu_img(
            Command::new(QEMU_IMG)
                .args(["create", "-q", "-f", "qcow2", "-b", &source.name, "-F", source.format])
                .arg("--")
                .arg(beside),
        )
    });
    let named = made.and_then(|_| match fs::hard_link(beside, path) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(err) => Err(err.into()),
    });
    // Under its own name by now, or of no use; nothing to add to an error that is on its way.
    let _ = fs::remove_file(beside);
    named.with_context(|| format!("could not make the overlay '{}'", path.display()))
}

/// Whether a published image can stand between the cache and the base; says why not.
fn is_of_use(args: &Args, published: &Published, source: &Source<'_>, virtual_size: u64) -> bool {
    let name = published.shown();
    match published.examine(&source.name, source.format, virtual_size) {
        Ok(()) => {
            args.say(&format!("reading '{name}' before the base"));
            true
        }
        Err(err) => {
            log::warn!("'{name}' is not used: {err:#}");
            false
        }
    }
}

/// QEMU with the library, the disk and the user's arguments.
fn command(
    args: &Args,
    cache: &Path,
    overlay: &Path,
    published: Option<&Published>,
) -> Result<Command> {
    let disk = Disk { cache: drive::absolute(cache)?, overlay: Some(drive::absolute(overlay)?) };
    let mut drive = disk.drive(args.id.as_deref());
    let mut ours = vec!["-name".into(), format!("guest={}", args.name)];
    if let Some(published) = published {
        ours.extend(["-drive".into(), published.drive()]);
        drive.push_str(&Published::option());
    }
    ours.extend(["-drive".into(), drive]);
    let arguments: Vec<_> =
        ours.into_iter().map(OsString::from).chain(args.arguments.iter().cloned()).collect();
    exec::command(&args.qemu, &arguments)
}

/// A command as a shell takes it.
fn in_words(command: &Command) -> String {
    let text = |word: &OsStr| shell_quoted(&word.to_string_lossy());
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    let variables = variables.map(|(name, value)| format!("{}={}", name.display(), text(value)));
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(text);
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

impl Args {
    fn say(&self, what: &str) {
        if !self.quiet {
            // Not where the guest's console may be; and where nobody reads it, nobody need.
            let _ = writeln!(io::stderr(), "vmcache: {what}");
        }
    }
}

fn is_kind(err: &anyhow::Error, kind: ErrorKind) -> bool {
    err.downcast_ref::<Error>().is_some_and(|err| err.kind() == kind)
}

fn parse_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    match starts_well && text.len() <= NAME_MAX && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "a name has at most {NAME_MAX} letters, digits, '.', '_' and '-', starting with a letter \
             or digit"
        )),
    }
}
