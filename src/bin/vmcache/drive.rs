//! `vmcache drive`: the argument that gives a virtual machine a disk through a cache image. Domains
//! for libvirt are in domain.rs.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use vmcache::image::{Access, BaseFile, BaseState, Image};

use crate::domain;
use crate::output::{path_text, shell_quoted};

const LONG_ABOUT: &str = "\
Print the argument that gives a virtual machine a disk through a cache image.

With --overlay the machine writes to that qcow2 file. Its header names the base,
never the cache, so that it works without vmcache too. Without an overlay
'drive' and 'libvirt' say snapshot=on: what the machine writes is gone when it
ends. 'blockdev' has no such thing; the disk is read-only.

What takes which form:
  drive        -drive of an unmodified QEMU that 'vmcache exec' runs
  blockdev     -blockdev and blockdev-add of a QEMU with vmcache's patches; an
               unmodified QEMU does not take the driver's name there
  libvirt      'virsh define': a domain whose <emulator> is the wrapper
               qemu-system-x86_64-vmcache, for an unmodified QEMU
  libvirt-nbd  'virsh define': a domain that needs no wrapper and does not come
               near the cache; 'vmcache exec qemu-nbd' serves it to all domains

A domain starts as it is printed, with one processor, a console and no network.
With --fragment only the element with the disk is printed, for another domain.";

const EXAMPLES: &str = "\
Examples:
  vmcache exec qemu-system-x86_64 -m 1G \\
      -drive \"$(vmcache drive --overlay vm1.qcow2 debian12.cache)\"
  qemu-system-x86_64 -blockdev \"$(vmcache drive --as=blockdev --id disk0 \\
      --overlay vm1.qcow2 debian12.cache)\" -device virtio-blk-pci,drive=disk0

  vmcache drive --as=libvirt --overlay vm1.qcow2 debian12.cache > vm1.xml
  virsh define vm1.xml && virsh start vm1 --console

  vmcache exec qemu-nbd -r -t -e 64 -k /run/vmcache/debian12.sock \
      --image-opts driver=vmcache,file.filename=debian12.cache &
  vmcache drive --as=libvirt-nbd --socket /run/vmcache/debian12.sock \
      --overlay vm2.qcow2 debian12.cache > vm2.xml

Names are printed as absolute paths, with what QEMU's own syntax needs (a comma
doubled) and no quoting for a shell: put the substitution between double quotes,
as above.";

/// The identifier in forms that cannot do without.
const DEFAULT_ID: &str = "vmcache0";
/// Longest backing file name that QEMU takes.
const BACKING_FILE_MAX: usize = 1023;
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Print the argument that gives a virtual machine a disk through a cache image
#[derive(Debug, clap::Args)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// The machine's own qcow2 file, on top of the base
    #[arg(long, value_name = "OVERLAY")]
    overlay: Option<PathBuf>,
    /// What the argument is for
    #[arg(long = "as", value_enum, default_value_t, value_name = "FORM")]
    form: Form,
    /// Identifier for a -device of your own (drive: if=none,id=ID; blockdev: node-name, there and
    /// for libvirt 'vmcache0' by default; libvirt-nbd has none)
    #[arg(long, value_name = "ID", value_parser = parse_id)]
    id: Option<String>,
    #[command(flatten)]
    domain: domain::Args,
    /// The cache image
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
}

/// `--as`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For -drive of an unmodified QEMU
    #[default]
    Drive,
    /// For -blockdev of a patched QEMU
    Blockdev,
    /// A libvirt domain with the wrapper as its emulator
    Libvirt,
    /// A libvirt domain on an NBD export of the cache
    LibvirtNbd,
}

/// The files of a disk, by absolute paths.
pub struct Disk {
    /// The cache image.
    pub cache: String,
    /// The machine's own file.
    pub overlay: Option<String>,
}

/// Prints the argument.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<u8> {
    let is_domain = matches!(args.form, Form::Libvirt | Form::LibvirtNbd);
    if let Some(option) = args.domain.given().filter(|_| !is_domain) {
        return Err(domain::not_for(option, "libvirt and --as=libvirt-nbd"));
    }
    if args.id.is_some() && args.form == Form::LibvirtNbd {
        return Err(domain::not_for("--id", "drive, --as=blockdev and --as=libvirt"));
    }
    let image = Image::open(&args.cache, Access::ReadOnly)?;
    image.require_trusted()?;
    if let BaseState::Changed(how) = BaseState::of(image.header(), image.path()) {
        log::warn!("'{}' is stale, reads will go to the base: {how}", args.cache.display());
    }
    if let Some(overlay) = &args.overlay {
        examine_overlay(overlay, &image)?;
    }
    let disk = Disk {
        cache: absolute(&args.cache)?,
        overlay: args.overlay.as_deref().map(absolute).transpose()?,
    };
    let id = args.id.as_deref();
    match args.form {
        Form::Drive => writeln!(out, "{}", disk.drive(id))?,
        Form::Blockdev => writeln!(out, "{}", disk.blockdev(id.unwrap_or(DEFAULT_ID)))?,
        Form::Libvirt => {
            write!(out, "{}", args.domain.with_wrapper(&disk, id.unwrap_or(DEFAULT_ID))?)?;
        }
        Form::LibvirtNbd => write!(out, "{}", args.domain.with_export(&disk)?)?,
    }
    Ok(0)
}

impl Disk {
    /// The value of a `-drive`.
    pub fn drive(&self, id: Option<&str>) -> String {
        let interface = id.map_or("if=virtio".into(), |id| format!("if=none,id={id}"));
        let cache = doubled_commas(&self.cache);
        match &self.overlay {
            Some(overlay) => format!(
                "{interface},driver=qcow2,file.filename={},backing.driver=vmcache,\
                 backing.file.filename={cache}",
                doubled_commas(overlay)
            ),
            None => format!("{interface},driver=vmcache,file.filename={cache},snapshot=on"),
        }
    }

    fn blockdev(&self, id: &str) -> Value {
        let file = |name: &str| json!({ "driver": "file", "filename": name });
        match &self.overlay {
            Some(overlay) => json!({
                "driver": "qcow2",
                "node-name": id,
                "file": file(overlay),
                "backing": { "driver": "vmcache", "read-only": true, "file": file(&self.cache) },
            }),
            None => json!({
                "driver": "vmcache",
                "node-name": id,
                "read-only": true,
                "file": file(&self.cache),
            }),
        }
    }
}

/// Says what is wrong with an overlay as far as a look at its header shows.
pub fn examine_overlay(overlay: &Path, cache: &Image) -> Result<()> {
    let shown = overlay.display();
    let Ok(file) = overlay.canonicalize() else {
        let header = cache.header();
        let base = match BaseFile::resolve(&header.backing_file, cache.path()) {
            Some(base) => path_text(base.path()),
            None => header.backing_file.clone(),
        };
        log::warn!(
            "there is no overlay '{shown}' yet; make it with: qemu-img create -f qcow2 -b {} -F {} \
             {}",
            shell_quoted(&base),
            shell_quoted(&header.backing_format),
            shell_quoted(&path_text(overlay))
        );
        return Ok(());
    };
    if file == cache.path() {
        bail!("'{shown}' is the cache image itself; --overlay is for the machine's own file");
    }
    if !file.is_file() {
        bail!("overlay '{shown}' is not a file; it is a qcow2 image that 'qemu-img create' makes");
    }
    let Some(backing) = backing_name(&file) else {
        return Ok(());
    };
    let named = BaseFile::resolve(&backing, &file).and_then(|base| base.path().canonicalize().ok());
    if named.as_deref() == Some(cache.path()) {
        let header = cache.header();
        bail!(
            "the overlay '{shown}' names the cache image as its backing file and would be lost with \
             it; let it name the base: qemu-img rebase -u -b {} -F {} {}",
            shell_quoted(&header.backing_file),
            shell_quoted(&header.backing_format),
            shell_quoted(&path_text(overlay))
        );
    }
    Ok(())
}

/// The backing file name in the header of a qcow2 file, if it is one and can be read.
pub fn backing_name(path: &Path) -> Option<String> {
    let file = File::open(path).ok()?;
    let mut start = [0; 20];
    file.read_exact_at(&mut start, 0).ok()?;
    let (magic, rest) = start.split_first_chunk::<4>()?;
    let (_version, rest) = rest.split_first_chunk::<4>()?;
    let (offset, rest) = rest.split_first_chunk::<8>()?;
    let (len, _) = rest.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
    if *magic != QCOW2_MAGIC || !(1..=BACKING_FILE_MAX).contains(&len) {
        return None;
    }
    let mut name = vec![0; len];
    file.read_exact_at(&mut name, u64::from_be_bytes(*offset)).ok()?;
    String::from_utf8(name).ok()
}

/// A name that means the same wherever QEMU is started.
pub fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path)
        .with_context(|| format!("could not find out where '{}' is", path.display()))?;
    let shown = path.display().to_string();
    path.into_os_string().into_string().ok().with_context(|| {
        format!("the name '{shown}' is not UTF-8, which QEMU's options have to be")
    })
}

/// Reads the identifier of a drive or node.
pub fn parse_id(text: &str) -> Result<String, String> {
    // QEMU's id_wellformed() in util/id.c, and its limit on node names.
    let rest = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic());
    match starts_well && text.len() < 32 && text.chars().all(rest) {
        true => Ok(text.to_owned()),
        false => Err("QEMU takes at most 31 letters, digits, '-', '.' and '_', \
                      starting with a letter"
            .into()),
    }
}

/// As QEMU's option syntax wants it.
pub fn doubled_commas(name: &str) -> String {
    name.replace(',', ",,")
}
