"""Libraries that make a Trainer themselves, and accept callbacks or a module's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_alrc import ALRC, ALRCCallback, ALRCMixin

SETTINGS = {"num_stddev": 2.0}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some libraries always write to the working directory


def spiky(length: int = 200) -> Any:
    """A series with a spike in it, float32 [length]."""
    torch.manual_seed(0)
    values = torch.sin(torch.arange(length) / 5) + 0.1 * torch.randn(length)
    values[length // 2] = 1e3
    return values.numpy()


def assert_clipped(callback: ALRCCallback) -> None:
    alrc: ALRC = callback.losses["loss"]
    assert alrc.updates >= 5
    assert torch.isfinite(alrc.mu1)
    assert alrc.stddev > 0
    assert alrc.clipped_total > 0


def quiet(**arguments: Any) -> dict[str, Any]:
    return {"accelerator": "cpu", "logger": False, "enable_progress_bar": False} | arguments


def test_darts(tmp_path: Path) -> None:
    darts = pytest.importorskip("darts", reason="darts is not installed")
    from darts.models import NBEATSModel

    callback = ALRCCallback(**SETTINGS)
    model = NBEATSModel(
        input_chunk_length=20,
        output_chunk_length=4,
        n_epochs=3,
        batch_size=16,
        num_stacks=2,
        work_dir=str(tmp_path),
        pl_trainer_kwargs=quiet(callbacks=[callback]),
    )
    model.fit(darts.TimeSeries.from_values(spiky()))
    assert_clipped(callback)


def test_gluonts(tmp_path: Path) -> None:
    pytest.importorskip("gluonts", reason="gluonts is not installed")
    pandas = pytest.importorskip("pandas")
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import SimpleFeedForwardEstimator

    callback = ALRCCallback(**SETTINGS)
    estimator = SimpleFeedForwardEstimator(
        prediction_length=5,
        context_length=10,
        num_batches_per_epoch=20,
        trainer_kwargs=quiet(max_epochs=2, callbacks=[callback], default_root_dir=tmp_path),
    )
    start = pandas.Timestamp("2020-01-01")
    series = [{"target": spiky() + index, "start": start} for index in range(5)]
    estimator.train(ListDataset(series, freq="D"))
    assert_clipped(callback)


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_neuralforecast(way: str) -> None:
    pytest.importorskip("neuralforecast", reason="neuralforecast is not installed")
    pandas = pytest.importorskip("pandas")
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    class Clipped(ALRCMixin, NHITS):  # type: ignore[misc]
        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(**SETTINGS)

    arguments = quiet(h=4, input_size=8, max_steps=30, enable_checkpointing=False)
    if way == "callback":
        model = NHITS(**arguments, callbacks=[ALRCCallback(**SETTINGS)])
    else:
        model = Clipped(**arguments)
    table = pandas.DataFrame({"unique_id": "a", "ds": range(200), "y": spiky()})
    forecast = NeuralForecast([model], freq=1)
    forecast.fit(table)
    (fitted,) = forecast.models  # a copy, with a copy of the callback
    if way == "callback":
        found = fitted.trainer_kwargs["callbacks"]
        (callback,) = (each for each in found if isinstance(each, ALRCCallback))
    else:
        callback = fitted._alrc_callback
    assert_clipped(callback)


def test_scvi() -> None:
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
    cells = scvi.data.synthetic_iid(batch_size=200)
    cells.X[7] *= 1000
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    callback = ALRCCallback(num_stddev=1)
    scvi.model.SCVI(cells).train(
        max_epochs=10, accelerator="cpu", enable_progress_bar=False, callbacks=[callback]
    )
    assert_clipped(callback)


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_mlcolvar(way: str) -> None:
    pytest.importorskip("mlcolvar", reason="mlcolvar is not installed")
    from lightning.pytorch import Trainer
    from mlcolvar.cvs import DeepLDA
    from mlcolvar.data import DictDataset, DictModule

    class Clipped(ALRCMixin, DeepLDA):  # type: ignore[misc]
        def configure_alrc(self) -> ALRCCallback:
            return callback

    torch.manual_seed(0)
    data, labels = torch.randn(400, 4), torch.randint(2, (400,)).float()
    callback, kind = ALRCCallback(num_stddev=1), DeepLDA if way == "callback" else Clipped
    trainer = Trainer(
        **quiet(max_epochs=3, enable_checkpointing=False, enable_model_summary=False),
        callbacks=[callback] if way == "callback" else [],
    )
    batches = DictModule(DictDataset({"data": data, "labels": labels}), batch_size=20)
    trainer.fit(kind(layers=[4, 8, 2], n_states=2), batches)
    assert callback.losses["loss"].mu1 < 0  # its loss is a negative eigenvalue
    assert_clipped(callback)
