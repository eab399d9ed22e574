"""The losses of any device, as tensors on it: nothing is read on the host.

Losses that are being compiled take this path, too, whatever their device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_alrc import functional
from lightning_alrc._moments.bounds import Bounds, bounds
from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import Sums, dtype_for, noted, summed

__all__ = ["clip", "clipped", "learn"]


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
    if message is not None:
        learn(state, rules, message)
    state.to(loss.device)
    result, sums = clipped(loss, state.mu1, bounds(state, rules.limits), watcher)
    state.learn_or_add(noted(sums, skips_spikes, sums_watcher), rules.decays, row)
    return result


def learn(state: State, rules: Rules, message: Tensor) -> None:
    """Move the moments by the row of a message."""
    state.to(message.device)
    state.learn(Sums(*message.unbind()), rules.decays)


def clipped(
    loss: Tensor,
    mu1: Any,
    bounds: Bounds,
    watcher: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Sums]:
    """Clip losses, and sum up what the moments are to learn of them.

    Args:
        loss: losses of any shape and floating dtype.
        mu1: running mean; a 0-d tensor of the losses' device, or a float for those of a CPU.
        bounds: of the losses, of the kind of ``mu1``.
        watcher: that of :class:`~lightning_alrc.ALRC`; it is not told while compiling.
    """
    wide = mu1.dtype if isinstance(mu1, Tensor) else torch.float64
    found = functional.clip(loss, mu1, bounds.upper, bounds.lower, dtype_for(loss, wide))
    if watcher is not None and not torch.compiler.is_compiling():
        watcher(torch.stack((found.scale, found.value, found.bounded)))
    if bounds.learned_upper is None:
        learned = found.bounded
    else:
        learned = found.value.clamp(bounds.learned_lower, bounds.learned_upper)
    return found.loss, summed(found, mu1, learned, bounds.spike)
