"""Figures that several examples draw: learning curves of methods, and images in rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.utils import make_grid

from lightning_alrc.plotting import BLUE, GREEN, ORANGE, VERMILION, boxcar

from .settings import in_order

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
# Further colours of Wong's palette; lightning_alrc.plotting has the others.
SKY_BLUE, PURPLE, GREY, BLACK = "#56b4e9", "#cc79a7", "0.55", "black"
# Wong's yellow is too pale for lines, so this colour is from another palette.
BROWN = "#8c6d46"

COLOURS = {
    "none": VERMILION,
    "norm": ORANGE,
    "zclip": SKY_BLUE,
    "autoclip": PURPLE,
    "autoclip10": BROWN,
    "agc": GREEN,
    "value": GREY,
    "huber": BLACK,
}
"""Colours of the other methods, alone or combined with ALRC; ALRC alone is blue."""

LINES: tuple[object, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
"""Lines that distinguish methods of one colour; further ones have a dash and more and more dots."""

BOXCAR = 100


def label(method: str) -> str:
    """A method's name in a figure."""
    return " + ".join(LABELS.get(name, name) for name in method.split("+"))


def styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each method. Methods of one colour have different lines."""
    used: Counter[str] = Counter()
    style = {}
    for method in in_order(methods):
        parts = method.split("+")
        colour = next((COLOURS[part] for part in parts if part in COLOURS), BLUE)
        dots = used[colour] - len(LINES) + 1
        line = (0, (5, 1.5) + (1, 1.5) * dots) if dots > 0 else LINES[used[colour]]
        style[method] = {"color": colour, "linestyle": line}
        used[colour] += 1
    return style


def draw_curves(
    axes: Axes, curves: Mapping[str, Sequence[np.ndarray]], window: int = BOXCAR
) -> None:
    """Draw learning curves: a thin line for each training, a thick line for a method's mean.

    Args:
        axes: axes to draw on.
        curves: by method, the losses of each of its trainings, [steps survived]; NaN if unknown.
        window: number of steps over which each point is averaged.
    """
    style = styles(curves)
    for method, trainings in curves.items():
        means = [boxcar(curve, window) for curve in trainings]
        if len(means) > 1:
            for mean in means:
                axes.plot(np.arange(1, len(mean) + 1), mean, alpha=0.3, lw=0.7, **style[method])
        # The mean ends where the first training lost its weights.
        shortest = min(map(len, means))
        whole = np.mean([mean[:shortest] for mean in means], axis=0)
        steps = np.arange(1, shortest + 1)
        axes.plot(steps, whole, lw=1.8, label=label(method), **style[method])
    axes.set_yscale("log")
    axes.set_title(f"Training, mean of {window} steps", loc="left")
    axes.legend(frameon=False, ncols=2, handlelength=3.2)


def draw_images(rows: Mapping[str, np.ndarray], pixels_an_inch: float = 24) -> Figure:
    """Draw images in rows.

    Args:
        rows: the images of each row by the row's name, [images, channels, height, width], with one
            channel or three, and values from 0 to 1. NaN is shown as black.
        pixels_an_inch: pixels of an image in one inch of the figure.
    """
    images = torch.from_numpy(np.concatenate(list(rows.values()))).nan_to_num().clamp(0, 1)
    count, padding = len(images) // len(rows), 2
    grid = make_grid(images, nrow=count, padding=padding, pad_value=1).permute(1, 2, 0)
    height, width = grid.shape[0] / pixels_an_inch, grid.shape[1] / pixels_an_inch
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid.numpy(), interpolation="nearest")
    pitch = images.shape[2] + padding
    axes.set_yticks([padding + pitch * (row + 0.5) for row in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=12)
    axes.spines[:].set_visible(False)
    return figure
