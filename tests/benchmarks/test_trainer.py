"""What ALRC adds to a step inside a Trainer, compared with Lightning's own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.callbacks.spike import SpikeDetection
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRCCallback
from tests.benchmarks.stopwatch import Stopwatch
from tests.benchmarks.timing import Times, in_order

LOG_EVERY = 50
PERIOD = 2 * LOG_EVERY  # the CSVLogger writes its file at every second row
PERIODS = 5
FITS = 12


class Tiny(pl.LightningModule):
    """A module so small that the cost of a step is that of Lightning and its callbacks.

    ALRC clips a few losses in a hundred. A step that clips costs as much as many other steps.
    """

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.fused = fused

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6, fused=self.fused)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "floor: an empty callback": lambda: {"callbacks": [Callback()]},
    "ALRC": lambda: {"callbacks": [ALRCCallback()]},
    "ALRC, skip": lambda: {"callbacks": [ALRCCallback(nonfinite="skip")]},
    "ALRC, skip, fused": lambda: {"callbacks": [ALRCCallback(nonfinite="skip")]},
    "ALRC, raise": lambda: {"callbacks": [ALRCCallback(nonfinite="raise")]},
    "peer: gradient_clip_val": lambda: {"gradient_clip_val": 1.0},
    # A small rtol would stop the fit.
    "peer: SpikeDetection": lambda: {"callbacks": [SpikeDetection(rtol=1e9)]},
}


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Times:
    warm_up = PERIOD // 2
    steps = warm_up + PERIODS * PERIOD + 1
    samples = torch.rand(steps, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(samples), batch_size=1)
    times: Times = {way: [] for way in WAYS}
    for index in range(FITS):
        for way in in_order(list(WAYS), index):
            torch.manual_seed(0)  # the same losses for all
            stopwatch, arguments = Stopwatch(PERIOD, warm_up), WAYS[way]()
            pl.Trainer(
                accelerator="cpu",
                max_epochs=1,
                logger=CSVLogger(str(tmp_path_factory.mktemp("fit"))),
                log_every_n_steps=LOG_EVERY,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **arguments | {"callbacks": [stopwatch, *arguments.get("callbacks", [])]},
            ).fit(Tiny(fused="fused" in way), data)
            times[way] += stopwatch.seconds
    return times


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_a_tiny_model(booked: Callable[..., None], times: Times, way: str) -> None:
    booked("a step inside a Trainer", way, times)
