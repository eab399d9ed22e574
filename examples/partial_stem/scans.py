"""Partial scans: the pixels that a probe visits on a path, and what it reads there."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Image = NDArray[np.float32]
Path = NDArray[np.float64]
"""Points that a probe passes in this order: rows and columns [points, 2], from 0 to the side."""

POINTS_A_PIXEL = 8
"""So densely is a path followed that it skips no pixel."""

JITTER = 0.25
"""How far a jittered spiral strays from its arm, in distances between arms: standard deviation."""

TURNS = 0.15
"""How much a random walk turns at each pixel, in radians: standard deviation."""


def spiral(side: int, coverage: float, chance: Generator) -> Path:
    """From the centre to the corners, with arms that are equally far apart."""
    return polar(*_spiral(arm_distance(side, coverage), side), side)


def jittered_spiral(side: int, coverage: float, chance: Generator) -> Path:
    """A spiral that strays from its arms, differently each time."""
    pitch = arm_distance(side, coverage)
    while True:
        radius, angle = _spiral(pitch, side)
        # As smooth along the path as arms are far apart.
        noise = gaussian_filter(chance.standard_normal(len(radius)), POINTS_A_PIXEL * pitch)
        points = polar(radius + JITTER * pitch * noise / noise.std(), angle, side)
        if len(visited(points, side)) >= round(coverage * side**2):
            return points
        pitch *= 0.97  # arms that cross, or leave the image, visit fewer pixels


def random_walk(side: int, coverage: float, chance: Generator) -> Path:
    """A walk that turns at random and is reflected at the edges."""
    # It crosses itself, so that it is followed for longer than it visits new pixels.
    points = int(POINTS_A_PIXEL * side**2 * -2 * np.log1p(-coverage)) + POINTS_A_PIXEL
    turns = chance.standard_normal(points) * TURNS / np.sqrt(POINTS_A_PIXEL)
    heading = chance.uniform(0, 2 * np.pi) + turns.cumsum()
    steps = np.stack([np.sin(heading), np.cos(heading)], axis=1) / POINTS_A_PIXEL
    free = chance.uniform(0, side, 2) + steps.cumsum(axis=0)
    return side - np.abs(free % (2 * side) - side)  # to and fro between the edges


def grid(side: int, coverage: float, chance: Generator) -> Path:
    """Single pixels, equally far apart in rows and columns."""
    each = max(1, round(side * np.sqrt(coverage)))
    places = (np.arange(each) + 0.5) * side / each
    return np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2)


PATHS: dict[str, Callable[[int, float, Generator], Path]] = {
    "spiral": spiral,
    "jittered_spiral": jittered_spiral,
    "random_walk": random_walk,
    "grid": grid,
}


def mask(path: str, side: int, coverage: float, chance: Generator) -> NDArray[np.bool_]:
    """The pixels that a probe visits.

    Args:
        path: a key of `PATHS`.
        side: of the image, in pixels.
        coverage: the fraction of pixels to visit; a grid comes near to it, a path stops there.
        chance: where chance comes from.

    Returns:
        [side, side]
    """
    points = PATHS[path](side, coverage, chance)
    flat = visited(points, side)
    found = np.zeros(side * side, dtype=bool)
    found[flat if path == "grid" else flat[: round(coverage * side * side)]] = True
    return found.reshape(side, side)


def visited(points: Path, side: int) -> NDArray[np.int64]:
    """The pixels that a path visits, as indices into the flattened image, in order of first visits.

    Points outside of the image are left out.
    """
    pixels = np.floor(points).astype(np.int64)
    pixels = pixels[((pixels >= 0) & (pixels < side)).all(axis=1)]
    flat = pixels[:, 0] * side + pixels[:, 1]
    _, first = np.unique(flat, return_index=True)
    return flat[np.sort(first)]


def partial_scan(
    micrograph: Image, visited_pixels: NDArray[np.bool_], probe: float
) -> NDArray[np.float32]:
    """What a probe reads on its path.

    Args:
        micrograph: [side, side].
        visited_pixels: [side, side].
        probe: a probe has a size, and moves while it reads: the standard deviation, in pixels, of
            the Gaussian that each reading averages over. 0 reads single pixels.

    Returns:
        [side, side], 0 where the probe was not.
    """
    blurred = gaussian_filter(micrograph, probe) if probe else micrograph
    return np.where(visited_pixels, blurred, np.float32(0))


def polar(radius: NDArray[np.float64], angle: NDArray[np.float64], side: int) -> Path:
    """Points around the centre of an image, from their polar coordinates."""
    offset = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
    return side / 2 + offset


def _spiral(pitch: float, side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Radius and angle of points that are equally far apart along a spiral."""
    # Its length up to a radius is pi radius^2 / pitch; it ends beyond the corners.
    corner = side / np.sqrt(2) + pitch
    length = np.arange(0, np.pi * corner**2 / pitch, 1 / POINTS_A_PIXEL)
    radius = np.sqrt(length * pitch / np.pi)
    return radius, 2 * np.pi * radius / pitch


@lru_cache
def arm_distance(side: int, coverage: float) -> float:
    """The distance between the arms of a spiral that visits so much of an image, in pixels."""
    pitch = 2 / coverage
    wanted = round(coverage * side**2)
    while len(visited(polar(*_spiral(pitch, side), side), side)) < wanted:
        pitch *= 0.99
    return pitch
