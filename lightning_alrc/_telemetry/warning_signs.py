"""What a Trainer's rows and learning rates say that a user should hear of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "ClippedFraction",
    "LearningRateDrop",
    "StepSizeLimiter",
    "checked_rates",
    "learning_rates",
]


class ClippedFraction:
    """The clipped fraction of a loss, over so many steps that a single clip does not make it high.

    Args:
        step: that the first row begins after.
    """

    STEPS = 100
    """over which it is taken, at least"""

    def __init__(self, step: int) -> None:
        self._since = self._until = step
        self._clipped = 0.0

    def after(self, step: int, row: Mapping[str, float]) -> float | None:
        """The fraction each time that it is known of enough steps.

        Args:
            step: of a row.
            row: as of :meth:`~lightning_alrc.ALRC.take_row`.
        """
        self._clipped += row.get("clipped_fraction", 0.0) * (step - self._until)
        self._until = step
        steps = step - self._since
        if steps < self.STEPS:
            return None
        clipped, self._since, self._clipped = self._clipped, step, 0.0
        return clipped / steps


class StepSizeLimiter:
    """Tells, once for each loss, of a clipped fraction that stays high.

    A guard against spikes clips now and then. One that always clips limits the size of the steps,
    and hides that the learning rate is too high or the threshold too low.
    """

    FRACTION = 0.2
    STEPS = 1000

    def __init__(self) -> None:
        self._fractions: dict[str, ClippedFraction] = {}
        self._high_since: dict[str, int] = {}
        self._told: set[str] = set()

    def message(self, name: str, step: int, row: Mapping[str, float]) -> str | None:
        """What is to be told after a row of a loss, if anything.

        Args:
            name: of the loss.
            step: of the row.
            row: as of :meth:`~lightning_alrc.ALRC.take_row`.
        """
        fraction = self._fractions.setdefault(name, ClippedFraction(step)).after(step, row)
        if fraction is None:
            return None
        if fraction <= self.FRACTION:
            self._high_since.pop(name, None)
            return None
        steps = step - self._high_since.setdefault(name, step)
        if steps < self.STEPS or name in self._told:
            return None
        self._told.add(name)
        return (
            f"ALRC has clipped more than {self.FRACTION:.0%} of the losses {name!r} for {steps:,} "
            f"steps, {fraction:.0%} at last: it has become a limit on the step size rather than a "
            "guard against spikes. Raise num_stddev, lower the learning rate, or call "
            "ALRCCallback.reset() if the losses have changed for good"
        )


class LearningRateDrop:
    """Tells of a learning rate that falls from one step to the next.

    Args:
        ratio: how far: to this fraction of what it was, or lower.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.rates: list[float] = []

    def happened(self, rates: Sequence[float]) -> bool:
        """Whether one of these is a drop from those of the last call."""
        before, self.rates = self.rates, list(rates)
        return len(before) == len(rates) and any(
            rate <= self.ratio * old and rate < old for rate, old in zip(rates, before, strict=True)
        )


def checked_rates(rates: Any) -> list[float]:
    """Learning rates from a checkpoint.

    Raises:
        ValueError: if they are anything else.
    """
    if not isinstance(rates, list) or not all(type(rate) is float for rate in rates):
        raise ValueError(
            f"ALRCCallback state 'learning_rates' must be a list of floats, got {rates!r:.100}"
        )
    return list(rates)


def learning_rates(optimizers: Sequence[Any]) -> list[float]:
    """Those of all parameter groups that can be read without waiting for a device."""
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    return [float(rate) for rate in rates if not isinstance(rate, Tensor) or rate.is_cpu]
