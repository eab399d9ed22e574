"""The sums over the losses of a call, by which the moments are updated.

The sums are floats, or 0-d tensors on the losses' device. The arithmetic is the same for both.

A *spike* is here a loss more than 6 standard deviations above the mean, as in the spike score. A
call *spikes* if more than half of its finite losses are clipped, as for ``on_spike="skip"``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc.functional import Clipped

__all__ = [
    "Sums",
    "centre",
    "dtype_for",
    "packed",
    "rebased",
    "summed",
    "widest_dtype",
    "zero_sums",
]

# Deviations from the mean are clamped to plus or minus this number before they are squared. So the
# sum of a million squares is finite.
LARGEST_DEVIATION = {torch.float64: 1e150, torch.float32: 1e16}

MOST_CONVERTED = 2**16
"""A call with at most this number of losses converts them all to the moments' dtype."""

SPIKED_SHARE = 0.5
"""A call spikes if more than this share of its finite losses is clipped."""

SAMPLE = 1023
"""Largest number of losses that :func:`centre` takes a median of."""


class Sums(NamedTuple):
    """Sums over the finite losses of one call, or of several calls clipped by the same moments."""

    losses: Any = 0.0
    nonfinite: Any = 0.0
    clipped: Any = 0.0
    scale: Any = 0.0
    """sum of the factors on the gradients; a loss that is not finite counts 1"""
    loss: Any = 0.0
    loss_clipped: Any = 0.0
    deviation: Any = 0.0
    """sum of deviations from ``mu1``, after clipping to the bounds ``learned_upper`` and
    ``learned_lower``"""
    squared_deviation: Any = 0.0
    """sum of the squares of these deviations; ``None`` for a single loss"""
    learned: Any = None
    """number of losses that the moments learn from; ``None`` if equal to ``losses``"""
    spikes: Any = 0.0
    """for the spike score, the number of losses that are larger than
    :attr:`Bounds.spike <lightning_alrc._moments.bounds.Bounds>`: 6 standard deviations above the
    mean, or infinity during burn-in"""
    offending: Any = 0.0
    """``nonfinite``. If :attr:`ALRC.spiked_calls_offend <lightning_alrc.ALRC>`, the number of calls
    that spike is added; see :data:`SPIKED_SHARE`."""

    def packed(self, device: torch.device | None = None) -> Tensor:
        """All sums in one tensor, in the order of the fields. See :func:`packed`."""
        deviation, square = self.deviation, self.squared_deviation
        if square is None:
            square = deviation * deviation
        learned = self.losses if self.learned is None else self.learned
        return packed((*self[:6], deviation, square, learned, *self[9:]), device)


def packed(numbers: tuple[Any, ...], device: torch.device | None = None) -> Tensor:
    """Numbers in one tensor: on ``device`` in its :func:`widest_dtype`, or on their own device."""
    if isinstance(numbers[0], Tensor):
        together = torch.stack(numbers)
    else:
        together = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if device is None or device == together.device:
        return together
    return together.to(device, widest_dtype(device))


def zero_sums(device: torch.device, *rows: int) -> Tensor:
    """Zeros to add :meth:`Sums.packed` to: [11], or [rows, 11]."""
    shape = (*rows, len(Sums._fields))
    return torch.zeros(shape, dtype=widest_dtype(device), device=device)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_for(loss: Tensor, moments: torch.dtype) -> torch.dtype:
    """The dtype in which losses are compared and summed.

    For at most :data:`MOST_CONVERTED` losses this is the moments' dtype. For more losses it is the
    losses' own dtype, but at least float32. Converting a million losses to float64 takes much
    longer than computing the losses. Deviations summed in float32 are right to five digits. The
    sampling error of the sum is far larger.
    """
    if loss.numel() <= MOST_CONVERTED:
        return moments
    return torch.promote_types(loss.dtype, torch.float32)


def summed(clipped: Clipped, mu1: float | Tensor, learned: Tensor, spike: Any) -> Sums:
    """The sums over clipped losses, as 0-d tensors.

    Args:
        clipped: losses of any shape.
        mu1: the running mean before the update. Its dtype is the sums' dtype; float64 for a float.
        learned: the clipped losses that the moments learn from, of the same shape.
        spike: a loss above this counts as a spike in the spike score.
    """
    wide = mu1.dtype if isinstance(mu1, Tensor) else torch.float64
    dtype = clipped.bounded.dtype
    limit = LARGEST_DEVIATION[dtype]
    mean: Any = mu1 if dtype == wide else centre(clipped.bounded, mu1)
    deviation = (learned - mean).clamp_(-limit, limit)

    def total(each: Tensor) -> Tensor:
        if each.ndim and each.dtype == torch.bool:
            return each.sum(dtype=wide)
        return (each.sum() if each.ndim else each).to(wide)

    # Where a loss is not finite, value and bounded equal mu1. The sums leave out this mu1.
    finite = clipped.finite.to(dtype)
    if dtype != wide:
        deviation.mul_(finite)
    losses = total(finite if dtype == wide else clipped.finite)  # float32 counts up to 2**24 only
    nonfinite = deviation.numel() - losses
    sums = Sums(
        losses=losses,
        nonfinite=nonfinite,
        clipped=total(clipped.scale < 1.0),
        scale=total(clipped.scale),
        loss=total(clipped.value * finite),
        loss_clipped=total(clipped.bounded * finite),
        deviation=total(deviation),
        squared_deviation=None if deviation.numel() == 1 else total(deviation * deviation),
        spikes=total(clipped.value > spike),
        offending=nonfinite,
    )
    return sums if mean is mu1 else rebased(mu1, mean.to(wide), sums)


def centre(values: Tensor, mu1: float | Tensor) -> Tensor:
    """A value near the losses. In a narrow dtype, deviations are taken from this value.

    Args:
        values: losses, at least one.
        mu1: their running mean, 0 if there is none yet.

    Returns:
        A 0-d tensor: ``mu1``, rounded to the losses' dtype, or the median of up to 1,023 losses if
        the rounded ``mu1`` is 0. An outlier has little effect on a median.
    """
    mean = torch.as_tensor(mu1, device=values.device).to(values.dtype)
    sample = values.flatten()[:: -(-values.numel() // SAMPLE)]
    return torch.where(mean == 0.0, sample.median(), mean)


def rebased(mu1: Any, mean: Any, sums: Sums) -> Sums:
    """Sums with deviations from ``mu1``, given sums with deviations from ``mean``."""
    shift = mean - mu1
    return sums._replace(
        deviation=sums.deviation + sums.losses * shift,
        squared_deviation=sums.squared_deviation
        + shift * (2.0 * sums.deviation + sums.losses * shift),
    )
