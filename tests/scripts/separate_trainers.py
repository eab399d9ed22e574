"""A rank of a process group that trains by itself, with a Trainer of one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback
from tests.scripts import sharing


class Net(sharing.Net):
    """A batch has its own loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["loss"], batch_idx)


def main(rank: int, folder: Path) -> None:
    """Train on 20 batches of one loss, or on 40 that are 100 times as large."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    count = 20 * (1 + rank)
    batches: Any = [
        {"loss": torch.tensor([100.0**rank * (1 + index % 3)]), "id": [index]}
        for index in range(count)
    ]
    callback = ALRCCallback(ledger=True, nonfinite="skip")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=5,
        default_root_dir=str(folder / str(rank)),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Net(), DataLoader(batches, batch_size=None))
    alrc = callback.losses["loss"]
    found = {"mu1": alrc.mu1.item(), "losses": alrc.losses_total.item()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
