"""bench_memory.py - the experiments of bench on memory: what an idle machine has more
of it with the driver than without, before and after it has read a boot; and the most
that a process takes while it stores less quickly than it reads.

Used by: bench.py. The machine is a qemu-system-x86_64 whose processor never starts;
its block layer reads what the boot reads, by the monitor's own qemu-io command. What
reads more quickly than it stores is a qemu-img bench over a base in the page cache.
"""

import contextlib
import json
import os
import socket
import subprocess
import time

import bench_lab
from bench_replay import Cell
from bench_report import IDLE

# How long a machine is left alone before it is looked at: longer than a checkpoint takes to come.
IDLE_SECONDS = 3
# The options that the most memory is taken with.
QUEUES = ("populate=off", "populate=on", "populate=on,populate-queue=8M")
QUEUE_READ = 2 << 20
QUEUE_DEPTHS = (1, 4, 64)


class Monitor:
    """QMP of one machine."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")
        self.lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                raise SystemExit(f"QMP {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise SystemExit("a machine ended early")

    def read(self, offset, length):
        line = f'qemu-io disk0 "read -q {offset} {length}"'
        said = self.execute("human-monitor-command", **{"command-line": line})
        if said.strip():
            raise SystemExit(f"reading in a machine: {said.strip()}")


def resident(process):
    """Rss, Pss and what is the process's alone, in bytes."""
    sums = {}
    with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            words = line.split()
            if words[-1] == "kB":
                sums[words[0].rstrip(":")] = int(words[1]) << 10
    return {
        "rss-bytes": sums["Rss"],
        "pss-bytes": sums["Pss"],
        "private-bytes": sums["Private_Clean"] + sums["Private_Dirty"],
    }


def high_water(process):
    """The most that a program has had resident until now, in bytes; 0 when it has ended."""
    with open(f"/proc/{process}/status", encoding="ascii") as lines:
        found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) << 10 if found else 0


@contextlib.contextmanager
def memory(lab, settings):
    """Machines over one NFS base, idle after their start and after a boot's reads."""
    network = lab.networks["unshaped"]

    def machines(kind, count):
        with lab.scratch() as directory, bench_lab.Servers() as start:
            cache = f"{directory}/cache.qcow2"
            lab.create_cache(network, cache, network.base())
            names = []
            for number in range(count):
                name = f"{directory}/vm-{number}"
                lab.create_overlay(f"{name}.qcow2", network.base())
                drive = f"if=none,id=disk0,driver=qcow2,file.filename={bench_lab.value(name)}.qcow2"
                if kind == "vmcache":
                    drive += f",backing.driver=vmcache,backing.file.filename={bench_lab.value(cache)}"
                words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-S", "-accel", "tcg", "-m", "128"]
                words += ["-display", "none", "-drive", drive, "-device", "virtio-blk-pci,drive=disk0"]
                words += ["-qmp", f"unix:{name},server=on,wait=off", "-pidfile", f"{name}.pid"]
                start(network.on_node(*(lab.preload(*words) if kind == "vmcache" else words)), name)
                names.append(name)
            start.ready()
            processes = []
            for name in names:
                with open(f"{name}.pid", encoding="ascii") as line:
                    processes.append(int(line.read()))

            def rows(state):
                time.sleep(IDLE_SECONDS)
                for number, process in enumerate(processes):
                    yield {
                        "competitor": kind,
                        "machines": count,
                        "state": state,
                        "machine": number,
                        **resident(process),
                    }

            yield from rows(IDLE[0])
            for name in names:
                monitor = Monitor(name)
                for _, offset, length in lab.reads:
                    monitor.read(offset, length)
            yield from rows(IDLE[1])

    yield [
        Cell(
            f"{count} idle qemu-system, {kind}",
            6 + 1.2 * count,
            lambda one=(kind, count): machines(*one),
            settings["memory-rounds"] if count == 1 else 1,
        )
        for count in settings["memory-machines"]
        for kind in ("plain NFS", "vmcache")
    ]


@contextlib.contextmanager
def queue(lab, settings):
    """The most memory of one process that reads all of a base whose blocks have to be stored."""
    size = settings["queue-mib"] << 20
    with lab.scratch() as directory:
        base = f"{directory}/base.raw"
        with open(base, "wb") as out:
            for _ in range(size >> 20):
                out.write(os.urandom(1 << 20))

        def read(options, depth):
            cache = f"{directory}/cache.qcow2"
            bench_lab.run([f"{lab.programs}/vmcache", "create", "-q", "--force", "-b", base, "-F", "raw", cache])
            image = f"driver=vmcache,file.filename={bench_lab.value(cache)},{options}"
            words = ["qemu-img", "bench", "-s", str(QUEUE_READ), "-c", str(size // QUEUE_READ), "-d", str(depth)]
            child = subprocess.Popen(lab.preload(*words, "--image-opts", image), stdout=subprocess.DEVNULL)
            # Not what wait4 says: that knows what this process had when it started the other.
            peak = 0
            while child.poll() is None:
                peak = max(peak, high_water(child.pid))
                time.sleep(0.005)
            if child.returncode != 0:
                raise SystemExit("qemu-img bench failed")
            yield {
                "competitor": f"vmcache {options}",
                "depth": depth,
                "block-bytes": QUEUE_READ,
                "peak-bytes": peak,
                # Where there are some, the queue was full.
                "dropped-bytes": lab.cache_status("stats", cache)["dropped-bytes"],
            }

        yield [
            Cell(f"{options}, depth {depth}", size / (1 << 30), lambda point=(options, depth): read(*point))
            for depth in QUEUE_DEPTHS
            for options in QUEUES
        ]
