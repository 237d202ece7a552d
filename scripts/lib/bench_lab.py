"""bench_lab.py - what bench's experiments stand on: the networks, the boot that is
replayed, and the competitors, each of which says how a virtual machine reads
through it.

Used by: bench_replay.py, bench_memory.py, bench.py.
Promises: whatever is started here is stopped when its `with` block ends, and dies
with this process even when that is killed. A run of a competitor starts from files
of its own. Every virtual machine is one qemu-io that replays one boot; it reads
through a qcow2 overlay, as a machine does.
"""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import time

import replay
import report
from bench_report import STORED

# A child of this process that must not outlive it, even after kill -9.
BOUND = ("setpriv", "--pdeathsig", "KILL", "--")


def value(text):
    """A file name in a QEMU option."""
    return str(text).replace(",", ",,")


class Machine:
    """How a virtual machine has its disk: the image in QEMU's options, what stands before the
    program, and whether the image is only read or takes what is read of its base."""

    def __init__(self, image, prefix=(), copy_on_read=False):
        self.image, self.prefix, self.copy_on_read = image, [*prefix], copy_on_read

    def replayed(self):
        """A qemu-io that takes the reads of a boot."""
        return [*self.prefix, "qemu-io", "-C" if self.copy_on_read else "-r", "--image-opts", self.image]

    def booted(self):
        """A qemu-system with a disk0, less what else the machine has. Its writes are lost, or go
        where its reads go."""
        disk = "copy-on-read=on" if self.copy_on_read else "snapshot=on"
        return [*self.prefix, "qemu-system-x86_64", "-drive", f"if=none,id=disk0,{self.image},{disk}"]


class Network:
    """A link between two network namespaces, which are named by processes that hold them."""

    def __init__(self, text):
        self.name, node, server, self.address = text.split(":")
        self.node, self.server = int(node), int(server)
        # Where nodes find their base; node N has the Nth, and when there are no more, the first again.
        self.bases = []

    def base(self, node=0):
        return self.bases[node % len(self.bases)]

    def inside(self, process):
        return ["nsenter", f"--net=/proc/{process}/ns/net", "--"]

    def on_node(self, *command):
        return [*self.inside(self.node), *command]

    def on_server(self, *command):
        return [*self.inside(self.server), *command]

    @staticmethod
    def device(process, column):
        with open(f"/proc/{process}/net/dev", encoding="ascii") as lines:
            for line in lines:
                name, _, values = line.partition(":")
                if name.strip() == "veth-vmcache":
                    return int(values.split()[column])
        raise SystemExit("the link between node and storage node is gone")

    def received(self):
        """Bytes the nodes have received so far."""
        return self.device(self.node, 0)

    def sent(self):
        """Bytes the storage node has sent so far, by its own count."""
        return self.device(self.server, 8)


class Lab:
    """The directory of a run, the programs, the base and its boot."""

    def __init__(self, options):
        self.directory = options.directory
        self.programs = options.programs
        self.floor, self.guest = options.floor, options.guest
        self.export, self.memory = options.export, options.memory
        self.image = options.image
        self.networks = {network.name: network for network in map(Network, options.network)}
        self.reads = replay.read_trace(options.trace)
        self.distinct = replay.distinct_bytes(self.reads)
        self.size = os.stat(options.image).st_size if options.image else 0
        self.number = 0
        for network in self.networks.values():
            network.bases = [f"nfs://{network.address}{self.export}/{os.path.basename(self.image)}"]

    @contextlib.contextmanager
    def scratch(self):
        """A directory that goes when the block ends."""
        self.number += 1
        path = f"{self.directory}/{self.number}"
        os.mkdir(path)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def preload(self, *command):
        return ["env", f"LD_PRELOAD={self.programs}/libvmcache.so", *command]

    def on(self, image, size, networks):
        """The same for a base of another name and size on the storage nodes."""
        other = copy.copy(self)
        other.image, other.size, other.export = image, size, os.path.dirname(image)
        other.networks = {}
        for name in networks:
            other.networks[name] = copy.copy(self.networks[name])
            other.networks[name].bases = [f"nfs://{other.networks[name].address}{image}"]
        return other

    def create_cache(self, network, path, base, form="raw", **options):
        words = [word for name, size in options.items() for word in ("-o", f"{name}={size}")]
        run(network.on_node(f"{self.programs}/vmcache", "create", "-q", "-b", base, "-F", form, *words, path))

    def cache_status(self, command, cache):
        """What `vmcache info` or `stats` says of a cache."""
        return json.loads(run([f"{self.programs}/vmcache", command, "--output=json", cache]))

    def create_overlay(self, path, base, form="raw", **options):
        words = [word for name, size in options.items() for word in ("-o", f"{name}={size}")]
        run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", form, *words, path, str(self.size)])


def run(command):
    """Runs a command to its end; gives what it printed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Servers:
    """Programs that run until the `with` block ends. One that serves writes NAME.pid when it does."""

    def __init__(self):
        self.started = []

    def __enter__(self):
        return self

    def __call__(self, command, name, **options):
        """Starts one; what it says goes to NAME.log."""
        with open(f"{name}.log", "wb") as out:
            child = subprocess.Popen(
                [*BOUND, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, **options
            )
        self.started.append((child, name))
        return child

    def ready(self):
        """Returns when all of them serve."""
        deadline = time.monotonic() + 60
        for child, name in self.started:
            while not os.path.exists(f"{name}.pid"):
                if child.poll() is not None or time.monotonic() > deadline:
                    with open(f"{name}.log", encoding="utf-8", errors="replace") as lines:
                        raise SystemExit(f"{' '.join(child.args)} does not serve: {lines.read().strip()}")
                time.sleep(0.01)

    def __exit__(self, *_):
        for child, _ in reversed(self.started):
            child.terminate()
        for child, _ in reversed(self.started):
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


# ---- the competitors -------------------------------------------------------
#
# title    what tables and plots call it
# phases   the replays of a run, one after the other on the same files
# open()   a `with` block around the phases: it makes the files of `nodes` nodes
#          in a directory and gives the Machine of a node
# before() does what a phase begins with, and gives the seconds it took
# after()  what more there is to say after a phase


class Competitor:
    """One way for a virtual machine to read its base."""

    title = ""
    phases = ("",)

    def before(self, lab, network, directory, nodes, phase):
        return 0.0

    def after(self, lab, directory, phase):
        return {}


class Plain(Competitor):
    """A qcow2 overlay whose backing file is on the storage node."""

    title = "plain NFS"

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        overlays = [f"{directory}/overlay-{number}.qcow2" for number in range(len(network.bases))]
        for number, overlay in enumerate(overlays):
            lab.create_overlay(overlay, network.base(number))

        def machine(node, phase):
            image = f"driver=qcow2,file.filename={value(overlays[node % len(overlays)])}"
            return Machine(image, network.on_node())

        yield machine


class Local(Competitor):
    """The floor: the base is a local raw file in the page cache. What many readers take
    here is what as many qemu-io cost on this machine's processors."""

    title = "local raw file"

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        overlay = f"{directory}/overlay.qcow2"
        lab.create_overlay(overlay, lab.image)
        image = f"driver=qcow2,file.filename={value(overlay)},backing.driver=raw,backing.file.driver=file"
        image += f",backing.file.filename={value(lab.image)},backing.file.aio=io_uring"
        yield lambda node, phase: Machine(image)


class FullCopy(Competitor):
    """Every node copies the base to its disk first. What crosses is a qcow2 of the base,
    so that holes cost nothing: the kindest form of the copy."""

    title = "full copy"
    phases = ("with copying", "copied")

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        def machine(node, phase):
            image = f"driver=qcow2,file.filename={value(directory)}/overlay-{node}.qcow2"
            return Machine(image)

        for node in range(nodes):
            lab.create_overlay(f"{directory}/overlay-{node}.qcow2", f"{directory}/copy-{node}.qcow2", "qcow2")
        yield machine

    def before(self, lab, network, directory, nodes, phase):
        if phase != self.phases[0]:
            return 0.0
        began = time.monotonic()
        source = f"nfs://{network.address}{lab.export}/compact.qcow2"
        words = ("qemu-img", "convert", "-f", "raw", "-O", "raw", source)
        with Servers() as start:
            copies = [f"{directory}/copy-{node}.qcow2" for node in range(nodes)]
            running = [start(network.on_node(*words, copy), copy) for copy in copies]
            if any(child.wait() != 0 for child in running):
                raise SystemExit("copying the base failed")
        return time.monotonic() - began


class CopyOnRead(Competitor):
    """QEMU's own copy-on-read into a qcow2, one image for each machine. What is in a finished image
    is read as anybody would, with copy-on-read off."""

    phases = ("cold", "finished")

    def __init__(self, cluster=64 << 10, extended=False):
        self.cluster, self.extended = cluster, extended
        form = "extended L2 " if extended else ""
        self.title = f"copy-on-read {form}{cluster >> 10} KiB"

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        extended = "on" if self.extended else "off"
        bases = len(network.bases)
        for node in range(nodes):
            image = f"{directory}/node-{node}.qcow2"
            if node < bases:
                lab.create_overlay(image, network.base(node), cluster_size=self.cluster, extended_l2=extended)
            else:
                shutil.copyfile(f"{directory}/node-{node % bases}.qcow2", image)

        def machine(node, phase):
            image = f"driver=qcow2,file.filename={value(directory)}/node-{node}.qcow2"
            return Machine(image, network.on_node(), copy_on_read=phase == "cold")

        yield machine

    def after(self, lab, directory, phase):
        return {"image-bytes": os.stat(f"{directory}/node-0.qcow2").st_blocks * 512}


class Nbdkit(Competitor):
    """nbdkit's cache filter, which has no plugin for NFS: it reads from a qemu-nbd that does,
    over a UNIX socket. One pair of them a node; warm only as long as it runs."""

    title = "nbdkit cache filter"
    phases = ("cold", "warm")

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        base = f"driver=raw,file.driver=nfs,file.server.type=inet,file.server.host={network.address}"
        base += f",file.path={value(lab.export)}/{value(os.path.basename(lab.image))}"
        environment = {**os.environ, "TMPDIR": directory}
        with Servers() as start:
            for node in range(nodes):
                path = f"{directory}/base-{node}"
                words = ("qemu-nbd", "-r", "-t", "-e", "64", "-k", path, "--pid-file", f"{path}.pid")
                start(network.on_node(*words, "--image-opts", base), path)
            start.ready()
            for node in range(nodes):
                path = f"{directory}/cache-{node}"
                words = ["nbdkit", "-f", "-r", "-P", f"{path}.pid", "-U", path, "--filter=cache"]
                words += ["nbd", f"socket={directory}/base-{node}", "cache-on-read=true", "cache=unsafe"]
                start(words, path, env=environment)
                lab.create_overlay(f"{path}.qcow2", f"nbd+unix:///?socket={path}")
            start.ready()

            def machine(node, phase):
                image = f"driver=qcow2,file.filename={value(directory)}/cache-{node}.qcow2"
                return Machine(image)

            yield machine


class Vmcache(Competitor):
    """One vmcache image for each node, in front of the NFS base."""

    title = "vmcache"
    phases = ("cold", "warm")

    def __init__(self, phases=phases, **options):
        self.phases, self.options = phases, options
        self.counted = {}

    def create(self, lab, network, directory, node):
        lab.create_cache(network, f"{directory}/node-{node}.qcow2", network.base(node), **self.options)

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        self.counted = {}
        overlay = f"{directory}/overlay.qcow2"
        lab.create_overlay(overlay, network.base())
        bases = min(nodes, len(network.bases))
        for node in range(bases):
            self.create(lab, network, directory, node)

        def machine(node, phase):
            image = f"driver=qcow2,file.filename={value(overlay)},backing.driver=vmcache"
            image += f",backing.file.filename={value(directory)}/node-{node}.qcow2"
            return Machine(image, network.on_node(*lab.preload()))

        if "cold" not in self.phases:
            # Filled once; every node gets a copy.
            replay.replay([machine(0, "").replayed()], replay.script(lab.reads))
        for node in range(bases, nodes):
            image = f"{directory}/node-{node % bases}.qcow2"
            run(["cp", "--sparse=always", image, f"{directory}/node-{node}.qcow2"])
        if "cold" not in self.phases:
            run(["sync", "--file-system", directory])
        yield machine
        # A stock QEMU must find nothing wrong with it.
        run(network.on_node("qemu-img", "check", "-q", "-f", "qcow2", f"{directory}/node-0.qcow2"))

    def after(self, lab, directory, phase):
        cache = f"{directory}/node-0.qcow2"
        info, stats = lab.cache_status("info", cache), lab.cache_status("stats", cache)
        share = report.stats_share(self.counted, stats)
        self.counted = stats
        read = sum(share[key] for key in report.READ_KEYS)
        return {
            "image-bytes": info["actual-size"],
            "cached-bytes": info["cached-bytes"],
            "dropped-bytes": share["dropped-bytes"],
            "hit-rate": (share["hit-bytes"] + share["zero-bytes"]) / read if read else None,
        }


class Chained(Vmcache):
    """Nodes with empty caches behind warm ones, one for each base, that the storage node publishes
    in its memory: plain qcow2 files in a tmpfs, over NFS."""

    title = "vmcache chained"

    def __init__(self):
        super().__init__(phases=("cold",))

    @contextlib.contextmanager
    def open(self, lab, network, directory, nodes):
        try:
            with super().open(lab, network, directory, nodes) as machine:
                yield machine
        finally:
            for name in os.listdir(lab.memory):
                os.remove(f"{lab.memory}/{name}")

    def create(self, lab, network, directory, node):
        first, published = (f"{lab.memory}/base-{number}.qcow2" for number in (0, node))
        if node == 0:
            lab.create_cache(network, published, network.base())
            # Filled from the base itself; over the network it would take as long as a first start.
            image = f"driver=vmcache,file.filename={value(published)},backing.driver=raw"
            image += f",backing.file.driver=file,backing.file.filename={value(lab.image)}"
            filler = Machine(image, lab.preload())
            replay.replay([filler.replayed()], replay.script(lab.reads))
            os.remove(f"{published}.live")
        else:
            # What the bases hold is the same; only their names differ.
            run(["cp", "--sparse=always", first, published])
            run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", network.base(node), published])
        base = f"nfs://{network.address}{published}"
        lab.create_cache(network, f"{directory}/node-{node}.qcow2", base, "qcow2")


def measure(lab, network, competitor, machines, nodes, boot_seconds=0.0, repeats=1, start=None):
    """Replays the boot in all machines, which are spread over the nodes; a row for each phase, or
    as many as `repeats` where nothing has to be fetched. With `start`, that starts them instead and
    gives what replay.replay() does."""
    if start is None:
        text = replay.script(lab.reads, boot_seconds)

        def start(chosen, _directory):
            return replay.replay([machine.replayed() for machine in chosen], text)

    phases = []
    for phase in competitor.phases:
        phases += [phase] * (repeats if phase in STORED or isinstance(competitor, Local) else 1)
    with lab.scratch() as directory, competitor.open(lab, network, directory, nodes) as machine:
        for phase in phases:
            received, sent = network.received(), network.sent()
            took = competitor.before(lab, network, directory, nodes, phase)
            seconds, spent = start([machine(number % nodes, phase) for number in range(machines)], directory)
            yield {
                "competitor": f"{competitor.title} {phase}".strip(),
                "network": network.name,
                "machines": machines,
                "nodes": nodes,
                "boot-seconds": boot_seconds,
                "first-seconds": seconds[0] + took,
                "median-seconds": seconds[len(seconds) // 2] + took,
                "last-seconds": seconds[-1] + took,
                "copy-seconds": took,
                "cpu-seconds": spent,
                "processors": len(os.sched_getaffinity(0)),
                "link-bytes": network.received() - received,
                "server-bytes": network.sent() - sent,
                "distinct-bytes": lab.distinct,
                **competitor.after(lab, directory, phase),
            }
