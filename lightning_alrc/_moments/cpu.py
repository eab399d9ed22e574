"""The path of losses on the CPU. Its moments are floats: several times faster than 0-d tensors.

It computes the same as :func:`~lightning_alrc.functional.clip` and
:func:`~lightning_alrc._moments.sums.summed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments import tensors
from lightning_alrc._moments.bounds import Bounds, bounds
from lightning_alrc._moments.call import Call
from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import LARGEST_DEVIATION, Sums, centre, dtype_for, rebased

__all__ = ["clip", "learn"]

LARGEST_SQUARE = LARGEST_DEVIATION[torch.float64] ** 2

CHUNK = 2**18
"""Number of losses that are summed at a time. The deviations of so many losses fit into the
processor's cache."""


def clip(loss: Tensor, call: Call) -> Tensor:
    """Clip losses by the moments, and update the moments by the clipped losses."""
    state, rules, on_clip, _, _, reduced, _ = call
    state.make_floats()
    if reduced is not None:
        learn(state, rules, reduced)
    clipped, sums = _clipped(loss, state.mu1, bounds(state, rules.limits), on_clip)
    call.finish(sums)
    return clipped


def learn(state: State, rules: Rules, reduced: Tensor) -> None:
    """Update the moments by all ranks' sums."""
    state.learn(Sums(*reduced.tolist()), rules.decays)


def _clipped(
    loss: Tensor,
    mu1: float,
    bounds: Bounds,
    on_clip: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Sums]:
    """Clip losses, and compute the sums that the moments learn from. The bounds are floats."""
    count = loss.numel()
    if count == 0:
        return loss, Sums()
    quick = (_clip_one if count == 1 else _clip_several)(loss, mu1, bounds, on_clip)
    if quick is not None:
        return quick
    clipped, sums = tensors.clipped(loss, mu1, bounds, on_clip)
    return clipped, Sums(*sums.packed().tolist())


def _clip_one(
    loss: Tensor, mu1: float, bounds: Bounds, on_clip: Callable[[Tensor], None] | None
) -> tuple[Tensor, Sums] | None:
    """:func:`_clipped` for one loss.

    ``None`` if the loss is not finite, is below ``lower``, or is so far from the mean that the
    square of the deviation is too large. Then :mod:`~lightning_alrc._moments.tensors` clips.
    """
    upper, lower, learned_upper, _, spike = bounds
    value = loss.item()
    deviation = value - mu1
    if not deviation * deviation <= LARGEST_SQUARE or (lower is not None and value < lower):
        return None
    is_spike = float(value > spike)
    if value <= upper:
        return loss, Sums(1.0, 0.0, 0.0, 1.0, value, value, deviation, None, None, is_spike)
    scale = _scale(value, upper, mu1)
    if on_clip is not None:
        seen = torch.tensor((scale, value, upper), dtype=torch.float64, device="cpu")
        on_clip(seen.view(3, *loss.shape))
    clipped = _scaled(loss, scale, upper)
    learned = upper if learned_upper is None else min(value, learned_upper)
    is_clipped = float(scale < 1.0)
    return clipped, Sums(
        1.0, 0.0, is_clipped, scale, value, upper, learned - mu1, None, None, is_spike
    )


def _scale(value: Any, bounded: Any, mu1: float) -> Any:
    """The factor on the gradient of one or several losses that are clipped to ``bounded``."""
    return bounded / value if mu1 > 0.0 else (bounded - mu1) / (value - mu1)


def _scaled(
    loss: Tensor, scale: float | Tensor, upper: float, bounded: Tensor | None = None
) -> Tensor:
    """Clipped losses, whose gradients are multiplied by ``scale``.

    This is much faster than an autograd function written in Python.

    Args:
        loss: one loss, or several.
        scale: the factor on each gradient.
        upper: the threshold.
        bounded: the clipped values. ``None`` for one loss, clipped to ``upper``.
    """
    product = (loss * scale).to(loss.dtype)
    # The product has the right gradient, but its value is rounded, and wrong for a negative mean.
    # So the value is overwritten.
    value, lowest = product.detach(), torch.finfo(loss.dtype).min
    # If the threshold is below the dtype's lowest number, all losses are clipped to that number.
    if bounded is None or upper < lowest:
        value.fill_(max(upper, lowest))
    else:
        value.copy_(bounded)
    return product


def _clip_several(
    loss: Tensor, mu1: float, bounds: Bounds, on_clip: Callable[[Tensor], None] | None
) -> tuple[Tensor, Sums] | None:
    """:func:`_clipped` for several losses. ``None`` in the cases of :func:`_clip_one`."""
    upper, lower, learned_upper, _, spike = bounds
    values, origin, count = loss.detach(), mu1, loss.numel()
    if values.ndim != 1:
        values = values.flatten()
    dtype = dtype_for(loss, torch.float64)
    if dtype == torch.float64:
        values = values.double()  # faster than to()
    else:
        values = values.to(dtype)
        origin = centre(values, mu1).item()
    largest, smallest, deviation, square = _measured(values, origin, lower is not None)
    # If a loss is NaN or infinite, the sum of squares is NaN or infinite, too.
    if not square <= LARGEST_SQUARE or (lower is not None and smallest < lower):
        return None
    total = count * origin + deviation
    spikes = (values > spike).count_nonzero().item() if largest > spike else 0.0
    sums = Sums(count, 0.0, 0.0, count, total, total, deviation, square, None, spikes)
    if largest > upper:
        bounded = values.clamp(max=upper)
        scale = _scale(values, bounded, mu1)
        scale.nan_to_num_(nan=1.0)  # a loss of 0 that is not clipped gives 0 / 0
        if on_clip is not None:
            on_clip(torch.stack((scale, values, bounded)).view(3, *loss.shape))
        _, _, deviation, square = _measured(bounded, origin)
        loss_clipped = count * origin + deviation
        if learned_upper is not None and learned_upper > upper:
            _, _, deviation, square = _measured(values.clamp(max=learned_upper), origin)
        sums = sums._replace(
            clipped=(scale < 1.0).count_nonzero().item(),
            scale=scale.sum().item(),
            loss_clipped=loss_clipped,
            deviation=deviation,
            squared_deviation=square,
        )
        factor = scale.to(torch.promote_types(loss.dtype, torch.float32))
        loss = _scaled(loss, factor.view(loss.shape), upper, bounded.view(loss.shape))
    return loss, sums if origin == mu1 else rebased(mu1, origin, sums)


def _measured(
    values: Tensor, origin: float, smallest_too: bool = False
) -> tuple[float, float, float, float]:
    """Largest and smallest value, sum of deviations from the origin, sum of their squares.

    The smallest is found only if ``smallest_too``; otherwise it is infinite.
    """
    if values.numel() > CHUNK:
        parts = (_measured(part, origin, smallest_too) for part in torch.split(values, CHUNK))
        largest, smallest, deviation, square = zip(*parts, strict=True)
        return max(largest), min(smallest), sum(deviation), sum(square)
    deviations = values - origin
    return (
        values.amax().item(),
        values.amin().item() if smallest_too else math.inf,
        deviations.sum().item(),
        deviations.dot(deviations).item(),
    )
