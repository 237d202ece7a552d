//! A machine without a guest: its processor halts at the first instruction, and the test does itself
//! what a guest's driver does. It sets up virtio-blk devices through their PCI registers, by QEMU's
//! test protocol, and puts requests into their queues in the machine's memory, which is a file.
//!
//! After "Virtual I/O Device (VIRTIO) Version 1.1", 4.1.4.8 (the legacy interface over PCI), 2.6
//! (split queues, legacy layout) and 5.2.6 (requests of block devices).
//!
//! Used by `iothreads`, `jobs` and `patched`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout};

use crate::lab::{Lab, sequential};
use crate::nbd::assert_equal;
use crate::process::{Child, Output, Tool, eventually};

/// The instruction that stops a processor.
const HALT: u8 = 0xf4;
const MEMORY: u64 = 64 << 20;
/// Requests in a queue at a time; each takes three of at least 64 entries.
pub const BATCH: usize = 16;
/// Bytes of the largest request.
pub const LARGEST: usize = 64 << 10;
/// Memory for each queue: its rings, the requests' heads and status bytes, and their data.
const QUEUE_MEMORY: u64 = 8 << 20;
const HEADS: u64 = 64 << 10;
const DATA: u64 = 128 << 10;

/// A running machine.
pub struct Machine {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    memory: File,
    queues: u64,
}

/// A queue of one of its disks.
pub struct Queue {
    /// The command that tells the device of new requests.
    bell: String,
    /// Where its memory begins.
    memory: u64,
    /// How many requests and answers its rings have room for, in descriptors.
    entries: u64,
    requests: u16,
}

/// The arguments for a disk that another process serves over vhost-user: device 4, two queues.
pub fn vhost_user_disk(socket: &Path) -> [String; 4] {
    let chardev = format!("socket,id=vhost,path={}", socket.display());
    let device = "vhost-user-blk-pci,id=disk,chardev=vhost,addr=04,num-queues=2";
    ["-chardev".into(), chardev, "-device".into(), device.into()]
}

/// Reads of a whole disk for two queues.
pub fn reads_of_two_queues(disk: usize) -> [Vec<(u64, u32)>; 2] {
    let (even, odd) = sequential(disk, LARGEST).partition(|(at, _)| at / LARGEST as u64 % 2 == 0);
    [even, odd]
}

impl Machine {
    /// A machine with two iothreads, `t0` and `t1`, and what else the arguments say.
    pub fn start(lab: &Lab, system: Tool, args: &[String]) -> Self {
        let path = lab.fresh("memory");
        let memory = File::options().read(true).write(true).create_new(true).open(&path);
        let memory = memory.expect("the machine's memory");
        memory.set_len(MEMORY).expect("room for the machine's memory");
        let rom = lab.fresh("rom");
        fs::write(&rom, [HALT; 64 << 10]).expect("a ROM");
        let backend = format!(
            "memory-backend-file,id=memory,size={MEMORY},share=on,mem-path={}",
            path.display()
        );
        let (child, input, output) = system
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine"])
            .args(["pc,memory-backend=memory", "-object", &backend, "-m", "64M"])
            .args(["-accel", "tcg", "-qtest", "stdio", "-qtest-log", "none", "-bios"])
            .arg(&rom)
            .args(["-name", "t,debug-threads=on"])
            .args(["-object", "iothread,id=t0", "-object", "iothread,id=t1"])
            .args(args)
            .start_with_pipes();
        let output = BufReader::new(output);
        Machine { child, input, output, memory, queues: 0 }
    }

    /// Runs a command of QEMU's test protocol and gives its answer.
    fn command(&mut self, command: &str) -> String {
        self.input.write_all(format!("{command}\n").as_bytes()).expect("a machine");
        let mut said = String::new();
        self.output.read_line(&mut said).expect("an answer");
        let answer = said.strip_prefix("OK").map(|answer| answer.trim().to_owned());
        answer.unwrap_or_else(|| panic!("{command}: {said}{}", self.child.complaints()))
    }

    /// Makes a virtio-blk device on bus 0 ready for use.
    pub fn disk(&mut self, device: u16, queues: u16) -> Vec<Queue> {
        let registers = 0xc000 + device * 0x100;
        self.set_address(device, 0x10, u32::from(registers));
        self.command(&format!("outb {:#x} 0x3", registers + 18));
        let ready = (0..queues).map(|index| {
            self.command(&format!("outw {:#x} {index:#x}", registers + 14));
            let entries = self.command(&format!("inw {:#x}", registers + 12));
            let bell = format!("outw {:#x} {index:#x}", registers + 16);
            let queue = self.queue(&entries, bell);
            self.command(&format!("outl {:#x} {:#x}", registers + 8, queue.memory / 4096));
            queue
        });
        let ready = ready.collect();
        self.command(&format!("outb {:#x} 0x7", registers + 18));
        ready
    }

    /// The same by the interface of version 1 of the standard, which vhost-user asks for (4.1.4.3;
    /// `hw/virtio/virtio-pci.c` puts the common configuration at the start of base address
    /// register 4, and the bells, four bytes each, at 0x3000).
    pub fn modern_disk(&mut self, device: u16, queues: u16) -> Vec<Queue> {
        let registers = 0xe000_0000 + u32::from(device) * 0x1_0000;
        self.set_address(device, 0x20, registers);
        self.command(&format!("writeb {:#x} 0x3", registers + 0x14));
        // Features 32 to 63: the first of them alone, VIRTIO_F_VERSION_1; then FEATURES_OK.
        self.command(&format!("writel {:#x} 0x1", registers + 0x08));
        self.command(&format!("writel {:#x} 0x1", registers + 0x0c));
        self.command(&format!("writeb {:#x} 0xb", registers + 0x14));
        let ready = (0..queues).map(|index| {
            self.command(&format!("writew {:#x} {index:#x}", registers + 0x16));
            let entries = self.command(&format!("readw {:#x}", registers + 0x18));
            let bell = registers + 0x3000 + 4 * u32::from(index);
            let queue = self.queue(&entries, format!("writew {bell:#x} {index:#x}"));
            let rings = [(0x20, queue.memory), (0x28, queue.available()), (0x30, queue.used())];
            for (register, ring) in rings {
                self.command(&format!("writel {:#x} {ring:#x}", registers + register));
                self.command(&format!("writel {:#x} 0x0", registers + register + 4));
            }
            self.command(&format!("writew {:#x} 0x1", registers + 0x1c));
            queue
        });
        let ready = ready.collect();
        self.command(&format!("writeb {:#x} 0xf", registers + 0x14));
        ready
    }

    /// Sets a base address register; then I/O, memory and bus mastering in the command register.
    fn set_address(&mut self, device: u16, register: u32, address: u32) {
        let config = |register: u32| 0x8000_0000 | u32::from(device) << 11 | register;
        self.command(&format!("outl 0xcf8 {:#x}", config(register)));
        self.command(&format!("outl 0xcfc {address:#x}"));
        self.command(&format!("outl 0xcf8 {:#x}", config(0x04)));
        self.command("outw 0xcfc 0x7");
    }

    /// A queue with memory of its own and as many entries as its device says.
    fn queue(&mut self, entries: &str, bell: String) -> Queue {
        self.queues += 1;
        let entries = u64::from_str_radix(entries.trim_start_matches("0x"), 16).expect("a number");
        Queue { bell, memory: self.queues * QUEUE_MEMORY, entries, requests: 0 }
    }

    /// Lets go of a device that is to be unplugged, as a guest does: by the PIIX4's hot-plug register
    /// (`docs/specs/acpi_pci_hotplug.rst` of QEMU).
    pub fn eject(&mut self, device: u16) {
        self.command(&format!("outl 0xae08 {:#x}", 1u32 << device));
    }

    /// Makes reads in several queues at the same time and holds what comes against the content.
    /// Each queue has reads of its own, of [`LARGEST`] bytes at the most.
    pub fn read_and_compare(
        &mut self,
        queues: &mut [Queue],
        reads: &[Vec<(u64, u32)>],
        content: &[u8],
    ) {
        let longest = reads.iter().map(Vec::len).max().unwrap_or(0);
        for start in (0..longest).step_by(BATCH) {
            let part = |all: &Vec<(u64, u32)>| -> Vec<_> {
                all.iter().copied().skip(start).take(BATCH).collect()
            };
            let parts: Vec<_> = reads.iter().map(part).collect();
            for (queue, part) in queues.iter_mut().zip(&parts) {
                queue.put(&self.memory, part);
            }
            for queue in &*queues {
                self.command(&queue.bell);
            }
            for (queue, part) in queues.iter().zip(&parts) {
                eventually("all requests are done", || queue.is_done(&self.memory));
                queue.compare(&self.memory, part, content);
            }
        }
    }

    /// Bytes that an iothread has read from files so far.
    pub fn bytes_read_by(&self, iothread: &str) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("a process");
        let name = format!("IO {iothread}\n");
        let task = tasks
            .map(|task| task.expect("a thread").path())
            .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm == name))
            .expect("an iothread");
        let counts = fs::read_to_string(task.join("io")).expect("counts");
        let read = counts.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("rchar");
        read.parse().expect("a number")
    }

    /// Ends it in good order.
    pub fn stop(self) -> Output {
        self.child.terminate().success()
    }
}

impl Queue {
    fn available(&self) -> u64 {
        self.memory + 16 * self.entries
    }

    fn used(&self) -> u64 {
        (self.available() + 6 + 2 * self.entries).next_multiple_of(4096)
    }

    fn head(&self, request: usize) -> u64 {
        self.memory + HEADS + 32 * request as u64
    }

    fn data(&self, request: usize) -> u64 {
        self.memory + DATA + (LARGEST * request) as u64
    }

    /// Puts reads into the queue: a head, the data, and a byte for the result each.
    fn put(&mut self, memory: &File, reads: &[(u64, u32)]) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let write = |bytes: &[u8], at| memory.write_all_at(bytes, at).expect("memory");
        for (request, (offset, len)) in reads.iter().enumerate() {
            let head = self.head(request);
            // Type 0, a read; reserved; the sector; and a result that is none.
            write(&[0; 8], head);
            write(&(offset / 512).to_le_bytes(), head + 8);
            write(&[0xff], head + 16);
            let entry = 3 * request as u16;
            let entries = [
                (head, 16, NEXT, entry + 1),
                (self.data(request), *len, NEXT | WRITE, entry + 2),
                (head + 16, 1, WRITE, 0),
            ];
            for (index, (address, len, flags, next)) in (u64::from(entry)..).zip(entries) {
                let mut bytes = Vec::with_capacity(16);
                bytes.extend(u64::to_le_bytes(address));
                bytes.extend(u32::to_le_bytes(len));
                bytes.extend(u16::to_le_bytes(flags));
                bytes.extend(u16::to_le_bytes(next));
                write(&bytes, self.memory + 16 * index);
            }
            let place = u64::from(self.requests) % self.entries;
            write(&entry.to_le_bytes(), self.available() + 4 + 2 * place);
            self.requests = self.requests.wrapping_add(1);
        }
        write(&self.requests.to_le_bytes(), self.available() + 2);
    }

    fn is_done(&self, memory: &File) -> bool {
        let mut index = [0; 2];
        memory.read_exact_at(&mut index, self.used() + 2).expect("memory");
        u16::from_le_bytes(index) == self.requests
    }

    fn compare(&self, memory: &File, reads: &[(u64, u32)], content: &[u8]) {
        for (request, (offset, len)) in reads.iter().enumerate() {
            let mut result = [0; 1];
            memory.read_exact_at(&mut result, self.head(request) + 16).expect("memory");
            assert_eq!(result, [0], "reading {len} bytes at {offset} failed");
            let mut data = vec![0; *len as usize];
            memory.read_exact_at(&mut data, self.data(request)).expect("memory");
            assert_equal(*offset, &data, content);
        }
    }
}
