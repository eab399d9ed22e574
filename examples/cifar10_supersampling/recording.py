"""A callback that records each training step, and stops a training whose weights are lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_alrc import ALRC, ALRCCallback

from .clipping import LossClipping
from .transformation import Batch

# Steps between two reads from the device.
READ_EVERY = 50


class StepRecorder(pl.Callback):
    """Keep each step's loss and threshold, and stop once the weights are not finite.

    The record is saved in the Trainer's checkpoints, and continues in a resumed training.

    Args:
        steps: number of training steps.
        report: called at the start and regularly with the number of steps done.
        every_image: keep each image's loss, and whether it is an outlier, beside the step's mean.
            Under Huber's loss these are the losses that ALRC gets, with Huber's tangent.

    Attributes:
        survived: number of steps up to the last one with finite losses; one less if all losses are
            finite, but the weights after the last step are not.
        seconds: seconds of training.
        last_weights: the network's weights after the last step. The module itself may have other
            weights at the end: their moving average, if Lightning keeps one.
    """

    def __init__(
        self,
        steps: int,
        report: Callable[[int], None] | None = None,
        every_image: bool = False,
    ) -> None:
        self.report = report
        self.every_image = every_image
        self.survived = 0
        self.seconds = 0.0
        self.last_weights: dict[str, Tensor] = {}
        self.loss = torch.full((steps,), torch.nan)
        self.clean = torch.zeros(steps, dtype=torch.int32)
        self.threshold = torch.full((steps,), torch.inf, dtype=torch.float64)
        self.image_losses: list[Tensor] = []
        self.outliers: list[Tensor] = []
        self._alrc: ALRCCallback | None = None
        self._clipping: LossClipping | None = None
        self._done = 0
        self._unread: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._threshold: Tensor | None = None
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the callback that clips losses, if any, and report the first step."""
        self._started = time.perf_counter()
        if self.report is not None:
            self.report(self._done)
        for callback in trainer.callbacks:
            if isinstance(callback, ALRCCallback):
                self._alrc = callback
                # With start moments, ALRC has a threshold before its first loss.
                callback.losses.get_or_add("loss")
            if isinstance(callback, LossClipping):
                self._clipping = callback

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Note the threshold before the step's losses change it."""
        clips = self._alrc_of_loss() or self._clipping
        self._threshold = None if clips is None else clips.threshold.detach().clone()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Note the step's losses, and regularly check that the weights are finite."""
        self._unread.append(
            (outputs["losses"], outputs["unclipped"], batch.outlier, self._threshold)
        )
        if (self._done + len(self._unread)) % READ_EVERY == 0:
            self._read()
            # Lost weights give losses that are not finite. So weights are checked only after
            # such losses.
            if self.survived < self._done and not finite(pl_module):
                trainer.should_stop = True
            if self.report is not None:
                self.report(self._done)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights, because the end of training may replace them by their average."""
        self.last_weights = {
            name: weight.detach().clone() for name, weight in pl_module.state_dict().items()
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the last steps."""
        self._read()
        self.seconds += time.perf_counter() - self._started
        if self.survived == len(self.loss) and not all(
            bool(weight.isfinite().all()) for weight in self.last_weights.values()
        ):
            self.survived -= 1

    @property
    def clipped(self) -> int | None:
        """Number of losses that ALRC or a `LossClipping` clipped; None without either."""
        if self._clipping is not None:
            return int(self._clipping.clipped)
        if self._alrc is None:
            return None
        return sum(int(alrc.clipped_total) for alrc in self._alrc.losses.values())

    def mean_loss(self, last_steps: int) -> float:
        """Mean loss of the clean images of the last steps; NaN if there is no clean image."""
        loss, clean = self.loss[-last_steps:].double(), self.clean[-last_steps:]
        # A step without a clean image has no mean.
        return float(loss.where(clean > 0, 0.0).mul(clean).sum() / clean.sum())

    def history(self) -> dict[str, np.ndarray]:
        """The record.

        Returns:
            "loss", float32 [steps]: each step's mean of clean images before clipping, NaN if
            the step has no clean image or was not reached. "threshold", float64 [steps]: infinite
            without clipping. If every image is kept, "image_loss", float32, and "outlier", bool,
            both [steps done, batch].
        """
        history = {"loss": self.loss.numpy(), "threshold": self.threshold.numpy()}
        if self.every_image:
            history["image_loss"] = torch.cat(self.image_losses).numpy()
            history["outlier"] = torch.cat(self.outliers).numpy()
        return history

    def state_dict(self) -> dict[str, Any]:
        """The record so far."""
        self._read()
        now = time.perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now
        done = slice(self._done)
        return {
            "loss": self.loss[done].clone(),
            "clean": self.clean[done].clone(),
            "threshold": self.threshold[done].clone(),
            "image_losses": list(self.image_losses),
            "outliers": list(self.outliers),
            "survived": self.survived,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a record."""
        self._done = len(state_dict["loss"])
        self.loss[: self._done] = state_dict["loss"]
        self.clean[: self._done] = state_dict["clean"]
        self.threshold[: self._done] = state_dict["threshold"]
        self.image_losses = state_dict["image_losses"]
        self.outliers = state_dict["outliers"]
        self.survived = state_dict["survived"]
        self.seconds = state_dict["seconds"]

    def _read(self) -> None:
        if not self._unread:
            return
        losses, unclipped, outliers, thresholds = zip(*self._unread, strict=True)
        self._unread = []
        loss, outlier = torch.stack(losses).float().cpu(), torch.stack(outliers).cpu()
        steps = slice(self._done, self._done + len(loss))
        clean = (~outlier).sum(dim=1)
        self.loss[steps] = loss.masked_fill(outlier, 0).sum(dim=1) / clean
        self.clean[steps] = clean
        if self._alrc is not None or self._clipping is not None:
            # The first threshold is on the CPU, because ALRC has not seen a device yet.
            infinite = torch.tensor(torch.inf)
            known = [infinite if each is None else each for each in thresholds]
            self.threshold[steps] = torch.stack([each.to(known[-1]) for each in known]).cpu()
        if self.every_image:
            self.image_losses.append(torch.stack(unclipped).float().cpu())
            self.outliers.append(outlier)
        # Lost weights stay lost, so the last step with finite losses is the last that survived.
        finite_steps = loss.isfinite().all(dim=1).nonzero()
        if len(finite_steps):
            self.survived = self._done + int(finite_steps[-1]) + 1
        self._done += len(loss)

    def _alrc_of_loss(self) -> ALRC | None:
        return self._alrc.losses.get("loss") if self._alrc is not None else None


def finite(module: torch.nn.Module) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())
