"""A clipping of each image's loss by an algorithm of this example's own, in place of ALRC."""

from __future__ import annotations

from abc import abstractmethod

import pytorch_lightning as pl
import torch
from torch import Tensor


class LossClipping(pl.Callback):
    """Has the module clip the losses of each training step by `clip`.

    Attributes:
        clipped: number of losses that were clipped.
    """

    def __init__(self) -> None:
        self.clipped: int | Tensor = 0

    @property
    @abstractmethod
    def threshold(self) -> Tensor:
        """The largest loss that the next step leaves alone, a 0-d tensor."""

    @abstractmethod
    def clip(self, losses: Tensor) -> Tensor:
        """Clip losses, and learn from them.

        Args:
            losses: [batch], with a graph.

        Returns:
            The same number of losses, whose gradients are scaled as they are.
        """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the module's losses pass through here."""
        pl_module.clip_losses = self.clip

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let them pass by again."""
        pl_module.clip_losses = None


def scaled(losses: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Losses scaled down to a threshold, and their gradients by the same factors.

    Args:
        losses: none of them negative; one that is not finite passes as it is.
        threshold: above 0, of a shape that broadcasts with them.

    Returns:
        The losses, and which of them were clipped.
    """
    scale = (threshold / losses.detach()).nan_to_num(nan=1.0).clamp(max=1.0).to(losses.dtype)
    scale = torch.where(losses.detach().isfinite(), scale, 1.0)
    return losses * scale, scale < 1.0
