"""ALRC as its authors ran it for the paper's CIFAR-10 tables, which differs from ALRC as stated.

Their `cifar10.py` updates both moments by ``0.997 * mu + 0.001 * mean``. The two factors do not add
up to 1, so the moments settle at a third of the true ones. `effective` shows how many losses
ALRC then clips.

Reference:
    https://github.com/Jeffrey-Ede/ALRC, commit e5bf1d7: `capper_fn` of
    `squared/training_squared/cifar10.py` and `unstable_learning_rates/*/cifar10.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_alrc import functional

from .clipping import LossClipping

DECAY, WEIGHT, EPSILON = 0.997, 0.001, 0.001
MU1_START, MU2_START = 10.0, 400.0


def threshold(mu1: Tensor, mu2: Tensor, num_stddev: float | Tensor) -> Tensor:
    """The threshold.

    Args:
        mu1: the authors' running moment of the losses, of any shape.
        mu2: the authors' running moment of the squared losses, of the same shape.
        num_stddev: number of standard deviations above ``mu1``.
    """
    return mu1 + num_stddev * (mu2 - mu1.square() + EPSILON).sqrt()


def moved(mu1: Tensor, mu2: Tensor, clipped: Tensor) -> tuple[Tensor, Tensor]:
    """The moments after a batch of clipped losses.

    Args:
        mu1: moment before the batch, of any shape.
        mu2: moment before the batch, of the same shape.
        clipped: losses of a batch, with one more dimension at the end.
    """
    return (
        DECAY * mu1 + WEIGHT * clipped.mean(-1),
        DECAY * mu2 + WEIGHT * clipped.square().mean(-1),
    )


class PublishedALRC(LossClipping):
    """ALRC with the moments, the epsilon and the start of the authors' CIFAR-10 code.

    Args:
        num_stddev: number of standard deviations above the running moment.
    """

    def __init__(self, num_stddev: float = 3.0) -> None:
        super().__init__()
        self.num_stddev = num_stddev
        self.mu1 = torch.tensor(MU1_START, dtype=torch.float64)
        self.mu2 = torch.tensor(MU2_START, dtype=torch.float64)

    @property
    def threshold(self) -> Tensor:
        """The threshold of the next step."""
        return threshold(self.mu1, self.mu2, self.num_stddev)

    def clip(self, losses: Tensor) -> Tensor:
        """Clip losses by the moments so far, then update the moments by the clipped losses."""
        self.mu1, self.mu2 = self.mu1.to(losses.device), self.mu2.to(losses.device)
        clipped = functional.clip(losses, self.mu1, self.threshold)
        self.mu1, self.mu2 = moved(self.mu1, self.mu2, clipped.bounded)
        self.clipped = self.clipped + (clipped.scale < 1.0).sum()
        return clipped.loss

    def state_dict(self) -> dict[str, Any]:
        """The moments and the count."""
        return {"mu1": self.mu1, "mu2": self.mu2, "clipped": self.clipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state_dict)
