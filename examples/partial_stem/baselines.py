"""Completions without training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import NearestNDInterpolator
from skimage.restoration import inpaint_biharmonic

from ..comparison.tables import Cell, Table
from .datamodule import PartialScans
from .module import target

Image = NDArray[np.float32]


def nearest(scan: Image, mask: Image) -> Image:
    """Fill each pixel with the nearest visited one; scan and mask are [side, side]."""
    interpolate = NearestNDInterpolator(np.argwhere(mask), scan[mask > 0])
    return interpolate(*np.indices(mask.shape)).astype(np.float32)


def biharmonic(scan: Image, mask: Image) -> Image:
    """Biharmonic interpolation between visited pixels; scan and mask are [side, side]."""
    return inpaint_biharmonic(scan, mask == 0).astype(np.float32)


BASELINES: dict[str, Callable[[Image, Image], Image]] = {
    "nearest neighbour": nearest,
    "biharmonic": biharmonic,
}


def error(complete: Callable[[Image, Image], Image], data: PartialScans) -> float:
    """Root mean square error on the test crops, in percent of the range."""
    squares = []
    for batch in data.test_dataloader():
        wanted = target(batch.truth)[:, 0].numpy()
        images = zip(batch.scan[:, 0].numpy(), batch.mask[:, 0].numpy(), wanted, strict=True)
        squares += [((complete(scan, mask) - truth) ** 2).mean() for scan, mask, truth in images]
    return float(50 * np.mean(squares) ** 0.5)


def table(data: PartialScans) -> Table:
    """The errors of all baselines."""
    rows = [
        [Cell(name), Cell(f"{error(complete, data):.2f}")] for name, complete in BASELINES.items()
    ]
    note = "Root mean square error on the test's crops in percent of the range, as above."
    return Table("Without training", ["", "error"], rows, [note])
