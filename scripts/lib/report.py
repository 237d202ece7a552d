#!/usr/bin/env python3
"""report.py - from the raw records of measured boots to figures, tables and a
verdict.

Used by: lab.sh (`boot`: one boot's result), demo (`demo`), bench-boot (`bench`),
and test, which reads the JSON.
Promises: JSON on --json FILE (`boot`: on standard output), a table for people on
standard output. `demo` and `bench` exit with 1 when a limit was passed that does
not depend on the machine's load: every guest came up, and a warm boot took at
most 1 % of the cold one's bytes from the base, by QEMU's count and on the wire.

A boot's result: name, kind, qemu, up, seconds, cpu-seconds, guest-uptime,
reason; base: reads, bytes, distinct-bytes (4 KiB blocks), wire-bytes; cache
(null without one): the keys of `vmcache info`, those of `vmcache stats` as this
boot's share, and hit-rate (what needed no base, of all the guest read).
"""

import argparse
import json
import statistics
import sys

import qemu_trace

# The base may serve this many times the distinct blocks of a cold boot.
COLD_LIMIT = 1.03
WARM_SHARE_LIMIT = 0.01
TIME_RATIO_LIMIT = 1.05
READ_KEYS = ("hit-bytes", "zero-bytes", "miss-bytes", "waited-bytes")


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def store(path, value):
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")


# ---- one boot --------------------------------------------------------------


def stats_share(before, after):
    """This boot's share of counters that go on counting, unless they began anew."""
    numbers = {key: value for key, value in after.items() if isinstance(value, int)}
    if any(before.get(key, 0) > value for key, value in numbers.items() if key != "processes"):
        return numbers
    return {key: value - before.get(key, 0) for key, value in numbers.items()}


def boot(options):
    directory = options.directory
    result = {"name": options.name, "kind": options.kind, "qemu": options.qemu}
    result.update(load(f"{directory}/boot.json"))
    served = qemu_trace.select(
        qemu_trace.nodes(f"{directory}/trace.log"), options.base_driver, options.base_filename
    ).summary()
    result["base"] = {key: served[key] for key in ("reads", "bytes", "distinct-bytes")}
    result["base"]["wire-bytes"] = options.wire_bytes
    result["cache"] = None
    if options.info:
        info = load(options.info)
        share = stats_share(load(options.stats_before), load(options.stats_after))
        read = sum(share[key] for key in READ_KEYS)
        result["cache"] = {
            "cached-bytes": info["cached-bytes"],
            "cached-zero-bytes": info["zero-bytes"],
            "actual-size": info["actual-size"],
            "state": info["state"],
            **share,
            "hit-rate": round((share["hit-bytes"] + share["zero-bytes"]) / read, 6) if read else None,
        }
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


# ---- tables ----------------------------------------------------------------


def megabytes(count):
    return f"{count / 1e6:,.2f} MB" if count < 1e7 else f"{count / 1e6:,.1f} MB"


def table(rows):
    """Rows of strings, the first the heading; the first column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


HEADING = ["boot", "seconds", "base reads", "base bytes", "on the wire", "cached", "hit rate"]


def row(title, result):
    cache = result["cache"]
    rate = cache and cache["hit-rate"]
    base = result["base"]
    return [
        title,
        f"{result['seconds']:.1f}" if result["up"] else "failed",
        f"{base['reads']:,}",
        megabytes(base["bytes"]),
        megabytes(base["wire-bytes"]),
        megabytes(cache["cached-bytes"]) if cache else "-",
        "-" if rate is None else f"{rate:.2%}",
    ]


def share(warm, cold, key):
    return warm["base"][key] / max(cold["base"][key], 1)


def cold_problems(cold):
    """What is wrong with what the base served to a cold boot, as sentences."""
    base = cold["base"]
    if base["bytes"] <= COLD_LIMIT * base["distinct-bytes"]:
        return []
    return [
        f"{cold['name']} took {megabytes(base['bytes'])} from the base, more than {COLD_LIMIT} times the "
        f"{megabytes(base['distinct-bytes'])} of distinct 4 KiB blocks"
    ]


def warm_problems(cold, warm):
    """What is wrong with a warm boot after a cold one, as sentences."""
    found = []
    for key, where in (("bytes", "by QEMU's count"), ("wire-bytes", "on the wire")):
        if share(warm, cold, key) > WARM_SHARE_LIMIT:
            found.append(
                f"{warm['name']} took {megabytes(warm['base'][key])} from the base {where}, more than "
                f"{WARM_SHARE_LIMIT:.0%} of the {megabytes(cold['base'][key])} of {cold['name']}"
            )
    return found


def boot_problems(result):
    found = []
    if result["reason"]:
        found.append(f"{result['name']}: {result['reason']}")
    # The two counts are independent: they must tell the same story.
    base = result["base"]
    if result["kind"] != "raw" and base["wire-bytes"] < base["bytes"]:
        found.append(
            f"{result['name']}: QEMU counts {base['bytes']} bytes from the base, "
            f"but only {base['wire-bytes']} crossed the network"
        )
    return found


def conclude(problems):
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def demo(options):
    nfs, cold, warm = (load(f"{options.directory}/{name}/result.json") for name in ("nfs", "cold", "warm"))
    problems = [problem for result in (nfs, cold, warm) for problem in boot_problems(result)]
    problems += cold_problems(cold) + warm_problems(cold, warm)
    store(
        options.json,
        {
            "qemu": options.qemu,
            "base-filename": options.base,
            "boots": [nfs, cold, warm],
            "cold-bytes-per-distinct-byte": round(cold["base"]["bytes"] / max(cold["base"]["distinct-bytes"], 1), 4),
            "warm-share-of-cold-bytes": round(share(warm, cold, "bytes"), 6),
            "problems": problems,
        },
    )
    print()
    print(f"Debian 12 to multi-user with QEMU {options.qemu}, base {options.base}")
    print()
    print(table([HEADING, row("straight from NFS", nfs), row("empty cache", cold), row("warm cache", warm)]))
    print()
    print(f"The warm boot took {share(warm, cold, 'bytes'):.3%} of the cold boot's bytes from the base.")
    return conclude(problems)


# ---- repeated boots --------------------------------------------------------


def median(results, *keys):
    values = []
    for value in results:
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.median(values)


def bench(options):
    kinds = ("raw", "nfs", "cold", "warm")
    titles = ("local raw file", "straight from NFS", "empty cache", "warm cache")
    boots = {
        kind: [load(f"{options.directory}/{kind}-{number}/result.json") for number in range(1, options.rounds + 1)]
        for kind in kinds
    }
    problems = [problem for results in boots.values() for result in results for problem in boot_problems(result)]
    for cold, warm in zip(boots["cold"], boots["warm"]):
        problems += cold_problems(cold) + warm_problems(cold, warm)
    if any(not result["up"] for results in boots.values() for result in results):
        return conclude(problems)

    summary = {}
    for kind, results in boots.items():
        summary[kind] = {key: median(results, key) for key in ("seconds", "cpu-seconds")}
        for key in ("reads", "bytes", "distinct-bytes", "wire-bytes"):
            summary[kind][f"base-{key}"] = median(results, "base", key)

    def ratio(one, other, key):
        return round(summary[one][key] / max(summary[other][key], 1e-9), 6)

    ratios = {
        "warm-to-raw-seconds": ratio("warm", "raw", "seconds"),
        "cold-to-nfs-seconds": ratio("cold", "nfs", "seconds"),
        "warm-to-raw-cpu-seconds": ratio("warm", "raw", "cpu-seconds"),
        "cold-to-nfs-cpu-seconds": ratio("cold", "nfs", "cpu-seconds"),
        "cold-bytes-per-distinct-byte": round(
            summary["cold"]["base-bytes"] / max(summary["cold"]["base-distinct-bytes"], 1), 4
        ),
        "warm-share-of-cold-bytes": ratio("warm", "cold", "base-bytes"),
    }
    if options.strict:
        for key in ("warm-to-raw-seconds", "cold-to-nfs-seconds"):
            if ratios[key] > TIME_RATIO_LIMIT:
                problems.append(f"{key} is {ratios[key]:.3f}, more than {TIME_RATIO_LIMIT}")
    store(
        options.json,
        {
            "qemu": options.qemu,
            "base-filename": options.base,
            "rounds": options.rounds,
            "medians": summary,
            "ratios": ratios,
            "boots": [result for number in range(options.rounds) for result in (boots[kind][number] for kind in kinds)],
            "problems": problems,
        },
    )

    rows = [["boot", "seconds", "(least..most)", "CPU s", "base reads", "base bytes", "distinct 4 KiB", "on the wire"]]
    for kind, title in zip(kinds, titles):
        seconds = [result["seconds"] for result in boots[kind]]
        line = summary[kind]
        rows.append(
            [
                title,
                f"{line['seconds']:.2f}",
                f"{min(seconds):.2f}..{max(seconds):.2f}",
                f"{line['cpu-seconds']:.2f}",
                f"{line['base-reads']:,.0f}",
                megabytes(line["base-bytes"]),
                megabytes(line["base-distinct-bytes"]),
                megabytes(line["base-wire-bytes"]),
            ]
        )
    print()
    print(f"Debian 12 to multi-user with QEMU {options.qemu}, medians of {options.rounds} interleaved rounds")
    print()
    print(table(rows))
    print()
    print(
        f"warm / local raw: {ratios['warm-to-raw-seconds']:.3f} in seconds, "
        f"{ratios['warm-to-raw-cpu-seconds']:.3f} in CPU time (aim: at most {TIME_RATIO_LIMIT})"
    )
    print(
        f"cold / plain NFS: {ratios['cold-to-nfs-seconds']:.3f} in seconds, "
        f"{ratios['cold-to-nfs-cpu-seconds']:.3f} in CPU time (aim: at most {TIME_RATIO_LIMIT})"
    )
    print(
        f"cold: {ratios['cold-bytes-per-distinct-byte']:.3f} bytes from the base for each distinct one (aim: at most "
        f"{COLD_LIMIT}); warm: {ratios['warm-share-of-cold-bytes']:.3%} of the cold boot's (aim: at most {WARM_SHARE_LIMIT:.0%})"
    )
    return conclude(problems)


# ---- command line ----------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("boot", help="one boot's result, as JSON on standard output")
    one.add_argument("--name", required=True)
    one.add_argument("--kind", required=True)
    one.add_argument("--qemu", required=True)
    one.add_argument("--directory", required=True, help="where boot_guest left boot.json and trace.log")
    one.add_argument("--base-driver", required=True, help="driver of the base's protocol node: nfs, file")
    one.add_argument("--base-filename", help="and its file name, where the driver alone does not say")
    one.add_argument("--wire-bytes", type=int, required=True)
    one.add_argument("--info", help="`vmcache info --output=json` after the boot")
    one.add_argument("--stats-before", help="`vmcache stats --output=json` before the boot")
    one.add_argument("--stats-after", help="and after it")
    one.set_defaults(run=boot)

    for name, run, text in (
        ("demo", demo, "table and verdict of the boots nfs, cold, warm"),
        ("bench", bench, "medians of the boots raw-N, nfs-N, cold-N, warm-N"),
    ):
        many = commands.add_parser(name, help=text)
        many.add_argument("--directory", required=True, help="the run's directory, with a directory for each boot")
        many.add_argument("--qemu", required=True)
        many.add_argument("--base", required=True)
        many.add_argument("--json")
        many.set_defaults(run=run)
        if name == "bench":
            many.add_argument("--rounds", type=int, required=True)
            many.add_argument("--strict", action="store_true")

    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
