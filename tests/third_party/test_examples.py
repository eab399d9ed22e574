"""The examples with modules of other packages run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "third_party"


@pytest.mark.parametrize("package", ["chemprop", "lightly", "pytorch_forecasting", "torchgeo"])
def test_an_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)  # where its Trainer logs
    runpy.run_path(str(EXAMPLES / f"{package}.py"), run_name="__main__")
