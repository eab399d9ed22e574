"""Measured costs beside their targets: ``python -m tests.benchmarks.table FILE.json``.

``pytest tests/benchmarks --benchmark-only --benchmark-json=FILE.json`` writes the file. Of several
files, the least time of each way counts. ``--figure costs.png`` draws how the costs grow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

READ = "floor: a read of the losses"
RAW = "peer: raw moments, word for word"
TRAINER = "a step inside a Trainer"
FACTORS = {"ns": 1e9, "us": 1e6, "ms": 1e3, "s": 1.0}


class Results:
    """The least seconds of each group and way, and further facts."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        for file in files:
            for each in json.loads(file.read_text())["benchmarks"]:
                ways = self.seconds.setdefault(each["group"], {})
                least = each["stats"]["min"]
                ways[each["name"]] = min(least, ways.get(each["name"], least))
                self.notes.setdefault(each["group"], {})
                if each["name"] == "ALRC":
                    self.notes[each["group"]] |= each["extra_info"]

    def of(self, group: str, way: str = "ALRC") -> float:
        return self.seconds[group][way]

    def over(self, group: str, way: str = "ALRC", floor: str = "") -> float:
        """The seconds of a way minus the seconds of ``floor``.

        If ``floor`` is empty, it is the group's first way whose name begins with "floor".
        """
        return self.of(group, way) - self.of(group, floor or self.floor(group))

    def floor(self, group: str) -> str:
        return next(way for way in self.seconds[group] if way.startswith("floor"))

    def cheapest_peer(self, group: str) -> str | None:
        peers = [way for way in self.seconds[group] if way.startswith("peer")]
        return min(peers, key=self.seconds[group].__getitem__, default=None)


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: Callable[[Results], tuple[str, bool | None]]
    """the measurement as text, and whether it reaches the target"""
    target: str
    group: str = ""
    """the group whose times are shown; empty for a row of counts"""
    floor: str = ""
    """the floor that is shown; if empty, the first of the group"""
    peer: str = ""
    """the peer that is shown; if empty, the cheapest of the group"""


def shown(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> shown(1.234e-5), shown(0.5), shown(-3e-7)
    ('12.3 us', '500 ms', '-300 ns')
    """
    unit = next((each for each in FACTORS if abs(seconds) * FACTORS[each] < 1000), "s")
    return f"{seconds * FACTORS[unit]:.3g} {unit}"


def at_most(value: float, bound: float, text: str) -> tuple[str, bool]:
    return text, value <= bound


def _operations(group: str) -> Callable[[Results], tuple[str, bool]]:
    def found(results: Results) -> tuple[str, bool]:
        count = results.notes[group]["operations"]
        return at_most(count, 10, f"{count}, {results.notes[group]['launches']} of them launch")

    return found


def _scalar(results: Results) -> tuple[str, bool]:
    return at_most(results.of("1 loss"), 10e-6, shown(results.of("1 loss")))


def _batch(results: Results) -> tuple[str, bool]:
    group = "256 losses"
    allowed = 1.5 * results.of(group, READ) + results.of("1 loss")
    return at_most(results.of(group), allowed, f"{shown(results.of(group))} of {shown(allowed)}")


def _million(results: Results) -> tuple[str, bool]:
    ratio = results.of("1,000,000 losses") / results.of("1,000,000 losses", READ)
    return at_most(ratio, 1.5, f"{ratio:.2f} reads")


def _trainer(results: Results) -> tuple[str, bool]:
    added = results.over(TRAINER)
    return at_most(added, 25e-6, f"+{shown(added)}")


def _spike_detection(results: Results) -> tuple[str, bool]:
    ratio = results.over(TRAINER) / results.over(TRAINER, "peer: SpikeDetection")
    return at_most(ratio, 1 / 5, f"1/{1 / ratio:.1f}")


def _parameters(group: str) -> Callable[[Results], tuple[str, bool | None]]:
    def found(results: Results) -> tuple[str, bool | None]:
        peer = results.cheapest_peer(group)
        if peer is None:
            return "no peer is installed", None
        ratio = results.of(group, peer) / results.of(group)
        return at_most(20, ratio, f"1/{ratio:.0f}")

    return found


def _growth(results: Results) -> tuple[str, bool]:
    times = [results.of(f"{millions} M parameters") for millions in (1, 25, 250)]
    ratio = max(times) / min(times)
    return at_most(ratio, 1.25, f"{' '.join(map(shown, times))}")


def _compiled(group: str) -> Callable[[Results], tuple[str, bool]]:
    def found(results: Results) -> tuple[str, bool]:
        notes = results.notes[group]
        functions, loops = notes["functions"], notes["loops"]
        breaks, again = notes["graph_breaks"], notes["recompilations"]
        text = f"{functions[0]} ({loops[0]} loops), {functions[1]} backwards; {breaks}, {again}"
        return text, functions[0] == 1 and breaks == 0 and again == 0

    return found


def _ranks(group: str) -> Callable[[Results], tuple[str, bool]]:
    def found(results: Results) -> tuple[str, bool]:
        share = results.over(group) / results.of(group, results.floor(group))
        return at_most(share, 0.03, f"{share:+.1%}")

    return found


def _collectives(results: Results) -> tuple[str, bool]:
    counts = results.notes["2 ranks"]["collectives_added"]
    return at_most(max(counts), 1, " and ".join(map(str, counts)))


def _import(results: Results) -> tuple[str, bool]:
    return at_most(results.of("an import"), 20e-3, shown(results.of("an import")))


def _log(results: Results) -> tuple[str, bool | None]:
    group = "a log of 100,000 rows"
    if results.cheapest_peer(group) is None:
        return "pandas is not installed", None
    ratio = results.of(group) / results.of(group, "peer: pandas.read_csv")
    return at_most(ratio, 3, f"{ratio:.1f} pandas")


def _memory(results: Results) -> tuple[str, bool]:
    size = results.notes["64 named losses"]["bytes_a_name"]
    return at_most(size, 1000, f"{size:,.0f} bytes")


ON_ACCELERATOR = "1 loss, as on an accelerator"
ROWS = [
    Row("tensor operations of a scalar loss", _operations("1 loss"), "10"),
    Row("the same on an accelerator", _operations(ON_ACCELERATOR), "10"),
    Row("a step, a scalar loss", _scalar, "10 us", "1 loss", peer=RAW),
    Row("a step, 256 losses", _batch, "1.5 reads + a scalar step", "256 losses", READ),
    Row("a step, a million losses", _million, "1.5 reads", "1,000,000 losses", READ),
    Row("a step inside a Trainer", _trainer, "+25 us", TRAINER, peer="peer: gradient_clip_val"),
    Row(
        "of what SpikeDetection adds",
        _spike_detection,
        "1/5",
        TRAINER,
        peer="peer: SpikeDetection",
    ),
    *(
        Row(group, _parameters(group), target, group)
        for group, target in {
            "1 M parameters": "",
            "25 M parameters": "1/20 of the cheapest",
            "250 M parameters": "",
        }.items()
    ),
    Row("as the model grows", _growth, "constant"),
    *(
        Row(f"{group}: functions; breaks, recompilations", _compiled(group), "one; no, no", group)
        for group in ("1 loss, compiled", "256 losses, compiled")
    ),
    *(Row(group, _ranks(group), "+3 %", group) for group in ("2 ranks", "3 ranks", "4 ranks")),
    Row("collectives of 1 and of 8 named losses", _collectives, "1"),
    Row("import", _import, "20 ms", "an import"),
    Row("a log of 100,000 rows, read", _log, "3 pandas", "a log of 100,000 rows"),
    Row("memory of a named loss", _memory, "a few hundred bytes"),
]


def table(results: Results) -> Table:
    """Every row, also those that were not measured."""
    made = Table(box=box.MARKDOWN)
    for name in ("", "ALRC", "floor", "x floor", "peer", "x peer", "measured", "to reach"):
        made.add_column(name, justify="left" if name in ("", "to reach") else "right", no_wrap=True)
    made.add_column("reached", justify="center", no_wrap=True)
    for row in ROWS:
        try:
            cells = _cells(row, results)
        except KeyError:
            cells = [""] * 5 + ["not measured", row.target, ""]
        made.add_row(row.what, *cells)
    return made


def _cells(row: Row, results: Results) -> list[str]:
    text, reached = row.found(results)
    mark = "" if reached is None or not row.target else "yes" if reached else "no"
    end = [text, row.target, mark]
    if not row.group:
        return ["", "", "", "", "", *end]
    ours = results.of(row.group)
    cells = [shown(ours)]
    floor = row.floor or results.floor(row.group)
    for way in (floor, row.peer or results.cheapest_peer(row.group)):
        if way in results.seconds[row.group]:
            seconds = results.of(row.group, way)
            cells += [f"{way.partition(': ')[2]}, {shown(seconds)}", f"{ours / seconds:.2g}"]
        else:
            cells += ["", ""]
    return cells + end


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--figure", type=Path, metavar="costs.png", help="draw how costs grow")
    parsed = parser.parse_args(arguments)
    results = Results(parsed.files)
    # Lines to a file or pipe are not wrapped, because wrapped lines are not a Markdown table.
    Console(width=None if sys.stdout.isatty() else 250).print(table(results))
    if parsed.figure:
        from tests.benchmarks.figure import draw

        draw(results).savefig(parsed.figure, dpi=160)


if __name__ == "__main__":
    main()
