"""How the cost of a step grows, as one figure."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.benchmarks.collectives import all_reduce_seconds
from tests.benchmarks.table import FACTORS, Results

OURS, GREYS = "#d62728", ["0.25", "0.45", "0.6", "0.7"]
DASHES = ["-", "--", "-.", ":"]
MESSAGE = 112  # bytes: two rows of seven float64


def draw(results: Results) -> Figure:
    """Four panels: losses in a call, named losses, parameters, ranks; all axes logarithmic."""
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    _losses(axes[0], results)
    _named(axes[1], results)
    _parameters(axes[2], results)
    _ranks(axes[3], results)
    for each in axes:
        each.set_xscale("log")
        each.set_yscale("log")
        each.spines[["top", "right"]].set_visible(False)
        each.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _shown(seconds)))
        each.grid(axis="y", color="0.93", zorder=0)
        each.legend(frameon=False, fontsize=8.5)
    return figure


def _shown(seconds: float) -> str:
    unit = next((each for each in FACTORS if seconds * FACTORS[each] < 999.5), "s")
    return f"{seconds * FACTORS[unit]:.3g} {unit.replace('u', 'µ')}"


def _curve(results: Results, pattern: str, way: str) -> tuple[list[float], list[float]]:
    """The count in each group's name, and the seconds of a way in it."""
    points = []
    for group, ways in results.seconds.items():
        match = re.fullmatch(pattern, group)
        if match and way in ways:
            points.append((float(match[1].replace(",", "")), ways[way]))
    return tuple(map(list, zip(*sorted(points), strict=True))) if points else ([], [])  # type: ignore[return-value]


def _plot(axes: Axes, results: Results, pattern: str, ways: dict[str, str]) -> None:
    greys = iter(zip(GREYS, DASHES, strict=True))
    for way, label in ways.items():
        points = _curve(results, pattern, way)
        if way == "ALRC":
            axes.plot(*points, color=OURS, lw=2.2, marker="o", ms=4, label=label, zorder=5)
        else:
            grey, dash = next(greys)
            axes.plot(*points, color=grey, ls=dash, lw=1.4, label=label, zorder=3)


def _losses(axes: Axes, results: Results) -> None:
    pattern = r"([\d,]+) loss(?:es)?"
    ways = {
        "ALRC": "ALRC",
        "peer: raw moments, word for word": "raw moments, word for word",
        "floor: a read of the losses": "a read of the losses: (loss * loss).mean()",
        "floor: an empty autograd node": "an empty autograd node",
    }
    _plot(axes, results, pattern, ways)
    axes.set(xlabel="losses in a call", title="Losses, each clipped by itself")


def _named(axes: Axes, results: Results) -> None:
    pattern = r"(\d+) named loss(?:es)?"
    ways = {
        "ALRC": "ALRC",
        "floor: as many empty autograd nodes": "as many empty autograd nodes",
        "floor: as many reads": "as many reads",
    }
    _plot(axes, results, pattern, ways)
    axes.set(xlabel="named losses in a step", title="Named losses, each with moments of its own")
    axes.set_xticks(*_ticks([1, 2, 4, 8, 16, 32, 64]), minor=False)


def _ticks(values: list[int]) -> tuple[list[int], list[str]]:
    return values, [f"{value:,}" for value in values]


def _parameters(axes: Axes, results: Results) -> None:
    pattern = r"(\d+) M parameters"
    ways = {
        "peer: timm's adaptive_clip_grad": "timm's adaptive_clip_grad",
        "peer: clip_grad_norm_": "clip_grad_norm_",
        "peer: AutoClip": "AutoClip",
        "peer: ZClip": "ZClip",
        "ALRC": "ALRC",
    }
    _plot(axes, results, pattern, ways)
    axes.set(xlabel="parameters", title="Parameters")
    values = [1, 25, 250]
    axes.set_xticks(values, [f"{value} M" for value in values])


def _ranks(axes: Axes, results: Results) -> None:
    """What is added to a step: measured where there are ranks, and the model for more."""
    ranks = np.unique(np.geomspace(2, 10_000, 60).astype(int))
    models: dict[str, Callable[[int], float]] = {
        "model: ring": lambda count: all_reduce_seconds(count, MESSAGE, "ring"),
        "model: tree, what NCCL takes": lambda count: all_reduce_seconds(count, MESSAGE, "tree"),
        "model: recursive doubling": lambda count: all_reduce_seconds(
            count, MESSAGE, "recursive doubling"
        ),
    }
    for (label, model), grey, dash in zip(models.items(), GREYS, DASHES[1:], strict=False):
        seconds = [model(count) for count in ranks]
        axes.plot(ranks, seconds, color=grey, ls=dash, lw=1.4, label=label)
    measured = {
        "peer: a blocking all-reduce": ("blocking, measured on one CPU", "0.4", "s"),
        "ALRC": ("ALRC, measured on one CPU, all it adds", OURS, "o"),
    }
    for way, (label, color, marker) in measured.items():
        counts, seconds = _curve(results, r"(\d+) ranks", way)
        _, floors = _curve(results, r"(\d+) ranks", "floor: plain DDP")
        added = [a - b for a, b in zip(seconds, floors, strict=True)]
        shown = [(count, each) for count, each in zip(counts, added, strict=True) if each > 0]
        if shown:
            axes.plot(
                *zip(*shown, strict=True), color=color, marker=marker, ms=5, ls="", label=label
            )
    axes.set(xlabel="ranks", title="One all-reduce a step, whatever the number of losses")
    axes.set_xticks(*_ticks([2, 10, 100, 1000, 10_000]))
