"""Which alerts are sent, and how often."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lightning_alrc import ALRCCallback
from lightning_alrc._telemetry.alerts import Alerts
from lightning_alrc._telemetry.watcher import CLIP_AFTER_CALM, NONFINITE, Event

NAN_EVENT = Event(NONFINITE, "loss", "3 NaN or infinite up to step 9")


def sent_at(alerts: Alerts, every: float, count: int = 100) -> list[float]:
    """Seconds at which alerts are sent, if ``count`` events occur, ``every`` seconds apart."""
    seconds = [every * index for index in range(count)]
    return [each for each in seconds if alerts.due(NAN_EVENT, each) is not None]


def test_an_alert_says_what_happened_to_which_loss() -> None:
    alert = Alerts().due(NAN_EVENT, 0.0)
    assert alert is not None
    assert alert.title == "ALRC: a loss is not finite: loss"
    assert alert.text == "The loss 'loss': 3 NaN or infinite up to step 9"
    assert alert.level == "ERROR"


def test_a_title_is_cut_to_what_weights_and_biases_accepts() -> None:
    name = "reconstruction_perceptual_" * 3
    alert = Alerts().due(NAN_EVENT._replace(loss=name), 0.0)
    assert alert is not None
    assert len(alert.title) == 63
    assert alert.title.startswith("ALRC: a loss is not finite: reconstruction_perceptual")
    assert repr(name) in alert.text


def test_at_most_one_alert_is_sent_in_an_hour() -> None:
    assert sent_at(Alerts(), 60) == [0, 3600]
    assert sent_at(Alerts(hours=0.5), 60) == [0, 1800, 3600, 5400]
    assert len(sent_at(Alerts(hours=0), 60)) == 100


def test_each_kind_and_each_loss_is_throttled_by_itself() -> None:
    alerts = Alerts()
    assert alerts.due(NAN_EVENT, 0.0) is not None
    assert alerts.due(NAN_EVENT._replace(kind=CLIP_AFTER_CALM), 1.0) is not None
    assert alerts.due(NAN_EVENT._replace(loss="other"), 2.0) is not None
    assert alerts.due(NAN_EVENT, 3599.0) is None
    assert alerts.due(NAN_EVENT, 3600.0) is not None
    assert alerts.due(NAN_EVENT._replace(kind=CLIP_AFTER_CALM), 3600.0) is None


def test_a_clock_that_starts_again_delays_no_alert() -> None:
    alerts = Alerts()
    assert alerts.due(NAN_EVENT, 1e6) is not None
    moved = pickle.loads(pickle.dumps(alerts))  # to a machine that was started later
    assert moved.due(NAN_EVENT, 10.0) is not None
    assert moved.due(NAN_EVENT, 20.0) is None


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
