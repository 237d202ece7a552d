#!/usr/bin/env python3
"""qemu_trace.py - what each block node of a QEMU process was asked to read.

Reads the log of QEMU's own trace events bdrv_open_common and
bdrv_co_preadv_part (boot.sh turns them on) and sums, for each node, the reads,
their bytes, and the distinct 4 KiB blocks they touched. That is how "what the
base served" is counted: by QEMU itself, in the same way whatever stands above
the base.

Used by: report.py as a module; tests on the command line, which prints JSON, and
record-boot, for which it prints each read (--csv).
Promises: a node is one opening of one file; an address that QEMU uses again for
another node starts a new one. Lines of other events are skipped.
"""

import argparse
import json
import re
import sys

BLOCK = 4096

OPEN = re.compile(r'bdrv_open_common bs (0x[0-9a-f]+) filename "(.*)" flags 0x[0-9a-f]+ format_name "(.*)"')
# What comes before an event when QEMU runs with `-msg timestamp=on`.
TIME = re.compile(r"^\d+@(\d+)\.(\d{6}):")
READ = re.compile(r"bdrv_co_preadv_part bs (0x[0-9a-f]+) offset (0x[0-9a-f]+|\d+) bytes (0x[0-9a-f]+|\d+)")


class Node:
    """One opened block node and what was read from it."""

    def __init__(self, filename, driver):
        self.filename = filename
        self.driver = driver
        self.reads = 0
        self.bytes = 0
        self.blocks = set()

    def add(self, offset, length):
        self.reads += 1
        self.bytes += length
        if length:
            self.blocks.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    def summary(self):
        return {
            "driver": self.driver,
            "filename": self.filename,
            "reads": self.reads,
            "bytes": self.bytes,
            "distinct-blocks": len(self.blocks),
            "distinct-bytes": len(self.blocks) * BLOCK,
        }


def nodes(path):
    """All nodes in the order of their opening."""
    found = []
    by_address = {}
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in log:
            read = READ.search(line)
            if read:
                address, offset, length = read.groups()
                if address not in by_address:
                    by_address[address] = Node("", "unknown")
                    found.append(by_address[address])
                by_address[address].add(int(offset, 0), int(length, 0))
                continue
            opened = OPEN.search(line)
            if opened:
                address, filename, driver = opened.groups()
                by_address[address] = Node(filename, driver)
                found.append(by_address[address])
    return found


def timeline(path, driver, filename):
    """Microseconds since the log began, offset and length of each read of the nodes of that driver
    whose file name ends in `filename`."""
    chosen = {}
    began = None
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in log:
            time = TIME.match(line)
            if not time:
                continue
            now = int(time.group(1)) * 1000000 + int(time.group(2))
            began = now if began is None else began
            opened = OPEN.search(line)
            if opened:
                address, name, of = opened.groups()
                chosen[address] = of == driver and name.endswith(filename)
                continue
            read = READ.search(line)
            if read and chosen.get(read.group(1)):
                yield now - began, int(read.group(2), 0), int(read.group(3), 0)


def select(found, driver=None, filename=None):
    """The nodes of that driver whose file name ends in `filename`, as one."""
    total = Node(filename or "", driver or "")
    for node in found:
        if driver is not None and node.driver != driver:
            continue
        if filename is not None and not node.filename.endswith(filename):
            continue
        total.reads += node.reads
        total.bytes += node.bytes
        total.blocks |= node.blocks
    return total


def main():
    parser = argparse.ArgumentParser(description="Sums what each block node of a QEMU process was asked to read.")
    parser.add_argument(
        "trace", nargs="+", help="logs of the events bdrv_open_common and bdrv_co_preadv_part"
    )
    parser.add_argument("--driver", help="only nodes of this driver (nfs, file, raw, qcow2, ...), summed")
    parser.add_argument("--filename", help="only nodes whose file name ends so, summed")
    parser.add_argument(
        "--beyond",
        metavar="TRACE",
        help="also count the distinct blocks that this trace's nodes of the same choice did not read",
    )
    parser.add_argument(
        "--csv",
        action="store_true",
        help="print microseconds, offset and length of each read of the one trace, taken with -msg timestamp=on",
    )
    options = parser.parse_args()

    if options.csv:
        print("microseconds,offset,length")
        for read in timeline(options.trace[0], options.driver or "raw", options.filename or ""):
            print(*read, sep=",")
        return
    found = [node for trace in options.trace for node in nodes(trace)]
    if options.driver is None and options.filename is None:
        result = [node.summary() for node in found if node.reads]
    else:
        chosen = select(found, options.driver, options.filename)
        result = chosen.summary()
        if options.beyond:
            other = select(nodes(options.beyond), options.driver, options.filename)
            result["blocks-beyond"] = len(chosen.blocks - other.blocks)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
