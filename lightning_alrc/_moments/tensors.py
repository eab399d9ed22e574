"""The losses of any device, as tensors on it: nothing is read on the host.

Losses that are being compiled take this path, too, whatever their device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_alrc import functional
from lightning_alrc._moments.bounds import Bounds
from lightning_alrc._moments.sums import Sums, dtype_for, summed

__all__ = ["clip"]


def clip(
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
    clipped = functional.clip(loss, mu1, bounds.upper, bounds.lower, dtype_for(loss, wide))
    if watcher is not None and not torch.compiler.is_compiling():
        watcher(torch.stack((clipped.scale, clipped.value, clipped.bounded)))
    if bounds.learned_upper is None:
        learned = clipped.bounded
    else:
        learned = clipped.value.clamp(bounds.learned_lower, bounds.learned_upper)
    return clipped.loss, summed(clipped, mu1, learned, bounds.spike)
