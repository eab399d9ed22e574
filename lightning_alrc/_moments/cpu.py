"""The losses of a CPU, read on the host, where floats are several times as fast as 0-d tensors.

The same comes of them as of :func:`~lightning_alrc.functional.clip` and
:func:`~lightning_alrc._moments.sums.summed`, which all other losses take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments import tensors
from lightning_alrc._moments.bounds import Bounds, bounds
from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import LARGEST_DEVIATION, Sums, centre, dtype_for, noted, rebased

__all__ = ["clip", "learn"]

LARGEST_SQUARE = LARGEST_DEVIATION[torch.float64] ** 2

CHUNK = 2**18
"""Losses read at a time, so that their deviations never leave the processor's cache."""


def clip(
    loss: Tensor,
    state: State,
    rules: Rules,
    watcher: Callable[[Tensor], None] | None,
    sums_watcher: Callable[[Sums], None] | None = None,
    skips_spikes: bool = False,
    message: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """Clip losses, and move the moments by them or add to the row of a message.

    The arguments are those of :class:`lightning_alrc._moments.paths.Path`.
    """
    state.to_host()
    if message is not None:
        learn(state, rules, message)
    result, sums = _clipped(loss, state.mu1, bounds(state, rules.limits), watcher)
    state.learn_or_add(noted(sums, skips_spikes, sums_watcher), rules.decays, row)
    return result


def learn(state: State, rules: Rules, message: Tensor) -> None:
    """Move the moments by the row of a message."""
    state.learn(Sums(*message.tolist()), rules.decays)


def _clipped(
    loss: Tensor,
    mu1: float,
    bounds: Bounds,
    watcher: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Sums]:
    """Clip losses, and sum up what the moments are to learn of them.

    Args:
        loss: losses of any shape and floating dtype.
        mu1: running mean.
        bounds: of the losses, floats.
        watcher: that of :class:`~lightning_alrc.ALRC`, told of a clip.
    """
    count = loss.numel()
    if count == 0:
        return loss, Sums()
    known = (_one if count == 1 else _several)(loss, mu1, bounds, watcher)
    if known is not None:
        return known
    clipped, sums = tensors.clipped(loss, mu1, bounds, watcher)
    return clipped, Sums(*sums.packed().tolist())


def _one(
    loss: Tensor, mu1: float, bounds: Bounds, watcher: Callable[[Tensor], None] | None
) -> tuple[Tensor, Sums] | None:
    """:func:`_clipped` of one loss; ``None`` if it is not finite, or below the lower bound."""
    upper, lower, learned_upper, _, spike = bounds
    value = loss.item()
    deviation = value - mu1
    if not deviation * deviation <= LARGEST_SQUARE or (lower is not None and value < lower):
        return None
    is_spike = float(value > spike)
    if value <= upper:
        return loss, Sums(1.0, 0.0, 0.0, 1.0, value, value, deviation, None, None, is_spike)
    scale = _factor(value, upper, mu1)
    if watcher is not None:
        seen = torch.tensor((scale, value, upper), dtype=torch.float64, device="cpu")
        watcher(seen.view(3, *loss.shape))
    clipped = _product(loss, scale, upper)
    learned = upper if learned_upper is None else min(value, learned_upper)
    is_clipped = float(scale < 1.0)
    return clipped, Sums(
        1.0, 0.0, is_clipped, scale, value, upper, learned - mu1, None, None, is_spike
    )


def _factor(value: Any, bounded: Any, mu1: float) -> Any:
    """The factor on the gradient of a loss, or of each, that is clipped to ``bounded``."""
    return bounded / value if mu1 > 0.0 else (bounded - mu1) / (value - mu1)


def _product(
    loss: Tensor, scale: float | Tensor, upper: float, bounded: Tensor | None = None
) -> Tensor:
    """Losses clipped to ``upper``, through which their gradients are multiplied by ``scale``.

    In a fraction of the time that autograd takes for a function written in Python. The value is
    that of each in ``bounded``, or ``upper`` for one loss.
    """
    product = (loss * scale).to(loss.dtype)
    # The product serves the gradient only. Its value is rounded, and wrong for a negative mean.
    value, lowest = product.detach(), torch.finfo(loss.dtype).min
    if bounded is None or upper < lowest:  # below all of a narrow dtype, every loss is clipped
        value.fill_(max(upper, lowest))
    else:
        value.copy_(bounded)
    return product


def _several(
    loss: Tensor, mu1: float, bounds: Bounds, watcher: Callable[[Tensor], None] | None
) -> tuple[Tensor, Sums] | None:
    """:func:`_clipped` of more losses; ``None`` if one is not finite, or below the lower bound."""
    upper, lower, learned_upper, _, spike = bounds
    values, mean, count = loss.detach(), mu1, loss.numel()
    if values.ndim != 1:
        values = values.flatten()
    dtype = dtype_for(loss, torch.float64)
    if dtype == torch.float64:
        values = values.double()  # to() takes half as long again
    else:
        values = values.to(dtype)
        mean = centre(values, mu1).item()
    largest, smallest, deviation, square = _seen(values, mean, lower is not None)
    # A NaN or an infinity shows in the squares.
    if not square <= LARGEST_SQUARE or (lower is not None and smallest < lower):
        return None
    total = count * mean + deviation
    spikes = (values > spike).count_nonzero().item() if largest > spike else 0.0
    sums = Sums(count, 0.0, 0.0, count, total, total, deviation, square, None, spikes)
    if largest > upper:
        bounded = values.clamp(max=upper)
        scale = _factor(values, bounded, mu1)
        scale.nan_to_num_(nan=1.0)  # 0 / 0 where a loss of 0 is left alone
        if watcher is not None:
            watcher(torch.stack((scale, values, bounded)).view(3, *loss.shape))
        _, _, deviation, square = _seen(bounded, mean)
        loss_clipped = count * mean + deviation
        if learned_upper is not None and learned_upper > upper:
            _, _, deviation, square = _seen(values.clamp(max=learned_upper), mean)
        sums = sums._replace(
            clipped=(scale < 1.0).count_nonzero().item(),
            scale=scale.sum().item(),
            loss_clipped=loss_clipped,
            deviation=deviation,
            squared_deviation=square,
        )
        factor = scale.to(torch.promote_types(loss.dtype, torch.float32))
        loss = _product(loss, factor.view(loss.shape), upper, bounded.view(loss.shape))
    return loss, sums if mean == mu1 else rebased(mu1, mean, sums)


def _seen(
    values: Tensor, mean: float, smallest_too: bool = False
) -> tuple[float, float, float, float]:
    """The largest, the smallest if asked for, and the sums of deviations and of their squares."""
    if values.numel() > CHUNK:
        parts = (_seen(part, mean, smallest_too) for part in torch.split(values, CHUNK))
        largest, smallest, deviation, square = zip(*parts, strict=True)
        return max(largest), min(smallest), sum(deviation), sum(square)
    deviations = values - mean
    return (
        values.amax().item(),
        values.amin().item() if smallest_too else math.inf,
        deviations.sum().item(),
        deviations.dot(deviations).item(),
    )
