#!/usr/bin/env python3
"""Reads one warm image in several qemu-img bench processes at once, and counts what they make.

Makes a base of random bytes and a cache image that holds all of it, runs every
combination in turn, prints a table or JSON, and judges it. Raw reads the data
clusters of the cache image itself: how fast a page is copied depends on where in
memory it is, by more than drivers differ. Used by bench-warm-shared, whose help
says what is measured, and by bench_reads.py as a module.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time

BLOCK = 4096
# A stride of an odd number of blocks visits all blocks of an image whose size is a power of two, in an
# order that no read-ahead guesses.
STRIDE = 251 * BLOCK
# Reads of a process that is only to start and end.
FEW = 1000
# How far the sum may fall below one process's beyond what it does with raw.
TOLERANCE = 0.05
# QEMU 10.0's io_uring submits the next request from within the completion of the last one; a long
# row of immediate completions overruns the usual 8 MiB of stack. All get more.
STACK = ("prlimit", "--stack=unlimited")
RUN = re.compile(r"Run completed in ([0-9.]+) seconds")


class Lab:
    """The images, and how to read them."""

    def __init__(self, options):
        self.library = f"{options.programs}/libvmcache.so"
        self.vmcache = f"{options.programs}/vmcache"
        self.base = f"{options.directory}/base.raw"
        self.cache = f"{options.directory}/cache.qcow2"
        self.size = options.size << 20
        self.depth = options.depth
        self.block, self.stride = BLOCK, STRIDE
        self.file = self.cache.replace(",", ",,")
        self.image_options = ["--image-opts", f"driver=vmcache,file.filename={self.file}"]
        self.kinds = {}

    def find_kinds(self):
        """How to read the image, once there is one. Its data clusters are the last of it."""
        self.part = f"offset={os.path.getsize(self.cache) - self.size},size={self.size}"
        raw = ["--image-opts", f"driver=raw,{self.part},file.driver=file,file.filename={self.file}", "-i"]
        self.kinds = {
            "vmcache": self.image_options,
            "raw io_uring": [*raw, "io_uring"],
            "raw threads": [*raw, "threads"],
        }

    def environment(self, kind):
        return {**os.environ, "LD_PRELOAD": self.library} if kind == "vmcache" else None

    def command(self, kind, reads):
        bench = ["qemu-img", "bench", "-s", str(self.block), "-S", str(self.stride)]
        return [*STACK, *bench, "-c", str(reads), "-d", str(self.depth), *self.kinds[kind]]

    def status(self, command):
        said = subprocess.run([self.vmcache, command, "--output=json", self.cache], check=True, stdout=subprocess.PIPE)
        return json.loads(said.stdout)

    def fill(self):
        with open(self.base, "wb") as base:
            for _ in range(self.size >> 20):
                base.write(os.urandom(1 << 20))
            # Nothing is to be written back while something is measured.
            base.flush()
            os.fsync(base.fileno())
        subprocess.run([self.vmcache, "create", "-q", "-b", self.base, "-F", "raw", self.cache], check=True)
        copy = self.base + ".copy"
        # What the populate queue had no room for is read again.
        for _ in range(20):
            convert = ["qemu-img", "convert", "-O", "raw", *self.image_options, copy]
            subprocess.run(convert, check=True, env=self.environment("vmcache"))
            if self.status("info")["cached-bytes"] >= self.size:
                break
        else:
            raise SystemExit("the cache does not take all of the base")
        subprocess.run(["cmp", self.base, copy], check=True)
        os.remove(copy)
        self.load(self.cache)
        self.find_kinds()

    def load(self, path):
        """Leaves all of a file in the page cache, and nothing of it to be written back."""
        with open(path, "rb+") as image:
            os.fsync(image.fileno())
            while image.read(1 << 20):
                pass

    def run(self, kind, processes, reads):
        """Runs that many at once; gives reads in a second and processor time of all of them."""
        each = reads // processes
        readers = []
        before = processor_seconds()
        try:
            for _ in range(processes):
                readers.append(
                    subprocess.Popen(
                        self.command(kind, each), env=self.environment(kind), stdout=subprocess.PIPE, text=True
                    )
                )
            spans = dict(self.spans(readers))
        finally:
            for reader in readers:
                if reader.poll() is None:
                    reader.kill()
                    reader.wait()
        begins, ends = zip(*spans.values())
        whole = max(ends) - min(begins)
        return {
            "kind": kind,
            "processes": processes,
            "reads-per-second": each * processes / whole,
            "cpu-seconds": processor_seconds() - before,
            # All of them were reading for this share of the time.
            "together": max(0.0, min(ends) - max(begins)) / whole,
        }

    def spans(self, readers):
        """Begin and end of each reader's run, when it is over."""
        left = set(readers)
        while left:
            for reader in list(left):
                if reader.poll() is None:
                    continue
                now = time.monotonic()
                left.remove(reader)
                took = RUN.search(reader.stdout.read())
                if reader.returncode != 0 or took is None:
                    raise SystemExit("qemu-img bench failed")
                yield reader, (now - float(took.group(1)), now)
            time.sleep(0.001)

    def start_up(self, kind):
        """Processor seconds of a process that hardly reads."""
        return min(self.run(kind, 1, FEW)["cpu-seconds"] for _ in range(3))

    def calls(self, reads):
        """System calls by name of a vmcache reader."""
        out = f"{self.base}.strace"
        trace = ["strace", "-f", "-c", "-U", "name,calls", "-o", out, "-E", f"LD_PRELOAD={self.library}"]
        subprocess.run(trace + self.command("vmcache", reads), check=True, stdout=subprocess.DEVNULL)
        with open(out, encoding="ascii") as lines:
            rows = [line.split() for line in lines]
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit() and row[0] != "total"}

    def calls_per_read(self):
        """What more reads cost, so that opening and closing do not count."""
        few, many = 10000, 30000
        less, more = self.calls(few), self.calls(many)
        return {name: (more[name] - less.get(name, 0)) / (many - few) for name in more}


def processor_seconds():
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def median(rows, kind, processes, key):
    return statistics.median(row[key] for row in rows if (row["kind"], row["processes"]) == (kind, processes))


def spread(rows, kind, processes):
    """Half the distance between the least and the greatest, of the median."""
    values = [row["reads-per-second"] for row in rows if (row["kind"], row["processes"]) == (kind, processes)]
    return (max(values) - min(values)) / 2 / statistics.median(values)


def judge(rows, kinds, counts, calls, missed):
    """What is wrong (always, only when strict), and the sums as shares of the first count's."""
    sums = {kind: {count: median(rows, kind, count, "reads-per-second") for count in counts} for kind in kinds}
    ratios = {kind: {count: of[count] / of[counts[0]] for count in counts} for kind, of in sums.items()}
    wrong, slow = [], []
    if missed:
        wrong.append(f"{missed} bytes were not hits")
    if not 0.99 <= calls.get("preadv2", 0) <= 1.01:
        wrong.append(f"a hit makes {calls.get('preadv2', 0):.3f} preadv2 calls")
    if calls.get("futex", 0) > 0.01:
        wrong.append(f"a hit makes {calls['futex']:.4f} futex calls")
    for count in counts[1:]:
        allowed = min(1.0, ratios["raw io_uring"][count]) - TOLERANCE
        if ratios["vmcache"][count] < allowed:
            times = ratios["vmcache"][count]
            slow.append(f"{count} processes make {times:.2f} times what {counts[0]} makes, less than {allowed:.2f}")
    return wrong, slow, ratios


def show(options, rows, kinds, counts, ratios, calls):
    print(
        f"4 KiB random reads of one page-cached image, depth {options.depth}, {options.reads} reads a run in all, "
        f"{os.cpu_count()} processors, median of {options.rounds} rounds"
    )
    print(f"{'':<14}{'processes':>10}{'reads/s':>10}{'spread':>9}{'of one':>8}{'together':>10}{'CPU us/read':>13}")
    for kind in kinds:
        for count in counts:
            keys = ("reads-per-second", "together", "cpu-microseconds-per-read")
            rate, together, spent = (median(rows, kind, count, key) for key in keys)
            print(
                f"{kind:<14}{count:>10}{rate:>10.0f}{spread(rows, kind, count):>9.1%}"
                f"{ratios[kind][count]:>8.2f}{together:>10.0%}{spent:>13.2f}"
            )
    print("System calls for each read of vmcache, all threads:")
    print("  " + ", ".join(f"{name} {share:.4f}" for name, share in sorted(calls.items()) if abs(share) >= 0.0001))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", required=True)
    parser.add_argument("--programs", required=True, help="where libvmcache.so and vmcache are")
    parser.add_argument("--processes", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--strict", action="store_true")
    for name in ("--reads", "--depth", "--rounds", "--size"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    counts = [int(count) for count in options.processes.split(",")]
    lab = Lab(options)
    lab.fill()
    before = lab.status("stats")["miss-bytes"]
    start_up = {kind: lab.start_up(kind) for kind in lab.kinds}
    rows = []
    for number in range(1, options.rounds + 1):
        for count in counts:
            for kind in lab.kinds:
                row = lab.run(kind, count, options.reads)
                # Without what it takes to start, which is no reading.
                spent = (row.pop("cpu-seconds") - count * start_up[kind]) / (options.reads - count * FEW)
                rows.append({"round": number, **row, "cpu-microseconds-per-read": spent * 1e6})
    calls = lab.calls_per_read()
    missed = lab.status("stats")["miss-bytes"] - before
    wrong, slow, ratios = judge(rows, lab.kinds, counts, calls, missed)
    if options.output == "json":
        report = {"depth": options.depth, "reads": options.reads, "ratios": ratios, "runs": rows}
        print(json.dumps({**report, "calls-per-read": calls, "problems": wrong, "slow": slow}, indent=2))
    else:
        show(options, rows, lab.kinds, counts, ratios, calls)
    for problem in wrong + slow:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if wrong or (slow and options.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
