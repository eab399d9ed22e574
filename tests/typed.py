"""What type checkers must accept and infer. mypy checks this file; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import assert_type

from lightning_alrc import ALRCMixin, preview_log, without_spikes
from lightning_alrc.wandb import sweep, workspace


class Net(ALRCMixin, LightningModule):
    def on_train_start(self) -> None:
        assert_type(self.trainer, Trainer)


def accepts(losses: np.ndarray[Any, Any], tensor: Tensor, dataset: Dataset[int]) -> None:
    preview_log(losses)
    preview_log(tensor)
    preview_log([1.0, 2.0])
    preview_log("log.csv")
    without_spikes([1, 2, 3], [2])
    without_spikes(losses, [2])
    without_spikes(dataset, [2])
    sweep(["python", Path("train.py")], "val_loss", values=np.linspace(1, 4, 4))
    workspace("me", "digits", np.array(["generator"]))
