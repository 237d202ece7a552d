"""test_bench.py - the parts of scripts/bench that measure nothing: traces, rounds,
medians, targets, tables and figures.

Run by scripts/test (unit), or: /usr/bin/python3 -m unittest discover tests/bench
"""

import json
import os
import re
import sys
import tempfile
import unittest
import unittest.mock

CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, f"{CHECKOUT}/scripts/lib")

import bench
import bench_lab
import bench_plot
import bench_readme
import bench_reads
import bench_report
import replay
from bench_replay import Cell

# Three reads, 1 and 3 seconds after the first.
TRACE = [(5_000_000, 0, 4096), (6_000_000, 1 << 20, 512), (8_000_000, 4095, 2)]
# What one run of `scripts/bench --quick` left.
with open(f"{CHECKOUT}/tests/data/bench-results.json", encoding="utf-8") as lines:
    RUN = json.load(lines)


SLOWEST = "64 nodes warm: the slowest, against 1.1 times one node plus {}"
AS_LOCAL = SLOWEST.format("what a local raw file takes longer")
BY_PROCESSORS = SLOWEST.format("the others' processor time")
FULL_QUEUE = "populate queue, full: the most memory more than with populate=off, at the worst depth"


def sleeps(script):
    return [int(wait) for wait in re.findall(rb"sleep (\d+)\n", script)]


def read_row(number, kind, rate, **more):
    return {
        "experiment": "reads",
        "round": number,
        "competitor": kind,
        "state": bench_report.REPEATED,
        "block-bytes": 4096,
        "depth": 1,
        "reads-per-second": rate,
        "cpu-seconds-per-read": 1 / rate,
        **more,
    }


def replay_row(kind, nodes, seconds, moved=0):
    return {
        "experiment": "nodes",
        "round": 1,
        "network": "shaped",
        "boot-seconds": 0,
        "competitor": kind,
        "nodes": nodes,
        "last-seconds": seconds,
        "link-bytes": moved,
        "cpu-seconds": 0.2,
        "processors": 2,
        "distinct-bytes": 100,
    }


def queue_row(populate, peak, dropped=0, depth=4):
    return {
        "experiment": "queue",
        "competitor": f"vmcache populate={populate}",
        "depth": depth,
        "block-bytes": 2 << 20,
        "peak-bytes": peak << 20,
        "dropped-bytes": dropped,
    }


class UnusedLab:
    """Enough of a lab to ask an experiment for its cells."""

    def __init__(self):
        self.networks = {name: unittest.mock.Mock(bases=["base"]) for name in ("shaped", "unshaped")}
        for name, network in self.networks.items():
            network.name = name
        self.reads = replay.read_trace(f"{CHECKOUT}/tests/data/debian12-boot.csv")
        self.guest = {"image": __file__}
        self.image = self.programs = self.directory = self.floor = "unused"
        self.preload = lambda *command: [*command]
        self.on = lambda *_: self
        self.scratch = tempfile.TemporaryDirectory


def estimate(settings, names):
    """Seconds of all rounds of the experiments, by what their cells say."""
    found = 0
    with (
        unittest.mock.patch("bench_reads.WarmLab.prepare"),
        unittest.mock.patch("bench_lab.run"),
        unittest.mock.patch("os.urandom", return_value=b""),
    ):
        for name in names:
            with bench.EXPERIMENTS[name](UnusedLab(), settings) as cells:
                cells = list(cells)
            rounds = range(1, settings["rounds"] + 1)
            found += sum(cell.seconds for number in rounds for cell in bench.order(cells, number))
    return found


def verdicts(rows, *more, quick=False):
    """By target, of a run of the experiments that the rows are of, and more."""
    run = dict.fromkeys([*(row["experiment"] for row in rows), *more])
    results = {"settings": {"quick": quick}, "experiment-seconds": run, "measurements": rows}
    return {target["target"]: target["verdict"] for target in bench_report.targets(results)}


class Traces(unittest.TestCase):
    def test_a_trace_is_read_without_its_remarks(self):
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as trace:
            trace.write("# a remark\nmicroseconds,offset,length\n7,4096,512\n")
            trace.flush()
            self.assertEqual(replay.read_trace(trace.name), [(7, 4096, 512)])

    def test_each_block_that_is_touched_counts_once(self):
        self.assertEqual(replay.distinct_bytes(TRACE), 3 * 4096)

    def test_without_a_boot_length_nothing_sleeps_and_all_is_read_in_order(self):
        script = replay.script(TRACE)
        self.assertEqual(script, b"read -q 0 4096\nread -q 1048576 512\nread -q 4095 2\n" + replay.MARK)

    def test_think_times_are_scaled_to_the_length_of_the_boot(self):
        self.assertEqual(sleeps(replay.script(TRACE, 9)), [3000, 6000])

    def test_think_times_below_a_millisecond_add_up(self):
        trace = [(microseconds, 0, 512) for microseconds in range(0, 100_001, 100)]
        self.assertEqual(sum(sleeps(replay.script(trace, 0.1))), 100)


class Replays(unittest.TestCase):
    def test_opening_the_image_is_a_part_of_the_start(self):
        # Like a qemu-io that takes a while to open its image.
        reader = "sleep 0.3; while read -r word _; do [ $word = read ] || echo 4 KiB; done"
        seconds, _ = replay.replay([["sh", "-c", reader]], replay.script(TRACE))
        self.assertGreaterEqual(seconds[0], 0.3)


class Competitors(unittest.TestCase):
    def test_a_finished_image_is_read_with_copy_on_read_off(self):
        lab, network = unittest.mock.Mock(), unittest.mock.Mock(bases=[])
        network.on_node.return_value = []
        with bench_lab.CopyOnRead().open(lab, network, "/d", 0) as machine:
            found = [machine(0, phase).replayed()[1] for phase in bench_lab.CopyOnRead.phases]
        self.assertEqual(found, ["-C", "-r"])


class Differences(unittest.TestCase):
    def test_repeated_reads_are_eight_passes_and_a_second(self):
        found = [bench_reads.more_reads(100, seconds) for seconds in (0.5, 0.01)]
        self.assertEqual(found, [800, 10_000])

    def test_slow_passes_are_fewer(self):
        found = [bench_reads.more_reads(100, seconds) for seconds in (2.0, 9.0)]
        self.assertEqual(found, [300, 200])

    def test_a_tenth_of_a_time_may_be_noise(self):
        found = [bench_reads.difference(10, part) for part in (11, 9, 8)]
        self.assertEqual(found, [None, None, 2])


class Rounds(unittest.TestCase):
    def test_every_second_round_goes_the_other_way_about(self):
        cells = [Cell(name, 1, None) for name in "abc"]
        found = ["".join(cell.text for cell in bench.order(cells, number)) for number in (1, 2, 3)]
        self.assertEqual(found, ["abc", "cba", "abc"])

    def test_a_cell_has_no_more_rounds_than_it_says(self):
        cells = [Cell("a", 1, None), Cell("b", 1, None, rounds=1)]
        found = ["".join(cell.text for cell in bench.order(cells, number)) for number in (1, 2)]
        self.assertEqual(found, ["ab", "a"])

    def test_both_forms_have_the_same_settings(self):
        self.assertEqual(set(bench.QUICK), set(bench.FULL))

    def test_both_forms_keep_to_their_time_by_their_own_estimates(self):
        quick = [name for name in bench.EXPERIMENTS if name != "guests"]
        self.assertLess(estimate(bench.QUICK, quick), 4.5 * 60)
        self.assertLess(estimate(bench.FULL, bench.EXPERIMENTS), 33 * 60)


class Statistics(unittest.TestCase):
    def test_the_median_is_that_of_the_chosen_rows(self):
        rows = [{"a": 1, "b": 5}, {"a": 1, "b": 9}, {"a": 2, "b": 100}]
        self.assertEqual(bench_report.median(rows, "b", a=1), 7)

    def test_there_is_no_median_of_nothing(self):
        self.assertIsNone(bench_report.median([], "b"))

    def test_ratios_pair_what_one_round_measured(self):
        rows = [read_row(1, "vmcache", 20), read_row(1, "raw", 10), read_row(2, "vmcache", 90), read_row(2, "raw", 30)]
        found = bench_report.paired(rows, "reads-per-second", {"competitor": "vmcache"}, {"competitor": "raw"})
        self.assertEqual(found, [2, 3])

    def test_a_round_without_its_partner_has_no_ratio(self):
        rows = [read_row(1, "vmcache", 20), read_row(2, "vmcache", 90), read_row(2, "raw", 30)]
        found = bench_report.paired(rows, "reads-per-second", {"competitor": "vmcache"}, {"competitor": "raw"})
        self.assertEqual(found, [3])

    def test_sizes_are_said_in_the_largest_unit(self):
        said = [bench_report.size(number) for number in (0, 512, 64 << 10, 3 << 29, 1 << 40)]
        self.assertEqual(said, ["none", "512 B", "64 KiB", "1.5 GiB", "1 TiB"])

    def test_a_table_has_the_median_and_the_spread_of_a_group(self):
        rows = [{"competitor": "x", "v": value} for value in (1, 2, 9)]
        table = bench_report.table(rows, [("competitor", "", str)], [("value", "v", str)])
        self.assertEqual(table.splitlines()[-1].split(), ["x", "2", "1..9"])


class Targets(unittest.TestCase):
    def test_the_median_ratio_decides_for_reads(self):
        rows = [read_row(number, "vmcache", rate) for number, rate in enumerate((96, 97, 50), 1)]
        rows += [read_row(number, bench_report.FLOOR, 100) for number in (1, 2, 3)]
        found = verdicts(rows)
        text = f"warm 4 KiB random, repeated reads, depth 1, {{}}against {bench_report.FLOOR}"
        self.assertEqual([found[text.format(what)] for what in ("", "processor time ")], ["met", "met"])

    def test_first_reads_are_judged_by_themselves(self):
        rows = [read_row(number, kind, rate, state=state) for number in (1, 2, 3) for kind, state, rate in (
            ("vmcache", bench_report.FIRST, 90),
            (bench_report.FLOOR, bench_report.FIRST, 100),
            ("vmcache", bench_report.REPEATED, 100),
            (bench_report.FLOOR, bench_report.REPEATED, 100),
        )]
        found = verdicts(rows)
        text = "warm 4 KiB random, {} reads, depth 1, against " + bench_report.FLOOR
        self.assertEqual([found[text.format(state)] for state in ("repeated", "first")], ["met", "NOT MET"])

    def test_two_rounds_judge_nothing_but_in_a_quick_run(self):
        rows = [read_row(number, kind, 100) for number in (1, 2) for kind in ("vmcache", "raw io_uring")]
        text = "warm 4 KiB random, repeated reads, depth 1, against raw io_uring"
        found = [verdicts(rows, quick=quick)[text] for quick in (False, True)]
        self.assertEqual(found, ["not measured here", "NOT MET"])

    def test_many_nodes_may_take_what_local_readers_take_longer(self):
        rows = 2 * [replay_row("vmcache warm", 1, 1.0), replay_row("local raw file", 1, 0.5)]
        rows += 2 * [replay_row("local raw file", 64, 4.0)]
        found = [verdicts(rows + 2 * [replay_row("vmcache warm", 64, last)])[AS_LOCAL] for last in (4.5, 4.7)]
        self.assertEqual(found, ["met", "NOT MET"])

    def test_one_start_of_many_nodes_judges_nothing(self):
        rows = 2 * [replay_row("vmcache warm", 1, 1.0), replay_row("local raw file", 1, 0.5)]
        rows += [replay_row("local raw file", 64, 4.0), replay_row("vmcache warm", 64, 1.0)]
        found = verdicts(rows)
        self.assertEqual([found[AS_LOCAL], found[BY_PROCESSORS]], 2 * ["not measured here"])

    def test_many_nodes_may_take_the_processor_time_of_the_others(self):
        rows = 2 * [replay_row("vmcache warm", 1, 1.0)]
        found = [verdicts(rows + 2 * [replay_row("vmcache warm", 64, last)])[BY_PROCESSORS] for last in (7.3, 7.5)]
        self.assertEqual(found, ["met", "NOT MET"])

    def test_warm_nodes_may_move_less_than_a_hundredth(self):
        rows = 2 * [replay_row("vmcache warm", 64, 1.0, 10), replay_row("plain NFS", 64, 1.0, 1000)]
        self.assertEqual(verdicts(rows)["64 nodes warm: bytes of plain NFS's"], "NOT MET")

    def test_a_queue_is_judged_where_it_was_full(self):
        rows = 3 * [queue_row("off", 10), queue_row("on", 500), queue_row("on", 77, dropped=1)]
        self.assertEqual(verdicts(rows)[FULL_QUEUE], "met")

    def test_a_queue_is_judged_at_its_worst_depth(self):
        rows = 3 * [queue_row("off", 10), queue_row("on", 20, dropped=1)]
        rows += 3 * [queue_row("off", 140, depth=64), queue_row("on", 209, dropped=1, depth=64)]
        self.assertEqual(verdicts(rows)[FULL_QUEUE], "NOT MET")

    def test_a_small_queue_is_judged_by_its_own_bound(self):
        rows = 3 * [queue_row("off", 10), queue_row("on,populate-queue=8M", 23, dropped=1)]
        self.assertEqual(verdicts(rows)[FULL_QUEUE.replace("populate queue", "populate-queue=8M")], "NOT MET")

    def test_a_queue_that_was_never_full_is_not_judged(self):
        rows = 3 * [queue_row("off", 10), queue_row("on", 20)]
        self.assertEqual(verdicts(rows)[FULL_QUEUE], "not measured here")

    def test_what_was_run_without_figures_is_named_as_not_measured(self):
        found = verdicts([], *bench_report.TARGETS)
        self.assertEqual(set(found.values()), {"not measured here"})
        self.assertGreaterEqual(set(found), {AS_LOCAL, BY_PROCESSORS, FULL_QUEUE, "opening a warm 1 TiB image, against one of 1 GiB"})
        self.assertEqual(len(found), 33)

    def test_an_experiment_that_was_not_run_has_no_target(self):
        self.assertEqual(verdicts([]), {})


class Results(unittest.TestCase):
    def test_every_experiment_of_a_run_is_drawn_in_both_forms(self):
        with tempfile.TemporaryDirectory() as directory:
            bench_plot.draw(RUN, directory)
            drawn = {name for name in os.listdir(directory) if os.stat(f"{directory}/{name}").st_size > 10_000}
        names = [name for figures in bench_plot.FIGURES.values() for name, _ in figures]
        self.assertEqual(drawn, {f"{name}.{form}" for name in names for form in ("svg", "png")})

    def test_a_run_that_is_drawn_again_gives_the_same_file(self):
        drawn = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as directory:
                bench_plot.draw(RUN, directory, ["open"])
                with open(f"{directory}/open.svg", "rb") as picture:
                    drawn.append(picture.read())
        self.assertEqual(drawn[0], drawn[1])

    def test_the_readme_has_every_target_and_every_competitor(self):
        text = bench_readme.text(RUN)
        named = [target["target"] for target in RUN["targets"]]
        named += {row["competitor"] for row in RUN["measurements"] if row["experiment"] in ("nodes", "guests", "reads")}
        self.assertEqual([name for name in named if name not in text], [])

    def test_the_readme_begins_with_what_run_it_is_of(self):
        full = {**RUN, "commit": "abc", "settings": {"quick": False, "rounds": 3}}
        machine = {**RUN["machine"], "programs": {"qemu-io": "qemu-io version 10.2.1"}}
        runs = [
            full,
            {**full, "settings": RUN["settings"]},
            {**full, "experiment-seconds": {"nodes": 1, "open": 1}},
            {**full, "complete": False},
            {**full, "machine": machine},
        ]
        self.assertEqual([bench_readme.kind(run) for run in runs], [
            "Commit abc.",
            "Commit abc: a quick run.",
            "Commit abc: a partial run (nodes, open).",
            "Commit abc: a run that was stopped.",
            "Commit abc: not with QEMU 10.0, which the targets are for.",
        ])
        self.assertTrue(bench_readme.text(full).startswith("Commit abc. "))

    def test_times_of_several_rounds_have_their_spread(self):
        found = [bench_readme.spread(seconds) for seconds in ([], [1.5], [1, 4, 2])]
        self.assertEqual(found, ["", "1.50", "2.00 (1.00–4.00)"])

    def test_the_targets_of_a_run_are_those_of_its_measurements(self):
        self.assertEqual(bench_report.targets(RUN), RUN["targets"])


if __name__ == "__main__":
    unittest.main()
