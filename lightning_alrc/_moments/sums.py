"""What the losses of one call come to: the sums that move the moments.

Sums are of floats, or of 0-d tensors on the losses' device: the arithmetic is the same.
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
    "with_spiked_call",
]

# A deviation from the mean is held within this before it is squared, so that the sum of a million
# squares is finite.
LARGEST_DEVIATION = {torch.float64: 1e150, torch.float32: 1e16}

MANY = 2**16
"""Losses in one call from which on they are not copied into the moments' dtype."""

SPIKED_SHARE = 0.5
"""Share of clipped losses above which a call is a spike as a whole."""

SAMPLE = 1023
"""Losses, at most, that a first centre is taken from."""


class Sums(NamedTuple):
    """The losses of one call, or of several at the same moments, summed over the finite ones."""

    losses: Any = 0.0
    nonfinite: Any = 0.0
    clipped: Any = 0.0
    scale: Any = 0.0
    """of the gradients; 1 for each loss that is not finite, too"""
    loss: Any = 0.0
    loss_clipped: Any = 0.0
    deviation: Any = 0.0
    """of the losses that the moments learn from, as clipped for that, from ``mu1``"""
    squared_deviation: Any = 0.0
    """the squares of these; ``None`` for a single loss"""
    learned: Any = None
    """number of losses that the moments learn from; ``None`` for all the finite ones"""
    spikes: Any = 0.0
    """losses above :attr:`Bounds.spike <lightning_alrc._moments.bounds.Bounds>`"""
    offending: Any = 0.0
    """what makes a step be skipped, where that is asked for: losses that are not finite, and calls
    that spike if :attr:`ALRC.skips_spikes <lightning_alrc.ALRC>`"""

    def packed(self, device: torch.device | None = None) -> Tensor:
        """All of them in one tensor, as :func:`packed` has it."""
        deviation, square = self.deviation, self.squared_deviation
        if square is None:
            square = deviation * deviation
        learned = self.losses if self.learned is None else self.learned
        return packed((*self[:6], deviation, square, learned, *self[9:]), device)


def packed(numbers: tuple[Any, ...], device: torch.device | None = None) -> Tensor:
    """Numbers in one tensor on a device, in the widest floats it has; ``None`` where they are."""
    if isinstance(numbers[0], Tensor):
        together = torch.stack(numbers)
    else:
        # Without a device these are the floats of a CPU, or on their way to another.
        together = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if device is None or device == together.device:
        return together
    return together.to(device, widest_dtype(device))


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floats that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_for(loss: Tensor, moments: torch.dtype) -> torch.dtype:
    """What losses are compared and summed in: that of the moments, unless they are many.

    A million float64 copies take many times as long as the losses themselves. Deviations from the
    mean summed in float32 are good to five digits, which is far more than their number tells.
    """
    if loss.numel() <= MANY:
        return moments
    return torch.promote_types(loss.dtype, torch.float32)


def summed(clipped: Clipped, mu1: float | Tensor, learned: Tensor, spike: Any) -> Sums:
    """What the moments are to learn of clipped losses, as 0-d tensors.

    Args:
        clipped: losses of any shape.
        mu1: the running mean that they were clipped by; its dtype is the result's, or float64.
        learned: the losses as the moments learn from them, of the shape of the losses.
        spike: a loss above it is counted as a spike.
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

    # mu1 stands where a loss is not finite; taken away again, it would leave its rounding.
    finite = clipped.finite.to(dtype)
    if dtype != wide:
        deviation.mul_(finite)
    losses = total(finite)
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


def with_spiked_call(sums: Sums) -> Sums:
    """The sums of a call, which offends if more than half of its finite losses are clipped.

    One loss for a whole batch is all of its call. An outlier among the losses of samples is not.
    """
    spiked: Any = sums.clipped > SPIKED_SHARE * sums.losses
    if isinstance(spiked, Tensor):
        spiked = spiked.to(sums.losses.dtype)
    return sums._replace(offending=sums.nonfinite + spiked)


def centre(values: Tensor, mu1: float | Tensor) -> Tensor:
    """What deviations are taken from where the dtype is too narrow for the losses' own squares.

    Args:
        values: losses, at least one.
        mu1: their running mean, 0 where there is none yet.

    Returns:
        ``mu1`` as their dtype has it, or the median of some thousand of them; a 0-d tensor. One
        outlier does not move a median far.
    """
    mean = torch.as_tensor(mu1, device=values.device).to(values.dtype)
    sample = values.flatten()[:: -(-values.numel() // SAMPLE)]
    return torch.where(mean == 0.0, sample.median(), mean)


def rebased(mu1: Any, mean: Any, sums: Sums) -> Sums:
    """Sums of deviations from ``mu1``, from those of deviations from a ``mean`` close to it."""
    shift = mean - mu1
    return sums._replace(
        deviation=sums.deviation + sums.losses * shift,
        squared_deviation=sums.squared_deviation
        + shift * (2.0 * sums.deviation + sums.losses * shift),
    )
