"""The losses of an accelerator with Triton: one kernel clips them and moves the moments.

The same comes of it as of :mod:`lightning_alrc._moments.tensors`, which takes every loss that this
cannot. Nothing is read on the host, and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments.bounds import BURN_IN
from lightning_alrc._moments.rules import Rules, Settings, rules_of
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import (
    LARGEST_DEVIATION,
    SPIKED_SHARE,
    Sums,
    dtype_for,
    new_row,
)
from lightning_alrc.functional import CATCH_UP, EPSILON, PAPERS_LEAST, RECENT, SPIKE, STUCK

__all__ = ["clip", "learn", "takes"]

ONE_PROGRAM = 2**15
"""Losses, at most, that one program reads; more are read by several, whose sums a second kernel
adds up."""

MOST_PROGRAMS = 1024

BLOCKS = ((1, 1), (32, 1), (256, 4), (1024, 8))
"""Losses that a program reads at a time, and its warps; the first that holds all is taken. Few of
them, as each is compiled."""

OLDEST_CUDA = (7, 0)
"""Compute capability from which on Triton compiles."""


def takes(loss: Tensor) -> bool:
    """Whether the kernel clips a loss: a plain tensor of a device that Triton compiles for."""
    return (
        loss.device.type in ("cuda", "xpu")
        and type(loss) is Tensor
        and not torch._C._are_functorch_transforms_active()  # its tensors have no memory
        and _compiles(loss.device, loss.dtype)
    )


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
    if loss.numel() == 0:
        if message is not None:
            learn(state, rules, message.to(loss.device))
        return loss
    if row is not None and row.device != loss.device:
        own = new_row(loss.device)
        clipped = clip(loss, state, rules, watcher, sums_watcher, skips_spikes, message, own)
        row.add_(own.to(row.device))
        return clipped
    if message is not None:
        message = message.to(loss.device)
    seen = None
    if watcher is not None:
        dtype = dtype_for(loss, torch.float64)
        seen = torch.empty((3, *loss.shape), dtype=dtype, device=loss.device)
    told = None
    if sums_watcher is not None:
        told = torch.empty(len(Sums._fields), dtype=torch.float64, device=loss.device)
    together = state.together(loss.device)
    result: Tensor = _Clip.apply(loss, together, rules, seen, told, skips_spikes, message, row)
    if sums_watcher is not None and told is not None:
        sums_watcher(Sums(*told.unbind()))
    if watcher is not None and seen is not None:
        watcher(seen)
    return result


def learn(state: State, rules: Rules, message: Tensor) -> None:
    """Move the moments by the row of a message, on its device, by one kernel."""
    together = state.together(message.device)
    with _on(message.device):
        _learn(together, _settings(rules, message.device), message, None, None, None, 0, False)


class _Clip(torch.autograd.Function):
    """One kernel forwards, and one multiplication backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        state: Tensor,
        rules: Rules,
        seen: Tensor | None,
        told: Tensor | None,
        skips_spikes: bool,
        message: Tensor | None,
        row: Tensor | None,
    ) -> Tensor:
        given, kernels, count = loss.contiguous(), _kernels(), loss.numel()
        clipped = torch.empty_like(given)
        wide = torch.float64 if loss.dtype == torch.float64 else torch.float32
        factors = torch.empty_like(given, dtype=wide)
        block, warps = next((each for each in BLOCKS if count <= each[0]), BLOCKS[-1])
        programs = 1 if count <= ONE_PROGRAM else min(-(-count // block), MOST_PROGRAMS)
        parts = None
        to = kernels.TO_MOMENTS if row is None else kernels.TO_ROW
        if programs > 1:
            to = kernels.TO_PARTS
            parts = torch.empty((8, programs), dtype=torch.float64, device=loss.device)
        settings = _settings(rules, loss.device)
        with _on(loss.device):
            _launch(
                kernels.clip,
                programs,
                warps,
                given,
                count,
                clipped,
                factors,
                state if seen is None else seen,
                state,
                settings,
                state if message is None else message,
                state if row is None else row,
                state if told is None else told,
                state if parts is None else parts,
                TO=to.value,
                HAS_MESSAGE=message is not None,
                TELLS=told is not None,
                SKIPS_SPIKES=skips_spikes,
                SEES=seen is not None,
                LARGEST=torch.finfo(loss.dtype).max,
                IS_NARROW=loss.dtype.itemsize == 2,
                BLOCK=block,
            )
            if parts is not None:
                _learn(state, settings, message, row, told, parts, count, skips_spikes)
        ctx.save_for_backward(factors)
        return clipped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        if gradient.dtype == factors.dtype or torch.is_grad_enabled():
            product = (gradient * factors).to(gradient.dtype)
        else:  # rounded as it is written, without a copy
            product = torch.mul(gradient, factors, out=torch.empty_like(gradient))
        return product, None, None, None, None, None, None, None


def _learn(
    state: Tensor,
    settings: Tensor,
    message: Tensor | None,
    row: Tensor | None,
    told: Tensor | None,
    parts: Tensor | None,
    count: int,
    skips_spikes: bool,
) -> None:
    kernels = _kernels()
    _launch(
        kernels.learn,
        1,
        1 if parts is None else 4,
        state,
        settings,
        state if message is None else message,
        state if row is None else row,
        state if told is None else told,
        state if parts is None else parts,
        0 if parts is None else parts.shape[1],
        count,
        TO=(kernels.TO_MOMENTS if row is None else kernels.TO_ROW).value,
        HAS_MESSAGE=message is not None,
        TELLS=told is not None,
        SKIPS_SPIKES=skips_spikes,
        HAS_PARTS=parts is not None,
        PROGRAMS=MOST_PROGRAMS,
    )


def _launch(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants, num_warps=warps)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one, on which Triton launches."""
    if device.type == "cpu":  # of Triton's interpreter
        return nullcontext()
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return nullcontext()
    return module.device(device)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=256)
def _settings(rules: Rules, device: torch.device) -> Tensor:
    """What the kernels read of settings and constants, in the order of kernels.py."""
    limits, decays = rules.limits, rules.decays
    below = limits.num_stddev_below
    numbers = (
        limits.num_stddev,
        float("inf") if below is None else below,
        decays.decay,
        -1.0 if decays.mu2_decay is None else decays.mu2_decay,
        decays.ramp_horizon or 0.0,
        1.0 - RECENT if decays.tracks_clipped else 0.0,
        float(BURN_IN),
        EPSILON,
        STUCK,
        PAPERS_LEAST,
        CATCH_UP,
        LARGEST_DEVIATION[torch.float64],
        RECENT,
        SPIKE,
        SPIKED_SHARE,
    )
    settings = torch.empty(len(numbers), dtype=torch.float64, device=device)
    for index, number in enumerate(numbers):  # a copy to an accelerator would wait for it
        settings[index].fill_(number)
    return settings


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("lightning_alrc._moments.kernels")


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled for a device. Tries it, by some losses of its own."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.version.hip is None:
        if torch.cuda.get_device_capability(device) < OLDEST_CUDA:
            return False
    elif device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return False
    try:
        rules = rules_of(Settings(3.0, 0.999, None, None, None, None))
        clip(torch.ones((), dtype=dtype, device=device), State(), rules, None)
    except Exception as error:  # whatever a compiler or its absence may raise
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"ALRC: Triton cannot compile for {device} ({reason:.300}). Losses are clipped by "
            "tensor operations: the result is the same, each call launches more kernels",
            stacklevel=2,
        )
        return False
    return True
