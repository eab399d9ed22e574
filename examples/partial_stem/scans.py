"""Partial scans: the pixels that a probe visits on a path, and its readings."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Image = NDArray[np.float32]
Path = NDArray[np.float64]
"""Points on a probe's path, in order: rows and columns [points, 2], from 0 to the side."""

POINTS_A_PIXEL = 8
"""Points on a path for each pixel: enough to skip no pixel."""

JITTER = 0.25
"""Standard deviation of a jittered spiral's random deviation, in distances between arms."""

TURNS = 0.15
"""Standard deviation of a random walk's turn at each pixel, in radians."""


def spiral(side: int, coverage: float, chance: Generator) -> Path:
    """A spiral from the centre to the corners, with equally spaced arms."""
    return polar(*_spiral(arm_distance(side, coverage), side), side)


def jittered_spiral(side: int, coverage: float, chance: Generator) -> Path:
    """A spiral with random deviations from its arms."""
    pitch = arm_distance(side, coverage)
    while True:
        radius, angle = _spiral(pitch, side)
        # Deviations are smooth along the path, over the distance between arms.
        noise = gaussian_filter(chance.standard_normal(len(radius)), POINTS_A_PIXEL * pitch)
        points = polar(radius + JITTER * pitch * noise / noise.std(), angle, side)
        if len(visited(points, side)) >= round(coverage * side**2):
            return points
        pitch *= 0.97  # arms that cross, or leave the image, visit fewer pixels


def random_walk(side: int, coverage: float, chance: Generator) -> Path:
    """A walk that turns at random and is reflected at the edges."""
    # The walk crosses itself, so it needs more points than pixels to visit.
    points = int(POINTS_A_PIXEL * side**2 * -2 * np.log1p(-coverage)) + POINTS_A_PIXEL
    turns = chance.standard_normal(points) * TURNS / np.sqrt(POINTS_A_PIXEL)
    heading = chance.uniform(0, 2 * np.pi) + turns.cumsum()
    steps = np.stack([np.sin(heading), np.cos(heading)], axis=1) / POINTS_A_PIXEL
    free = chance.uniform(0, side, 2) + steps.cumsum(axis=0)
    return side - np.abs(free % (2 * side) - side)  # reflected at the edges


def grid(side: int, coverage: float, chance: Generator) -> Path:
    """Single pixels, equally spaced in rows and columns."""
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
        side: side of the image, in pixels.
        coverage: the fraction of pixels to visit: exact for a path, approximate for a grid.
        chance: source of random numbers.

    Returns:
        [side, side]
    """
    points = PATHS[path](side, coverage, chance)
    flat = visited(points, side)
    found = np.zeros(side * side, dtype=bool)
    found[flat if path == "grid" else flat[: round(coverage * side * side)]] = True
    return found.reshape(side, side)


def visited(points: Path, side: int) -> NDArray[np.int64]:
    """The pixels on a path, as indices into the flattened image, in order of first visits.

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
    """A probe's readings on its path.

    Args:
        micrograph: [side, side].
        visited_pixels: [side, side].
        probe: size of the probe: standard deviation, in pixels, of the Gaussian that each reading
            averages over. 0 reads single pixels.

    Returns:
        [side, side], 0 in pixels that were not visited.
    """
    blurred = gaussian_filter(micrograph, probe) if probe else micrograph
    return np.where(visited_pixels, blurred, np.float32(0))


def polar(radius: NDArray[np.float64], angle: NDArray[np.float64], side: int) -> Path:
    """Convert polar coordinates around the centre of an image to points."""
    offset = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
    return side / 2 + offset


def _spiral(pitch: float, side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Radius and angle of points, equally spaced along a spiral."""
    # The spiral's length up to a radius is pi radius^2 / pitch. It ends beyond the corners.
    corner = side / np.sqrt(2) + pitch
    length = np.arange(0, np.pi * corner**2 / pitch, 1 / POINTS_A_PIXEL)
    radius = np.sqrt(length * pitch / np.pi)
    return radius, 2 * np.pi * radius / pitch


@lru_cache
def arm_distance(side: int, coverage: float) -> float:
    """The distance between arms, in pixels, of a spiral with a given coverage."""
    pitch = 2 / coverage
    wanted = round(coverage * side**2)
    while len(visited(polar(*_spiral(pitch, side), side), side)) < wanted:
        pitch *= 0.99
    return pitch
