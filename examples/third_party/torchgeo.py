"""torchgeo's regression task learns numbers for ten images of noise, with ALRC."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torchgeo.trainers import RegressionTask

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedTask(ALRCMixin, RegressionTask):
    """The mixin does what the callback does."""


def batches() -> Any:
    images: Any = [{"image": torch.rand(3, 32, 32), "label": torch.rand(1)} for _ in range(10)]
    return DataLoader(images, batch_size=2)


def task(kind: type[RegressionTask] = RegressionTask) -> RegressionTask:
    return kind(model="resnet18", in_channels=3, num_outputs=1)


if __name__ == "__main__":
    alrc = ALRCCallback()
    # torchgeo's scheduler goes by a validation loss.
    Trainer(max_epochs=1, callbacks=[alrc]).fit(task(), batches(), batches())
    print(f"mean loss of five steps: {alrc.losses['loss'].mu1:.3f}")
    Trainer(max_epochs=1).fit(task(ClippedTask), batches(), batches())
