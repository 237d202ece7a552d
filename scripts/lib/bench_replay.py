"""bench_replay.py - the experiments of bench that replay boots: over nodes, machines
of one node, bases, cluster sizes and quotas.

Used by: bench.py. Each experiment is a `with` block that gives its cells; a cell is
run once a round and gives rows.
"""

import contextlib
import copy
import os

import bench_lab
from bench_lab import Chained, CopyOnRead, FullCopy, Local, Nbdkit, Plain, Vmcache, measure
from bench_report import STORED

MIB = 1 << 20
# What a read of the slow disk of `bases` takes.
DISK_MILLISECONDS = 1


class Cell:
    """Something to measure: what it says while it runs, about how long it takes, the call, and in
    how many of the rounds."""

    def __init__(self, text, seconds, call, rounds=99):
        self.text, self.seconds, self.call, self.rounds = text, seconds, call, rounds


def guess(lab, network, machines, crossing):
    """About how long a replay takes whose base data crosses `crossing` times."""
    link = 0.66 if network.name == "shaped" else 0.2
    return 1 + 0.06 * machines + link * crossing


def cell(lab, network, competitor, machines, nodes, boot_seconds=0.0, rounds=99, **more):
    # Where many machines leave time for few rounds, what is quick is repeated in them.
    repeats = 3 if rounds <= 2 and not boot_seconds else 1

    def call():
        for row in measure(lab, network, competitor, machines, nodes, boot_seconds, repeats):
            yield {**row, **more}

    fetching = any(phase not in STORED for phase in competitor.phases) and not isinstance(competitor, Local)
    crossing = machines if isinstance(competitor, Plain) else nodes
    seconds = guess(lab, network, machines, crossing if fetching else 0) + boot_seconds * len(competitor.phases)
    machine = "machine" if machines == 1 else "machines"
    return Cell(f"{competitor.title}, {machines} {machine}, {network.name} link", seconds, call, rounds)


@contextlib.contextmanager
def nodes(lab, settings):
    """One base, many nodes, one machine on each."""
    cells = []
    judged, beside = settings["rounds-judged"], settings["rounds-beside"]
    for count in settings["counts"]:
        for network in lab.networks.values():
            if network.name == "unshaped" and count not in settings["unshaped-counts"]:
                continue
            deciding = [Local(), Plain(), Vmcache()]
            others = [CopyOnRead(128 << 10, extended=True), Chained()]
            if count <= settings["most-copy-on-read-nodes"]:
                others.append(CopyOnRead())
            if count <= settings["most-nbdkit-nodes"]:
                others.append(Nbdkit())
            if count <= settings["most-copy-nodes"]:
                others.append(FullCopy())
            if network.name == "unshaped":
                # It has no target.
                others = others if count <= settings["most-nbdkit-nodes"] else []
                cells += [cell(lab, network, one, count, count, rounds=1) for one in deciding + others]
                continue
            cells += [cell(lab, network, one, count, count, rounds=judged.get(count, 99)) for one in deciding]
            cells += [cell(lab, network, one, count, count, rounds=beside.get(count, 99)) for one in others]
    for count in settings["warm-counts"]:
        network = lab.networks["shaped"]
        for one in (Local(), Plain(), Vmcache(phases=("warm",))):
            cells.append(cell(lab, network, one, count, count, rounds=2))
    for count in settings["boot-counts"]:
        network = lab.networks["shaped"]
        for one in (Local(), Plain(), Vmcache()):
            cells.append(cell(lab, network, one, count, count, settings["boot-seconds"], rounds=1))
    yield cells


@contextlib.contextmanager
def together(lab, settings):
    """Many machines on one node share what it has; each machine has its own copy-on-read image."""
    network = lab.networks["shaped"]
    cells = []
    for count in settings["together"]:
        rounds = settings["together-rounds"].get(count, 99)
        cells += [cell(lab, network, one, count, 1, rounds=rounds) for one in (Local(), Plain(), Nbdkit())]
        # What is judged has all rounds.
        cells.append(cell(lab, network, Vmcache(), count, 1))
        if count <= settings["most-together-copies"]:
            cells.append(cell(lab, network, CopyOnRead(128 << 10, extended=True), count, count, rounds=rounds))
    yield cells


@contextlib.contextmanager
def clusters(lab, settings):
    """Cluster sizes: one machine, the shaped link."""
    network = lab.networks["shaped"]
    everybody = []
    for size in settings["clusters"]:
        everybody.append((Vmcache(cluster_size=size), size, size // 32, "vmcache"))
        everybody.append((CopyOnRead(size), size, size, "copy-on-read"))
        if size >= 16 << 10:
            everybody.append((CopyOnRead(size, extended=True), size, size // 32, "copy-on-read extended L2"))
    yield [
        cell(lab, network, one, 1, 1, rounds=settings["sizes-rounds"], **{"cluster-bytes": size, "unit-bytes": unit, "image": image})
        for one, size, unit, image in everybody
    ]


@contextlib.contextmanager
def quota(lab, settings):
    """Quotas below and above what the boot reads: one machine, the shaped link."""
    network = lab.networks["shaped"]
    yield [
        cell(lab, network, Vmcache(**options), 1, 1, rounds=settings["sizes-rounds"], **{"quota-bytes": size * MIB})
        for size, options in ((size, {"quota": f"{size}M"} if size else {}) for size in settings["quotas"])
    ]


@contextlib.contextmanager
def bases(lab, settings):
    """Different bases on a storage node whose disk is slow at random reads.

    The disk is an nbdkit that serves one read at a time, and each takes DISK_MILLISECONDS more. In
    front of it, one nbdkit with a cache for each base is the storage node's memory: a block of a
    base comes from the disk once. What the disk reads goes to one base's memory at a time.
    """
    shaped = lab.networks["shaped"]

    def crossing(one, number, count):
        with lab.scratch() as directory, bench_lab.Servers() as start:
            # Names of their own for one and the same image.
            images = f"{directory}/bases"
            os.mkdir(images)
            for base in range(number):
                os.symlink(lab.image, f"{images}/{base}")
            disk = f"{directory}/disk"
            words = ["nbdkit", "-f", "-r", "-P", f"{disk}.pid", "-U", disk, "--filter=noparallel", "--filter=delay"]
            words += ["file", f"dir={images}", "serialize=all-requests", f"rdelay={DISK_MILLISECONDS}ms"]
            start(shaped.on_server(*words), disk)
            start.ready()
            environment = {**os.environ, "TMPDIR": directory}
            slow = copy.copy(shaped)
            slow.bases = []
            for base in range(number):
                name = f"{directory}/memory-{base}"
                words = ["nbdkit", "-f", "-r", "-P", f"{name}.pid", "-p", str(10809 + base), "--filter=cache"]
                words += ["nbd", f"socket={disk}", f"export={base}"]
                words += ["cache-on-read=true", "cache=unsafe", "cache-min-block-size=4096"]
                start(shaped.on_server(*words), name, env=environment)
                slow.bases.append(f"nbd://{shaped.address}:{10809 + base}/")
            start.ready()
            for row in measure(lab, slow, one, count, count):
                title = row["competitor"].replace("NFS", "overlay")
                yield {**row, "competitor": title, "bases": number, "disk-milliseconds": DISK_MILLISECONDS}

    def one_cell(one, number, count):
        seconds = 1 + 0.02 * number + guess(lab, shaped, count, 0 if isinstance(one, Local) else count)
        if not isinstance(one, (Local, Chained)):
            seconds = max(seconds, number * len(lab.reads) * (DISK_MILLISECONDS + 0.3) / 1000)
        text = f"{one.title}, {number} bases on a slow disk, {count} nodes"
        return Cell(text, seconds, lambda: crossing(one, number, count), rounds=1)

    count = settings["bases-nodes"]
    # Copy-on-read reads as plain overlays do the first time, and without a base afterwards.
    everybody = (Local(), Plain(), Vmcache(), Chained())
    yield [
        one_cell(one, number, count)
        for number in settings["bases"]
        for one in everybody
        # With one base for all it is what `nodes` has: its chain's first image is in memory.
        if number > 1 or not isinstance(one, Chained)
    ]
