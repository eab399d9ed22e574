"""Packages that train a module several times, from the same first weights.

The moments must be reset with the weights. Otherwise the threshold would be far below the first
losses of the next training, and the gradients there would be scaled down.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRCCallback, ALRCMixin
from tests.nets import UnifiedNet

SETTINGS: dict[str, Any] = {"num_stddev": 10.0}
"""Settings that clip no loss of a training, if it starts with new weights and new moments."""


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 3, generator=generator)
    return TensorDataset(x, x @ torch.randn(3, 2, generator=generator) + 100.0)


class Scored(UnifiedNet):
    """Keeps the losses that are differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.differentiated: list[float] = []

    def on_before_backward(self, loss: Tensor) -> None:
        self.differentiated.append(loss.item())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class ScoredMixin(ALRCMixin, Scored):
    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS)


def quiet(root: Path, *callbacks: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "callbacks": list(callbacks),
        "default_root_dir": root,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "max_epochs": 3,
    }


def nets(way: str) -> tuple[Scored, list[Any]]:
    seed_everything(0, verbose=False)
    if way == "mixin":
        return ScoredMixin(), []
    return Scored(), [ALRCCallback(**SETTINGS)]


Train = Callable[[Path, Scored, list[Any]], None]


def lightning_kfold(root: Path, net: Scored, callbacks: list[Any]) -> None:
    package = pytest.importorskip("lightning_kfold", reason="lightning-kfold is not installed")

    class Folds(package.KFoldDataModule):  # type: ignore[misc, name-defined]
        def setup_datasets(self) -> Any:
            return dataset(), dataset(), torch.arange(240).remainder(2).numpy()

    seed_everything(0, verbose=False)
    trainer = package.KFoldTrainer(
        num_folds=3, export_path=root / "folds", logger=False, **quiet(root, *callbacks)
    )
    data = Folds(num_folds=3, batch_size=4)
    data.setup()
    trainer.fit(net, data, test_ensemble=False)


def pl_crossvalidate(root: Path, net: Scored, callbacks: list[Any]) -> None:
    package = pytest.importorskip("pl_crossvalidate", reason="pl-crossvalidate is not installed")
    seed_everything(0, verbose=False)
    trainer = package.KFoldTrainer(num_folds=3, **quiet(root, *callbacks))
    loader = DataLoader(dataset(), batch_size=4)
    trainer.cross_validate(net, train_dataloader=loader, val_dataloaders=loader)


@pytest.mark.parametrize("way", ["callback", "mixin"])
@pytest.mark.parametrize("train", [lightning_kfold, pl_crossvalidate])
@pytest.mark.filterwarnings("ignore:ALRC's moments start afresh")
def test_each_fold_trains_as_without_alrc(tmp_path: Path, train: Train, way: str) -> None:
    seed_everything(0, verbose=False)
    plain = Scored()
    train(tmp_path / "plain", plain, [])
    net, callbacks = nets(way)
    train(tmp_path / "clipped", net, callbacks)
    assert len(net.differentiated) == len(plain.differentiated) > 0
    assert net.differentiated == plain.differentiated
