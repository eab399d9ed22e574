"""The comparison's figures: learning curves with ALRC's threshold, and restored images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_alrc import plot
from lightning_alrc.plotting import draw_points, draw_threshold, finish
from lightning_alrc.spikes import Spike

from ..comparison.figures import BOXCAR, draw_curves, draw_images, label
from .results import Result


def survived(result: Result) -> np.ndarray:
    """Each step's mean loss of clean images, [steps survived]; NaN if a step has none."""
    return result.history["loss"][: result.row["steps_survived"]]


def draw_learning_curves(axes: Axes, results: Sequence[Result]) -> None:
    """Draw each method's loss of clean images."""
    curves: dict[str, list[np.ndarray]] = {}
    for result in results:
        curves.setdefault(result.row["method"], []).append(survived(result))
    window = min(BOXCAR, *(result.row["last_steps"] for result in results))
    draw_curves(axes, curves, window)
    axes.set_ylabel("loss of clean images")


def draw_clips(axes: Axes, result: Result) -> None:
    """Draw every image's loss and ALRC's threshold, and mark the losses that ALRC clipped."""
    losses = result.history["image_loss"]
    threshold = result.history["threshold"][: len(losses)]
    step = np.broadcast_to(np.arange(1, len(losses) + 1)[:, None], losses.shape)
    clipped = losses > threshold[:, None]
    draw_points(axes, step[~clipped], losses[~clipped], "loss of an image", clipped=False)
    draw_points(axes, step[clipped], losses[clipped], "clipped by ALRC", clipped=True)
    draw_threshold(axes, step[:, 0], threshold)
    axes.set_yscale("log")
    axes.set_title(f"{label(result.row['method'])}, seed {result.row['seed']}", loc="left")
    axes.set_xlabel("training step")


def save_curves(results: Sequence[Result], path: Path) -> None:
    """Save learning curves of all trainings, and the first seed's losses under ALRC.

    Args:
        results: at least one.
        path: path of the PNG.
    """
    seed = min(result.row["seed"] for result in results)
    under_alrc = [
        result
        for result in results
        if result.row["clipped"] is not None and result.row["seed"] == seed
    ]
    figure = Figure(figsize=(10, 8 if under_alrc else 4.5), layout="constrained")
    columns = max(1, len(under_alrc))
    grid = figure.add_gridspec(2 if under_alrc else 1, columns)
    curves = figure.add_subplot(grid[0, :])
    draw_learning_curves(curves, results)
    curves.set_xlabel("training step")
    first: Axes | None = None
    for column, result in enumerate(under_alrc):
        axes = figure.add_subplot(grid[1, column], sharex=curves, sharey=first)
        draw_clips(axes, result)
        if first is None:
            first = axes
            axes.set_ylabel("loss")
    finish(figure, figure.axes[1:2])
    figure.savefig(path, dpi=150)


def draw_training(result: Result) -> Figure:
    """Draw one training under ALRC by `lightning_alrc.plot`.

    Args:
        result: the training's result, which must have each image's loss.
    """
    losses = result.history["image_loss"].astype(np.float64)
    threshold = result.history["threshold"][: len(losses), None]
    clipped = losses > threshold
    metrics = {
        "alrc/loss": losses.mean(axis=1),
        "alrc/loss_clipped": np.minimum(losses, threshold).mean(axis=1),
        "alrc/threshold": threshold[:, 0],
        "alrc/clipped_total": clipped.sum(axis=1).cumsum(),
    }
    rows = [
        {"step": step, **dict(zip(metrics, values, strict=True))}
        for step, values in enumerate(zip(*metrics.values(), strict=True))
    ]
    spikes = [
        Spike("loss", step, 0, step, image, None, loss, bound, bound / loss, rank=0)
        for step, image in np.argwhere(clipped).tolist()
        for loss, bound in [(losses[step, image], threshold[step, 0])]
    ]
    title = f"{label(result.row['method'])}, seed {result.row['seed']}"
    return plot([*rows, *spikes], title=title)


def save_images(results: Sequence[Result], path: Path) -> None:
    """Save test images in rows: the networks' input, each network's output, and the truth.

    Args:
        results: at least one; those of the first seed are shown.
        path: path of the PNG.
    """
    seed = min(result.row["seed"] for result in results)
    shown = [result for result in results if result.row["seed"] == seed]
    rows = {"input": shown[0].images["input"]}
    rows |= {label(each.row["method"]): each.images["output"] for each in shown}
    rows["truth"] = shown[0].images["truth"]
    draw_images(rows).savefig(path, dpi=100, bbox_inches="tight")
