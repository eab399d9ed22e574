"""A callback that clips each image's loss by an algorithm other than `lightning_alrc`'s."""

from __future__ import annotations

from abc import abstractmethod

import pytorch_lightning as pl
import torch
from torch import Tensor


class LossClipping(pl.Callback):
    """Makes the module clip the losses of each training step by `clip`.

    Attributes:
        clipped: number of losses that were clipped.
    """

    def __init__(self) -> None:
        self.clipped: int | Tensor = 0

    @property
    @abstractmethod
    def threshold(self) -> Tensor:
        """The threshold of the next step, a 0-d tensor."""

    @abstractmethod
    def clip(self, losses: Tensor) -> Tensor:
        """Clip losses, and update the threshold.

        Args:
            losses: [batch], with a graph.

        Returns:
            The clipped losses, [batch]. Their gradients are scaled by the same factors.
        """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_float64(pl_module.device)
        pl_module.clip_losses = self.clip

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.clip_losses = None


def require_float64(device: torch.device) -> None:
    """Raise ValueError for a device that has no float64, which moments and thresholds are in."""
    if device.type == "mps":
        raise ValueError(
            "accelerator: these trainings need float64, which MPS does not have; give cpu"
        )


def scaled(losses: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Scale losses down to a threshold, and their gradients by the same factors.

    Args:
        losses: losses, not negative; a loss that is not finite is returned unchanged.
        threshold: threshold above 0, of a shape that broadcasts with the losses.

    Returns:
        The scaled losses, and which of them were clipped.
    """
    scale = (threshold / losses.detach()).nan_to_num(nan=1.0).clamp(max=1.0).to(losses.dtype)
    scale = torch.where(losses.detach().isfinite(), scale, 1.0)
    return losses * scale, scale < 1.0
