"""The LightningModule: two stages of training, two optimizers, and four losses under ALRC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import MeanSquaredError

from lightning_alrc import ALRCCallback, ALRCMixin

from .datamodule import Batch
from .network import Completion, Discriminators, Generator, blurred, halved, patches_of

LOSSES = ("mse_inner", "mse_outer", "generator", "discriminator")

MSE_SCALE = 200.0
"""The authors' factor on mean squared errors."""

Scores = Sequence[Tensor]
"""The output of each discriminator for its patches, [batch]."""


def least_squares(scores: Scores, wanted: float) -> Tensor:
    """Squared distance of the discriminators' outputs from a target, [batch], not negative."""
    return torch.stack([(each - wanted) ** 2 for each in scores]).sum(dim=0)


def adversarial_losses(kind: str, of_truth: Scores, of_completion: Scores) -> Tensor:
    """The discriminators' loss of each crop, [batch]."""
    if kind == "least_squares":
        return least_squares(of_truth, 1) + least_squares(of_completion, 0)
    return torch.stack([*of_completion, *(-each for each in of_truth)]).sum(dim=0)


def generator_losses(kind: str, of_completion: Scores) -> Tensor:
    """The generator's adversarial loss of each crop, [batch]."""
    if kind == "least_squares":
        return least_squares(of_completion, 1)
    return -torch.stack(list(of_completion)).sum(dim=0)


def target(truth: Tensor) -> Tensor:
    """The target of completions: the truth, blurred, because no scan can predict its noise."""
    return blurred(truth)


def crop_errors(completion: Tensor, wanted: Tensor) -> Tensor:
    """200 times the mean squared error of each crop, [batch]."""
    return MSE_SCALE * ((completion - wanted) ** 2).mean(dim=(1, 2, 3))


class PartialSTEM(ALRCMixin, pl.LightningModule):
    """Learn to complete partial scans.

    The first stage of training has the mean squared errors of the generator's inner and outer
    stage. The second stage of training adds the discriminators. ALRC clips each of the four losses
    crop by crop, with its own moments.

    Args:
        width: factor on the networks' number of channels; 1 is the authors' network.
        adversarial_from: batch from which the discriminators join; null for never.
        adversarial: "least_squares", as in the paper, or "wasserstein", which has negative losses.
        learning_rate: learning rate of the generator's Adam.
        discriminator_learning_rate: learning rate of the discriminators' Adam.
        gradient_clip_val: largest norm of each network's gradient; null for no limit. The Trainer
            cannot clip gradients under manual optimization.
        num_stddev: standard deviations of ALRC, for all four losses.
    """

    def __init__(
        self,
        width: float = 0.125,
        adversarial_from: int | None = None,
        adversarial: Literal["least_squares", "wasserstein"] = "least_squares",
        learning_rate: float = 0.0003,
        discriminator_learning_rate: float = 0.0001,
        gradient_clip_val: float | None = None,
        num_stddev: float = 3.0,
    ) -> None:
        super().__init__()
        if adversarial not in ("least_squares", "wasserstein"):
            raise ValueError(
                f"adversarial must be 'least_squares' or 'wasserstein', got {adversarial!r}"
            )
        if adversarial_from is not None and adversarial_from < 0:
            raise ValueError(
                f"adversarial_from must be None or not negative, got {adversarial_from!r}"
            )
        positive = {
            "width": width,
            "learning_rate": learning_rate,
            "discriminator_learning_rate": discriminator_learning_rate,
            "gradient_clip_val": gradient_clip_val,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(width)
        self.discriminators = Discriminators(width)
        self.error = MeanSquaredError(squared=False)

    def configure_alrc(self) -> ALRCCallback:
        """ALRC for the four losses only."""
        return ALRCCallback(self.hparams["num_stddev"], losses={name: {} for name in LOSSES})

    def forward(self, scan: Tensor, mask: Tensor) -> Tensor:
        """Complete scans [batch, 1, side, side]; mask is 1 in visited pixels."""
        return self.generator(scan, mask).outer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Train the generator, and in the second stage the discriminators."""
        generator, discriminator = self.optimizers()
        completion = self.generator(batch.scan, batch.mask)
        if not self.is_adversarial:
            self.step(generator, self.completion_losses(batch, completion).sum())
            return
        kind = self.hparams["adversarial"]
        patches = patches_of(batch.truth, completion.outer)
        truth, made = zip(*patches, strict=True)

        self.toggle_optimizer(generator)
        adversarial = self.alrc(generator_losses(kind, self.discriminators(made)), "generator")
        self.step(generator, self.completion_losses(batch, completion).sum() + adversarial.mean())
        self.untoggle_optimizer(generator)

        scores = self.discriminators(truth), self.discriminators([each.detach() for each in made])
        loss = self.alrc(adversarial_losses(kind, *scores), "discriminator")
        self.step(discriminator, loss.mean())

    @property
    def is_adversarial(self) -> bool:
        """Whether the second stage of training has begun."""
        start = self.hparams["adversarial_from"]
        return start is not None and self.trainer.fit_loop.total_batch_idx >= start

    def completion_losses(self, batch: Batch, completion: Completion) -> Tensor:
        """Errors of the generator's inner and outer stage, each clipped by its own moments, [2].

        In the second stage of training the outer stage's completion is blurred before its error is
        computed, because the discriminators judge the details.
        """
        wanted = target(batch.truth)
        outer = target(completion.outer) if self.is_adversarial else completion.outer
        inner_losses = self.alrc(crop_errors(completion.inner, halved(wanted)), "mse_inner")
        outer_losses = self.alrc(crop_errors(outer, wanted), "mse_outer")
        return torch.stack([inner_losses.mean(), outer_losses.mean()])

    def step(self, optimizer: Any, loss: Tensor) -> None:
        """Step an optimizer by a loss's gradient."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, self.hparams["gradient_clip_val"], "norm")
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the root mean square error as "val/rms"."""
        self._measure(batch, "val/rms")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the root mean square error against the blurred truth as "test/rms".

        It is in percent of a crop's range.
        """
        self._measure(batch, "test/rms")

    def _measure(self, batch: Batch, name: str) -> None:
        # The range from -1 to 1 is 100 %.
        self.error(50 * self(batch.scan, batch.mask), 50 * target(batch.truth))
        self.log(name, self.error, prog_bar=True, batch_size=len(batch.truth))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for the generator, one for the discriminators."""
        return [
            torch.optim.Adam(
                self.generator.parameters(), self.hparams["learning_rate"], fused=True
            ),
            torch.optim.Adam(
                self.discriminators.parameters(),
                self.hparams["discriminator_learning_rate"],
                betas=(0.5, 0.999),
                fused=True,
            ),
        ]
