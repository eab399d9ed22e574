"""A callback that records each training step, and stops a training whose weights are lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_alrc import ALRC, ALRCCallback

from .transformation import Batch

REPORT_EVERY = 10


class StepRecorder(pl.Callback):
    """Keep each step's losses, outliers and threshold, and stop once a weight is not finite.

    Args:
        report: called now and then with the number of steps done.
        alrc: the callback whose threshold and clips are to be recorded, if any.

    Attributes:
        survived: steps after which every weight was still finite.
    """

    def __init__(
        self, report: Callable[[int], None] | None = None, alrc: ALRCCallback | None = None
    ) -> None:
        self.report = report
        self.alrc = alrc
        self.survived = 0
        self.losses: list[Tensor] = []
        self.outliers: list[Tensor] = []
        self.thresholds: list[Tensor] = []
        self.clipped_totals: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Note the threshold before the step's own losses move it."""
        unclipped = torch.tensor(torch.inf)
        alrc = self._alrc_of_loss()
        self.thresholds.append(unclipped if alrc is None else alrc.threshold.detach().clone())

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Note the step's losses and clips, and look whether the weights are still numbers."""
        losses = outputs["losses"]
        self.losses.append(losses)
        self.outliers.append(batch.outlier)
        alrc = self._alrc_of_loss()
        self.clipped_totals.append(
            torch.tensor(0) if alrc is None else alrc.clipped_total.detach().clone()
        )
        # Lost weights show in the next step's losses, so that it is enough to look there first.
        if not bool(losses.isfinite().all()) and not all(
            bool(parameter.isfinite().all()) for parameter in pl_module.parameters()
        ):
            trainer.should_stop = True
        else:
            self.survived += 1
        if self.report is not None and len(self.losses) % REPORT_EVERY == 0:
            self.report(len(self.losses))

    def history(self) -> dict[str, np.ndarray]:
        """What was recorded.

        Returns:
            "loss" float32 [steps, batch], of each image, before clipping; "outlier" bool
            [steps, batch]; "threshold" float64 [steps], infinite without ALRC; "clipped" int64
            [steps], the number of the step's losses that were clipped.
        """
        totals = torch.stack(self.clipped_totals).long()
        return {
            "loss": torch.stack(self.losses).numpy(),
            "outlier": torch.stack(self.outliers).numpy(),
            "threshold": torch.stack([each.double() for each in self.thresholds]).numpy(),
            "clipped": totals.diff(prepend=totals.new_zeros(1)).numpy(),
        }

    def _alrc_of_loss(self) -> ALRC | None:
        return self.alrc.losses.get("loss") if self.alrc is not None else None
