"""Gradient norms: those that Lightning computes to clip gradients, and those of skipped steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradient_norm", "norms_watched"]


@contextmanager
def norms_watched(watcher: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``watcher`` with each norm that ``torch.nn.utils.clip_grad_norm_`` returns.

    The result is the norm before clipping. Lightning calls the function and drops the result.
    """
    original = torch.nn.utils.clip_grad_norm_

    @functools.wraps(original)
    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
        norm = original(*args, **kwargs)
        if type(norm) is Tensor:  # the full tensor of a DTensor would need communication
            watcher(norm)
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = original


def gradient_norm(trainer: Any, optimizer: Any) -> Tensor | None:
    """The norm of an optimizer's gradients, divided by the factor of the GradScaler, if any.

    ``None`` if there are no gradients, or if each rank holds only a part of the gradients.
    """
    is_whole = trainer.world_size == 1 or any(
        base.__name__ == "DDPStrategy" for base in type(trainer.strategy).__mro__
    )
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    gradients = [each.grad.detach() for each in parameters if each.grad is not None]
    if not (is_whole and gradients):
        return None
    values = [each.coalesce().values() if each.is_sparse else each for each in gradients]
    norms = [torch.linalg.vector_norm(each.float()) for each in values]
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([each.to(norms[0].device) for each in norms])
    )
    scaler = getattr(trainer.strategy.precision_plugin, "scaler", None)
    return norm if scaler is None else norm / float(scaler.get_scale())
