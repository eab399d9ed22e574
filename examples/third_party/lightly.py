"""lightly's linear classifier learns the noise of twenty images by heart, with ALRC."""

import torch
from lightly.utils.benchmarking import LinearClassifier
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedClassifier(ALRCMixin, LinearClassifier): ...


def classifier(kind: type[LinearClassifier]) -> LinearClassifier:
    return kind(torch.nn.Flatten(), 4, feature_dim=3 * 8 * 8, num_classes=5)


batches = DataLoader([(torch.rand(3, 8, 8), index % 5) for index in range(20)], batch_size=4)

if __name__ == "__main__":
    Trainer(max_epochs=1, callbacks=[ALRCCallback()]).fit(classifier(LinearClassifier), batches)
    Trainer(max_epochs=1).fit(classifier(ClippedClassifier), batches)
