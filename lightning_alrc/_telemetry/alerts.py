"""When a person is to be called to a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_alrc._moments import arguments
from lightning_alrc._telemetry.warning_signs import ClippedFraction

__all__ = ["Alert", "Alerts", "checked_alerts"]

LONGEST_TITLE = 63
"""Characters that W&B takes."""

NO_TOTALS = {"nonfinite_total": 0.0, "clipped_total": 0.0}


class Alert(NamedTuple):
    """What is sent."""

    title: str
    text: str


class Alerts:
    """Tells, from what is logged, of what a person should see, each at most once an hour.

    For each loss: that it is NaN or infinite; that more is clipped than by a guard against spikes;
    the first clip after a long calm.

    Args:
        hours: between two alerts of one kind for one loss, at least.
        clipped_fraction: of the losses: above it, over 100 steps or more, it is told of.
        calm: steps without a clip after which the next is told of.

    Raises:
        TypeError: if one is not a number.
        ValueError: if ``hours`` or ``calm`` is negative or not finite, or ``clipped_fraction`` is
            not between 0 and 1.
    """

    def __init__(
        self, hours: float = 1.0, clipped_fraction: float = 0.2, calm: float = 1000
    ) -> None:
        self.hours = arguments.not_negative("alerts['hours']", hours)
        self.clipped_fraction = arguments.fraction("alerts['clipped_fraction']", clipped_fraction)
        self.calm = arguments.not_negative("alerts['calm']", calm)
        self._alerted_at: dict[tuple[str, str], float] = {}
        self.start(0, {})

    def start(self, step: int, totals: Mapping[str, Mapping[str, float]]) -> None:
        """A training starts, or goes on. An alert of before it counts in the hour after.

        Args:
            step: where.
            totals: of each loss seen before: its ``nonfinite_total`` and ``clipped_total``.
        """
        self._start = step
        self._losses = {name: _Watched(step, counted) for name, counted in totals.items()}

    def after(self, name: str, step: int, row: Mapping[str, float], seconds: float) -> Alert | None:
        """What is to be sent after a row of a loss, if anything.

        Args:
            name: of the loss.
            step: of the row.
            row: as of :meth:`~lightning_alrc.ALRC.take_row`.
            seconds: of a clock that never goes back.
        """
        watched = self._losses.setdefault(name, _Watched(self._start, NO_TOTALS))
        cause = self._cause(watched, step, row)
        if cause is None:
            return None
        what, text = cause
        if seconds - self._alerted_at.get((name, what), -math.inf) < self.hours * 3600:
            return None
        self._alerted_at[name, what] = seconds
        return Alert(f"ALRC: {what}: {name}"[:LONGEST_TITLE], f"The loss {name!r}: {text}")

    def _cause(
        self, watched: _Watched, step: int, row: Mapping[str, float]
    ) -> tuple[str, str] | None:
        """What there is to be told, in short and in full."""
        nonfinite, clipped = watched.new("nonfinite_total", row), watched.new("clipped_total", row)
        calm = step - watched.clipped_at
        if clipped:
            watched.clipped_at = step
        fraction = watched.fraction.after(step, row)
        if nonfinite:
            return "a loss is not finite", f"{nonfinite:,.0f} NaN or infinite up to step {step:,}"
        if fraction is not None and fraction > self.clipped_fraction:
            return "many losses are clipped", (
                f"{fraction:.0%} clipped up to step {step:,}. The learning rate may be too high, "
                "or num_stddev too low"
            )
        if clipped and calm >= self.calm:
            return "a loss spiked", (
                f"{clipped:,.0f} clipped up to step {step:,}, the first for {calm:,} steps"
            )
        return None


class _Watched:
    """What is remembered of one loss."""

    def __init__(self, step: int, totals: Mapping[str, float]) -> None:
        self.clipped_at = step
        self.fraction = ClippedFraction(step)
        self._totals = dict(totals)

    def new(self, total: str, row: Mapping[str, float]) -> float:
        """By how much a total has grown since the last row."""
        before, self._totals[total] = self._totals[total], row[total]
        return row[total] - before


def checked_alerts(alerts: Any) -> Alerts | None:
    """The alerts that an argument asks for.

    Args:
        alerts: ``True`` or ``False``, or settings by name.

    Raises:
        TypeError: if it is neither, or one of the settings is no number.
        ValueError: if it has a setting of another name, or one is out of its range.
    """
    if isinstance(alerts, bool):
        return Alerts() if alerts else None
    if not isinstance(alerts, Mapping):
        raise TypeError(f"alerts must be True, False or a mapping of settings, got {alerts!r:.100}")
    if not set(alerts) <= {"hours", "clipped_fraction", "calm"}:
        raise ValueError(
            "alerts must have no other settings than 'hours', 'clipped_fraction' and 'calm', got "
            f"{alerts!r:.200}"
        )
    return Alerts(**alerts)
