"""bench_guests.py - the experiment of bench that boots real guests: a Debian 12 to
multi-user, from the storage node over 1 Gbit/s, as many at once as the processors
carry.

Used by: bench.py. The guests are emulated (boot.sh says why), so their times are their
processors' for the most part; what the storage node serves is not.
"""

import contextlib
import json
import os
import resource
import subprocess

import bench_lab
from bench_lab import CopyOnRead, Local, Plain, Vmcache
from bench_replay import Cell

# Seconds that a boot takes where each guest has a processor, for the progress bar; and the most.
BOOT_SECONDS = 18
LIMIT = 300


def boot(guest, machines, directory):
    """Boots all of them at once; gives the seconds until each was up, the quickest first, and the
    processor time of all. A guest that does not come up ends the run."""
    script = f"{os.path.dirname(os.path.abspath(__file__))}/boot.py"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with bench_lab.Servers() as start:
        running = []
        for number, machine in enumerate(machines):
            name = f"{directory}/guest-{number}"
            words = ["python3", script, "--log", f"{name}.serial", "--stderr", f"{name}.stderr"]
            words += ["--result", f"{name}.json", "--marker", guest["marker"], "--limit", str(LIMIT), "--"]
            # Where snapshot=on puts what the guest writes.
            words += ["env", f"TMPDIR={directory}", *machine.booted(), *guest["machine"]]
            running.append((start(words, name), name))
        for child, _ in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LIMIT + 120)
    results = []
    for _, name in running:
        with open(f"{name}.json", encoding="utf-8") as lines:
            results.append(json.load(lines))
        if results[-1]["reason"]:
            with open(f"{name}.stderr", encoding="utf-8", errors="replace") as lines:
                raise SystemExit(f"a guest: {results[-1]['reason']}; {lines.read().strip()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return sorted(result["seconds"] for result in results), spent


@contextlib.contextmanager
def guests(lab, settings):
    """Real boots, one guest on each node, each node with a cache of its own."""
    guest = lab.guest
    there = lab.on(guest["image"], os.stat(guest["image"]).st_size, ["shaped"])
    network = there.networks["shaped"]

    def call(one, count):
        for row in bench_lab.measure(
            there, network, one, count, count, start=lambda machines, directory: boot(guest, machines, directory)
        ):
            del row["distinct-bytes"], row["boot-seconds"]
            yield row

    def cell(one, count):
        turns = max(count / os.cpu_count(), 1)
        text = f"{one.title}, {count} {'guest' if count == 1 else 'guests'}"
        return Cell(text, BOOT_SECONDS * turns * len(one.phases), lambda: call(one, count), settings["guests-rounds"])

    # Nobody reads the base from the disk, whoever is first.
    with open(guest["image"], "rb") as image:
        while image.read(1 << 22):
            pass
    cells = []
    for count in settings["guests"]:
        everybody = [Local()] if count <= settings["most-local-guests"] else []
        everybody += [Plain(), Vmcache()]
        everybody += [CopyOnRead()] if count in settings["copy-on-read-guests"] else []
        cells += [cell(one, count) for one in everybody]
    yield cells
