"""``LearningRateDrop``: notices when a learning rate drops, for ``reset_on_lr_drop``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["LearningRateDrop", "checked_rates", "learning_rates"]


class LearningRateDrop:
    """Compares the learning rates of each step with the rates of the step before.

    Args:
        ratio: a rate drops if it falls to this fraction of the rate before, or lower.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.rates: list[float] = []

    def happened(self, rates: Sequence[float]) -> bool:
        """Whether one of these rates has dropped since the last call."""
        before, self.rates = self.rates, list(rates)
        # A rate that drops to exactly this fraction may be a rounding error above it.
        ratio = self.ratio * (1 + 1e-6)
        return len(before) == len(rates) and any(
            rate <= ratio * old and rate < old for rate, old in zip(rates, before, strict=True)
        )


def checked_rates(rates: Any) -> list[float]:
    """Learning rates from a checkpoint.

    Raises:
        ValueError: if they are not a list of floats.
    """
    if not isinstance(rates, list) or not all(type(rate) is float for rate in rates):
        raise ValueError(
            f"ALRCCallback state 'learning_rates' must be a list of floats, got {rates!r:.100}"
        )
    return list(rates)


def learning_rates(optimizers: Sequence[Any]) -> list[float]:
    """The rates of all parameter groups.

    Tensors on a device are left out: reading one would wait for the device. Groups without a rate
    are left out, too: some optimizers compute their own.
    """
    rates = [group.get("lr") for optimizer in optimizers for group in optimizer.param_groups]
    on_host = (rate for rate in rates if not isinstance(rate, Tensor) or rate.is_cpu)
    return [float(rate) for rate in on_host if rate is not None]
