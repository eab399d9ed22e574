"""The path of losses that the other paths cannot take: tensor operations on the losses' device.

The host reads nothing from the device. Inside a compiled function every loss takes this path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_alrc import functional
from lightning_alrc._moments.bounds import Bounds, bounds
from lightning_alrc._moments.call import Call
from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import Sums, dtype_for, summed

__all__ = ["clip", "clipped", "learn"]


def clip(loss: Tensor, call: Call) -> Tensor:
    """Clip losses by the moments, and update the moments by the clipped losses."""
    state, rules, on_clip, _, _, reduced, _ = call
    if reduced is not None:
        learn(state, rules, reduced)
    state.move_to(loss.device)
    result, sums = clipped(loss, state.mu1, bounds(state, rules.limits), on_clip)
    call.finish(sums)
    return result


def learn(state: State, rules: Rules, reduced: Tensor) -> None:
    """Update the moments by all ranks' sums."""
    state.move_to(reduced.device)
    state.learn(Sums(*reduced.unbind()), rules.decays)


def clipped(
    loss: Tensor,
    mu1: Any,
    bounds: Bounds,
    on_clip: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Sums]:
    """Clip losses, and compute the sums that the moments learn from.

    Args:
        loss: losses of any shape and floating dtype.
        mu1: running mean: a 0-d tensor on the losses' device, or a float for losses on the CPU.
        bounds: floats or tensors, like ``mu1``.
        on_clip: see :class:`~lightning_alrc.ALRC`. Not called inside a compiled function.
    """
    wide = mu1.dtype if isinstance(mu1, Tensor) else torch.float64
    found = functional.clip(loss, mu1, bounds.upper, bounds.lower, dtype_for(loss, wide))
    if on_clip is not None and not torch.compiler.is_compiling():
        on_clip(torch.stack((found.scale, found.value, found.bounded)))
    if bounds.learned_upper is None:
        learned = found.bounded
    else:
        learned = found.value.clamp(bounds.learned_lower, bounds.learned_upper)
    return found.loss, summed(found, mu1, learned, bounds.spike)
