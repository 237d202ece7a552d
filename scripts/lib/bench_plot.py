"""bench_plot.py - draws what a run of bench found, as SVG and PNG.

Used by: bench.py. `bench_plot.py RESULTS.json DIRECTORY` draws a run again.
Promises: one figure for each experiment that was run; points are medians, bars
reach from the least to the greatest. Colours are told apart by colour-blind people
(Okabe and Ito's), lines are named where they end.
"""

import contextlib
import json
import os
import statistics
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import bench_report

BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
VERMILLION, ORANGE, PINK, GREY = "#D55E00", "#E69F00", "#CC79A7", "#777777"
# By the beginning of a competitor's name, the longest first.
COLOURS = {
    "vmcache chained": SKY,
    "vmcache, first": SKY,
    "vmcache": BLUE,
    "plain": VERMILLION,
    "copy-on-read extended": PINK,
    "copy-on-read": ORANGE,
    "nbdkit": GREEN,
    "full copy": GREY,
    "local raw": BLACK,
    "preadv2 alone": GREY,
    "raw threads": VERMILLION,
    "raw io_uring": ORANGE,
    "raw native": GREEN,
    "qcow2": PINK,
    "raw": VERMILLION,
}
# Points from one name to the next, and what leads from the end of a line to its name.
LABEL_GAP = 10.5
LEADER = {"arrowstyle": "-", "linewidth": 0.8, "linestyle": ":", "relpos": (0, 0.5)}

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": "#444444",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "vmcache",
        "figure.constrained_layout.use": True,
    }
)


def colour(name):
    return next((code for start, code in COLOURS.items() if name.startswith(start)), GREY)


def series(rows, x, y, name="competitor"):
    """For each competitor its points: x and the values of all rounds."""
    found = {}
    for row in rows:
        value = y(row) if callable(y) else row[y]
        found.setdefault(row[name], {}).setdefault(row[x], []).append(value)
    return found


def lines(axis, found, log_y=True, log_x=2, strong="vmcache"):
    """A line for each series, named at its end."""
    ends = []
    for name, points in found.items():
        places = sorted(points)
        middle = [statistics.median(points[place]) for place in places]
        low = [value - min(points[place]) for place, value in zip(places, middle)]
        high = [max(points[place]) - value for place, value in zip(places, middle)]
        axis.errorbar(
            places,
            middle,
            yerr=[low, high],
            color=colour(name),
            linewidth=2.4 if name.startswith(strong) else 1.4,
            linestyle="--" if name.endswith("cold") and not name.startswith(strong) else "-",
            marker="o",
            markersize=4,
            elinewidth=1,
            capsize=2,
            zorder=3 if name.startswith(strong) else 2,
        )
        ends.append((middle[-1], places[-1], name))
    if log_x:
        axis.set_xscale("log", base=log_x)
        every = sorted({place for points in found.values() for place in points})
        axis.set_xticks(every)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
        if len(every) == 1:
            axis.set_xlim(every[0] / 2, every[0] * 2)
    if log_y:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    else:
        axis.set_ylim(bottom=0)
    axis.named = ends


def name_lines(figure):
    """The names at the ends of the lines, moved apart; when all axes have their final size."""
    figure.canvas.draw()
    for axis in figure.axes:
        ends = sorted(getattr(axis, "named", []))
        unit = figure.dpi / 72
        spots = [axis.transData.transform((place, value))[1] for value, place, _ in ends]
        lowest = min(spots, default=0.0)
        # From the bottom up, then from the top down, so that none leaves the axes for long.
        for number in range(1, len(spots)):
            spots[number] = max(spots[number], spots[number - 1] + LABEL_GAP * unit)
        top = axis.transAxes.transform((0, 1))[1]
        if spots and spots[-1] > top:
            spots[-1] = max(top, lowest)
            for number in range(len(spots) - 2, -1, -1):
                spots[number] = min(spots[number], spots[number + 1] - LABEL_GAP * unit)
        to_axes = axis.transAxes.inverted()
        for (value, place, name), spot in zip(ends, spots):
            axis.annotate(
                name,
                (place, value),
                xytext=(1.03, to_axes.transform((0, spot))[1]),
                textcoords="axes fraction",
                arrowprops={**LEADER, "color": colour(name)},
                color=colour(name),
                fontsize=8,
                fontweight="bold" if name.startswith("vmcache") else "normal",
                va="center",
                annotation_clip=False,
            )


def bars(axis, found, text, spread=True):
    """A bar for each competitor, the first on top, with its figure at its end: the median, and the
    least and the greatest, in words or as a line."""
    names = list(found)[::-1]
    middle = [statistics.median(found[name]) for name in names]
    axis.barh(names, middle, color=[colour(name) for name in names], height=0.65)
    for number, (name, value) in enumerate(zip(names, middle)):
        least, most = min(found[name]), max(found[name])
        words = f"  ({text(least)} to {text(most)})" if spread and text(least) != text(most) else ""
        if not spread:
            axis.hlines(number, least, most, color="#222222", linewidth=1)
        place = (value if spread else most, number)
        axis.annotate(f"{text(value)}{words}", place, (4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, max(max(found[name]) for name in names) * (1.35 if spread else 1.2))


def panels(rows, columns, width=5.6, height=3.6):
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return figure, axes


def plain_numbers(axis):
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def sizes(axis):
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bench_report.size(value)))
    axis.tick_params(axis="x", labelrotation=30)


# ---- one figure for each experiment ----------------------------------------


def is_warm(row):
    return row["competitor"].endswith(bench_report.STORED) or row["competitor"].startswith("local")


def is_cold(row):
    return row["competitor"].endswith(("cold", "with copying"))


def without_phase(name):
    first, _, last = name.rpartition(" ")
    return first if last in ("cold", *bench_report.STORED) else name


def nodes(rows):
    """Time of the slowest machine, over the nodes."""
    wheres = sorted({(row["boot-seconds"], row["network"]) for row in rows})
    figure, axes = panels(2, len(wheres))
    for column, (boot, network) in enumerate(wheres):
        link = "1 Gbit/s link" if network == "shaped" else "unshaped link"
        think = f", {boot:g} s of think time" if boot else ", no think time"
        mine = [row for row in rows if (row["boot-seconds"], row["network"]) == (boot, network)]
        for line, (chosen, when) in enumerate(((is_cold, "first start"), (is_warm, "later starts"))):
            axis = axes[line][column]
            shown = [row for row in mine if chosen(row) or row["competitor"].startswith("plain")]
            lines(axis, series(shown, "nodes", "last-seconds"))
            plain_numbers(axis)
            axis.set_title(f"{when.capitalize()}, {link}{think}")
            axis.set_xlabel("nodes that start at once")
            axis.set_ylabel("until the slowest has started (s)")
    return figure


def starts(rows):
    """The same for the slow link alone, as the README shows it."""
    mine = [row for row in rows if row["network"] == "shaped" and row["boot-seconds"] == 0]
    figure, axes = panels(1, 2, width=5.4, height=4.4)
    for axis, chosen, when in zip(axes[0], (is_cold, is_warm), ("First start", "Later starts")):
        shown = [
            {**row, "competitor": without_phase(row["competitor"])}
            for row in mine
            if chosen(row) or row["competitor"].startswith("plain")
        ]
        lines(axis, series(shown, "nodes", "last-seconds"))
        plain_numbers(axis)
        axis.set_title(f"{when}, 1 Gbit/s, no think time")
        axis.set_xlabel("nodes that start at once")
        axis.set_ylabel("until the slowest has started (s)")
    return figure


def traffic(rows):
    """What crosses the link, over the nodes."""
    mine = [row for row in rows if row["network"] == "shaped" and row["boot-seconds"] == 0 and row["link-bytes"]]
    if not mine:
        return None
    figure, axes = panels(1, 1, width=7, height=4.2)
    axis = axes[0][0]
    shown = [row for row in mine if not row["competitor"].startswith("copy-on-read") or is_cold(row)]
    lines(axis, series(shown, "nodes", lambda row: row["link-bytes"] / 1e6))
    plain_numbers(axis)
    axis.set_title("What the storage node sends")
    axis.set_xlabel("nodes that start at once")
    axis.set_ylabel("bytes over the link (MB)")
    return figure


def together(rows):
    most = max(row["machines"] for row in rows)
    figure, axes = panels(1, 2, width=6.4, height=3.8)
    for axis, key, scale, unit, text in (
        (axes[0][0], "last-seconds", 1, "until the slowest has started (s)", bench_report.seconds),
        (axes[0][1], "link-bytes", 1e-6, "bytes over the link (MB)", lambda number: f"{number:,.1f}"),
    ):
        found = {}
        for row in rows:
            if row["machines"] == most:
                found.setdefault(row["competitor"], []).append(row[key] * scale)
        bars(axis, found, text)
        axis.set_xlabel(unit)
    axes[0][0].set_title(f"{most} machines on one node, 1 Gbit/s link")
    axes[0][1].set_yticklabels([])
    return figure


def reads(rows):
    warm = [row for row in rows if row["state"] == bench_report.REPEATED]
    blocks = sorted({row["block-bytes"] for row in warm})
    figure, axes = panels(2, len(blocks), width=4.6, height=3.4)
    for column, block in enumerate(blocks):
        mine = [row for row in warm if row["block-bytes"] == block]
        order = "sequential" if block >= bench_report.MIB else "random"
        what = (
            ("reads-per-second", 1, "reads in a second"),
            ("cpu-seconds-per-read", 1e6, "processor time of a read (µs)"),
        )
        for line, (key, scale, unit) in enumerate(what):
            axis = axes[line][column]
            lines(axis, series(mine, "depth", lambda row, key=key, scale=scale: row[key] * scale))
            plain_numbers(axis)
            axis.set_xlabel("requests under way at once")
            axis.set_ylabel(unit)
            if line == 0:
                axis.set_title(f"{bench_report.size(block)}, {order}")
    return figure


def warm(rows):
    """Warm reads as multiples of raw io_uring, round by round, as the README shows it."""
    kinds = {
        "vmcache, repeated reads": ("vmcache", bench_report.REPEATED),
        "vmcache, first reads": ("vmcache", bench_report.FIRST),
        "preadv2 alone (the floor)": (bench_report.FLOOR, bench_report.REPEATED),
        "raw io_uring": ("raw io_uring", bench_report.REPEATED),
        "qcow2 io_uring": ("qcow2 io_uring", bench_report.REPEATED),
        "raw threads": ("raw threads", bench_report.REPEATED),
    }
    depths = [row["depth"] for row in rows]
    points = [(4096, min(depths)), (4096, max(depths)), (bench_report.MIB, min(depths))]
    figure, axes = panels(1, len(points), width=3.6, height=2.6)
    for axis, (block, depth) in zip(axes[0], points):
        found = {}
        for name, (kind, state) in kinds.items():
            mine = {"block-bytes": block, "depth": depth, "competitor": kind, "state": state}
            other = {**mine, "competitor": "raw io_uring"}
            found[name] = bench_report.paired(rows, "reads-per-second", mine, other)
        bars(axis, {name: times for name, times in found.items() if times}, lambda number: f"{number:.2f}", spread=False)
        axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        order = "sequential" if block >= bench_report.MIB else "random"
        axis.set_title(f"{bench_report.size(block)} {order}, depth {depth}")
        axis.set_xlabel("reads per second, raw io_uring = 1")
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    return figure


def opening(rows):
    figure, axes = panels(1, 1, width=7)
    axis = axes[0][0]
    lines(axis, series(rows, "virtual-bytes", lambda row: row["seconds"] * 1e3), log_y=False)
    sizes(axis)
    axis.set_title("Opening a warm image, reading 4 KiB and closing it")
    axis.set_xlabel("virtual size")
    axis.set_ylabel("ms")
    return figure


def memory(rows):
    figure, axes = panels(1, 2, width=6.4, height=3.2)
    for axis, key, unit in ((axes[0][0], "rss-bytes", "Rss (MB)"), (axes[0][1], "pss-bytes", "Pss (MB)")):
        found = {}
        for row in sorted(rows, key=lambda row: (row["machines"], row["state"] != "started")):
            machines = f"{row['machines']} at once" if row["machines"] > 1 else "one"
            found.setdefault(f"{row['competitor']}, {machines}, {row['state']}", []).append(row[key] / 1e6)
        bars(axis, found, lambda number: f"{number:.1f}")
        axis.set_xlabel(unit)
    axes[0][0].set_title("Memory of an idle qemu-system")
    axes[0][1].set_yticklabels([])
    return figure


def queue(rows):
    figure, axes = panels(1, 1, width=7, height=2.4)
    found = {}
    for row in rows:
        found.setdefault(f"{row['competitor']}, depth {row['depth']}", []).append(row["peak-bytes"] / 1e6)
    bars(axes[0][0], found, lambda number: f"{number:.1f}")
    axes[0][0].set_title("The most memory while blocks come faster than they are stored")
    axes[0][0].set_xlabel("Rss (MB)")
    return figure


def guests(rows):
    counts = sorted({row["machines"] for row in rows})
    figure, axes = panels(1, len(counts) + 1, width=4.4, height=2.8)
    for axis, count in zip(axes[0], counts):
        found = {}
        for row in rows:
            if row["machines"] == count:
                found.setdefault(row["competitor"], []).append(row["last-seconds"])
        bars(axis, found, lambda number: f"{number:.1f}")
        axis.set_title(f"{count} {'guest' if count == 1 else 'guests at once'}")
        axis.set_xlabel("until the slowest is up (s)")
    found = {}
    for row in rows:
        if row["machines"] == counts[-1]:
            found.setdefault(row["competitor"], []).append(row["link-bytes"] / 1e6)
    bars(axes[0][-1], found, lambda number: f"{number:,.1f}")
    axes[0][-1].set_title(f"{counts[-1]} {'guest' if counts[-1] == 1 else 'guests'}")
    axes[0][-1].set_xlabel("bytes over the link (MB)")
    return figure


def clusters(rows):
    figure, axes = panels(1, 3, width=4.8)
    cold = [{**row, "competitor": row["image"]} for row in rows if is_cold(row)]
    for axis, key, scale, unit in (
        (axes[0][0], "link-bytes", 1e-6, "bytes over the link, cold (MB)"),
        (axes[0][1], "image-bytes", 1e-6, "size of the cache image (MB)"),
        (axes[0][2], "last-seconds", 1, "first start (s)"),
    ):
        lines(axis, series(cold, "cluster-bytes", lambda row, key=key, scale=scale: row[key] * scale), log_y=False)
        sizes(axis)
        axis.set_xlabel("cluster size")
        axis.set_ylabel(unit)
    axes[0][0].set_title("One machine, 1 Gbit/s link")
    return figure


def quota(rows):
    figure, axes = panels(1, 2, width=5.6)
    limited = [row for row in rows if row["quota-bytes"]]
    if not limited:
        plt.close(figure)
        return None
    for axis, key, scale, unit, chosen in (
        (axes[0][0], "hit-rate", 100, "hits of a warm start (%)", is_warm),
        (axes[0][1], "last-seconds", 1, "start (s)", lambda row: True),
    ):
        mine = [{**row, "quota-mib": row["quota-bytes"] >> 20} for row in limited if chosen(row)]
        lines(axis, series(mine, "quota-mib", lambda row, key=key, scale=scale: row[key] * scale), False, log_x=None)
        axis.set_xlabel("quota (MiB)")
        axis.set_ylabel(unit)
        axis.set_xlim(left=0)
    axes[0][0].set_title(f"The boot reads {limited[0]['distinct-bytes'] / bench_report.MIB:.1f} MiB")
    return figure


def bases(rows):
    figure, axes = panels(1, 1, width=7, height=4.2)
    axis = axes[0][0]
    lines(axis, series(rows, "bases", "last-seconds"))
    plain_numbers(axis)
    model = f"one read at a time, {rows[0]['disk-milliseconds']} ms each"
    axis.set_title(f"{rows[0]['nodes']} nodes, a storage node with a slow disk ({model})")
    axis.set_xlabel("different bases")
    axis.set_ylabel("until the slowest has started (s)")
    return figure


FIGURES = {
    "nodes": (("starts", starts), ("nodes", nodes), ("traffic", traffic)),
    "together": (("together", together),),
    "reads": (("warm", warm), ("reads", reads)),
    "open": (("open", opening),),
    "memory": (("memory", memory),),
    "queue": (("queue", queue),),
    "clusters": (("clusters", clusters),),
    "quota": (("quota", quota),),
    "bases": (("bases", bases),),
    "guests": (("guests", guests),),
}


def files(directory, name):
    """Where a figure goes."""
    return [f"{directory}/{name}.{form}" for form in ("svg", "png")]


def forget(directory):
    """Removes the figures of an earlier run."""
    for figures in FIGURES.values():
        for name, _ in figures:
            for path in files(directory, name):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)


def draw(results, directory, only=None):
    """Draws all figures, or only the named ones."""
    machine = results["machine"]
    source = f"{machine['cpu']}, {machine['cores']} processors; Linux {machine['kernel']}; {machine['date'][:10]}"
    for experiment, figures in FIGURES.items():
        rows = [row for row in results["measurements"] if row["experiment"] == experiment]
        for name, make in figures if rows else ():
            figure = make(rows) if only is None or name in only else None
            if figure is None:
                continue
            figure.supxlabel(source, x=0.995, ha="right", fontsize=7, color=GREY)
            name_lines(figure)
            for path in files(directory, name):
                # Without its date, so that drawing a run again gives the same file.
                metadata = {"Date": None} if path.endswith("svg") else None
                # What stands beside the axes belongs to the picture.
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
            plt.close(figure)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as source_file:
        draw(json.load(source_file), sys.argv[2])
