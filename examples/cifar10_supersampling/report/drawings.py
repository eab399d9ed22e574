"""The report's figures: learning curves, each training's results as points, restored images."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from lightning_alrc.plotting import boxcar, finish

from ...comparison.differences import mean_interval
from ...comparison.figures import draw_images, styles
from ...comparison.settings import Setting
from ...comparison.tables import lost
from . import rows
from .settings import MEASURES

WINDOWS = 50
"""The boxcar's width is the number of steps divided by this."""

POINTS = 1000
"""Largest number of points drawn for a curve."""


def curves(setting: Setting) -> Figure | None:
    """Draw each method's loss over the steps, or None if there are no histories."""
    kept = rows.histories(setting.rows)
    if not kept:
        return None
    steps = int(setting["steps"])
    window = max(1, steps // WINDOWS)
    shown = np.unique(np.linspace(0, steps - 1, POINTS).astype(int))
    by_method: dict[str, list[np.ndarray]] = {}
    for index, history in kept.items():
        loss = np.full(steps, np.nan)
        loss[: len(history["loss"])] = history["loss"]
        mean = boxcar(loss, window)[shown]
        by_method.setdefault(setting.rows["method"][index], []).append(mean)

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    style = styles(setting.methods)
    medians = {method: np.median(own, axis=0) for method, own in by_method.items()}
    best_first = [*setting.values("train_loss"), *setting.lost("train_loss")]
    for method in (method for method in reversed(best_first) if method in medians):
        own = by_method[method]
        colour = style[method]["color"]
        if len(own) > 1:
            ends = np.min(own, axis=0), np.max(own, axis=0)
            axes.fill_between(shown + 1, *ends, color=colour, alpha=0.12, lw=0)
        axes.plot(shown + 1, medians[method], lw=1.7, label=method, **style[method])
        if method in setting.lost("train_loss"):
            last = np.flatnonzero(np.isfinite(medians[method]))[-1:]
            axes.plot(shown[last] + 1, medians[method][last], "x", color=colour, ms=8, mew=2)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss of clean images" + (f", mean of {window:,} steps" if window > 1 else ""))
    finish(figure, [])
    # The legend has the order of the ends of the curves, the highest loss first.
    figure.legend(loc="outside right center", frameon=False, handlelength=3.2)
    return figure


def points(setting: Setting) -> Figure:
    """Draw each training's losses and errors as points, with each method's mean and interval."""
    methods = [*setting.values("train_loss"), *setting.lost("train_loss")]
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    style = styles(methods)
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        values, missing = setting.values(measure), setting.lost(measure)
        for place, method in enumerate(methods):
            colour = style[method]["color"]
            if method in missing:
                axes.annotate(
                    lost(*missing[method]),
                    (0.01, place),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    color="0.35",
                )
                continue
            own = values[method].dropna()
            mean, width = mean_interval(own)
            axes.scatter(own, np.full(len(own), place), s=20, color=colour, alpha=0.5, lw=0)
            axes.errorbar(mean, place, xerr=width, fmt="D", ms=5, color=colour, capsize=3)
        spread = values.max().max() / values.min().min() if values.size else 1
        if spread > 3:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(methods)), methods)
    finish(figure, [])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    return figure


def images(setting: Setting) -> Figure | None:
    """Draw inputs and outputs of networks of one seed; None if no images were kept."""
    kept = rows.images(setting.rows)
    if not kept:
        return None
    of_seed = setting.rows.loc[list(kept)].sort_values("seed", kind="stable")
    of_seed = of_seed[of_seed["seed"] == of_seed["seed"].iloc[0]]
    order = [*setting.values("test_error"), *setting.lost("test_error")]
    outputs = dict(zip(of_seed["method"], of_seed.index, strict=True))
    first = kept[of_seed.index[0]]
    shown = {
        "input": first["input"],
        **{method: kept[outputs[method]]["output"] for method in order if method in outputs},
        "truth": first["truth"],
    }
    return draw_images(shown)


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
    return picture.getvalue()
