"""When a person is called, and how seldom."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_alrc import ALRCCallback
from lightning_alrc._telemetry.alerts import Alerts

PERIOD = 50


def titles(
    rows: list[tuple[float, int, int]], seconds: float = 1.0, alerts: Alerts | None = None
) -> dict[int, str]:
    """What is sent after rows of clipped fraction, clips and losses that are not finite, by step.

    Args:
        rows: of every 50th step.
        seconds: between two rows.
        alerts: that send it.
    """
    alerts = alerts or Alerts()
    clipped = nonfinite = 0
    sent = {}
    for index, (fraction, new_clipped, new_nonfinite) in enumerate(rows, 1):
        clipped, nonfinite = clipped + new_clipped, nonfinite + new_nonfinite
        row = {
            "clipped_fraction": fraction,
            "clipped_total": float(clipped),
            "nonfinite_total": float(nonfinite),
        }
        alert = alerts.after("loss", index * PERIOD, row, index * seconds)
        if alert is not None:
            sent[index * PERIOD] = alert.title
    return sent


CALM, SPIKE, MANY, LOST = (0.0, 0, 0), (0.02, 1, 0), (0.5, 25, 0), (0.0, 0, 3)


def test_a_calm_training_sends_nothing() -> None:
    assert titles([CALM] * 1000) == {}


def test_the_first_spike_after_a_long_calm_is_told_of() -> None:
    assert titles([CALM] * 19 + [SPIKE]) == {1000: "ALRC: a loss spiked: loss"}
    assert titles([CALM] * 18 + [SPIKE]) == {}
    # spikes that come often are what ALRC is for
    assert titles([SPIKE, *[CALM] * 9] * 100, seconds=3600) == {}


def test_losses_that_are_not_finite_are_told_of() -> None:
    assert titles([CALM, LOST, CALM]) == {100: "ALRC: a loss is not finite: loss"}


def test_a_clipped_fraction_is_told_of_when_it_is_known_of_enough_steps() -> None:
    assert titles([CALM, CALM, MANY, MANY]) == {200: "ALRC: many losses are clipped: loss"}
    assert titles([CALM, CALM, (0.3, 15, 0), CALM] * 20) == {}  # 15 % of them
    bound = Alerts(clipped_fraction=0.1)
    assert list(titles([CALM, CALM, (0.3, 15, 0), CALM], alerts=bound)) == [200]


def test_what_is_told_of_says_which_loss_and_by_when() -> None:
    row = {"clipped_total": 0.0, "nonfinite_total": 1.0}
    name = "reconstruction_perceptual_" * 3
    alert = Alerts().after(name, 9, row, 0.0)
    assert alert is not None
    assert len(alert.title) == 63  # W&B takes no longer ones
    assert alert.title.startswith("ALRC: a loss is not finite: reconstruction_perceptual")
    assert alert.text == f"The loss {name!r}: 1 NaN or infinite up to step 9"


def test_a_spike_does_not_silence_a_loss_that_is_not_finite() -> None:
    assert titles([CALM] * 19 + [SPIKE, LOST]) == {
        1000: "ALRC: a loss spiked: loss",
        1050: "ALRC: a loss is not finite: loss",
    }


def test_there_is_one_in_an_hour() -> None:
    assert list(titles([LOST] * 100, seconds=60)) == [50, 61 * 50]
    assert list(titles([LOST] * 100, seconds=60, alerts=Alerts(hours=0.5))) == [
        index * PERIOD for index in (1, 31, 61, 91)
    ]
    assert len(titles([LOST] * 100, alerts=Alerts(hours=0))) == 100


def test_each_loss_has_its_own() -> None:
    alerts = Alerts()
    row = {"clipped_total": 0.0, "nonfinite_total": 1.0}
    assert alerts.after("first", 10, row, 0.0) is not None
    assert alerts.after("second", 10, row, 0.0) is not None
    assert alerts.after("first", 20, {**row, "nonfinite_total": 2.0}, 1.0) is None


def test_what_was_counted_before_a_training_went_on_is_not_told_of() -> None:
    alerts = Alerts()
    alerts.start(5000, {"loss": {"nonfinite_total": 7.0, "clipped_total": 9.0}})
    row = {"clipped_total": 9.0, "nonfinite_total": 7.0}
    assert alerts.after("loss", 5050, row, 0.0) is None
    assert alerts.after("loss", 5100, {**row, "nonfinite_total": 8.0}, 0.0) is not None


def test_the_hour_goes_on_in_the_next_training() -> None:
    alerts = Alerts()
    row = {"clipped_total": 0.0, "nonfinite_total": 1.0}
    assert alerts.after("loss", 10, row, 0.0) is not None
    alerts.start(0, {})
    assert alerts.after("loss", 10, row, 3599.0) is None
    assert alerts.after("loss", 20, {**row, "nonfinite_total": 2.0}, 3600.0) is not None


@pytest.mark.parametrize(
    ("alerts", "error", "message"),
    [
        (1, TypeError, "alerts must be True, False or a mapping of settings, got 1"),
        ({"hour": 1}, ValueError, "'hours', 'clipped_fraction' and 'calm', got {'hour': 1}"),
        ({"hours": -1}, ValueError, r"alerts\['hours'\] must be a finite number.*got -1"),
        ({"hours": "1"}, TypeError, r"alerts\['hours'\] must be .*got '1'"),
        ({"clipped_fraction": 20}, ValueError, r"alerts\['clipped_fraction'\].*got 20"),
        ({"calm": float("nan")}, ValueError, r"alerts\['calm'\].*got nan"),
    ],
)
def test_bad_settings_are_refused(alerts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ALRCCallback(alerts=alerts)
