"""Whether a module still has the weights that its moments were measured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "have_changed"]


def fingerprint(module: nn.Module) -> Tensor | None:
    """A few numbers of a module's weights, on their device; ``None`` if there are no weights.

    Equal weights have equal ones. Of parameters that are spread over ranks it is the rank's part.
    """
    norms = []
    for parameter in module.parameters():
        value = parameter.detach()
        if hasattr(value, "to_local"):
            value = value.to_local()
        if value.is_floating_point() and value.numel() and not value.is_meta:
            norms.append(value.norm().cpu().double())
    return torch.stack(norms) if norms else None


def have_changed(before: Tensor | None, module: nn.Module, strategy: Any) -> bool:
    """Whether the weights, on any rank, are others than those of a fingerprint.

    Every rank must call it.
    """
    now = None if before is None else fingerprint(module)
    changed = before is not None and (now is None or not torch.equal(before, now))
    return bool(strategy.reduce_boolean_decision(changed, all=False))
