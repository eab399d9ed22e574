"""Variants of ALRC that were tried beside the paper's; the README says what came of them."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_alrc import ALRCCallback


class LogALRC(ALRCCallback):
    """ALRC of the losses' logarithms, which are nearly normal where losses are nearly log-normal.

    A loss is scaled down to exp(mean + num_stddev times the standard deviation) of the logarithms;
    what is logged is of these.

    Args:
        num_stddev: number of standard deviations.
    """

    def __init__(self, num_stddev: float = 2.0) -> None:
        super().__init__(num_stddev, record=0)

    def clip(self, loss: Tensor, name: str = "loss") -> Tensor:
        """Clip losses, none of them negative."""
        logarithm = loss.clamp(min=torch.finfo(loss.dtype).tiny).log()
        return loss * (super().clip(logarithm, name) - logarithm).detach().exp()


class QuantileALRC(ALRCCallback):
    """Losses scaled down to a quantile of the last ones before, in place of mean and deviation.

    Args:
        quantile: of the losses before they were clipped, in (0, 1).
        history_length: how many of them.
    """

    def __init__(self, quantile: float = 0.95, history_length: int = 1000) -> None:
        super().__init__(math.inf, record=0)
        self.quantile = quantile
        self.history: deque[float] = deque(maxlen=history_length)

    def clip(self, loss: Tensor, name: str = "loss") -> Tensor:
        """Clip losses, and take them into the history."""
        before = loss.detach().double()
        threshold = before.new_tensor(math.inf)
        if len(self.history) >= 10:
            threshold = before.new_tensor(list(self.history)).quantile(self.quantile)
        self.history.extend(before[before.isfinite()].flatten().tolist())
        scale = (threshold / before).nan_to_num(nan=1.0).clamp(max=1.0).to(loss.dtype)
        return super().clip(loss * scale, name)

    def state_dict(self) -> dict[str, Any]:
        """The history besides."""
        return super().state_dict() | {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.history.extend(state_dict["history"])
