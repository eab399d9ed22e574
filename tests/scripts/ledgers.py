"""Trainings that keep a ledger.

``ranks`` trains on two ranks, and saves their losses. ``endless`` trains until it is killed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_alrc import ALRCCallback


class Samples(Dataset[dict[str, Any]]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"factor": torch.tensor(1.0 + index), "id": index}


class Net(LightningModule):
    """Its losses differ in each epoch and on each rank. The module keeps its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.given: dict[str, list[tuple[int, float]]] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = batch["factor"] * (1.0 + self.current_epoch) + self.global_rank / 4.0
        for key, loss in zip(batch["id"].tolist(), losses.tolist(), strict=True):
            self.given.setdefault(str(key), []).append((self.current_epoch, loss))
        return losses + 0.0 * self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Saving(Callback):
    """Saves a checkpoint's ledger after the first epoch and in the middle of the second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self._save(trainer, pl_module, "after 1 epoch")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx == 1:
            self._save(trainer, pl_module, "in the second")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.given["all"] = together(pl_module.given)
        if trainer.is_global_zero:
            (self.folder / "given.json").write_text(json.dumps(self.given))

    def _save(self, trainer: Trainer, pl_module: Any, name: str) -> None:
        self.given[name] = together(pl_module.given)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            state = torch.load(self.folder / "last.ckpt", weights_only=True)
            ledger = state["callbacks"]["ALRCCallback"]["recording"]["ledger"]
            torch.save(ledger, self.folder / f"{name}.pt")


def together(given: dict[str, list[tuple[int, float]]]) -> dict[str, list[float]]:
    """The losses of all ranks, in the order of epochs and then of ranks."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, given)
    keys = {key for of_rank in of_ranks for key in of_rank}
    seen = {key: [pair for each in of_ranks for pair in each.get(key, [])] for key in keys}
    return {key: [loss for _, loss in sorted(seen[key], key=lambda pair: pair[0])] for key in keys}


def main(case: str, folder: Path) -> None:
    with_ranks = case == "ranks"
    data: Any = Samples(20 if with_ranks else 2000)
    trainer = Trainer(
        accelerator="cpu",
        devices=2 if with_ranks else 1,
        strategy="ddp_fork" if with_ranks else "auto",
        max_epochs=2 if with_ranks else -1,
        logger=CSVLogger(folder, "logs"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ALRCCallback(ledger=True), *([Saving(folder)] if with_ranks else [])],
    )
    trainer.fit(Net(), DataLoader(data, batch_size=3 if with_ranks else 500, shuffle=True))
