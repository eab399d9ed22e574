"""Two processes on gloo: the behaviour of a DTensor, of MAX, and of ALRC."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_alrc import ALRC


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
