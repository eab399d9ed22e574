"""What a loss's ALRC remembers, and how the losses of one call change it.

State and sums are of floats, or of 0-d tensors on the losses' device: the arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc.functional import Clipped, at_least, at_most, ramped_decay, update

__all__ = ["State", "Sums", "dtype_for", "dump_state", "moved", "read_state", "summed"]

VERSION = 1

# A deviation from the mean is held within this before it is squared, so that the sum of a million
# squares is finite.
LARGEST_DEVIATION = {torch.float64: 1e150, torch.float32: 1e16}


MANY = 2**16
"""Losses in one call from which on they are not copied into the moments' dtype."""

# These may be infinite after huge losses, at the cost of a logged row.
SUMS_OF_LOSSES = ("row_loss", "row_loss_clipped")


class State(NamedTuple):
    """Moments and counts. ``row_*`` are sums over the finite losses since the last logged row."""

    mu1: Any = 0.0
    variance: Any = 0.0
    updates: Any = 0.0
    losses: Any = 0.0
    clipped: Any = 0.0
    nonfinite: Any = 0.0
    resets: Any = 0.0
    losses_before: Any = 0.0
    """those seen when the moments were last reset"""
    row_losses: Any = 0.0
    row_clipped: Any = 0.0
    row_loss: Any = 0.0
    row_loss_clipped: Any = 0.0
    row_scale: Any = 0.0

    def with_new_row(self) -> State:
        """The same with nothing since the last logged row."""
        return State(**{k: v for k, v in self._asdict().items() if not k.startswith("row_")})


class Sums(NamedTuple):
    """The losses of one call, or of several at the same moments, summed over the finite ones."""

    losses: Any = 0.0
    nonfinite: Any = 0.0
    clipped: Any = 0.0
    scale: Any = 0.0
    deviation_before: Any = 0.0
    """of the losses from ``mu1`` before they were clipped"""
    deviation: Any = 0.0
    squared_deviation: Any = 0.0
    """of the clipped losses, as the one above"""

    def as_tensor(self, device: torch.device) -> Tensor:
        """The same in one tensor of the shape [7], to be sent."""
        if isinstance(self.losses, Tensor):
            return torch.stack(self)
        return torch.tensor(self, dtype=torch.float64, device=device)


def dtype_for(loss: Tensor, moments: torch.dtype) -> torch.dtype:
    """What losses are compared and summed in: that of the moments, unless they are many.

    A million float64 copies take many times as long as the losses themselves. Deviations from the
    mean summed in float32 are good to five digits, which is far more than their number tells.
    """
    if loss.numel() <= MANY:
        return moments
    return torch.promote_types(loss.dtype, torch.float32)


def summed(clipped: Clipped, mu1: Tensor) -> Tensor:
    """What the moments are to learn of clipped losses: :class:`Sums` in a tensor of shape [7]."""
    dtype = clipped.bounded.dtype
    limit = LARGEST_DEVIATION[dtype]
    mean = mu1.to(dtype)
    deviation = (clipped.bounded - mean).clamp_(-limit, limit).flatten()
    if deviation.numel() <= MANY:
        rows = Sums(
            losses=clipped.finite,
            nonfinite=~clipped.finite,
            clipped=clipped.scale < 1.0,
            scale=clipped.scale,
            deviation_before=clipped.value - mean,
            deviation=deviation,
            squared_deviation=deviation * deviation,
        )
        return torch.stack([row.flatten().to(mu1.dtype) for row in rows]).sum(1)
    losses = clipped.finite.count_nonzero()
    sums = Sums(
        losses=losses,
        nonfinite=deviation.numel() - losses,
        clipped=(clipped.scale < 1.0).count_nonzero(),
        scale=clipped.scale.sum(),
        deviation_before=clipped.value.sum().to(mu1.dtype) - losses * mean,
        deviation=deviation.sum(),
        squared_deviation=deviation.dot(deviation),
    )
    sums = Sums(*(each.to(mu1.dtype) for each in sums))
    return torch.stack(_from(mu1, mean.to(mu1.dtype), sums))


def _from(mu1: Any, mean: Any, sums: Sums) -> Sums:
    """Sums of deviations from ``mu1``, from those of deviations from a ``mean`` close to it."""
    shift = mean - mu1
    return sums._replace(
        deviation_before=sums.deviation_before + sums.losses * shift,
        deviation=sums.deviation + sums.losses * shift,
        squared_deviation=sums.squared_deviation
        + shift * (2.0 * sums.deviation + sums.losses * shift),
    )


def summed_on_host(loss: Tensor, mu1: float, upper: float, lower: float | None) -> Sums | None:
    """The same of a CPU tensor's losses as floats; ``None`` if one is to be clipped or not finite.

    Args:
        loss: losses of any shape and floating dtype.
        mu1: running mean.
        upper: the threshold; infinity clips nothing.
        lower: a bound below the mean; ``None`` clips nothing there.
    """
    count = loss.numel()
    if count == 0:
        return Sums()
    mean = mu1
    if count == 1:
        smallest = largest = loss.item()
        deviation = largest - mu1
        squared_deviation = deviation * deviation
    else:
        value = loss.detach().to(dtype_for(loss, torch.float64)).flatten()
        largest = value.amax().item()
        smallest = largest if lower is None else value.amin().item()
        if value.dtype != torch.float64:
            mean = value.new_tensor(mu1).item()
        deviations = value - mean
        deviation = deviations.sum().item()
        squared_deviation = deviations.dot(deviations).item()
    # A NaN or an infinity, here or among many, shows in the squares.
    finite = squared_deviation <= LARGEST_DEVIATION[torch.float64] ** 2
    if not finite or largest > upper or (lower is not None and smallest < lower):
        return None
    sums = Sums(count, 0.0, 0.0, count, deviation, deviation, squared_deviation)
    return sums if mean == mu1 else _from(mu1, mean, sums)


def moved(
    state: State, sums: Sums, decay: float, mu2_decay: float | None, ramp_horizon: float | None
) -> State:
    """The state after losses have been clipped by its moments.

    Args:
        state: moments and counts before.
        sums: of the losses; if none was finite, no moment moves.
        decay: of the moments.
        mu2_decay: of the second moment if it has its own.
        ramp_horizon: of :func:`~lightning_alrc.functional.ramped_decay`; ``None`` for the full
            decay from the first update.
    """
    learns = at_most(sums.losses, 1.0)
    count = at_least(sums.losses, 1.0)
    delta = sums.deviation / count
    batch_variance = at_least(sums.squared_deviation / count - delta * delta, 0.0)

    def effective(decay: float) -> Any:
        ramped = decay if ramp_horizon is None else ramped_decay(decay, state.updates, ramp_horizon)
        return 1.0 - (1.0 - ramped) * learns

    mu1, variance = update(
        state.mu1,
        state.variance,
        state.mu1 + delta,
        batch_variance,
        effective(decay),
        None if mu2_decay is None else effective(mu2_decay),
    )
    mean_before = sums.losses * state.mu1
    return State(
        mu1=mu1,
        variance=variance,
        updates=state.updates + learns,
        losses=state.losses + sums.losses,
        clipped=state.clipped + sums.clipped,
        nonfinite=state.nonfinite + sums.nonfinite,
        resets=state.resets,
        losses_before=state.losses_before,
        row_losses=state.row_losses + sums.losses,
        row_clipped=state.row_clipped + sums.clipped,
        row_loss=state.row_loss + (sums.deviation_before + mean_before),
        row_loss_clipped=state.row_loss_clipped + (sums.deviation + mean_before),
        row_scale=state.row_scale + (sums.scale - sums.nonfinite),
    )


def dump_state(state: State, settings: Mapping[str, float | None]) -> dict[str, Any]:
    """A state of floats, and the settings it was made with, for a checkpoint."""
    return {"version": VERSION, "settings": dict(settings), "state": state._asdict()}


def read_state(dumped: Any) -> State:
    """The state of floats in what :func:`dump_state` returned, checked.

    Raises:
        ValueError: names what is wrong with it, and what is allowed.
    """
    version = dumped.get("version") if isinstance(dumped, Mapping) else type(dumped).__name__
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"ALRC state must be a mapping of version {VERSION}, got {version!r:.100}: it was "
            "written by something else, or by a later release of lightning-alrc"
        )
    values = dumped.get("state")
    if not isinstance(values, Mapping) or set(values) != set(State._fields):
        raise ValueError(f"ALRC state must have {list(State._fields)}, got {values!r:.300}")
    for name, value in values.items():
        if name in SUMS_OF_LOSSES:
            allowed, good = "a float", type(value) is float
        else:
            largest, smallest = (1e152, -1e152) if name == "mu1" else (1e302, 0.0)
            allowed = f"a finite number from {smallest:g} to {largest:g}"
            good = type(value) in (int, float) and smallest <= value <= largest
        if not good:
            raise ValueError(f"ALRC state {name!r} must be {allowed}, got {value!r:.100}")
    return State(**{name: float(value) for name, value in values.items()})
