"""A bounded number of rows, from the whole training, is kept for the charts."""

from __future__ import annotations

from lightning_alrc._telemetry.chart_definitions import LOSSES_IN_CHARTS
from lightning_alrc._telemetry.chart_rows import ChartRows


def test_the_number_of_rows_kept_is_bounded() -> None:
    kept = ChartRows()
    for step in range(5000):
        kept.enter(step, {"loss": {"loss": float(step)}, "other": {"loss": 1.0}})
    rows = [row for row in kept.rows() if "alrc/loss" in row]
    assert ChartRows.MOST_ROWS / 2 <= len(rows) <= ChartRows.MOST_ROWS
    # The rows are evenly spaced over the whole training.
    assert [row["step"] for row in rows] == [*range(7, 5000, 8)]
    assert [row["alrc/loss"] for row in rows] == [step - 3.5 for step in range(7, 5000, 8)]


def test_merged_rows_are_those_of_longer_periods() -> None:
    kept = ChartRows()
    for step in range(2100):
        spike = step == 1501
        row = {"loss": 1e4 if spike else 2.0, "clipped_fraction": float(spike), "mu1": float(step)}
        kept.enter(step, {"loss": row | {"clipped_total": float(step > 1500)}})
    last = kept.rows()[-1]
    assert last["step"] == last["alrc/mu1"] == 2099
    (spiked,) = (row for row in kept.rows() if row["alrc/loss"] > 2)
    assert spiked["step"] == 1503
    assert spiked["alrc/loss"] == (1e4 + 3 * 2) / 4
    assert spiked["alrc/clipped_fraction"] == 1 / 4
    assert spiked["alrc/clipped_total"] == 1


def test_a_missing_value_is_not_taken_for_zero() -> None:
    kept = ChartRows()
    for step in range(2 * ChartRows.MOST_ROWS):
        lost = step % 2 == 1
        row = {"nonfinite_total": float(lost)} | ({} if lost else {"loss": 3.0})
        kept.enter(step, {"loss": row})
    assert {row["alrc/loss"] for row in kept.rows()} == {3.0}


def test_rows_of_losses_that_are_not_drawn_are_not_kept() -> None:
    kept = ChartRows()
    for step in range(10):
        kept.enter(step, {f"loss{index}": {"loss": 1.0} for index in range(20)})
    assert len(kept.rows()) == 10 * LOSSES_IN_CHARTS
    assert len(kept.names) == 20
