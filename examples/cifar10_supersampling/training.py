"""One training of the comparison: what is varied, and what is measured."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_alrc import ALRCCallback

from .datamodule import CIFAR10Supersampling
from .module import Supersampling, to_display_range
from .recording import StepRecorder

SHOWN_IMAGES = 8

Source = Literal["photographs", "download", "folder"]


@dataclass(frozen=True)
class Scenario:
    """What all trainings of a comparison have in common.

    Attributes:
        loss: power of the errors.
        guard: whether losses over 50 enter as their square root, as for the paper's authors.
        batch_size: images in a batch.
        learning_rate: of Adam.
        outlier_fraction: probability that a training image has hot pixels.
        steps: of training.
        last_steps: over which the training loss is averaged, at the end.
    """

    loss: Literal["squared", "quartic"]
    guard: bool
    batch_size: int
    learning_rate: float
    outlier_fraction: float
    steps: int
    last_steps: int


SCENARIOS = {
    # One image in twenty is damaged: what clipping each sample's loss is for. The authors' guard
    # would be a second protection, also of the training that is to have none.
    "outliers": Scenario("quartic", False, 8, 1 / 1280, 0.05, steps=2000, last_steps=1000),
    # A learning rate at which training diverges.
    "unstable": Scenario("quartic", True, 1, 0.002, 0.0, steps=6000, last_steps=2000),
    # The paper's own, at its learning rate.
    "paper": Scenario("quartic", True, 1, 0.1 / 128, 0.0, steps=10_000, last_steps=5000),
}


@dataclass(frozen=True)
class Method:
    """One way of protecting a training.

    Attributes:
        label: its name in the table and the figures.
        clip_norm: what the gradient's norm is clipped to, or None.
        alrc: whether each sample's loss is clipped.
    """

    label: str
    clip_norm: float | None
    alrc: bool


METHODS = {
    "none": Method("unprotected", None, False),
    "norm": Method("gradient clipping", 1.0, False),
    "alrc": Method("ALRC", None, True),
    "both": Method("ALRC + clipping", 1.0, True),
}


@dataclass(frozen=True)
class Run:
    """Everything that determines one training."""

    scenario: str
    method: str
    seed: int
    steps: int
    width: float
    num_stddev: float
    data: Source
    root: Path

    @property
    def last_steps(self) -> int:
        """Steps over which the training loss is averaged: the last 40 % of a short training."""
        last_steps = SCENARIOS[self.scenario].last_steps
        return last_steps if self.steps >= 2 * last_steps else max(1, int(0.4 * self.steps))

    @property
    def name(self) -> str:
        """Unique among the trainings of one scenario."""
        return f"{self.scenario}-{self.method}-seed{self.seed}"


@dataclass
class Result:
    """What one training measured. Losses of a training whose weights were lost are NaN.

    Attributes:
        run: the training.
        train_loss: mean loss of clean training images over the last steps.
        test: the module's test metrics by name, without "test/".
        clips: number of losses that ALRC clipped.
        survived: steps after which every weight was still finite.
        seconds: of training.
        history: see `StepRecorder.history`.
        images: float32 [SHOWN_IMAGES, 3, 32, 32] each, 0 to 1: "input", "output" and "truth".
    """

    run: Run
    train_loss: float
    test: dict[str, float]
    clips: int
    survived: int
    seconds: float
    history: dict[str, np.ndarray] = field(repr=False)
    images: dict[str, np.ndarray] = field(repr=False)


def clean_mean(values: np.ndarray, outlier: np.ndarray, last_steps: int) -> float:
    """Mean over the last steps of the values of images that are not outliers.

    Args:
        values: [steps, batch]
        outlier: bool [steps, batch]
        last_steps: how many steps.
    """
    return float(np.mean(values[-last_steps:][~outlier[-last_steps:]], dtype=np.float64))


def train(run: Run, report: Callable[[int], None] | None = None) -> Result:
    """Train, test, and measure. The same seed gives the same weights and batches to start with.

    Args:
        run: the training.
        report: called now and then with the number of steps done.
    """
    # Lightning's advice on devices and worker processes would be repeated by every training.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")

    scenario, method = SCENARIOS[run.scenario], METHODS[run.method]
    pl.seed_everything(run.seed, verbose=False)
    datamodule = CIFAR10Supersampling(
        data=run.data,
        root=run.root,
        batch_size=scenario.batch_size,
        outlier_fraction=scenario.outlier_fraction,
        seed=run.seed,
    )
    module = Supersampling(
        width=run.width,
        loss=scenario.loss,
        guard=scenario.guard,
        per_sample=method.alrc,
        learning_rate=scenario.learning_rate,
    )
    alrc = ALRCCallback(num_stddev=run.num_stddev) if method.alrc else None
    recorder = StepRecorder(report, alrc)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=run.steps,
        limit_val_batches=0,
        gradient_clip_val=method.clip_norm,
        callbacks=[recorder] if alrc is None else [alrc, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule)
    seconds = time.perf_counter() - start

    history = recorder.history()
    lost = recorder.survived < run.steps
    (metrics,) = trainer.test(module, datamodule, verbose=False)
    return Result(
        run=run,
        train_loss=(
            float("nan")
            if lost
            else clean_mean(history["loss"], history["outlier"], run.last_steps)
        ),
        test={name.removeprefix("test/"): value for name, value in metrics.items()},
        clips=int(history["clipped"].sum()),
        survived=recorder.survived,
        seconds=seconds,
        history=history,
        images=restored_images(module, datamodule),
    )


@torch.no_grad()
def restored_images(
    module: Supersampling, datamodule: CIFAR10Supersampling
) -> dict[str, np.ndarray]:
    """Restore the first few test images, as displayed; see `Result.images`."""
    batch = next(iter(datamodule.test_dataloader()))
    inputs, truth = batch.input[:SHOWN_IMAGES], batch.target[:SHOWN_IMAGES]
    output = module.eval()(inputs)
    return {
        name: to_display_range(images, truth).numpy()
        for name, images in {"input": inputs, "output": output, "truth": truth}.items()
    }
