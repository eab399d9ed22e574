"""The cost of the record and the logs: as a share of each step, and once in a training.

``python -m pytest tests/benchmarks/test_telemetry.py --benchmark-only`` prints it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.transformation import Batch
from lightning_alrc import ALRCCallback

STEPS = 1600
HOOKS = ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end")
OF_STEPS = HOOKS[1:3]


class Timed(ALRCCallback):
    """Adds up the time of the callback's hooks, which do not clip."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds = dict.fromkeys(HOOKS, 0.0)
        for name in HOOKS:
            setattr(self, name, self._timed(name, getattr(self, name)))

    def _timed(self, name: str, hook: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hook)
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            hook(*args)
            self.seconds[name] += time.perf_counter() - start

        return timed


@pytest.fixture
def loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = WandbLogger(
        offline=True,
        save_dir=tmp_path,
        settings=wandb.Settings(x_disable_stats=True, console="off"),
    )
    yield {"none": False, "all": [CSVLogger(tmp_path), TensorBoardLogger(tmp_path), run]}
    wandb.finish()


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("way", ["none", "all"])
@pytest.mark.benchmark(group=f"telemetry of {STEPS} supersampling steps", min_rounds=1)
def test_telemetry(
    benchmark: Callable[..., Any],
    loggers: Any,
    capsys: pytest.CaptureFixture[str],
    way: str,
    batch_size: int,
) -> None:
    """The example's network at a quarter of its width, logging every 50 steps."""
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs = [Batch(image, image.roll(1, -1), torch.tensor(False)) for image in images]
    data = DataLoader(pairs * (STEPS // 64), batch_size)  # type: ignore[arg-type]
    callback = Timed(num_stddev=2.0)

    def fit() -> float:
        start = time.perf_counter()
        pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=STEPS,
            callbacks=[callback],
            logger=loggers[way],
            log_every_n_steps=50,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Supersampling(per_sample=True), data)
        return time.perf_counter() - start

    seconds = benchmark.pedantic(fit, rounds=1)  # type: ignore[attr-defined]
    share = sum(callback.seconds[name] for name in OF_STEPS) / seconds
    once = sum(callback.seconds.values()) - share * seconds
    benchmark.extra_info |= {"share": share, "once": once}  # type: ignore[attr-defined]
    with capsys.disabled():
        print(f"\nloggers: {way}, batches of {batch_size}: {share:.2%} of a step of", end=" ")
        print(f"{1000 * seconds / STEPS:.1f} ms; {once:.1f} s at the start and the end")
