"""The bounds to which the losses of a call are clipped."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc._moments.state import State
from lightning_alrc.functional import PAPERS_LEAST, SPIKE, learned_threshold, stddev, threshold

__all__ = ["BURN_IN", "Bounds", "Limits", "bounds", "tracks_clipped"]

BURN_IN = 10
"""Number of first losses that are not clipped if there are no start values."""


class Bounds(NamedTuple):
    """The bounds of one call: floats, or 0-d tensors on the losses' device."""

    upper: Any
    """the threshold; infinity clips nothing"""
    lower: Any = None
    """a bound below the mean; ``None`` clips nothing there"""
    learned_upper: Any = None
    """upper bound on the losses that the moments learn from; ``None`` if equal to ``upper``"""
    learned_lower: Any = None
    """lower bound on the losses that the moments learn from; ``None`` if equal to ``lower``"""
    spike: Any = math.inf
    """a loss above this counts as a spike in the spike score; no loss is clipped to this bound"""


class Limits(NamedTuple):
    """The settings that the bounds depend on."""

    num_stddev: float
    """standard deviations above the mean"""
    num_stddev_below: float | None
    """standard deviations below the mean; ``None`` for no lower bound"""
    burns_in: bool
    """whether the first :data:`BURN_IN` losses are not clipped"""
    tracks_clipped: bool
    """see :func:`tracks_clipped`"""


def tracks_clipped(num_stddev: float, num_stddev_below: float | None) -> bool:
    """Whether a bound may get stuck, so that the recent clipped fraction must be tracked.

    See :func:`~lightning_alrc.functional.learned_threshold`.
    """
    least = num_stddev if num_stddev_below is None else min(num_stddev, num_stddev_below)
    return least < PAPERS_LEAST


def bounds(state: State, limits: Limits) -> Bounds:
    """The bounds of the next call: floats or tensors, like the moments in ``state``."""
    mu1, variance, num_stddev = state.mu1, state.variance, limits.num_stddev
    if limits.burns_in and not isinstance(mu1, Tensor) and state.losses < BURN_IN:
        return UNBOUNDED
    deviation = stddev(variance)
    # The same as functional.threshold, which does not return the deviation that ``spike`` needs.
    upper = mu1 + num_stddev * deviation
    if limits.num_stddev_below is None and not limits.tracks_clipped:
        found = Bounds(upper)
    else:
        found = _with_lower_and_learned(state, limits, upper)
    if num_stddev == math.inf:
        found = found._replace(spike=mu1 + SPIKE * deviation)
    if limits.burns_in and isinstance(mu1, Tensor):
        burning_in = state.losses < BURN_IN
        found = Bounds(
            *(_unbounded_during(each, burning_in) for each in zip(found, UNBOUNDED, strict=True))
        )
    if num_stddev < math.inf:  # during burn-in ``upper`` is infinite, and so is ``spike``
        found = found._replace(spike=_raised(found.upper, deviation, SPIKE - num_stddev))
    return found


def _raised(bound: Any, deviation: Any, factor: float) -> Any:
    """A bound raised by a number of standard deviations, in one operation."""
    if isinstance(bound, Tensor):
        return torch.add(bound, deviation, alpha=factor)
    return bound + factor * deviation


def _with_lower_and_learned(state: State, limits: Limits, upper: Any) -> Bounds:
    """All bounds but ``spike``."""
    mu1, variance, recently = state.mu1, state.variance, state.clipped_recently
    above, below, _, tracks = limits
    lower = None if below is None else threshold(mu1, variance, -below)
    if not tracks:
        return Bounds(upper, lower)
    learned_upper, learned_lower = upper, lower
    if above < PAPERS_LEAST:
        learned_upper = learned_threshold(mu1, variance, above, recently)
    if below is not None and below < PAPERS_LEAST:
        learned_lower = learned_threshold(mu1, variance, -below, recently)
    return Bounds(upper, lower, learned_upper, learned_lower)


UNBOUNDED = Bounds(math.inf, -math.inf, math.inf, -math.inf, math.inf)
"""Bounds that clip nothing."""


def _unbounded_during(bound: tuple[Any, float], burning_in: Tensor) -> Any:
    usual, unbounded = bound
    return usual.masked_fill(burning_in, unbounded) if isinstance(usual, Tensor) else usual
