"""Gradient norms: those that Lightning computes to clip gradients, and those of skipped steps."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradient_norm", "norms_watched"]


class _InThread(threading.local):
    """The watcher of the innermost :func:`norms_watched` in this thread."""

    watcher: Callable[[Tensor], None] | None = None


_in_thread = _InThread()


class _Patch:
    """Replaces ``torch.nn.utils.clip_grad_norm_`` while a thread watches norms.

    Fits in several threads share one patch, because all threads of a process use the same function.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def install(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._original = torch.nn.utils.clip_grad_norm_
                self._wrapper = _watched(self._original)
                torch.nn.utils.clip_grad_norm_ = self._wrapper

    def remove(self) -> None:
        with self._lock:
            self._users -= 1
            # Other code may have wrapped the wrapper since. The wrapper then stays in place, and
            # only calls the original.
            if not self._users and torch.nn.utils.clip_grad_norm_ is self._wrapper:
                torch.nn.utils.clip_grad_norm_ = self._original


_patch = _Patch()


@contextmanager
def norms_watched(watcher: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``watcher`` with each norm that ``clip_grad_norm_`` returns inside the ``with`` block.

    The norm is that before clipping. Lightning calls ``torch.nn.utils.clip_grad_norm_``, and drops
    the norm that it returns. Calls in other threads, which may be of other fits, are not watched.
    """
    outer, _in_thread.watcher = _in_thread.watcher, watcher
    _patch.install()
    try:
        yield
    finally:
        _patch.remove()
        _in_thread.watcher = outer


def _watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
        # The original may call an earlier wrapper, which must not notify the watcher a second time.
        watcher, _in_thread.watcher = _in_thread.watcher, None
        try:
            norm = original(*args, **kwargs)
        finally:
            _in_thread.watcher = watcher
        # A DTensor is left out: to compute its value, the ranks would have to communicate.
        if watcher is not None and type(norm) is Tensor:
            watcher(norm)
        return norm

    return clip_grad_norm_


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
    values = [
        torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in values
    ]
    norms = [torch.linalg.vector_norm(each.float()) for each in values]
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([each.to(norms[0].device) for each in norms])
    )
    scaler = getattr(trainer.strategy.precision_plugin, "scaler", None)
    return norm if scaler is None else norm / float(scaler.get_scale())
