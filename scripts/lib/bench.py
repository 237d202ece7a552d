#!/usr/bin/env python3
"""bench.py - runs the experiments of scripts/bench in rounds and keeps every measurement.

Used by: bench only, whose help says what the experiments are.
Promises: within an experiment, a round measures every cell once, every second round
the other way about, so that what else the machine does falls on all alike. --output
has results.json (also when the run is stopped: with what was measured until then),
and plots as SVG and PNG. Nothing that was not run is in any of them.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time

import tqdm

import bench_guests
import bench_lab
import bench_memory
import bench_plot
import bench_reads
import bench_replay
import bench_report

KIB, MIB = 1 << 10, 1 << 20

# In the order of their importance.
EXPERIMENTS = {
    "nodes": bench_replay.nodes,
    "together": bench_replay.together,
    "reads": bench_reads.reads,
    "open": bench_reads.opening,
    "memory": bench_memory.memory,
    "queue": bench_memory.queue,
    "clusters": bench_replay.clusters,
    "quota": bench_replay.quota,
    "bases": bench_replay.bases,
    "guests": bench_guests.guests,
}

QUICK = {
    "rounds": 2,
    "counts": [1, 4],
    "unshaped-counts": [1],
    "warm-counts": [16],
    # By nodes, of what a target judges, and of the others.
    "rounds-judged": {4: 1},
    "rounds-beside": {1: 1, 4: 1},
    "most-copy-on-read-nodes": 1,
    "most-copy-nodes": 1,
    "most-nbdkit-nodes": 16,
    "boot-counts": [],
    "boot-seconds": 10,
    "together": [1, 16],
    "together-rounds": {1: 1, 16: 1},
    "most-together-copies": 1,
    # Depths by block size.
    "reads": {4 * KIB: [1, 64], MIB: [1, 64]},
    "reads-beside": False,
    "direct-block-sizes": [4 * KIB],
    "read-mib": 256,
    "open-sizes-gib": [1, 1024],
    "opens": 200,
    "memory-machines": [4],
    "memory-rounds": 1,
    "queue-mib": 256,
    "clusters": [64 * KIB, 128 * KIB],
    "sizes-rounds": 1,
    "quotas": [16, 0],
    "bases": [1, 2],
    "bases-nodes": 2,
    "guests": [1],
    "guests-rounds": 1,
    "most-local-guests": 0,
    "copy-on-read-guests": [],
}
FULL = {
    "rounds": 3,
    "counts": [1, 4, 16, 64],
    "unshaped-counts": [1, 64],
    "warm-counts": [],
    # Many nodes take most of the time.
    "rounds-judged": {64: 2},
    "rounds-beside": {4: 1, 16: 1, 64: 1},
    "most-copy-on-read-nodes": 16,
    "most-copy-nodes": 4,
    # With two more processes for each node, 64 would measure these.
    "most-nbdkit-nodes": 16,
    "boot-counts": [1, 16],
    "boot-seconds": 10,
    "together": [1, 16],
    "together-rounds": {16: 1},
    "most-together-copies": 16,
    # Small blocks take the most time.
    "reads": {512: [1], 4 * KIB: [1, 8, 64], 64 * KIB: [1, 64], MIB: [1, 64], 2 * MIB: [1, 64]},
    "reads-beside": True,
    "direct-block-sizes": [4 * KIB, MIB],
    "read-mib": 1024,
    "open-sizes-gib": [1, 8, 64, 512, 1024],
    "opens": 400,
    "memory-machines": [1, 16],
    "memory-rounds": 3,
    "queue-mib": 512,
    "clusters": [16 * KIB, 64 * KIB, 128 * KIB, 512 * KIB, 2048 * KIB],
    "sizes-rounds": 1,
    "quotas": [8, 16, 32, 48, 64, 72, 96, 0],
    "bases": [1, 64],
    "bases-nodes": 64,
    "guests": [1, 2],
    "guests-rounds": 1,
    "most-local-guests": 1,
    "copy-on-read-guests": [1],
}


def said(*command):
    """The first line that a command prints, or nothing where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return (done.stdout or done.stderr).strip().split("\n")[0]


def machine():
    """Where the figures come from."""
    cpu = {}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, text = line.partition(":")
            cpu.setdefault(name.strip(), text.strip())
    with open("/proc/meminfo", encoding="ascii") as lines:
        memory = int(lines.readline().split()[1]) * KIB
    os_release = platform.freedesktop_os_release()
    programs = {
        "qemu-io": said("qemu-io", "--version"),
        "qemu-img": said("qemu-img", "--version"),
        "qemu-nbd": said("qemu-nbd", "--version"),
        "qemu-system-x86_64": said("qemu-system-x86_64", "--version"),
        "nbdkit": said("nbdkit", "--version"),
        "nfs-ganesha": said("dpkg-query", "--show", "nfs-ganesha"),
    }
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "memory-bytes": memory,
        # The version; what follows names a build, which is nobody else's.
        "kernel": platform.release().split("-")[0],
        "system": os_release.get("PRETTY_NAME", ""),
        "programs": {name: version for name, version in programs.items() if version},
        "load-at-start": os.getloadavg(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def order(cells, number):
    """The cells of a round: every second one the other way about."""
    chosen = [cell for cell in cells if number <= cell.rounds]
    return chosen if number % 2 else chosen[::-1]


def measure(lab, settings, names, rounds, results):
    """Runs the experiments, adding to the results."""
    rows = results["measurements"]
    for place, name in enumerate(names, 1):
        began = time.monotonic()
        # From here on it counts as one that was run, however far it comes.
        results["experiment-seconds"][name] = None
        text = f"{name} ({place} of {len(names)})"
        with EXPERIMENTS[name](lab, settings) as cells:
            expected = sum(cell.seconds for number in range(1, rounds + 1) for cell in order(cells, number))
            with tqdm.tqdm(
                total=expected,
                desc=text,
                bar_format="{desc}: {percentage:3.0f}% {bar:20} {elapsed}{postfix}",
                disable=None,
                leave=False,
            ) as bar:
                for number in range(1, rounds + 1):
                    for cell in order(cells, number):
                        bar.set_postfix_str(f"round {number} of {rounds}: {cell.text}")
                        for row in cell.call():
                            rows.append({"experiment": name, "round": number, **row})
                        bar.update(cell.seconds)
        results["experiment-seconds"][name] = round(time.monotonic() - began, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", required=True, help="for what the run makes")
    parser.add_argument("--programs", required=True, help="where libvmcache.so and vmcache are")
    parser.add_argument("--floor", help="the driver of benches/floor, for reads")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--image", help="the base, a local path")
    parser.add_argument("--export", help="the directory that the storage nodes serve")
    parser.add_argument("--memory", help="another, in the storage node's memory")
    parser.add_argument("--guest", type=json.loads, help="image, marker and machine of the guest, for guests")
    parser.add_argument("--network", action="append", default=[], metavar="NAME:NODE:SERVER:ADDRESS")
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()

    def stop(number, _frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)

    settings = QUICK if options.quick else FULL
    rounds = options.rounds or settings["rounds"]
    names = options.only.split(",")
    results = {
        "machine": machine(),
        "commit": options.commit,
        "trace": os.path.basename(options.trace),
        "settings": {**settings, "quick": options.quick, "rounds": rounds},
        "complete": False,
        "experiment-seconds": {},
        "measurements": [],
    }
    bench_plot.forget(options.output)
    began = time.monotonic()
    try:
        measure(bench_lab.Lab(options), settings, names, rounds, results)
        results["complete"] = True
    finally:
        results["seconds"] = round(time.monotonic() - began, 1)
        results["targets"] = bench_report.targets(results)
        with open(f"{options.output}/results.json", "w", encoding="utf-8") as out:
            json.dump(results, out, indent=1)
            out.write("\n")
    bench_report.show(results)
    bench_plot.draw(results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
