"""Whether a module still has the weights that its moments were measured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["fingerprint", "have_changed"]


def fingerprint(module: nn.Module) -> Tensor | None:
    """A few numbers of a module's weights, on the CPU; ``None`` if there are no weights.

    Equal weights have equal ones, but for rounding. Of parameters that are spread over ranks it is
    the rank's part.
    """
    norms = []
    for parameter in module.parameters():
        if is_lazy(parameter):  # has no shape yet
            continue
        value = parameter.detach()
        if hasattr(value, "to_local"):
            value = value.to_local()
        if value.is_floating_point() and value.numel() and not value.is_meta:
            wide = value.double if value.dtype == torch.float64 else value.float
            norms.append(wide().norm().cpu().double())
    return torch.stack(norms) if norms else None


def have_changed(before: Tensor | None, module: nn.Module, strategy: Any) -> bool:
    """Whether the weights, on any rank, are others than those of a fingerprint.

    Every rank must call it.
    """
    now = None if before is None else fingerprint(module)
    same = before is None or (
        now is not None
        and before.shape == now.shape
        # Another device, or number of threads, sums in another order.
        and torch.allclose(before, now, rtol=1e-5, atol=0.0, equal_nan=True)
    )
    return bool(strategy.reduce_boolean_decision(not same, all=False))
