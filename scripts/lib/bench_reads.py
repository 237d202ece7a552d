"""bench_reads.py - the experiments of bench that need no storage node: reads of a warm
image, and opening it.

Used by: bench.py. Reads are `qemu-img bench`, opens are `qemu-io`, both unmodified.

What a block costs when a process reads it first after opening the image, and what it
costs from then on, is told apart for all kinds alike: one run reads every block of the
image once and ends, another does the same and then goes on reading. The first is the
"first reads", the second less the first the "repeated reads". The image is in the page
cache, and nothing of it is to be fetched, in both. It is larger than a processor's
caches by far.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import time

import bench_lab
import warm_shared
from bench_replay import Cell
from bench_report import DEPTHS, DIRECT, EMPTY, FIRST, FLOOR, MIB, REPEATED

# From this size on reads are sequential; below, in an order that no read-ahead guesses.
SEQUENTIAL = MIB
# Reads of an image that the page cache does not have.
EMPTY_READS = 4000
# qemu-img tells its time in milliseconds: a pass that is shorter is measured several times.
PASS_SECONDS = 0.15
MOST_PASSES = 8
# Repeated reads are a difference of two times: so many passes more, and so many seconds of them, that
# it is not made of noise. Where passes are slow, as many as take LONG_SECONDS, and no fewer than two.
MORE_PASSES, LEAST_PASSES = 8, 2
MORE_SECONDS, LONG_SECONDS = 1.0, 6.0
# What is left has to be more than this share of the time that it is taken from.
LEAST_SHARE = 0.1
# What a disk is read by in one run, past the page cache.
DIRECT_BYTES = 64 * MIB
# About what a machine with two processors makes, for the progress bar: reads in a second, bytes in a second.
READS, SLOW_READS = 300e3, 60e3
BANDWIDTH, DISK_BANDWIDTH = 8e9, 0.8e9


class WarmLab(warm_shared.Lab):
    """The images of bench-warm-shared, and more ways to read them."""

    def __init__(self, lab, directory, mib):
        super().__init__(argparse.Namespace(programs=lab.programs, directory=directory, size=mib, depth=1))
        self.floor = lab.floor
        self.qcow2 = f"{directory}/base.qcow2.full"
        self.start_up = functools.cache(self.measure_start_up)

    def environment(self, kind):
        return {**os.environ, "LD_PRELOAD": self.floor} if kind == FLOOR else super().environment(kind)

    def find_kinds(self):
        super().find_kinds()
        self.kinds[FLOOR] = ["--image-opts", f"driver=floor,filename={self.file},{self.part}"]
        self.kinds["qcow2 io_uring"] = ["-f", "qcow2", "-i", "io_uring", self.qcow2]
        self.kinds[DIRECT] = ["-t", "none", *self.kinds["raw threads"][:-1], "native"]

    def prepare(self):
        self.fill()
        bench_lab.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.base, self.qcow2])
        # All come to the page cache in the same way: it matters in how large pieces it has them.
        self.reload()
        self.forget()
        self.reload()

    def measure_start_up(self, kind, block, depth):
        """Processor seconds of a process that reads once: it clears the memory of all its reads first."""
        self.block, self.depth = block, depth
        found = []
        for _ in range(3):
            before = warm_shared.processor_seconds()
            command = self.command(kind, 1)
            subprocess.run(command, check=True, env=self.environment(kind), stdout=subprocess.DEVNULL)
            found.append(warm_shared.processor_seconds() - before)
        return min(found)

    def spent(self, kind, reads):
        """Seconds of that many reads in one process, and the processor time of all of it."""
        row = self.run(kind, 1, reads)
        return reads / row["reads-per-second"], row["cpu-seconds"]

    def paths(self, kind=None):
        """The image that a kind reads; of no kind, all of them."""
        files = {"qcow2 io_uring": self.qcow2}
        return [files.get(kind, self.cache)] if kind else [self.cache, self.qcow2]

    def reload(self, kind=None):
        for path in self.paths(kind):
            self.load(path)

    def forget(self, kind=None):
        """Takes images out of the page cache."""
        for path in self.paths(kind):
            with open(path, "rb") as image:
                os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def more_reads(once, seconds):
    """How many reads more than a pass of `once`, which takes that many seconds, tell what they cost."""
    passes = max(MORE_PASSES, math.ceil(MORE_SECONDS / seconds))
    return once * min(passes, max(LEAST_PASSES, math.ceil(LONG_SECONDS / seconds)))


def difference(whole, part):
    """What is left of a time, or None where that may be noise."""
    left = whole - part
    return left if left > LEAST_SHARE * whole else None


@contextlib.contextmanager
def reads(lab, settings):
    """Reads of a warm image by block size and depth, and some while the page cache is empty."""
    with lab.scratch() as directory:
        warm = WarmLab(lab, directory, settings["read-mib"])
        warm.prepare()

        def row(state, kind, count, seconds, spent):
            return {
                "competitor": kind,
                "state": state,
                "block-bytes": warm.block,
                "depth": warm.depth,
                "reads": count,
                "reads-per-second": count / seconds,
                "bytes-per-second": count / seconds * warm.block,
                "cpu-seconds-per-read": max(spent, 0.0) / count,
            }

        def choose(block, depth):
            """How many reads visit all of the image, by steps of whole 4 KiB blocks."""
            warm.block, warm.depth = block, depth
            step = max(block, warm_shared.BLOCK)
            # Zero is qemu-img's word for one block after the other.
            warm.stride = 0 if block >= SEQUENTIAL else warm_shared.STRIDE // warm_shared.BLOCK * step
            return warm.size // step

        def cached(kind, block, depth):
            start_up = warm.start_up(kind, block, depth)
            once = choose(block, depth)
            passes = [warm.spent(kind, once)]
            for _ in range(1, min(math.ceil(PASS_SECONDS / passes[0][0]), MOST_PASSES)):
                passes.append(warm.spent(kind, once))
            number = len(passes)
            seconds, spent = (sum(column) for column in zip(*passes))
            yield row(FIRST, kind, once * number, seconds, spent - start_up * number)
            more = more_reads(once, seconds / number)
            all_seconds, all_spent = warm.spent(kind, once + more)
            left = difference(all_seconds, seconds / number)
            if left is not None:
                yield row(REPEATED, kind, more, left, all_spent - spent / number)

        def direct(block, depth):
            """What passes the page cache by, has no first reads."""
            start_up = warm.start_up(DIRECT, block, depth)
            count = min(choose(block, depth), DIRECT_BYTES // block)
            seconds, spent = warm.spent(DIRECT, count)
            yield row(REPEATED, DIRECT, count, seconds, spent - start_up)

        def empty(kind, depth):
            start_up = warm.start_up(kind, warm_shared.BLOCK, depth)
            count = min(EMPTY_READS, choose(warm_shared.BLOCK, depth))
            warm.forget(kind)
            seconds, spent = warm.spent(kind, count)
            yield row(EMPTY, kind, count, seconds, spent - start_up)
            # Read by single blocks, the page cache has it in small pieces.
            warm.forget(kind)
            warm.reload(kind)

        def seconds_of(kind, block):
            """About how long a cell of reads takes."""
            reads_per_second = SLOW_READS if kind == "raw threads" else READS
            one = max(warm.size / max(block, warm_shared.BLOCK) / reads_per_second, warm.size / BANDWIDTH)
            return 0.3 + max(one, PASS_SECONDS) + one + one * more_reads(1, one)

        cells = []
        judged = ("vmcache", "raw io_uring", "raw threads", FLOOR)
        for block, depths in settings["reads"].items():
            for depth in depths:
                for kind in (kind for kind in warm.kinds if kind != DIRECT):
                    decides = kind in judged[: 4 if block == warm_shared.BLOCK else 2] and depth in DEPTHS
                    decides = decides and block in (warm_shared.BLOCK, MIB)
                    # Threads are slow at small blocks: only where they decide.
                    slow = block <= warm_shared.BLOCK and (kind == "raw threads" or block < warm_shared.BLOCK)
                    if not decides and (not settings["reads-beside"] or (slow and kind not in judged[:2])):
                        continue
                    text = f"{kind}, {block} B, depth {depth}"
                    call = functools.partial(cached, kind, block, depth)
                    cells.append(Cell(text, seconds_of(kind, block), call, 99 if decides else 1))
        for block in settings["direct-block-sizes"]:
            for depth in DEPTHS:
                text = f"{DIRECT}, {block} B, depth {depth}"
                cells.append(Cell(text, 1, functools.partial(direct, block, depth), rounds=1))
        for depth in DEPTHS:
            # The floor is none for data that has to come from the disk.
            kinds = [kind for kind in warm.kinds if kind not in (FLOOR, DIRECT)]
            for kind in kinds if settings["reads-beside"] else ("vmcache", "raw threads"):
                text = f"{kind}, empty page cache, depth {depth}"
                seconds = 0.5 + warm.size / DISK_BANDWIDTH
                call = functools.partial(empty, kind, depth)
                cells.append(Cell(text, seconds, call, 99 if kind in ("vmcache", "raw threads") else 1))
        yield cells


@contextlib.contextmanager
def opening(lab, settings):
    """Opening and closing a warm image, by the virtual size of its base.

    One qemu-io opens and closes it many times; the same with few times is taken off, so that its own
    start does not count. The base holds data in its first 64 MiB, all of which is cached.
    """
    data = 64 << 20
    with lab.scratch() as directory:
        images = {}
        for gib in settings["open-sizes-gib"]:
            base, cache, overlay = (f"{directory}/{gib}.{kind}" for kind in ("raw", "cache", "qcow2"))
            with open(base, "wb") as out:
                out.write(os.urandom(data))
                out.truncate(gib << 30)
            bench_lab.run([f"{lab.programs}/vmcache", "create", "-q", "-b", base, "-F", "raw", cache])
            vmcache = f"driver=vmcache,file.filename={bench_lab.value(cache)}"
            fill = [word for at in range(0, data, 1 << 20) for word in ("-c", f"read -q {at} 1M")]
            bench_lab.run(lab.preload("qemu-io", "-r", *fill, "--image-opts", vmcache))
            bench_lab.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay])
            images[gib] = {
                "vmcache": vmcache,
                "qcow2 overlay": f"driver=qcow2,file.filename={bench_lab.value(overlay)}",
                "raw": f"driver=raw,file.driver=file,file.filename={bench_lab.value(base)}",
            }

        def spent(kind, image, times):
            # One read after each open: an open that put its work off must do it.
            text = f"open -r -o {image}\nread -q 0 4k\nclose\n" * times
            command = ["qemu-io"] if kind != "vmcache" else lab.preload("qemu-io")
            began = time.monotonic()
            done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
            took = time.monotonic() - began
            if done.returncode != 0 or "an't" in done.stdout + done.stderr:
                raise SystemExit(f"qemu-io could not open {image}: {done.stdout[-500:]} {done.stderr[-500:]}")
            return took

        def measure(kind, gib):
            few, many = settings["opens"] // 10, settings["opens"]
            image = images[gib][kind]
            seconds = (spent(kind, image, many) - spent(kind, image, few)) / (many - few)
            row = {"competitor": kind, "virtual-bytes": gib << 30, "opens": many, "seconds": seconds}
            if kind == "vmcache":
                row["cached-bytes"] = json.loads(
                    bench_lab.run([f"{lab.programs}/vmcache", "info", "--output=json", f"{directory}/{gib}.cache"])
                )["cached-bytes"]
            yield row

        yield [
            Cell(f"{kind}, {gib} GiB", 0.3, lambda point=(kind, gib): measure(*point))
            for gib in settings["open-sizes-gib"]
            for kind in images[gib]
        ]
