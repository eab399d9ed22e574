"""Loggers of other packages: each has the rows, the charts and the spikes of a real training."""

from __future__ import annotations

import csv
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_alrc import ALRCCallback
from tests.nets import NAMESPACES, NETS, SETTINGS

Fit = Callable[..., Any]
EVERY = 4

pytestmark = pytest.mark.usefixtures("charts_of_short_fits")


@pytest.fixture
def trained(fit: Fit, tmp_path: Path) -> Callable[..., ALRCCallback]:
    """Trains with a logger and with Lightning's CSVLogger. Warnings of ALRC are errors."""

    def train(logger: Any, namespace: str = "pytorch_lightning") -> ALRCCallback:
        files = NAMESPACES[namespace].loggers.CSVLogger(tmp_path / "csv", name="", version="")
        net, callback = NETS[namespace]("vector"), ALRCCallback(**SETTINGS)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*ALRC")
            fit(net, callback, logger=[files, logger], log_every_n_steps=EVERY)
        assert len(callback.spikes) > 3
        return callback

    return train


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """The rows as Lightning's CSVLogger has them."""
    with open(folder / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    return {
        int(row["step"]): {name: float(row[name]) for name in row if name.startswith("alrc/")}
        for row in rows
    }


def approximately(rows: dict[int, dict[str, float]]) -> dict[int, Any]:
    return {step: pytest.approx(row, rel=1e-5) for step, row in rows.items()}


def by_step(found: dict[str, dict[int, float]]) -> dict[int, dict[str, float]]:
    """Values by step and metric, from values by metric and step."""
    steps = {step for values in found.values() for step in values}
    return {
        step: {name: values[step] for name, values in found.items() if step in values}
        for step in steps
    }


def assert_are_the_spikes(rows: list[Any], callback: ALRCCallback) -> None:
    """Check losses and places, in order."""
    found = [(float(row["loss"]), int(row["step"]), int(row["sample"])) for row in rows]
    spikes = [(spike.loss, spike.step, spike.sample) for spike in callback.spikes]
    assert found == [pytest.approx(spike) for spike in spikes]


def test_mlflow(trained: Any, tmp_path: Path, namespace: str, mlflow_database: Path) -> None:
    logger = NAMESPACES[namespace].loggers.MLFlowLogger(
        tracking_uri=f"sqlite:///{mlflow_database}", artifact_location=str(tmp_path / "kept")
    )
    callback = trained(logger, namespace)
    client, run = logger.experiment, logger.run_id
    found = {
        name: {each.step: each.value for each in client.get_metric_history(run, name)}
        for name in client.get_run(run).data.metrics
        if name != "epoch"
    }
    assert by_step(found) == approximately(logged(tmp_path))
    assert [each.path for each in client.list_artifacts(run, "alrc")] == [
        "alrc/charts.png",
        "alrc/spikes.csv",
    ]
    artifacts = tmp_path / "kept" / run / "artifacts" / "alrc"
    assert (artifacts / "charts.png").stat().st_size > 10_000
    # On Windows, MLflow writes a second "\r" for "\r\n".
    assert b"\r" not in (artifacts / "spikes.csv").read_bytes()
    with open(artifacts / "spikes.csv", newline="") as file:
        assert_are_the_spikes(list(csv.DictReader(file)), callback)


def test_comet_offline(
    trained: Any, tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    comet_ml = pytest.importorskip("comet_ml", reason="comet_ml is not installed")
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")

    class Offline(NAMESPACES[namespace].loggers.CometLogger):  # type: ignore[misc]
        """A logger whose offline experiment is enabled. Lightning 2.6 disables it."""

        def _create_experiment(self) -> None:
            self._comet_config = comet_ml.ExperimentConfig(offline_directory=str(tmp_path / "runs"))
            super()._create_experiment()

    logger = Offline(online=False, offline_directory=str(tmp_path / "runs"))
    callback = trained(logger, namespace)
    logger.experiment.end()
    (archive,) = (tmp_path / "runs").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        lines = file.read("messages.json").decode().splitlines()
        messages = [json.loads(line) for line in lines]
        found: dict[str, dict[int, float]] = {}
        assets = {}
        for message in messages:
            payload = message["payload"]
            metric = payload.get("metric")
            if metric and metric["metricName"].startswith("alrc/"):
                values = found.setdefault(metric["metricName"], {})
                values[metric["step"]] = metric["metricValue"]
            about = payload.get("additional_params") or {}
            name = about.get("figName") or about.get("fileName") or ""
            if name.startswith("alrc/"):
                assets[name.partition(".")[0]] = file.read(Path(payload["file_path"]).name)
    assert by_step(found) == approximately(logged(tmp_path))
    assert len(assets["alrc/charts"]) > 10_000
    table = list(csv.DictReader(assets["alrc/spikes"].decode().splitlines()))
    assert_are_the_spikes(table, callback)


def test_swanlab_offline(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("swanlab", reason="SwanLab is not installed")
    import swanlab
    from swanlab.integration.pytorch_lightning import SwanLabLogger
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    logger = SwanLabLogger(
        project="spikes", mode="offline", log_dir=str(tmp_path / "runs"), save_dir=tmp_path
    )
    try:
        callback = trained(logger, "lightning.pytorch")
    finally:
        swanlab.finish()
    reader, found = DataStoreReader(), {}
    (path,) = (tmp_path / "runs").rglob("*.swanlab")
    reader.open(path)
    for data in reader:
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "scalar" and record.scalar.key != "epoch":
            values = found.setdefault(record.scalar.key, {})
            values[record.scalar.step] = record.scalar.value.number
    assert by_step(found) == approximately(logged(tmp_path))
    (image,) = path.parent.rglob("media/image/*.png")
    assert image.stat().st_size > 10_000
    (table,) = path.parent.rglob("media/echarts/*.json")
    html = table.read_text()
    assert all(f"{spike.loss}" in html for spike in callback.spikes)


def test_aim(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("aim", reason="Aim is not installed")
    from aim.pytorch_lightning import AimLogger
    from aim.storage.context import Context

    logger = AimLogger(
        repo=str(tmp_path),
        system_tracking_interval=None,
        log_system_params=False,
        capture_terminal_logs=False,
    )
    trained(logger, "lightning.pytorch")
    run = logger.experiment
    found: dict[str, dict[int, float]] = {}
    for metric in run.metrics():
        frame = metric.dataframe()
        found[metric.name] = dict(zip(frame["step"], frame["value"], strict=True))
    assert by_step(found) == approximately(logged(tmp_path))
    figures = run.get_figure_sequence("alrc/charts", Context({}))
    images = run.get_image_sequence("alrc/charts", Context({}))
    assert (figures or images).last_step() == 12
    run.close()


def test_trackio(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackio has no logger for Lightning. A user's own logger must be named TrackioLogger."""
    trackio = pytest.importorskip("trackio", reason="Trackio is not installed")
    from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
    from trackio import sqlite_storage

    # If another test has imported Trackio, Trackio has already read the environment.
    for module in [each for name, each in sys.modules.items() if name.startswith("trackio")]:
        for name, folder in (("TRACKIO_DIR", "runs"), ("MEDIA_DIR", "runs/media")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / folder)

    class TrackioLogger(Logger):
        name, version = "spikes", "first"

        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self.arguments, self.run = arguments, None

        @property
        @rank_zero_experiment
        def experiment(self) -> Any:
            self.run = self.run or trackio.init(**self.arguments)
            return self.run

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.experiment.log(dict(metrics), step)

        def log_hyperparams(self, *_: Any) -> None:
            pass

    logger = TrackioLogger(
        project="spikes", name="first", auto_log_cpu=False, auto_log_gpu=False, embed=False
    )
    callback = trained(logger)
    logger.experiment.finish()
    rows = sqlite_storage.SQLiteStorage.get_logs("spikes", "first")
    found = {
        row["step"]: {name: row[name] for name in row if name.startswith("alrc/")}
        for row in rows
        if "alrc/loss" in row
    }
    assert found == approximately(logged(tmp_path))
    (table,) = (row["alrc/spikes"]["_value"] for row in rows if "alrc/spikes" in row)
    assert_are_the_spikes(table, callback)
    (charts,) = (row["alrc/charts"]["file_path"] for row in rows if "alrc/charts" in row)
    assert (tmp_path / "runs" / "media" / charts).stat().st_size > 5_000
