"""The losses of a CPU, read on the host, where floats are several times as fast as 0-d tensors.

The same comes of them as of :func:`~lightning_alrc.functional.clip` and
:func:`~lightning_alrc.sums.summed`, which all other losses take.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_alrc.sums import LARGEST_DEVIATION, Sums, dtype_for, rebased

__all__ = ["clip"]

LARGEST_SQUARE = LARGEST_DEVIATION[torch.float64] ** 2

CHUNK = 2**18
"""Losses read at a time, so that their deviations never leave the processor's cache."""


def clip(
    loss: Tensor,
    mu1: float,
    upper: float,
    lower: float | None,
    watcher: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Sums] | None:
    """Clip losses, and sum up what the moments are to learn of them.

    Args:
        loss: losses of any shape and floating dtype.
        mu1: running mean.
        upper: the threshold; infinity clips nothing.
        lower: a bound below the mean; ``None`` clips nothing there.
        watcher: that of :class:`~lightning_alrc.ALRC`, told of a clip.

    Returns:
        ``None`` for losses several of which are clipped, or that are not finite, or too low.
    """
    count = loss.numel()
    if count != 1:
        sums = _unclipped(loss, mu1, upper, lower) if count else Sums()
        return None if sums is None else (loss, sums)
    value = loss.item()
    deviation = value - mu1
    if not deviation * deviation <= LARGEST_SQUARE or (lower is not None and value < lower):
        return None
    if value <= upper:
        return loss, Sums(1.0, 0.0, 0.0, 1.0, value, value, deviation, None)
    origin = mu1 if upper <= 0.0 else 0.0
    scale = (upper - origin) / (value - origin)
    if watcher is not None:
        seen = torch.tensor((scale, value, upper), dtype=torch.float64)
        watcher(seen.view(3, *loss.shape))
    # The product is differentiated, and rounded; or wrong, where the threshold is not positive.
    clipped = loss * scale
    clipped.detach().fill_(max(upper, torch.finfo(loss.dtype).min))
    return clipped, Sums(1.0, 0.0, float(scale < 1.0), scale, value, upper, upper - mu1, None)


def _unclipped(loss: Tensor, mu1: float, upper: float, lower: float | None) -> Sums | None:
    """The sums of several losses, unless one is to be clipped or not finite."""
    values = loss.detach().to(dtype_for(loss, torch.float64))
    if values.ndim != 1:
        values = values.flatten()
    mean = mu1 if values.dtype == torch.float64 else values.new_tensor(mu1).item()
    count = values.numel()
    largest, smallest = -math.inf, math.inf
    deviation = squared_deviation = 0.0
    for some in torch.split(values, CHUNK) if count > CHUNK else (values,):
        largest = max(largest, some.amax().item())
        if lower is not None:
            smallest = min(smallest, some.amin().item())
        deviations = some - mean
        deviation += deviations.sum().item()
        squared_deviation += deviations.dot(deviations).item()
    # A NaN or an infinity shows in the squares.
    finite = squared_deviation <= LARGEST_SQUARE
    if not finite or largest > upper or (lower is not None and smallest < lower):
        return None
    total = count * mean + deviation
    sums = Sums(count, 0.0, 0.0, count, total, total, deviation, squared_deviation)
    return sums if mean == mu1 else rebased(mu1, mean, sums)
