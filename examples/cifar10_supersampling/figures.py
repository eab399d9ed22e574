"""The comparison's figures: learning curves with ALRC's threshold, and restored images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.utils import make_grid

from lightning_alrc import plot
from lightning_alrc.plotting import (
    BLUE,
    GREEN,
    ORANGE,
    VERMILION,
    boxcar,
    draw_points,
    draw_threshold,
    finish,
)
from lightning_alrc.spikes import Spike

from .results import Result

LABELS = {
    "none": "unprotected",
    "norm": "gradient clipping",
    "value": "value clipping",
    "alrc2": "ALRC 2",
    "alrc3": "ALRC 3",
    "alrc4": "ALRC 4",
    "zclip": "ZClip",
    "autoclip": "AutoClip",
    "autoclip10": "AutoClip, 10th percentile",
    "agc": "AGC",
    "huber": "Huber loss",
}
COLOURS = {"none": VERMILION, "norm": ORANGE, "alrc2": BLUE, "alrc2+norm": GREEN}
# The rest of the same palette, for whatever else is compared.
OTHER_COLOURS = ("#cc79a7", "#56b4e9", "#000000", "#f0e442")
BOXCAR = 100


def label(method: str) -> str:
    """A method's name as people write it."""
    return " + ".join(LABELS.get(name, name) for name in method.split("+"))


def colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, always the same for the four that are compared by default."""
    others = cycle(OTHER_COLOURS)
    return {method: COLOURS.get(method) or next(others) for method in methods}


def survived(result: Result) -> np.ndarray:
    """Each step's mean loss of clean images, [steps survived]; NaN where it has none."""
    return result.history["loss"][: result.row["steps_survived"]]


def draw_learning_curves(axes: Axes, results: Sequence[Result]) -> None:
    """Draw each method's loss of clean images: thin for each seed, thick for their mean."""
    methods = list(dict.fromkeys(result.row["method"] for result in results))
    for method, colour in colours(methods).items():
        curves = [
            boxcar(survived(result), min(BOXCAR, result.row["last_steps"]))
            for result in results
            if result.row["method"] == method
        ]
        if len(curves) > 1:
            for curve in curves:
                axes.plot(np.arange(1, len(curve) + 1), curve, color=colour, alpha=0.3, lw=0.7)
        # A training that lost its weights ends its method's mean.
        shortest = min(map(len, curves))
        mean = np.mean([curve[:shortest] for curve in curves], axis=0)
        axes.plot(np.arange(1, shortest + 1), mean, color=colour, lw=1.8, label=label(method))
    axes.set_yscale("log")
    axes.set_ylabel("loss of clean images")
    axes.set_title(f"Training, mean of {BOXCAR} steps", loc="left")
    axes.legend(frameon=False, ncols=2)


def draw_clips(axes: Axes, result: Result) -> None:
    """Draw every image's loss, ALRC's threshold among them, and the losses it clipped."""
    losses = result.history["image_loss"]
    threshold = result.history["threshold"][: len(losses)]
    step = np.broadcast_to(np.arange(1, len(losses) + 1)[:, None], losses.shape)
    clipped = losses >= threshold[:, None]
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
        path: of the PNG.
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
    """Draw one training under ALRC, as `lightning_alrc.plot` draws any.

    Args:
        result: with each image's loss.
    """
    losses = result.history["image_loss"].astype(np.float64)
    threshold = result.history["threshold"][: len(losses), None]
    clipped = losses >= threshold
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
    """Save test images in rows: what each network was given, what it returned, and the truth.

    Args:
        results: at least one; those of the first seed are shown.
        path: of the PNG.
    """
    seed = min(result.row["seed"] for result in results)
    shown = [result for result in results if result.row["seed"] == seed]
    rows = {"input": shown[0].images["input"]}
    rows |= {label(each.row["method"]): each.images["output"] for each in shown}
    rows["truth"] = shown[0].images["truth"]
    draw_images(rows).savefig(path, dpi=100, bbox_inches="tight")


def draw_images(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw images in rows.

    Args:
        rows: by name, [images, 3, height, width] each, 0 to 1; NaN is shown as black.
    """
    images = torch.from_numpy(np.concatenate(list(rows.values()))).nan_to_num()
    count, padding = len(images) // len(rows), 2
    grid = make_grid(images, nrow=count, padding=padding, pad_value=1).permute(1, 2, 0)
    height, width = grid.shape[0] / 24, grid.shape[1] / 24
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid.numpy(), interpolation="nearest")
    pitch = images.shape[2] + padding
    axes.set_yticks([padding + pitch * (row + 0.5) for row in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=12)
    axes.spines[:].set_visible(False)
    return figure
