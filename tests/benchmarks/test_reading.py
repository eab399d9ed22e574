"""Reading a log, compared with pandas and with Python's own CSV reader.

``python -m pytest tests/benchmarks/test_reading.py --benchmark-only`` prints the times. They
are CPU times of all threads, because pandas has several.
"""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_alrc._telemetry import reading_csv
from lightning_alrc._telemetry.reading import read
from lightning_alrc.plotting import plot
from tests.benchmarks.timing import in_turn

ROWS = [1_000, 100_000]
FLOOR = "floor: csv.DictReader"
PANDAS = "peer: pandas.read_csv"
WAYS = [FLOOR, PANDAS, "ALRC", "ALRC, without pandas", "ALRC, drawn as well"]


def write_log(folder: Path, rows: int) -> Path:
    """A log as a CSVLogger writes it, with half of its lines from Lightning's own metrics."""
    draws = random.Random(0)
    logger = CSVLogger(folder, flush_logs_every_n_steps=2**62)
    clipped = 0.0
    for step in range(49, 50 * rows // 2, 50):
        loss = draws.lognormvariate(0.0, 0.5)
        clipped += loss > 3.0
        row = {
            "loss": loss,
            "loss_clipped": min(loss, 3.0),
            "scale": min(1.0, 3.0 / loss),
            "clipped_fraction": float(loss > 3.0),
            "clipped_total": clipped,
            "nonfinite_total": 0.0,
            "resets": 0.0,
            "mu1": 1.0 + draws.random(),
            "stddev": draws.random(),
            "threshold": 3.0 + draws.random(),
        }
        metrics = {f"alrc/{name}": value for name, value in row.items()}
        logger.log_metrics(metrics | {"epoch": step // 50_000}, step)
        logger.log_metrics({"train_loss": draws.random(), "epoch": step // 50_000}, step)
    logger.finalize("success")
    return Path(logger.log_dir) / "metrics.csv"


def by_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_pandas(path: Path) -> object:
    large, reading_csv.LARGE = reading_csv.LARGE, 2**62
    try:
        return read(path)
    finally:
        reading_csv.LARGE = large


@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_log(tmp_path_factory.mktemp("log"), request.param)
    ways: dict[str, Callable[[], object]] = {
        FLOOR: lambda: by_csv(path),
        "ALRC": lambda: read(path),
        "ALRC, without pandas": lambda: without_pandas(path),
        "ALRC, drawn as well": lambda: plot(path).draw_without_rendering(),
    }
    try:
        import pandas
    except ModuleNotFoundError:
        pass
    else:
        ways[PANDAS] = lambda: pandas.read_csv(path)
    for way in ways.values():
        way()  # imports are not counted
    times = in_turn(ways, seconds=5, clock=time.process_time)
    return f"a log of {request.param:,} rows", times


@pytest.mark.parametrize("way", WAYS)
def test_a_log_is_read(booked: Callable[..., None], case: Any, way: str) -> None:
    name, times = case
    booked(name, way, times)
