"""torchgeo's regression task learns numbers for ten images of noise, with ALRC."""

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torchgeo.trainers import RegressionTask

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedTask(ALRCMixin, RegressionTask): ...


images = [{"image": torch.rand(3, 32, 32), "label": torch.rand(1)} for _ in range(10)]
batches = DataLoader(images, batch_size=2)

if __name__ == "__main__":
    task = RegressionTask("resnet18")
    # The task's scheduler needs a validation loss, so the batches serve for validation, too.
    Trainer(max_epochs=1, callbacks=[ALRCCallback()]).fit(task, batches, batches)
    Trainer(max_epochs=1).fit(ClippedTask("resnet18"), batches, batches)
