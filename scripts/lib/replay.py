#!/usr/bin/env python3
"""Replays a recorded boot in several qemu-io processes at once, and sums up.

base    makes a raw image whose blocks that the trace reads all hold data
run     starts the readers, opens the image in each, then hands all of them the
        whole trace at the same instant; leaves processor time, and seconds from
        before the first reader is started, so that opening counts
note    prints that result as one line, with what else the caller knows
report  prints a table of such lines, and judges it

The trace is a CSV of microseconds,offset,length; the command leaves think times
out. Used by bench-shared and bench, and by bench_lab.py as a module.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import threading
import time

BLOCK = 4096
MIB = 1 << 20
# A command that succeeds and prints one line, the length of the image.
MARK = b"length\n"
MARKED = re.compile(rb"\d (bytes|[KMGT]iB)$")


def read_trace(path):
    """Microseconds, offsets and lengths; whole sectors."""
    with open(path, encoding="ascii") as lines:
        return [tuple(map(int, line.split(","))) for line in lines if line[0].isdigit()]


def distinct_bytes(reads):
    """Bytes of the distinct 4 KiB blocks that the reads touch."""
    blocks = set()
    for _, offset, length in reads:
        blocks.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
    return len(blocks) * BLOCK


def base(options):
    """Random bytes where the trace reads, and more all over the image, as a system's files are."""
    reads = read_trace(options.trace)
    random_bytes = random.Random(1).randbytes
    more = max(options.data - distinct_bytes(reads), 0) // MIB
    with open(options.image, "wb") as image:
        image.truncate(options.size)
        for number in range(more):
            image.seek(options.size // more * number // MIB * MIB)
            image.write(random_bytes(MIB))
        for _, offset, length in reads:
            end = -(-(offset + length) // BLOCK) * BLOCK
            image.seek(offset // BLOCK * BLOCK)
            image.write(random_bytes(end - offset // BLOCK * BLOCK))
        os.fsync(image.fileno())


def script(reads, boot_seconds=0.0):
    """qemu-io's commands for the reads, with a mark at the end.

    The think times between them are those of the trace, scaled so that all together are
    boot_seconds. qemu-io sleeps whole milliseconds; what is less adds up.
    """
    commands = []
    scale = boot_seconds * 1000 / max(reads[-1][0] - reads[0][0], 1)
    slept = 0
    for microseconds, offset, length in reads:
        wait = int((microseconds - reads[0][0]) * scale) - slept
        if wait > 0:
            commands.append(b"sleep %d\n" % wait)
            slept += wait
        commands.append(b"read -q %d %d\n" % (offset, length))
    return b"".join(commands) + MARK


class Reader:
    """One qemu-io that opens the image and then waits for commands."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.seconds = None
        self.problems = []
        self.process.stdin.write(MARK)
        self.process.stdin.flush()

    def wait_for_mark(self):
        for line in self.process.stdout:
            if MARKED.search(line.strip()):
                return
            self.problems.append(line.decode(errors="replace").strip())
        raise SystemExit("a qemu-io ended early: " + "; ".join(self.problems))

    def start(self, commands, began):
        def write():
            # qemu-io looks at its input when there is something to read, and takes one command;
            # what it has buffered beyond that it only looks at when the input has ended.
            try:
                self.process.stdin.write(commands)
                self.process.stdin.close()
            except BrokenPipeError:
                pass  # it ended, which finish() sees

        def follow():
            self.wait_for_mark()
            self.seconds = time.monotonic() - began

        self.threads = [threading.Thread(target=write), threading.Thread(target=follow)]
        for thread in self.threads:
            thread.start()

    def finish(self):
        for thread in self.threads:
            thread.join()
        self.process.stdout.read()
        self.process.stdout.close()
        if self.process.wait() != 0 or self.seconds is None:
            raise SystemExit("a qemu-io failed: " + "; ".join(self.problems[:3]))


def replay(commands, text):
    """Runs the commands, each a qemu-io with an image, and hands all of them the text at once.

    Gives the seconds until each was done, the quickest first, and the processor seconds of all.
    Both begin before the first of them is started: opening its image is a part of a machine's start.
    """
    readers = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    try:
        for command in commands:
            readers.append(Reader(command))
        for reader in readers:
            reader.wait_for_mark()
        for reader in readers:
            reader.start(text, began)
        for reader in readers:
            reader.finish()
    finally:
        for reader in readers:
            if reader.process.poll() is None:
                reader.process.kill()
                reader.process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return sorted(reader.seconds for reader in readers), spent


def run(options):
    reads = read_trace(options.trace)
    seconds, spent = replay([options.command] * options.readers, script(reads))
    result = {
        "readers": options.readers,
        "first-seconds": seconds[0],
        "last-seconds": seconds[-1],
        "cpu-seconds": spent,
        "distinct-bytes": distinct_bytes(reads),
    }
    with open(options.result, "w", encoding="ascii") as out:
        json.dump(result, out)


def note(options):
    with open(options.result, encoding="ascii") as lines:
        result = json.load(lines)
    os.remove(options.result)
    result.update({"kind": options.kind, "round": options.round, "link-bytes": options.link_bytes})
    print(json.dumps(result))


def report(options):
    with open(options.results, encoding="ascii") as lines:
        rows = [json.loads(line) for line in lines]
    groups = {}
    for row in rows:
        groups.setdefault((row["readers"], row["kind"]), []).append(row)
    middle = {
        key: {
            name: statistics.median(row[name] for row in group)
            for name in ("first-seconds", "last-seconds", "cpu-seconds", "link-bytes")
        }
        for key, group in groups.items()
    }
    distinct = rows[0]["distinct-bytes"]
    print(f"Replay of one boot: {distinct / 1e6:.2f} MB of distinct 4 KiB blocks; medians.")
    print(f"{'readers':>7}  {'':<5}{'first s':>9}{'last s':>9}{'CPU s':>9}{'link MB':>10}{'x distinct':>12}")
    status = 0
    for (readers, kind), row in middle.items():
        times = row["link-bytes"] / distinct
        print(
            f"{readers:>7}  {kind:<5}{row['first-seconds']:>9.2f}{row['last-seconds']:>9.2f}"
            f"{row['cpu-seconds']:>9.2f}{row['link-bytes'] / 1e6:>10.2f}{times:>12.3f}"
        )
        if kind == "cold" and times > 1.05:
            print(f"FAILED: {readers} readers moved {times:.3f} times the distinct blocks (1.05 allowed)")
            status = 1
    one = middle.get((1, "cold"))
    for (readers, kind), row in middle.items():
        if one is None or kind != "cold" or readers == 1 or (readers, "warm") not in middle:
            continue
        # What the readers cost when nothing has to be fetched, on this machine's processors.
        warm = middle[(readers, "warm")]["cpu-seconds"] / os.cpu_count()
        allowed = 1.3 * one["last-seconds"] + warm
        verdict = "within" if row["last-seconds"] <= allowed else "ABOVE"
        print(f"{readers} readers, cold: the last after {row['last-seconds']:.2f} s, {verdict} {allowed:.2f} s")
        if options.strict and row["last-seconds"] > allowed:
            status = 1
    if options.json:
        with open(options.json, "w", encoding="ascii") as out:
            json.dump({"distinct-bytes": distinct, "runs": rows}, out, indent=2)
            out.write("\n")
    return status


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="do", required=True)
    sub = commands.add_parser("base")
    sub.add_argument("--trace", required=True)
    sub.add_argument("--size", type=int, required=True, help="bytes of the image")
    sub.add_argument("--data", type=int, required=True, help="how many of them are not holes, about")
    sub.add_argument("image")
    sub = commands.add_parser("run")
    sub.add_argument("--trace", required=True)
    sub.add_argument("--readers", type=int, required=True)
    sub.add_argument("--result", required=True)
    sub.add_argument("command", nargs="+")
    sub = commands.add_parser("note")
    sub.add_argument("--result", required=True)
    sub.add_argument("--kind", required=True)
    sub.add_argument("--round", type=int, required=True)
    sub.add_argument("--link-bytes", type=int, required=True)
    sub = commands.add_parser("report")
    sub.add_argument("--results", required=True)
    sub.add_argument("--strict", action="store_true")
    sub.add_argument("--json")
    options = parser.parse_args()
    return {"base": base, "run": run, "note": note, "report": report}[options.do](options)


if __name__ == "__main__":
    sys.exit(main())
