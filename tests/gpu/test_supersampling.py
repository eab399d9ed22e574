"""The example of supersampling on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl

from lightning_alrc import ALRCCallback

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")

from examples.cifar10_supersampling.datamodule import CIFAR10Supersampling
from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.published import PublishedALRC
from examples.cifar10_supersampling.recording import StepRecorder


@pytest.mark.parametrize("kind", [ALRCCallback, PublishedALRC])
def test_each_step_of_a_training_is_recorded(accelerator: str, kind: Any) -> None:
    recorder = StepRecorder(60)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=60,
        limit_val_batches=0,
        callbacks=[kind(num_stddev=2), recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Supersampling(width=0.05, guard=False, per_sample=kind is ALRCCallback)
    trainer.fit(module, CIFAR10Supersampling(batch_size=4, outlier_fraction=0.2))
    history = recorder.history()
    assert recorder.survived == 60
    assert np.isfinite(history["loss"]).sum() > 50
    assert len(np.unique(history["threshold"])) >= 50
