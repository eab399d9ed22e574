"""What a loss's ALRC remembers, and how the losses of one call change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc.functional import at_least, at_most, ramped_decay, update
from lightning_alrc.sums import Sums, packed

__all__ = ["Decays", "Moments", "Row", "State", "Totals", "moved"]

VERSION = 1


class Moments(NamedTuple):
    """The running moments, and what has moved them since the start or the last reset."""

    mu1: Any = 0.0
    variance: Any = 0.0
    updates: Any = 0.0
    losses: Any = 0.0


class Decays(NamedTuple):
    """How fast the moments forget."""

    decay: float
    mu2_decay: float | None
    """of the second moment if it has its own"""
    ramp_horizon: float | None
    """of :func:`~lightning_alrc.functional.ramped_decay`; ``None`` for the full decay from the
    first update"""


class Row(NamedTuple):
    """Sums over the finite losses since a row was last logged."""

    losses: Any = 0.0
    nonfinite: Any = 0.0
    clipped: Any = 0.0
    scale: Any = 0.0
    """of the gradients; 1 for each loss that is not finite, too"""
    loss: Any = 0.0
    loss_clipped: Any = 0.0


class Totals(NamedTuple):
    """Counts since the start, but for those of the row."""

    losses: float = 0.0
    nonfinite: float = 0.0
    clipped: float = 0.0
    resets: float = 0.0


@dataclass
class State:
    """All that is remembered of a loss.

    Moments and row are of floats while the losses are on the CPU, or else of 0-d tensors on the
    losses' device. The arithmetic is the same.
    """

    moments: Moments = field(default_factory=Moments)
    row: Row = field(default_factory=Row)
    totals: Totals = field(default_factory=Totals)

    @property
    def is_on_host(self) -> bool:
        """Whether they are floats."""
        return not isinstance(self.moments.mu1, Tensor)

    def floats(self) -> tuple[Moments, Row]:
        """Moments and row on the host. Reads the device, once."""
        if self.is_on_host:
            return self.moments, self.row
        return _parted(packed((*self.moments, *self.row)).tolist())

    def to_host(self) -> None:
        """Move both to the host, as floats."""
        self.moments, self.row = self.floats()

    def to(self, device: torch.device) -> None:
        """Move both to a device, as tensors."""
        if not self.is_on_host and self.moments.mu1.device == device:
            return
        numbers = packed((*self.moments, *self.row), device)
        self.moments, self.row = _parted([each.clone() for each in numbers.unbind()])

    def learn(self, sums: Sums, decays: Decays) -> None:
        """Move the moments by the sums of losses that were clipped by them, of their kind."""
        moments, row = self.moments, self.row
        mean = sums.losses * moments.mu1
        more = Row(
            row.losses + sums.losses,
            row.nonfinite + sums.nonfinite,
            row.clipped + sums.clipped,
            row.scale + sums.scale,
            row.loss + (sums.deviation_before + mean),
            row.loss_clipped + (sums.deviation + mean),
        )
        after = moved(moments, sums, decays)
        if self.is_on_host or torch.compiler.is_compiling():
            self.moments, self.row = after, more
        else:
            # In place, so that a captured CUDA graph goes on from there when it is replayed.
            torch._foreach_copy_([*moments, *row], [*after, *more])

    def take_row(self) -> tuple[Moments, Row, Totals]:
        """All of it in floats, as it was before a new row begins. Reads the device, once."""
        moments, row = self.floats()
        before = self.totals
        self.totals = Totals(
            before.losses + row.losses,
            before.nonfinite + row.nonfinite,
            before.clipped + row.clipped,
            before.resets,
        )
        if self.is_on_host:
            self.row = Row()
        else:
            torch._foreach_zero_(list(self.row))
        return moments, row, self.totals

    def dump(self, settings: Mapping[str, float | None]) -> dict[str, Any]:
        """All of it, and the settings it was made with, as plain numbers for a checkpoint."""
        parts = *self.floats(), self.totals
        values = {
            prefix + name: getattr(part, name)
            for part, (prefix, kind) in zip(parts, PARTS.items(), strict=True)
            for name in kind._fields
        }
        return {"version": VERSION, "settings": dict(settings), "state": values}

    @classmethod
    def read(cls, dumped: Any) -> State:
        """What :meth:`dump` returned, checked.

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
        names = [prefix + name for prefix, kind in PARTS.items() for name in kind._fields]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ValueError(f"ALRC state must have {names}, got {values!r:.500}")
        for name, value in values.items():
            if name in UNBOUNDED:
                allowed, good = "a float", type(value) is float
            else:
                largest, smallest = (1e152, -1e152) if name == "mu1" else (1e302, 0.0)
                allowed = f"a finite number from {smallest:g} to {largest:g}"
                good = type(value) in (int, float) and smallest <= value <= largest
            if not good:
                raise ValueError(f"ALRC state {name!r} must be {allowed}, got {value!r:.100}")
        return cls(
            *(
                kind(*(float(values[prefix + name]) for name in kind._fields))
                for prefix, kind in PARTS.items()
            )
        )


# By the prefix that their fields have in a checkpoint.
PARTS: dict[str, Any] = {"": Moments, "row_": Row, "total_": Totals}

# These may be infinite after huge losses, at the cost of a logged row.
UNBOUNDED = ("row_loss", "row_loss_clipped")


def _parted(numbers: Sequence[Any]) -> tuple[Moments, Row]:
    count = len(Moments._fields)
    return Moments(*numbers[:count]), Row(*numbers[count:])


def moved(moments: Moments, sums: Sums, decays: Decays) -> Moments:
    """The moments after losses have been clipped by them.

    Args:
        moments: those before.
        sums: of the losses; if none was finite, no moment moves.
        decays: how fast they forget.
    """
    learns = at_most(sums.losses, 1.0)
    count = at_least(sums.losses, 1.0)
    delta = sums.deviation / count
    batch_variance = at_least(sums.squared_deviation / count - delta * delta, 0.0)

    def effective(decay: float) -> Any:
        horizon = decays.ramp_horizon
        ramped = decay if horizon is None else ramped_decay(decay, moments.updates, horizon)
        return 1.0 - (1.0 - ramped) * learns

    mu1, variance = update(
        moments.mu1,
        moments.variance,
        delta,
        batch_variance,
        effective(decays.decay),
        None if decays.mu2_decay is None else effective(decays.mu2_decay),
    )
    return Moments(mu1, variance, moments.updates + learns, moments.losses + sums.losses)
