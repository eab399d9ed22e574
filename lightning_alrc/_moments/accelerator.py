"""The path of losses on an accelerator with Triton: one kernel clips and updates the moments.

It computes the same as :mod:`lightning_alrc._moments.tensors`, which takes the losses that this
path cannot take. The host reads nothing from the device. A CUDA graph can capture the whole path.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments.bounds import BURN_IN
from lightning_alrc._moments.call import Call
from lightning_alrc._moments.rules import Rules, Settings, rules_of
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import (
    LARGEST_DEVIATION,
    SPIKED_SHARE,
    Sums,
    dtype_for,
    zero_sums,
)
from lightning_alrc.functional import CATCH_UP, EPSILON, PAPERS_LEAST, RECENT, SPIKE, STUCK

__all__ = ["clip", "is_capturing", "learn", "takes"]

ONE_PROGRAM = 2**15
"""Largest number of losses that a single Triton program reads. If there are more, several programs
read them, and a second kernel adds up the programs' sums."""

MOST_PROGRAMS = 1024

BLOCKS = ((1, 1), (32, 1), (256, 4), (1024, 8))
"""Pairs: the number of losses that a program reads at a time, and its number of warps. A call uses
the first pair that holds all of its losses, or the last pair if none does. There are few pairs,
because each needs its own compilation."""

LEAST_CAPABILITY = (7, 0)
"""Lowest compute capability that Triton compiles for."""


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is now run on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def takes(loss: Tensor) -> bool:
    """Whether a loss can take this path: a plain tensor on a device that Triton compiles for."""
    return (
        loss.device.type in ("cuda", "xpu")
        and type(loss) is Tensor
        and not torch._C._are_functorch_transforms_active()  # functorch's tensors have no memory
        and _compiles(loss.device, loss.dtype)
    )


def clip(loss: Tensor, call: Call) -> Tensor:
    """Clip losses by the moments, and update the moments by the clipped losses."""
    state, rules, on_clip, on_sums, spiked_calls_offend, reduced, outgoing = call
    if reduced is not None:
        reduced = reduced.to(loss.device)
    if loss.numel() == 0:
        if reduced is not None:
            learn(state, rules, reduced)
        return loss
    if outgoing is not None and outgoing.device != loss.device:
        own = zero_sums(loss.device)
        clipped = clip(loss, call._replace(outgoing=own))
        outgoing.add_(own.to(outgoing.device))
        return clipped
    seen = None
    if on_clip is not None:
        dtype = dtype_for(loss, torch.float64)
        seen = torch.empty((3, *loss.shape), dtype=dtype, device=loss.device)
    call_sums = None
    if on_sums is not None:
        call_sums = torch.empty(len(Sums._fields), dtype=torch.float64, device=loss.device)
    values, settings = _tensors_of(state, rules, loss.device)
    result: Tensor = _Clip.apply(
        loss, values, settings, seen, call_sums, spiked_calls_offend, reduced, outgoing
    )
    if on_sums is not None and call_sums is not None:
        on_sums(Sums(*call_sums.unbind()))
    if on_clip is not None and seen is not None:
        on_clip(seen)
    return result


def learn(state: State, rules: Rules, reduced: Tensor) -> None:
    """Update the moments by all ranks' sums, with one kernel on the device of the sums."""
    values, settings = _tensors_of(state, rules, reduced.device)
    with _on(reduced.device):
        _learn(values, settings, reduced, None, None, None, 0, False)


class _Clip(torch.autograd.Function):
    """Forward: one kernel. If several programs read the losses, each writes its sums (a part), and
    a second kernel adds up the parts. Backward: one multiplication."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        values: Tensor,
        settings: Tensor,
        seen: Tensor | None,
        call_sums: Tensor | None,
        spiked_calls_offend: bool,
        reduced: Tensor | None,
        outgoing: Tensor | None,
    ) -> Tensor:
        # A view like ``z.conj().imag`` has the opposite numbers in memory.
        given, kernels, count = loss.contiguous().resolve_neg(), _kernels(), loss.numel()
        clipped = torch.empty_like(given)
        wide = torch.float64 if loss.dtype == torch.float64 else torch.float32
        factors = torch.empty_like(given, dtype=wide)
        block, warps = next((each for each in BLOCKS if count <= each[0]), BLOCKS[-1])
        programs = 1 if count <= ONE_PROGRAM else min(-(-count // block), MOST_PROGRAMS)
        parts = None
        to = kernels.TO_MOMENTS if outgoing is None else kernels.TO_OUTGOING
        if programs > 1:
            to = kernels.TO_PARTS
            parts = torch.empty((8, programs), dtype=torch.float64, device=loss.device)
        with _on(loss.device):
            _launch(
                kernels.clip,
                programs,
                warps,
                given,
                count,
                clipped,
                factors,
                seen,
                values,
                settings,
                reduced,
                outgoing,
                call_sums,
                parts,
                stand_in=values,
                TO=to.value,
                HAS_REDUCED=reduced is not None,
                HAS_CALL_SUMS=call_sums is not None,
                SPIKED_CALLS_OFFEND=spiked_calls_offend,
                SEES=seen is not None,
                LARGEST=torch.finfo(loss.dtype).max,
                IS_NARROW=loss.dtype.itemsize == 2,
                BLOCK=block,
            )
            if parts is not None:
                _learn(
                    values,
                    settings,
                    reduced,
                    outgoing,
                    call_sums,
                    parts,
                    count,
                    spiked_calls_offend,
                )
        ctx.save_for_backward(factors)
        return clipped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        if gradient.dtype == factors.dtype or torch.is_grad_enabled():
            product = (gradient * factors).to(gradient.dtype)
        else:  # torch.mul rounds as it writes, so no wide product is stored
            product = torch.mul(gradient, factors, out=torch.empty_like(gradient))
        return product, None, None, None, None, None, None, None


def _learn(
    values: Tensor,
    settings: Tensor,
    reduced: Tensor | None,
    outgoing: Tensor | None,
    call_sums: Tensor | None,
    parts: Tensor | None,
    count: int,
    spiked_calls_offend: bool,
) -> None:
    """Launch the kernel that learns from all ranks' sums, from the parts of a call, or from both.

    ``outgoing`` is a row of the next all-reduce. If it is given, the sums of the parts are added to
    it, and the moments do not learn from the parts yet.
    """
    kernels = _kernels()
    _launch(
        kernels.learn,
        1,
        1 if parts is None else 4,
        values,
        settings,
        reduced,
        outgoing,
        call_sums,
        parts,
        0 if parts is None else parts.shape[1],
        count,
        stand_in=values,
        TO=(kernels.TO_MOMENTS if outgoing is None else kernels.TO_OUTGOING).value,
        HAS_REDUCED=reduced is not None,
        HAS_CALL_SUMS=call_sums is not None,
        SPIKED_CALLS_OFFEND=spiked_calls_offend,
        HAS_PARTS=parts is not None,
        PROGRAMS=MOST_PROGRAMS,
    )


def _launch(
    kernel: Any, programs: int, warps: int, *arguments: Any, stand_in: Tensor, **constants: Any
) -> None:
    """Launch a kernel.

    Triton needs a tensor for each pointer, so ``stand_in`` is passed for each argument that is
    ``None``. The kernel does not read that argument.
    """
    given = (stand_in if each is None else each for each in arguments)
    kernel[(programs,)](*given, **constants, num_warps=warps)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, because Triton launches on the current device."""
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return nullcontext()
    return module.device(device)  # type: ignore[no-any-return]


def _tensors_of(state: State, rules: Rules, device: torch.device) -> tuple[Tensor, Tensor]:
    """A state's values and settings, as the kernels take them.

    The state keeps both tensors. Later calls by this path on the device use the same tensors: a
    captured CUDA graph reads and writes them in each replay.

    Raises:
        RuntimeError: if a CUDA graph captures a call that would have to make a tensor or write the
            settings. Each replay would do that again.
    """
    known, settings = state.kernel_settings or (None, None)
    if settings is None or settings.device != device:
        known, settings = None, None
    is_packed = state.is_one_tensor and state.mu1.device == device
    if not (is_packed and known is rules) and is_capturing(device):
        raise RuntimeError(
            f"a CUDA graph captures the first call of this ALRC on {device}, or the first call "
            "after a setting was changed: call it once before the capture"
        )
    if settings is None or known is not rules:
        numbers = _settings(rules)
        if settings is None:
            settings = torch.empty(len(numbers), dtype=torch.float64, device=device)
        for index, number in enumerate(numbers):  # a copy would make the host wait for the device
            settings[index].fill_(number)
        state.kernel_settings = rules, settings
    return state.one_tensor(device), settings


def _settings(rules: Rules) -> tuple[float, ...]:
    """The settings and constants that the kernels read, in the order of kernels.py."""
    limits, decays = rules.limits, rules.decays
    below = limits.num_stddev_below
    return (
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


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("lightning_alrc._moments.kernels")


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile for a device. Compiles them for one loss to find out."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.version.hip is None:
        if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            return False
    elif device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return False
    if is_capturing(device):
        raise RuntimeError(
            f"a CUDA graph captures the first call of ALRC with losses of {dtype} on {device}: "
            "call ALRC with such a loss before the capture, so that its kernel is compiled"
        )
    try:
        rules = rules_of(Settings(3.0, 0.999, None, None, None, None))
        clip(torch.ones((), dtype=dtype, device=device), Call(State(), rules))
    except torch.OutOfMemoryError:  # this says nothing about the compiler
        raise
    except Exception as error:  # a compiler, or its absence, may raise anything
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"ALRC: Triton cannot compile for {device} ({reason:.300}). Losses are clipped by "
            "tensor operations: the result is the same, each call launches more kernels",
            stacklevel=2,
        )
        return False
    return True
