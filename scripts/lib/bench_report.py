"""bench_report.py - what a run of bench found: tables of medians, and which targets
are met.

Used by: bench.py and its experiments, bench_plot.py and bench_readme.py.
Promises: figures are medians over the rounds, with the least and the greatest beside
the first one where there are several. What was not measured is in no table; its target is
named if its experiment was run, and neither met nor missed.
"""

import statistics

import report

MIB = 1 << 20
# What `reads` tells apart (bench_reads.py), and two of its kinds.
FIRST, REPEATED, EMPTY = "first reads", "repeated reads", "page cache empty"
FLOOR, DIRECT = "preadv2 alone", "raw native O_DIRECT"
# The phases of a competitor (bench_lab.py) in which nothing has to be fetched.
STORED = ("warm", "finished", "copied")
# What a process may take beyond its queue's bound: what the queue is kept in.
QUEUE_SLACK = 4 * MIB
NOT_MEASURED = "not measured here"
# What the targets are about. Depths of reads; machines that start at once, on as many nodes and on one;
# how many measurements of many nodes there have to be, as these take the most time; states of a machine.
DEPTHS = (1, 64)
MANY_NODES, MANY_MACHINES = 64, 16
FEWEST_WITH_NODES = 2
IDLE = ("started", "has read a boot")
# 4 KiB at random: the depth, the other, how many times its reads in a second.
WARM_TARGETS = (
    (1, "raw threads", 8),
    (1, "raw io_uring", 1.25),
    (1, FLOOR, 0.95),
    (64, "raw threads", 3.5),
    (64, "raw io_uring", 1.35),
    (64, FLOOR, 0.95),
)


def median(rows, key, **where):
    """The median of a value over the rows in which all of `where` holds, or None."""
    values = [row[key] for row in rows if all(row.get(name) == wanted for name, wanted in where.items())]
    return statistics.median(values) if values else None


# ---- tables ----------------------------------------------------------------


def seconds(number):
    return f"{number:.2f}" if number >= 0.1 else f"{number:.3f}"


def milliseconds(number):
    return f"{number * 1e3:.2f}"


def microseconds(number):
    return f"{number * 1e6:.2f}"


def megabytes(number):
    number /= 1e6
    return f"{number:,.2f}" if number < 1 else f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"


def count(number):
    return f"{number:,.0f}"


def ratio(number):
    return f"{number:.3f}"


def share(number):
    return f"{number:.1%}"


def size(number):
    if not number:
        return "none"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            break
        number /= 1024
    else:
        unit = "TiB"
    return f"{number:g} {unit}"


def distinct(row):
    return row["link-bytes"] / row["distinct-bytes"]


REPLAY = [
    ("last done s", "last-seconds", seconds),
    ("first s", "first-seconds", seconds),
    ("CPU s", "cpu-seconds", seconds),
    ("link MB", "link-bytes", megabytes),
    ("x distinct", distinct, ratio),
]
MEMORY = {"rss": "Rss", "pss": "Pss", "private": "own"}
CACHED = ("image MB", "image-bytes", megabytes)
# For each experiment: what it is, what its tables are divided by, what makes a row, and the
# columns, the first with its spread.
TABLES = {
    "nodes": (
        "One base, one machine on each node, a cache for each node; chained: empty caches behind a warm one\n"
        "that the storage node publishes in its memory (a qcow2 in a tmpfs, over NFS); finished: copy-on-read off\n"
        "again, from the images it made",
        [("network", "{} link"), ("boot-seconds", "{:g} s of think time")],
        [("nodes", "nodes", str), ("competitor", "", str)],
        REPLAY,
    ),
    "together": (
        "Machines on one node, 1 Gbit/s",
        [],
        [("machines", "machines", str), ("competitor", "", str)],
        REPLAY,
    ),
    "reads": (
        "Reads of a warm image, one qemu-img bench; sequential from 1 MiB on, at random below. First reads: each\n"
        "block once after the open, vmcache looks at its checksum; repeated: the same process goes on reading",
        [("state", "{}")],
        [("block-bytes", "block", size), ("depth", "depth", str), ("competitor", "", str)],
        [
            ("reads/s", "reads-per-second", count),
            ("MB/s", "bytes-per-second", megabytes),
            ("CPU us/read", "cpu-seconds-per-read", microseconds),
        ],
    ),
    "open": (
        "Opening a warm image, reading 4 KiB and closing it",
        [],
        [("virtual-bytes", "virtual size", size), ("competitor", "", str)],
        [("ms", "seconds", milliseconds)],
    ),
    "memory": (
        "Memory of a qemu-system-x86_64 whose processor is stopped",
        [],
        [("machines", "machines", str), ("state", "", str), ("competitor", "", str)],
        [(f"{name} MB", f"{key}-bytes", megabytes) for key, name in MEMORY.items()],
    ),
    "queue": (
        "The most memory of a process that reads a local base through an empty cache, 2 MiB at once, faster\n"
        "than it is stored; what was dropped found the populate queue full",
        [],
        [("depth", "depth", str), ("competitor", "", str)],
        [("peak MB", "peak-bytes", megabytes), ("dropped MB", "dropped-bytes", megabytes)],
    ),
    "clusters": (
        "Cluster sizes (unit: the least that is fetched), one machine, 1 Gbit/s",
        [],
        [("cluster-bytes", "cluster", size), ("unit-bytes", "unit", size), ("competitor", "", str)],
        [REPLAY[0], *REPLAY[3:], CACHED],
    ),
    "quota": (
        "Quotas, one machine, 1 Gbit/s",
        [],
        [("quota-bytes", "quota", size), ("competitor", "", str)],
        [REPLAY[0], REPLAY[3], ("hit rate", "hit-rate", share), CACHED],
    ),
    "bases": (
        "Different bases on a storage node with a slow disk: one read at a time, each {disk-milliseconds} ms more,\n"
        "and memory in front that keeps what was read; all over 1 Gbit/s",
        [("nodes", "{} nodes")],
        [("bases", "bases", str), ("competitor", "", str)],
        REPLAY,
    ),
    "guests": (
        "A Debian 12 boots to multi-user, emulated, one guest on each node, 1 Gbit/s",
        [],
        [("machines", "guests", str), ("competitor", "", str)],
        REPLAY[:4],
    ),
}


def groups(rows, keys):
    """The rows by their values of the keys, in the order of values that are numbers."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    place = {key: number for number, key in enumerate(found)}

    def numbers(key):
        return [0 if isinstance(part, str) else part for part in key]

    return sorted(found.items(), key=lambda one: (numbers(one[0]), place[one[0]]))


def values(rows, key):
    return [key(row) if callable(key) else row[key] for row in rows]


def table(rows, names, columns):
    found_groups = groups(rows, [key for key, *_ in names])
    several = any(len(group) > 1 for _, group in found_groups)
    # The competitor stands first, to the left.
    names = sorted(names, key=lambda name: name[0] != "competitor")
    heading = [title for _, title, _ in names]
    for number, (title, *_) in enumerate(columns):
        heading += [title, "least..greatest"] if several and number == 0 else [title]
    lines = [heading]
    for _, group in found_groups:
        line = [show_name(group[0][key]) for key, _, show_name in names]
        for number, (_, of, show_value) in enumerate(columns):
            found = values(group, of)
            line.append(show_value(statistics.median(found)))
            if several and number == 0:
                line.append(f"{show_value(min(found))}..{show_value(max(found))}" if len(found) > 1 else "once")
        lines.append(line)
    return report.table(lines)


def show(results):
    """Everything that was measured, for people."""
    rows = results["measurements"]
    machine = results["machine"]
    print(f"{machine['cpu']}, {machine['cores']} processors, {machine['memory-bytes'] / (1 << 30):.0f} GiB")
    print(f"{machine['system']}, Linux {machine['kernel']}; {machine['programs'].get('qemu-io')}")
    loads = " ".join(f"{load:.2f}" for load in machine["load-at-start"])
    print(f"load at start {loads}; took {results['seconds']:.0f} s")
    for name, (title, sections, names, columns) in TABLES.items():
        mine = [row for row in rows if row["experiment"] == name]
        if not mine:
            continue
        print()
        print(f"== {name}: {title.format_map(mine[0])}")
        for key, group in groups(mine, [section for section, _ in sections]):
            print()
            if sections:
                print(", ".join(text.format(part) for (_, text), part in zip(sections, key)))
            # What only some of the competitors have, such as an image, the others lack.
            shown = [column for column in columns if callable(column[1]) or all(column[1] in row for row in group)]
            print(table(group, names, shown))
    print()
    print("== targets")
    print()
    lines = [["target", "needed", "measured", ""]]
    for target in results["targets"]:
        lines.append([target["target"], target["needed"], target["measured"], target["verdict"]])
    print(report.table(lines))


# ---- targets ---------------------------------------------------------------


def target(text, needed, measured, met, **figures):
    return {
        "target": text,
        "needed": needed,
        "measured": measured,
        "verdict": "met" if met else "NOT MET",
        **figures,
    }


def unmeasured(text, needed):
    """A target that there are too few figures for. It is named all the same."""
    return {"target": text, "needed": needed, "measured": "-", "verdict": NOT_MEASURED}


def paired(rows, key, mine, other):
    """Ours as a multiple of another's, round by round: both were measured close to each other."""
    found = []
    for number in sorted({row["round"] for row in rows}):
        pair = [median(rows, key, round=number, **where) for where in (mine, other)]
        if None not in pair:
            found.append(pair[0] / pair[1])
    return found


def compare(text, limit, times, fewest, least=False):
    """A target for multiples: their median at most, or at least, the limit."""
    needed = f"{'>=' if least else '<='} {limit}"
    if len(times) < fewest:
        return unmeasured(text, needed)
    middle = statistics.median(times)
    measured = f"{middle:.3f}"
    if len(times) > 1:
        measured += f" ({min(times):.3f}..{max(times):.3f})"
    met = middle >= limit if least else middle <= limit
    return target(text, needed, measured, met, ratio=middle, ratios=times)


def reads(rows, fewest):
    def race(text, limit, kind, **where):
        sides = ({"competitor": one, **where} for one in ("vmcache", kind))
        times = paired(rows, "reads-per-second", *sides)
        return compare(f"{text}, against {kind}", limit, times, fewest, least=True)

    found = []
    for state in (REPEATED, FIRST):
        for depth, kind, limit in WARM_TARGETS:
            where = {"state": state, "block-bytes": 4096, "depth": depth}
            text = f"warm 4 KiB random, {state}, depth {depth}"
            found.append(race(text, limit, kind, **where))
            if kind == FLOOR:
                # The same in what one thread does, which other work on the machine does not change.
                sides = ({"competitor": one, **where} for one in ("vmcache", kind))
                times = paired(rows, "cpu-seconds-per-read", *sides)
                text = f"{text}, processor time against {kind}"
                found.append(compare(text, round(1 / limit, 2), times, fewest))
        for depth in DEPTHS:
            where = {"state": state, "block-bytes": MIB, "depth": depth}
            found.append(race(f"warm 1 MiB sequential, {state}, depth {depth}", 1, "raw io_uring", **where))
    for depth in DEPTHS:
        where = {"state": EMPTY, "depth": depth}
        found.append(race(f"page cache empty, 4 KiB random, depth {depth}", 1, "raw threads", **where))
    return found


def replays(rows, fewest):
    rows = [row for row in rows if (row["network"], row["boot-seconds"]) == ("shaped", 0)]

    def of(key, kind, nodes):
        """The median, where there is more than one measurement."""
        chosen = [row for row in rows if (row["competitor"], row["nodes"]) == (kind, nodes)]
        return median(chosen, key) if len(chosen) >= FEWEST_WITH_NODES else None

    cold, plain = ({"competitor": kind, "nodes": 1} for kind in ("vmcache cold", "plain NFS"))
    times = paired(rows, "last-seconds", cold, plain)
    found = [compare("cold boot, 1 Gbit/s: time against plain NFS", 1.02, times, fewest)]
    times = [distinct(row) for row in rows if row["competitor"] == "vmcache cold" and row["nodes"] == 1]
    found.append(compare("cold boot, 1 Gbit/s: bytes against the distinct blocks", 1.02, times, fewest))

    many = [row["nodes"] for row in rows if row["competitor"] == "vmcache warm" and row["nodes"] > 1]
    most = max(many, default=MANY_NODES)
    one, last = (of("last-seconds", "vmcache warm", count) for count in (1, most))
    # What the processors must cost: what the other nodes' replays take of them. That allows more where
    # vmcache itself takes more; so the same with what it cannot change, by how much as many readers of
    # a local raw file take longer than one.
    spent, processors = (of(key, "vmcache warm", 1) for key in ("cpu-seconds", "processors"))
    local_one, local = (of("last-seconds", "local raw file", count) for count in (1, most))
    costs = {
        "the others' processor time": spent and (most - 1) * spent / processors,
        "what a local raw file takes longer": local and local_one and max(local - local_one, 0.0),
    }
    for name, cost in costs.items():
        text = f"{most} nodes warm: the slowest, against 1.1 times one node plus {name}"
        if None in (one, last, cost):
            found.append(unmeasured(text, "-"))
            continue
        allowed = 1.1 * one + cost
        needed = f"<= {allowed:.2f} s (1.1 x {one:.2f} + {cost:.2f})"
        found.append(target(text, needed, f"{last:.2f} s", last <= allowed, ratio=last / allowed, nodes=most))
    warm, plain = (of("link-bytes", kind, most) for kind in ("vmcache warm", "plain NFS"))
    text = f"{most} nodes warm: bytes of plain NFS's"
    if None in (warm, plain):
        found.append(unmeasured(text, "< 1 %"))
    else:
        part = warm / plain
        measured = f"{part:.3%} of {plain / 1e9:.2f} GB"
        found.append(target(text, "< 1 %", measured, part < 0.01, ratio=part, nodes=most))
    return found


def sharing(rows, fewest):
    rows = [row for row in rows if row["competitor"] == "vmcache cold"]
    most = max((row["machines"] for row in rows if row["machines"] > 1), default=MANY_MACHINES)
    text = f"{most} machines on one node, cold: base bytes against one machine's"
    return [compare(text, 1.05, paired(rows, "link-bytes", {"machines": most}, {"machines": 1}), fewest)]


def memory(rows, fewest):
    found = []
    for machines in sorted({row["machines"] for row in rows}) or [1]:
        for state in IDLE:
            sides = [
                [
                    row["rss-bytes"]
                    for row in rows
                    if (row["competitor"], row["machines"], row["state"]) == (kind, machines, state)
                ]
                for kind in ("vmcache", "plain NFS")
            ]
            text = f"memory of an idle machine more than without ({machines} at once, {state})"
            if min(map(len, sides)) < fewest:
                found.append(unmeasured(text, "< 8 MiB"))
                continue
            more = statistics.mean(sides[0]) - statistics.mean(sides[1])
            found.append(target(text, "< 8 MiB", f"{more / MIB:.1f} MiB", more < 8 * MIB, bytes=more))
    return found


def opening(rows, fewest):
    rows = [row for row in rows if row["competitor"] == "vmcache"]
    sizes = ({"virtual-bytes": 1 << bits} for bits in (40, 30))
    times = paired(rows, "seconds", *sizes)
    return [compare("opening a warm 1 TiB image, against one of 1 GiB", 2, times, fewest)]


def queue(rows, fewest):
    found = []
    for option, name, bound in (("populate=on", "populate queue", 64), ("=8M", "populate-queue=8M", 8)):
        text = f"{name}, full: the most memory more than with populate=off, at the worst depth"
        needed = f"<= {bound} + {QUEUE_SLACK / MIB:.0f} MiB"
        worst = {}
        for depth in sorted({row["depth"] for row in rows}):
            here = [row for row in rows if row["depth"] == depth]
            mine = [row for row in here if row["competitor"].endswith(option)]
            without = [row["peak-bytes"] for row in here if row["competitor"].endswith("off")]
            # A queue that was never full did not show its bound.
            full = [row["peak-bytes"] for row in mine if row["dropped-bytes"]]
            if full and min(len(mine), len(without)) >= fewest:
                worst[depth] = max(full) - statistics.median(without)
        if not worst:
            found.append(unmeasured(text, needed))
            continue
        depth = max(worst, key=worst.get)
        more = worst[depth]
        measured = f"{more / MIB:.1f} MiB (depth {depth})"
        found.append(target(text, needed, measured, more <= bound * MIB + QUEUE_SLACK, bytes=more, depth=depth))
    return found


# By experiment; the others have none.
TARGETS = {
    "reads": reads,
    "nodes": replays,
    "together": sharing,
    "memory": memory,
    "queue": queue,
    "open": opening,
}


def targets(results):
    """Every target of the experiments that were run, with figures or without."""
    fewest = 2 if results["settings"]["quick"] else 3
    found = []
    for name, judge in TARGETS.items():
        if name in results["experiment-seconds"]:
            found += judge([row for row in results["measurements"] if row["experiment"] == name], fewest)
    return found
