//! A libvirt domain with a disk through a cache image, for `vmcache drive`: complete, or the element
//! that gives the disk to a domain of the user's own.
//!
//! What libvirt's own elements cannot say goes to QEMU by `qemu:commandline`. The order of elements
//! is that of libvirt's schema, against which scripts/libvirt-boot holds what is printed here.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::drive::{Disk, absolute, doubled_commas};
use crate::output::{Failure, shell_quoted};
use crate::size;

const NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// The wrapper that an installation has, see exec.rs.
const WRAPPER: &str = "qemu-system-x86_64-vmcache";
/// Where it can be, after the directory of this program.
const WRAPPER_DIRECTORIES: [&str; 2] = ["/usr/local/bin", "/usr/bin"];
const DEFAULT_MEMORY: &str = "1G";
/// Less is a mistake.
const LEAST_MEMORY: u64 = 1 << 20;

/// The options of `vmcache drive` that only a libvirt domain has.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Options for libvirt")]
// Its name would be that of drive's own group, which clap refuses in debug builds.
#[group(skip)]
pub struct Args {
    /// UNIX socket of the cache's NBD export (libvirt-nbd)
    #[arg(long, value_name = "SOCKET")]
    socket: Option<PathBuf>,
    /// Name of the domain [default: OVERLAY's, or CACHE's, without its suffix]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: Option<String>,
    /// Memory of the domain [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u64>,
    /// What runs the guest's code: kvm, or tcg where there is no KVM [default: kvm]
    #[arg(long, value_enum, value_name = "ACCEL")]
    accel: Option<Accel>,
    /// Program of the domain [default: libvirt: qemu-system-x86_64-vmcache as installed;
    /// libvirt-nbd: libvirt's own]
    #[arg(long, value_name = "PROGRAM")]
    emulator: Option<PathBuf>,
    /// Print only the element with the disk, for a domain of your own
    #[arg(long, conflicts_with_all = ["name", "memory", "accel", "emulator"])]
    fragment: bool,
}

/// `--accel`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Accel {
    #[default]
    Kvm,
    Tcg,
}

impl Args {
    /// The option that is given, where one is.
    pub fn given(&self) -> Option<&'static str> {
        let given = [
            (self.socket.is_some(), "--socket"),
            (self.name.is_some(), "--name"),
            (self.memory.is_some(), "--memory"),
            (self.accel.is_some(), "--accel"),
            (self.emulator.is_some(), "--emulator"),
            (self.fragment, "--fragment"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    /// A disk by QEMU's own arguments, which need a QEMU that has the driver loaded.
    pub fn with_wrapper(&self, disk: &Disk, id: &str) -> Result<String> {
        if self.socket.is_some() {
            return Err(not_for("--socket", "libvirt-nbd"));
        }
        // A PCI slot that libvirt, which fills them from below, does not come to; and without a
        // place in the order of booting the firmware is told not to look at the disk. After all
        // disks that libvirt knows of.
        let arguments = [
            "-drive".to_owned(),
            disk.drive(Some(id)),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={id},addr=0x10,bootindex=100"),
        ];
        let mut lines = String::new();
        for argument in arguments {
            lines += &format!("    <qemu:arg value='{}'/>\n", escaped(&argument)?);
        }
        if self.fragment {
            return Ok(shifted(&format!(
                "  <qemu:commandline xmlns:qemu='{NAMESPACE}'>\n{lines}  </qemu:commandline>\n"
            )));
        }
        let emulator = match &self.emulator {
            Some(path) => absolute(path)?,
            None => installed_wrapper()?,
        };
        let emulator = format!("    <emulator>{}</emulator>\n", escaped(&emulator)?);
        let arguments = format!("  <qemu:commandline>\n{lines}  </qemu:commandline>\n");
        self.domain(disk, &format!(" xmlns:qemu='{NAMESPACE}'"), &emulator, &arguments)
    }

    /// A disk that libvirt knows all of: the overlay, and below it the export of a process that has
    /// the cache open.
    pub fn with_export(&self, disk: &Disk) -> Result<String> {
        let Some(overlay) = &disk.overlay else {
            return Err(usage("--as=libvirt-nbd needs --overlay: an export is only read".into()));
        };
        let Some(socket) = &self.socket else {
            return Err(usage("--as=libvirt-nbd needs --socket, where the cache is served".into()));
        };
        let socket = absolute(socket)?;
        examine_socket(&socket, &disk.cache);
        let element = format!(
            "    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{overlay}'/>
      <backingStore type='network'>
        <format type='raw'/>
        <source protocol='nbd'>
          <host transport='unix' socket='{socket}'/>
        </source>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>\n",
            overlay = escaped(overlay)?,
            socket = escaped(&socket)?,
        );
        if self.fragment {
            return Ok(shifted(&shifted(&element)));
        }
        let emulator = match &self.emulator {
            Some(path) => format!("    <emulator>{}</emulator>\n", escaped(&absolute(path)?)?),
            None => String::new(),
        };
        self.domain(disk, "", &(emulator + &element), "")
    }

    /// A domain that starts as it is: one processor, a console, no network.
    fn domain(&self, disk: &Disk, namespace: &str, devices: &str, last: &str) -> Result<String> {
        let (kind, processor) = match self.accel.unwrap_or_default() {
            Accel::Kvm => ("kvm", "  <cpu mode='host-model'/>\n"),
            Accel::Tcg => ("qemu", ""),
        };
        let name = match &self.name {
            Some(name) => name.clone(),
            None => default_name(disk)?,
        };
        let memory = match self.memory {
            Some(bytes) => bytes,
            None => size::parse(DEFAULT_MEMORY)?,
        };
        Ok(format!(
            "<domain type='{kind}'{namespace}>
  <name>{name}</name>
  <memory unit='KiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
{processor}  <clock offset='utc'/>
  <devices>
{devices}    <console type='pty'/>
    <rng model='virtio'>
      <backend model='builtin'/>
    </rng>
  </devices>
{last}</domain>\n",
            name = escaped(&name)?,
            memory = memory >> 10,
        ))
    }
}

/// What is wrong with an option that another form has.
pub fn not_for(option: &str, form: &str) -> anyhow::Error {
    usage(format!("{option} is for --as={form}"))
}

fn usage(message: String) -> anyhow::Error {
    Failure { code: 2, message }.into()
}

/// Says how to serve the cache where nobody does.
fn examine_socket(socket: &str, cache: &str) {
    let is_socket = std::fs::metadata(socket).is_ok_and(|meta| meta.file_type().is_socket());
    if !is_socket {
        log::warn!(
            "nobody serves '{socket}' yet; start: vmcache exec qemu-nbd -r -t -e 64 -k {} \
             --image-opts {}",
            shell_quoted(socket),
            shell_quoted(&format!("driver=vmcache,file.filename={}", doubled_commas(cache)))
        );
    }
}

/// The wrapper beside this program, or where installations are.
fn installed_wrapper() -> Result<String> {
    let own = std::env::current_exe().ok();
    let own = own.as_deref().and_then(Path::parent);
    let found = own
        .into_iter()
        .chain(WRAPPER_DIRECTORIES.iter().map(Path::new))
        .map(|directory| directory.join(WRAPPER))
        .find(|path| path.is_file());
    match found {
        Some(path) => absolute(&path),
        None => bail!(
            "{WRAPPER} is not installed, and libvirt starts nothing else with the driver loaded: \
             name a wrapper with --emulator (see 'vmcache exec --help'), or take \
             --as=libvirt-nbd, which needs none"
        ),
    }
}

/// The name of the machine's file without its suffix.
fn default_name(disk: &Disk) -> Result<String> {
    let file = Path::new(disk.overlay.as_ref().unwrap_or(&disk.cache));
    let stem = file.file_stem().and_then(|stem| stem.to_str());
    stem.map(str::to_owned).context("there is no name for the domain; give it with --name")
}

fn parse_name(text: &str) -> Result<String, String> {
    match !text.is_empty() && !text.contains(|c: char| c == '/' || c.is_control()) {
        true => Ok(text.to_owned()),
        false => Err("libvirt takes a name without slashes and control characters".into()),
    }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(bytes) if bytes >= LEAST_MEMORY => Ok(bytes),
        Ok(_) => Err("that is less than 1M; a number without a letter is in bytes".into()),
        Err(err) => Err(err.to_string()),
    }
}

/// Without the first two columns, which are for elements inside a domain.
fn shifted(lines: &str) -> String {
    lines.lines().map(|line| format!("{}\n", line.strip_prefix("  ").unwrap_or(line))).collect()
}

fn escaped(text: &str) -> Result<String> {
    if text.contains(char::is_control) {
        bail!("{text:?} has control characters, which XML cannot hold");
    }
    Ok(text
        .chars()
        .map(|c| match c {
            '&' => "&amp;".into(),
            '<' => "&lt;".into(),
            '>' => "&gt;".into(),
            '\'' => "&apos;".into(),
            '"' => "&quot;".into(),
            c => String::from(c),
        })
        .collect())
}
