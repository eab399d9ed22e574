"""The comparison's figures: learning curves, the four losses under ALRC, and completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_alrc import plot, preview_log
from lightning_alrc.plotting import finish

from ..comparison.figures import draw_curves, draw_images, label
from ..comparison.files import read_arrays
from .baselines import BASELINES
from .measuring import CURVE, SHOWN, first_stage

CURVES, IMAGES, LOSSES = "curves.png", "images.png", "losses.png"


def save_figures(rows: Sequence[dict[str, Any]], folders: Sequence[Path], output: Path) -> None:
    """Draw the trainings of one setting, each figure in a file.

    Args:
        rows: rows of the trainings.
        folders: folder of each training.
        output: folder of the figures.
    """
    save_curves(rows, folders, output / CURVES)
    first = {
        row["method"]: folder
        for row, folder in zip(rows, folders, strict=True)
        if row["seed"] == rows[0]["seed"]
    }
    save_images(first, output / IMAGES)
    protected = next((folder for method, folder in first.items() if "alrc" in method), None)
    if protected is not None:
        plot(protected).savefig(output / LOSSES, dpi=100)


def save_curves(rows: Sequence[dict[str, Any]], folders: Sequence[Path], path: Path) -> None:
    """Draw the error of the generator's outer stage, before ALRC clips it, for each training."""
    curves: dict[str, list[np.ndarray]] = {}
    for row, folder in zip(rows, folders, strict=True):
        curves.setdefault(row["method"], []).append(preview_log(folder, CURVE).losses)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, curves, min(100, rows[0]["steps"]))
    first_steps = first_stage(rows[0]["steps"])
    axes.axvline(first_steps, color="0.4", lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        " discriminators join", (first_steps, 1), xycoords=("data", "axes fraction"), va="top"
    )
    axes.set_ylabel("error of the outer stage")
    axes.set_xlabel("training step")
    finish(figure, [])
    figure.savefig(path, dpi=100)


def save_images(folders: dict[str, Path], path: Path) -> None:
    """Draw truth, scans, and completions of the baselines and of each method's training."""
    first = read_arrays(next(iter(folders.values())) / SHOWN)
    pairs = list(zip(first["scan"][:, 0], first["mask"][:, 0], strict=True))
    # Pixels that the probe did not visit are black.
    rows = {"truth": first["truth"], "scan": np.where(first["mask"] > 0, first["scan"], -1)}
    for name, complete in BASELINES.items():
        rows[name] = np.stack([complete(scan, mask) for scan, mask in pairs])[:, None]
    for method, folder in folders.items():
        rows[label(method)] = read_arrays(folder / SHOWN)["completion"]
    figure = draw_images({name: (each + 1) / 2 for name, each in rows.items()}, 72)
    figure.savefig(path, dpi=100, bbox_inches="tight")
