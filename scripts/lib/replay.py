#!/usr/bin/env python3
"""Replays a recorded boot in several qemu-io processes at once, and sums up.

run     starts the readers, opens the image in each, then hands all of them the
        whole trace at the same instant; leaves seconds and processor time
note    prints that result as one line, with what else the caller knows
report  prints a table of such lines, and judges it

The trace is a CSV of microseconds,offset,length; think times are left out.
Used by bench-shared.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time

BLOCK = 4096
# A command that succeeds and prints one line, the length of the image.
MARK = b"length\n"
MARKED = re.compile(rb"\d (bytes|[KMGT]iB)$")


def read_trace(path):
    """Offsets and lengths, whole sectors."""
    reads = []
    with open(path, encoding="ascii") as lines:
        for line in lines:
            if line[0].isdigit():
                _, offset, length = line.split(",")
                reads.append((int(offset), int(length)))
    return reads


def distinct_bytes(reads):
    """Bytes of the distinct 4 KiB blocks that the reads touch."""
    blocks = set()
    for offset, length in reads:
        blocks.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
    return len(blocks) * BLOCK


class Reader:
    """One qemu-io that has the image open and waits for commands."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.seconds = None
        self.problems = []
        self.process.stdin.write(MARK)
        self.process.stdin.flush()
        self.wait_for_mark()

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
            self.process.stdin.write(commands)
            self.process.stdin.close()

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
        if self.process.wait() != 0 or self.seconds is None:
            raise SystemExit("a qemu-io failed: " + "; ".join(self.problems[:3]))


def run(options):
    reads = read_trace(options.trace)
    commands = b"".join(b"read -q %d %d\n" % read for read in reads) + MARK
    readers = []
    try:
        readers = [Reader(options.command) for _ in range(options.readers)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        for reader in readers:
            reader.start(commands, began)
        for reader in readers:
            reader.finish()
    finally:
        for reader in readers:
            if reader.process.poll() is None:
                reader.process.kill()
                reader.process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sorted(reader.seconds for reader in readers)
    result = {
        "readers": options.readers,
        "first-seconds": seconds[0],
        "last-seconds": seconds[-1],
        "cpu-seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
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
    return {"run": run, "note": note, "report": report}[options.do](options)


if __name__ == "__main__":
    sys.exit(main())
