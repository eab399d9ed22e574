"""Variants of ALRC that were tried; docs/results.md has the results."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_alrc import ALRC

from .clipping import LossClipping, scaled


class LogALRC(LossClipping):
    """ALRC of the losses' logarithms, which are nearly normal if losses are nearly log-normal.

    The threshold is exp(mean + num_stddev * standard deviation) of the logarithms.

    Args:
        num_stddev: number of standard deviations.
    """

    def __init__(self, num_stddev: float = 2.0) -> None:
        super().__init__()
        self.alrc = ALRC(num_stddev)

    @property
    def threshold(self) -> Tensor:
        """The threshold of the next step."""
        return self.alrc.threshold.exp()

    def clip(self, losses: Tensor) -> Tensor:
        """Clip losses, none of them negative."""
        logarithms = losses.clamp(min=torch.finfo(losses.dtype).tiny).log()
        clipped = losses * (self.alrc(logarithms) - logarithms).detach().nan_to_num(nan=0.0).exp()
        self.clipped = int(self.alrc.clipped_total)
        return clipped

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return {"alrc": self.alrc.get_extra_state(), "clipped": self.clipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.alrc.set_extra_state(state_dict["alrc"])
        self.clipped = state_dict["clipped"]


class QuantileALRC(LossClipping):
    """Clips losses to a quantile of earlier losses, not to a threshold of mean and deviation.

    Args:
        quantile: quantile of the losses before clipping, in (0, 1).
        history_length: number of losses kept.
    """

    def __init__(self, quantile: float = 0.95, history_length: int = 1000) -> None:
        super().__init__()
        self.quantile = quantile
        self.history: deque[float] = deque(maxlen=history_length)

    @property
    def threshold(self) -> Tensor:
        """The threshold of the next step; infinite for the first 10 losses."""
        if len(self.history) < 10:
            return torch.tensor(torch.inf, dtype=torch.float64)
        return torch.tensor(list(self.history), dtype=torch.float64).quantile(self.quantile)

    def clip(self, losses: Tensor) -> Tensor:
        """Clip losses, and add them to the history."""
        clipped, are_clipped = scaled(losses, self.threshold.to(losses.device))
        before = losses.detach()
        self.history.extend(before[before.isfinite()].tolist())
        self.clipped = int(self.clipped + are_clipped.sum())
        return clipped

    def state_dict(self) -> dict[str, Any]:
        """The history and the count."""
        return {"history": list(self.history), "clipped": self.clipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.history.extend(state_dict["history"])
        self.clipped = state_dict["clipped"]
