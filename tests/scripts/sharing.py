"""A run in a folder that other runs share.

It waits until another run has begun.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback


class Net(LightningModule):
    """A batch is its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Meeting(Callback):
    """Waits at the start of a fit until another run is there, so that both write at once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def on_fit_start(self, *_: Any) -> None:
        (self.folder / f"{self.name}.here").touch()
        while len(list(self.folder.glob("*.here"))) < 2:
            time.sleep(0.001)


def main(folder: Path, spike_at: int) -> None:
    losses = torch.ones(30)
    losses[spike_at] = 50.0
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[
            ALRCCallback(save_batches=True),
            ModelCheckpoint(folder, f"spike{spike_at}", save_top_k=1),
            Meeting(folder, str(spike_at)),
        ],
    )
    trainer.fit(Net(), DataLoader(losses, batch_size=None))  # type: ignore[arg-type]
