"""The blocks of code in docs/ledger.md, one after the other, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

PAGE = Path(__file__).parents[1] / "docs" / "ledger.md"


class Pictures(Dataset[dict[str, Any]]):
    """Grey pictures, a few of them bright, with their indices as ids."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> dict[str, Any]:
        brightness = 9.0 if index % 30 == 29 else 1.0 + index / 240
        return {"image": torch.full((4, 4), brightness), "id": index}


class Brightness(pl.LightningModule):
    """Learns how bright pictures are."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return (batch["image"] - self.level).square().mean((1, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_page_on_ledgers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    torch.manual_seed(0)
    names: dict[str, Any] = {"net": Brightness(), "dataset": Pictures(), "DataLoader": DataLoader}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert {29, 59, 89, 119} <= set(names["issues"]["id"][:10])
    assert {29, 59, 89, 119}.isdisjoint(names["rest"].indices)
    assert len(names["rest"]) == 110
    for name in ("hardest.png", "map.png"):
        assert (tmp_path / name).stat().st_size > 5000
