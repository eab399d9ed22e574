"""Whether a module's weights have changed since its last fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["fingerprint", "have_changed"]

OF_DEVICE: tuple[type[Exception], ...] = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
"""Errors of a device that has no memory left, or is lost. Torch 2.8 added ``AcceleratorError``."""


def fingerprint(module: nn.Module) -> Tensor | None:
    """The norms of a module's parameters, on the CPU; ``None`` if there are none.

    A parameter is left out if PyTorch cannot compute its norm. Sparse CSR is an example.
    Equal weights have equal norms, up to rounding. The norm of a ``DTensor`` is that of this
    rank's part.

    Raises:
        RuntimeError: if the device has no memory left, or is lost.
    """
    norms = []
    for parameter in module.parameters():
        if is_lazy(parameter):  # has no shape yet
            continue
        try:
            value = parameter.detach()
            if hasattr(value, "to_local"):
                value = value.to_local()
            if value.is_complex():
                value = torch.view_as_real(value.resolve_conj())
            if value.is_floating_point() and value.numel() and not value.is_meta:
                wide = value.double if value.dtype == torch.float64 else value.float
                norms.append(wide().norm().cpu().double())
        except OF_DEVICE:  # does not tell whether PyTorch can compute the norm
            raise
        except (RuntimeError, TypeError):  # which error depends on the kind of tensor
            continue
    return torch.stack(norms) if norms else None


def have_changed(before: Tensor | None, module: nn.Module, strategy: Any) -> bool:
    """Whether the weights on any rank differ from a fingerprint. Every rank must call it."""
    now = None if before is None else fingerprint(module)
    same = before is None or (
        now is not None
        and before.shape == now.shape
        # The order of summation depends on the device and the number of threads. So the norms of
        # equal weights may differ by rounding errors.
        and torch.allclose(before, now, rtol=1e-5, atol=0.0, equal_nan=True)
    )
    return bool(strategy.reduce_boolean_decision(not same, all=False))
