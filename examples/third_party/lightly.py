"""lightly's linear classifier learns the noise of twenty images by heart, with ALRC."""

from typing import Any

import torch
from lightly.utils.benchmarking import LinearClassifier
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedClassifier(ALRCMixin, LinearClassifier):
    """The mixin does what the callback does."""


def batches() -> Any:
    images = TensorDataset(torch.rand(20, 3, 8, 8), torch.arange(20) % 5)
    return DataLoader(images, batch_size=4)


def classifier(kind: type[LinearClassifier] = LinearClassifier) -> LinearClassifier:
    return kind(torch.nn.Flatten(), 4, feature_dim=3 * 8 * 8, num_classes=5, topk=(1,))


if __name__ == "__main__":
    alrc = ALRCCallback()
    Trainer(max_epochs=1, callbacks=[alrc]).fit(classifier(), batches())
    print(f"mean loss of five steps: {alrc.losses['loss'].mu1:.3f}")
    Trainer(max_epochs=1).fit(classifier(ClippedClassifier), batches())
