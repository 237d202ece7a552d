#!/usr/bin/env python3
"""bench_readme.py - what of a run of bench stands in the README: tables in Markdown on
standard output, and two figures in a directory.

Used by: bench --readme. Takes the results.json of a run, whichever experiments that had.
"""

import json
import re
import statistics
import sys

import bench_plot
import bench_report

FIGURES = ("starts", "warm")
# The release that the targets name.
QEMU = "10.0"


def markdown(heading, rows):
    """A table; all columns but the first to the right."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kind(results):
    """What run the figures are of, before anything else: its commit, and what makes it less than a full one."""
    settings, run = results["settings"], results["experiment-seconds"]
    expected = [name for name in bench_report.TABLES if name != "guests" or not settings["quick"]]
    words = ["a quick run"] if settings["quick"] else []
    if not results["complete"]:
        words.append("a run that was stopped")
    if any(name not in run for name in expected):
        words.append(f"a partial run ({', '.join(run)})")
    qemu = results["machine"]["programs"].get("qemu-io", "")
    if not re.search(rf"version {re.escape(QEMU)}(\D|$)", qemu):
        words.append(f"not with QEMU {QEMU}, which the targets are for")
    text = f"Commit {results['commit'] or 'unknown'}"
    return f"{text}: {', '.join(words)}." if words else f"{text}."


def machine(results):
    """Where the figures come from, in a sentence."""
    of = results["machine"]
    memory = of["memory-bytes"] / (1 << 30)
    programs = of["programs"]
    qemu = programs.get("qemu-io", "").split()
    server = programs.get("nfs-ganesha", "").split()
    words = [f"{of['cpu']}, {of['cores']} processors, {memory:.0f} GiB", of["system"], f"Linux {of['kernel']}"]
    words += [f"QEMU {qemu[2]}"] if len(qemu) > 2 else []
    words += [f"nfs-ganesha {server[1]}"] if len(server) > 1 else []
    rounds = results["settings"]["rounds"]
    load = results["machine"]["load-at-start"][0]
    return f"{', '.join(words)}; {of['date'][:10]}, load {load:.2f} at the start, medians of up to {rounds} rounds."


def spread(seconds):
    """The median, with the least and the greatest where there are several."""
    if not seconds:
        return ""
    middle, least, greatest = map(bench_report.seconds, (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle} ({least}–{greatest})" if len(seconds) > 1 else middle


def nodes(rows):
    """The slowest of all nodes, and what crossed the link, on the slow link."""
    mine = [
        row for row in rows if (row["experiment"], row.get("network"), row.get("boot-seconds")) == ("nodes", "shaped", 0)
    ]
    if not mine:
        return []
    counts = sorted({row["nodes"] for row in mine})
    heading = ["seconds until the slowest has started", *(f"{count} {'node' if count == 1 else 'nodes'}" for count in counts)]
    heading.append(f"MB over the link, {counts[-1]}")
    lines = []
    for name in dict.fromkeys(row["competitor"] for row in mine):
        line = [name]
        for count in counts:
            line.append(spread([row["last-seconds"] for row in mine if (row["competitor"], row["nodes"]) == (name, count)]))
        moved = bench_report.median(mine, "link-bytes", competitor=name, nodes=counts[-1])
        lines.append([*line, "" if moved is None else bench_report.megabytes(moved)])
    return [markdown(heading, lines)]


def reads(rows):
    """Reads in a second and processor time, at the least and the greatest depth."""
    mine = [row for row in rows if row["experiment"] == "reads" and row["block-bytes"] in (4096, bench_report.MIB)]
    if not mine:
        return []
    depths = sorted({row["depth"] for row in mine})
    points = [(block, depth) for block in (4096, bench_report.MIB) for depth in dict.fromkeys((depths[0], depths[-1]))]
    heading = ["reads in a second (µs of processor time each)"]
    heading += [f"{bench_report.size(block)}, depth {depth}" for block, depth in points]
    lines = []
    for state in (bench_report.FIRST, bench_report.REPEATED, bench_report.EMPTY):
        for name in dict.fromkeys(row["competitor"] for row in mine if row["state"] == state):
            line = [f"{name}, {state}"]
            for block, depth in points:
                where = {"competitor": name, "state": state, "block-bytes": block, "depth": depth}
                rate = bench_report.median(mine, "reads-per-second", **where)
                spent = bench_report.median(mine, "cpu-seconds-per-read", **where)
                line.append("" if rate is None else f"{rate:,.0f} ({spent * 1e6:.1f})")
            lines.append(line)
    return [markdown(heading, lines)]


def guests(rows):
    """Boots of real guests."""
    mine = [row for row in rows if row["experiment"] == "guests"]
    if not mine:
        return []
    counts = sorted({row["machines"] for row in mine})
    heading = ["seconds until the slowest guest is up (MB over the link)"]
    heading += [f"{count} {'guest' if count == 1 else 'guests'}" for count in counts]
    lines = []
    for name in dict.fromkeys(row["competitor"] for row in mine):
        line = [name]
        for count in counts:
            chosen = [row for row in mine if (row["competitor"], row["machines"]) == (name, count)]
            middle = [statistics.median(row[key] for row in chosen) for key in ("last-seconds", "link-bytes") if chosen]
            line.append(f"{middle[0]:.1f} ({middle[1] / 1e6:,.1f})" if middle else "")
        lines.append(line)
    return [markdown(heading, lines)]


def targets(results):
    """What was promised, and what came out."""
    lines = [[of["target"], of["needed"], of["measured"], of["verdict"]] for of in results["targets"]]
    return [markdown(["target", "needed", "measured", ""], lines)] if lines else []


def text(results):
    """All of it."""
    rows = results["measurements"]
    parts = [f"{kind(results)} {machine(results)}", *nodes(rows), *guests(rows), *reads(rows), *targets(results)]
    return "\n\n".join(parts) + "\n"


def main():
    with open(sys.argv[1], encoding="utf-8") as lines:
        results = json.load(lines)
    bench_plot.draw(results, sys.argv[2], FIGURES)
    print(text(results), end="")


if __name__ == "__main__":
    main()
