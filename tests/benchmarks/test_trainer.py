"""What ALRC adds to a step inside a Trainer, beside Lightning's own ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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

STEPS = 500


class Tiny(pl.LightningModule):
    """So small that what a step costs is what Lightning and its callbacks cost."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.fused = fused

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6, fused=self.fused)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "floor: nothing": dict,
    "floor: an empty callback": lambda: {"callbacks": [Callback()]},
    "ALRC": lambda: {"callbacks": [ALRCCallback()]},
    "ALRC, skip": lambda: {"callbacks": [ALRCCallback(nonfinite="skip")]},
    "ALRC, skip, fused": lambda: {"callbacks": [ALRCCallback(nonfinite="skip")]},
    "ALRC, raise": lambda: {"callbacks": [ALRCCallback(nonfinite="raise")]},
    "gradient_clip_val": lambda: {"gradient_clip_val": 1.0},
    "SpikeDetection": lambda: {"callbacks": [SpikeDetection(rtol=1e9)]},  # it stops at a spike
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(group=f"a Trainer, {STEPS} steps", min_rounds=5)
def test_steps_of_a_tiny_model(benchmark: Callable[..., Any], way: str, tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(STEPS, 8)), batch_size=1)

    def fit() -> None:
        pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=CSVLogger(str(tmp_path)),
            log_every_n_steps=50,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **WAYS[way](),
        ).fit(Tiny(fused="fused" in way), data)

    benchmark(fit)
