"""How the cost of a step grows, as one figure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.benchmarks.collectives import ALGORITHMS, all_reduce_seconds
from tests.benchmarks.table import FACTORS, Results

__all__ = ["draw"]

OURS = {"color": "#d62728", "lw": 2.2, "marker": "o", "ms": 4, "zorder": 5}
PEERS = ["#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e"]
FLOORS = [(0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2))]
MESSAGE = 176
"""Bytes of the modelled all-reduce: what ALRC sends for one loss, two rows of 11 float64."""


def draw(results: Results) -> Figure:
    """Four panels: losses in a call, named losses, parameters, ranks."""
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    losses, named, parameters, ranks = figure.subplots(2, 2).ravel()
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _time(seconds)))
        axes.grid(axis="y", color="0.93", zorder=0)
    _losses(losses, results)
    _named(named, results)
    _parameters(parameters, results)
    _ranks(ranks, results)
    for axes in figure.axes:
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def _time(seconds: float) -> str:
    unit = next((each for each in FACTORS if seconds * FACTORS[each] < 999.5), "s")
    return f"{seconds * FACTORS[unit]:.3g} {unit.replace('u', 'µ')}"


class Curve(NamedTuple):
    counts: list[float]
    seconds: list[float]


def _curve(results: Results, groups: str, way: str) -> Curve:
    """The seconds of a way by the number in the name of each group."""
    points = []
    for group, ways in results.seconds.items():
        match = re.fullmatch(groups, group)
        if match and way in ways:
            points.append((float(match[1].replace(",", "")), ways[way]))
    return Curve([count for count, _ in sorted(points)], [time for _, time in sorted(points)])


def _plot(axes: Axes, results: Results, groups: str, ways: Mapping[str, str]) -> None:
    """ALRC in red, peers in other colours, floors grey and dashed."""
    colors, dashes = iter(PEERS), iter(FLOORS)
    for way, label in ways.items():
        curve = _curve(results, groups, way)
        if way == "ALRC":
            axes.plot(*curve, label=label, **OURS)
        elif way.startswith("peer"):
            axes.plot(*curve, label=label, color=next(colors), lw=1.4, marker=".")
        else:
            axes.plot(*curve, label=label, color="0.4", lw=1.4, ls=next(dashes))


def _ticks(axes: Axes, counts: list[int]) -> None:
    axes.set_xticks(counts, [_count(count) for count in counts])


def _count(count: int) -> str:
    for size, suffix in ((10**6, " M"), (1000, " k")):
        if count >= size:
            return f"{count // size}{suffix}"
    return str(count)


def _losses(axes: Axes, results: Results) -> None:
    groups = r"([\d,]+) loss(?:es)?"
    ways = {
        "peer: raw moments, word for word": "the authors' formula, word for word",
        "ALRC": "ALRC",
        "floor: a read of the losses": "a read of the losses: (loss * loss).mean()",
        "floor: an empty autograd node": "an empty autograd node",
    }
    _plot(axes, results, groups, ways)
    axes.set(xlabel="losses in a call", ylabel="time of a call", title="Losses one by one")
    _ticks(axes, [10**power for power in range(8)])


def _named(axes: Axes, results: Results) -> None:
    ways = {
        "ALRC": "ALRC",
        "floor: as many empty autograd nodes": "as many empty autograd nodes",
        "floor: as many reads": "as many reads",
    }
    _plot(axes, results, r"(\d+) named loss(?:es)?", ways)
    axes.set(xlabel="named losses", ylabel="time of a step", title="Each with moments of its own")
    _ticks(axes, [1, 2, 4, 8, 16, 32, 64])


def _parameters(axes: Axes, results: Results) -> None:
    ways = {
        "peer: timm's adaptive_clip_grad": "timm's adaptive_clip_grad",
        "peer: clip_grad_norm_": "clip_grad_norm_",
        "peer: AutoClip": "AutoClip",
        "peer: ZClip": "ZClip",
        "ALRC": "ALRC",
    }
    _plot(axes, results, r"(\d+) M parameters", ways)
    axes.set(xlabel="million parameters", ylabel="time of a step", title="Parameters")
    _ticks(axes, [1, 25, 250])


def _ranks(axes: Axes, results: Results) -> None:
    """Measured steps of a few ranks, and a model of the all-reduce for more ranks."""
    measured = {
        "floor: plain DDP": {"color": "0.4", "marker": "o", "ms": 9, "mfc": "none", "ls": ""},
        "peer: a blocking all-reduce": {"color": PEERS[0], "marker": "x", "ms": 7, "ls": ""},
        "ALRC": OURS | {"ls": ""},
    }
    labels = {
        "floor: plain DDP": "a step of plain DDP, on one CPU",
        "peer: a blocking all-reduce": "the same and a blocking all-reduce",
        "ALRC": "the same and ALRC",
    }
    for way, style in measured.items():
        axes.plot(*_curve(results, r"(\d+) ranks?", way), label=labels[way], **style)
    counts = np.unique(np.geomspace(2, 10_000, 100).astype(int))
    for algorithm, dash in zip(ALGORITHMS, FLOORS, strict=True):
        seconds = [all_reduce_seconds(int(count), MESSAGE, algorithm) for count in counts]
        axes.plot(counts, seconds, color="0.4", lw=1.4, ls=dash, label=f"model: {algorithm}")
    axes.set(xlabel="ranks", ylabel="time", title="Ranks, and the all-reduce they add")
    axes.set(xlim=(0.8, 15_000), ylim=(5e-6, 5.0))  # with room for the legend
    _ticks(axes, [1, 10, 100, 1000, 10_000])
