"""Processes on gloo.

Two show the behaviour of a DTensor, of MAX, and of ALRC. One resumes a fit from a full checkpoint
of ``ModelParallelStrategy``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_alrc import ALRC, ALRCCallback


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found: dict[str, object] = {}

    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.tensor([0.0, 1.0, 2.0, 3.0]), mesh, [Shard(0)])
    found["item"], found["full"] = sharded.sum().item(), sharded.sum().full_tensor().item()
    alrc = ALRC()
    alrc(sharded.requires_grad_().sum())
    found["mu1"] = alrc.mu1.item()

    value = torch.ones(33)
    value[rank::2] = math.nan  # each index is NaN on one rank
    dist.all_reduce(value, dist.ReduceOp.MAX)
    found["max"] = [str(each) for each in value.tolist()]
    alrc = ALRC()
    alrc(torch.tensor(math.nan if rank else 1.0, requires_grad=True))
    found["nonfinite"] = int(alrc.nonfinite_total)

    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


class Net(pl.LightningModule):
    """Its layer is sharded by FSDP2. A second layer is an ALRC."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.clip = torch.nn.Linear(3, 1), ALRC()

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.clip(self.layer(batch).square()[:, 0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.layer.parameters())

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(16, 3), batch_size=4)


def resume_full_checkpoint(folder: Path) -> None:
    """Train an epoch, save a full checkpoint, and resume from it for a second epoch."""
    for epochs, checkpoint in ((1, None), (2, folder / "full.ckpt")):
        net, callback = Net(), ALRCCallback()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=ModelParallelStrategy(1, 1, save_distributed_checkpoint=False),
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        trainer.fit(net, ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / "full.ckpt")
    updates = {"layer": int(net.clip.updates), "callback": int(callback.losses["loss"].updates)}
    (folder / "updates.json").write_text(json.dumps(updates))
    dist.destroy_process_group()
