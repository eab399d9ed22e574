"""Steps of ranks that train together, timed: ``python timed_ranks.py FOLDER RANKS``.

The first rank writes what it found to ``FOLDER/ranks-0.json``. Lightning starts this script once
more for each further rank. The package's root must be on the PYTHONPATH.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback
from tests.benchmarks.stopwatch import Stopwatch
from tests.benchmarks.timing import Times, in_order
from tests.scripts.ranks import Collectives, leave

WIDTH, BATCH = 512, 64
PERIOD, PERIODS = 10, 10  # steps in a period, and periods in a fit
WARM_UP = 20
FITS = 3
NAMES = 8


class Net(pl.LightningModule):
    """A million parameters in four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


class Blocking(Net):
    """Waits for an all-reduce of the losses: the simplest way to get the mean of all ranks."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        value = loss.detach().double()
        dist.all_reduce(torch.stack([torch.ones_like(value), value, value * value]))
        return loss


class Named(Net):
    """Several losses, each with its own moments."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = self.layers(batch).square().mean(0)[: NAMES * 8].view(NAMES, -1).mean(1)
        (callback,) = (each for each in self.trainer.callbacks if isinstance(each, ALRCCallback))
        clipped = [callback.clip(loss, f"loss{index}") for index, loss in enumerate(losses)]
        return torch.stack(clipped).mean()


WAYS: dict[str, tuple[type[Net], bool]] = {
    "floor: plain DDP": (Net, False),
    "ALRC": (Net, True),
    "peer: a blocking all-reduce": (Blocking, False),
    f"ALRC, {NAMES} named losses": (Named, True),
}


class Counting(pl.Callback):
    """Counts the collectives of each step."""

    def __init__(self) -> None:
        self.mode = Collectives()
        self.steps: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.mode.__enter__()

    def on_train_batch_start(self, *_: Any) -> None:
        self.mode.calls = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(len(self.mode.calls))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.mode.__exit__(None, None, None)


def fit(ranks: int, way: str, steps: int, callback: pl.Callback) -> None:
    torch.manual_seed(0)
    net, clips = WAYS[way]
    data = DataLoader(torch.randn(steps * BATCH, WIDTH), BATCH)  # type: ignore[arg-type]
    pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback, *[ALRCCallback()] * clips],
    ).fit(net(), data)


def timed(ranks: int) -> Times:
    times: Times = {way: [] for way in WAYS}
    for index in range(FITS):
        for way in in_order(list(WAYS), index):
            stopwatch = Stopwatch(PERIOD, WARM_UP, time.perf_counter)
            fit(ranks, way, WARM_UP + PERIODS * PERIOD + 1, stopwatch)
            times[way] += stopwatch.seconds
    return times


def collectives(ranks: int) -> dict[str, int]:
    """Collectives of a typical step, with and without ALRC."""
    counts = {}
    for way in WAYS:
        counting = Counting()
        fit(ranks, way, 6, counting)
        counts[way] = counting.steps[-1]
    return counts


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200)  # shows where it hangs, before the timeout kills it
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    found = {"times": timed(ranks), "collectives": collectives(ranks)}
    if dist.get_rank() == 0:
        (folder / "ranks-0.json").write_text(json.dumps(found))
    leave()
