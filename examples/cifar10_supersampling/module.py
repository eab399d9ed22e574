"""The LightningModule: the network, its loss per image, and how it is tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from .network import SupersamplingNetwork
from .transformation import Batch

POWERS = {"squared": 2, "quartic": 4}
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

# The paper's factor on the mean power of the errors, and the loss above which the authors' code
# takes the square root.
ERROR_SCALE = 25.0
GUARD = 50.0


def image_error(
    prediction: Tensor, target: Tensor, power: int, huber_delta: float | None = None
) -> Tensor:
    """25 times each image's mean power of the error.

    Args:
        prediction: [batch, channels, height, width].
        target: [batch, channels, height, width], in standard deviations of each image.
        power: 2 for squared errors, 4 for quartic ones.
        huber_delta: error above which the loss continues as the power's tangent, as in Huber's loss
            (which is half of this for squared errors); None for never.

    Returns:
        [batch]
    """
    error = prediction - target
    if huber_delta is None:
        return ERROR_SCALE * error.pow(power).mean(dim=(1, 2, 3))
    size = error.abs()
    within = size.clamp(max=huber_delta)
    tangent = power * huber_delta ** (power - 1) * (size - within)
    return ERROR_SCALE * (within.pow(power) + tangent).mean(dim=(1, 2, 3))


def guarded(loss: Tensor) -> Tensor:
    """Take the square root of each loss above 50, as in the authors' code.

    Args:
        loss: losses of any shape, not negative.
    """
    # The clamp keeps the square root's infinite slope at 0 out of the gradient.
    return torch.where(loss > GUARD, loss.clamp(min=GUARD).sqrt(), loss)


def to_display_range(images: Tensor, reference: Tensor) -> Tensor:
    """Map each reference's darkest and brightest value to 0 and 1, and clamp the images to [0, 1].

    Args:
        images: [batch, channels, height, width], in standard deviations.
        reference: [batch, channels, height, width], the true images.
    """
    darkest = reference.amin(dim=(1, 2, 3), keepdim=True)
    brightest = reference.amax(dim=(1, 2, 3), keepdim=True)
    return ((images - darkest) / (brightest - darkest).clamp(min=1e-6)).clamp(0, 1)


class Supersampling(pl.LightningModule):
    """Learn to restore images whose resolution was halved.

    Args:
        width: factor on the network's number of channels; 1 is the paper's network.
        loss: power of the errors, "squared" or "quartic"; quartic errors spike.
        guard: take the square root of losses above 50, as the paper's authors did.
        huber_delta: above this error, in standard deviations of the image, the loss continues as
            the power's tangent, as in Huber's loss; null for never.
        per_sample: return a vector of losses from training_step, one for each image. ALRCCallback
            clips each and averages; nothing else in Lightning accepts a vector.
        optimizer: "adam" or "sgd".
        learning_rate: learning rate of the optimizer. The paper's is 0.1/128.
        learning_rate_drop_at: optimizer step from which the learning rate is a tenth; null for
            never. The paper's is 54,687 for batches of 64.
    """

    def __init__(
        self,
        width: float = 0.25,
        loss: Literal["squared", "quartic"] = "quartic",
        guard: bool = True,
        huber_delta: float | None = None,
        per_sample: bool = False,
        optimizer: Literal["adam", "sgd"] = "adam",
        learning_rate: float = 0.1 / 128,
        learning_rate_drop_at: int | None = None,
    ) -> None:
        super().__init__()
        if loss not in POWERS:
            raise ValueError(f"loss must be one of {list(POWERS)}, got {loss!r}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {list(OPTIMIZERS)}, got {optimizer!r}")
        if huber_delta is not None and not huber_delta > 0:
            raise ValueError(f"huber_delta must be None or a number above 0, got {huber_delta!r}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be a number above 0, got {learning_rate!r}")
        if learning_rate_drop_at is not None and learning_rate_drop_at < 1:
            raise ValueError(
                f"learning_rate_drop_at must be None or at least 1, got {learning_rate_drop_at!r}"
            )
        self.save_hyperparameters()
        self.power = POWERS[loss]
        self.guard = guard
        self.huber_delta = huber_delta
        self.per_sample = per_sample
        self.clip_losses: Callable[[Tensor], Tensor] | None = None
        """Clips each image's loss before the mean; set by a `LossClipping`."""
        self.network = SupersamplingNetwork(width)
        # By default the metric would leave out NaN, and hide the output of a lost network.
        self.error = MeanMetric(nan_strategy=float("nan"))
        self.input_error = MeanMetric()
        self.squared_error = MeanSquaredError()
        self.peak_signal_to_noise = PeakSignalNoiseRatio(data_range=1.0)
        self.structural_similarity = StructuralSimilarityIndexMeasure(data_range=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Restore images, float [batch, 3, height, width], in standard deviations."""
        restored: Tensor = self.network(images)
        # torchmetrics cannot view tensors in the network's memory layout.
        return restored.contiguous()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and each image's error, detached, [batch]: "losses" and "unclipped".

        "losses" are without Huber's tangent, so that all methods can be compared by them.
        "unclipped" are with it, as ALRC gets them.
        """
        prediction = self.network(batch.input)
        losses = self._losses(prediction, batch.target, self.huber_delta)
        shown = unclipped = losses.detach()
        if self.huber_delta is not None:
            shown = self._losses(prediction.detach(), batch.target)
        if self.clip_losses is not None:
            losses = self.clip_losses(losses)
        loss = losses if self.per_sample else losses.mean()
        return {"loss": loss, "losses": shown, "unclipped": unclipped}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss as "train/loss", at the steps at which Lightning logs.

        At all other steps `log` would do nothing, but take as long as some convolutions.
        """
        every = self.trainer.log_every_n_steps
        if every and self.global_step % every == 0:
            self.log("train/loss", outputs["losses"].mean(), batch_size=len(batch.input))

    def _losses(
        self, prediction: Tensor, target: Tensor, huber_delta: float | None = None
    ) -> Tensor:
        losses = image_error(prediction, target, self.power, huber_delta)
        return guarded(losses) if self.guard else losses

    def on_validation_start(self) -> None:
        """Keep the metrics in float32, whatever the precision."""
        self._metrics_to_float32()

    def on_test_start(self) -> None:
        """Keep the metrics in float32, whatever the precision."""
        self._metrics_to_float32()

    def _metrics_to_float32(self) -> None:
        # In half precision Lightning casts the metrics' sums together with the network. bfloat16
        # cannot add 1 to 256. `set_dtype`, which torchmetrics has for this, casts integers, too.
        for module in self.modules():
            if isinstance(module, Metric):
                module.to(torch.float32)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the error as "val/error"."""
        self.error(image_error(self(batch.input).float(), batch.target.float(), self.power))
        self.log("val/error", self.error, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the error, the error of the input, and the usual metrics of restoration.

        "test/mse" is in units of the images' variance. "test/psnr" (in dB) and "test/ssim" are of
        the images as displayed: each truth's darkest and brightest value are black and white.
        """
        prediction, target = self(batch.input).float(), batch.target.float()
        self.error(image_error(prediction, target, self.power))
        self.input_error(image_error(batch.input.float(), target, self.power))
        self.squared_error(prediction, target)
        displayed = to_display_range(prediction, target)
        truth = to_display_range(target, target)
        self.peak_signal_to_noise(displayed, truth)
        with torch.autocast(self.device.type, enabled=False):
            # The metric convolves. Under autocast it would do so in half precision.
            self.structural_similarity(displayed, truth)
        self.log("test/error", self.error)
        self.log("test/input_error", self.input_error)
        self.log("test/mse", self.squared_error)
        self.log("test/psnr", self.peak_signal_to_noise)
        self.log("test/ssim", self.structural_similarity)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer; its learning rate is constant or drops once to a tenth."""
        optimizer: torch.optim.Optimizer = OPTIMIZERS[self.hparams["optimizer"]](
            self.parameters(), lr=self.hparams["learning_rate"], fused=self._may_fuse()
        )
        drop_at = self.hparams["learning_rate_drop_at"]
        if drop_at is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [drop_at], gamma=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _may_fuse(self) -> bool:
        # Under mixed precision Lightning does not clip gradients of a fused optimizer. With a
        # GradScaler it does not unscale them either, so other clippers would see larger gradients.
        trainer = self._trainer
        return trainer is None or not (
            trainer.precision == "16-mixed"
            or (trainer.gradient_clip_val and trainer.precision.endswith("mixed"))
        )
