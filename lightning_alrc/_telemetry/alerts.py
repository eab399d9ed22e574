"""``Alerts``: turns events into alerts, at most one an hour for each kind of event and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_alrc._moments import arguments
from lightning_alrc._telemetry.watcher import (
    CALM,
    CLIP_AFTER_CALM,
    DATA_EVENT,
    DIVERGENCE_EVENT,
    MANY_CLIPS,
    NONFINITE,
    Event,
)

__all__ = ["Alert", "Alerts", "checked_alerts"]

LONGEST_TITLE = 63
"""Most characters that W&B accepts in a title."""

LEVELS = {
    NONFINITE: "ERROR",
    DIVERGENCE_EVENT: "ERROR",
    MANY_CLIPS: "WARN",
    CLIP_AFTER_CALM: "INFO",
    DATA_EVENT: "INFO",
}
"""The level of each kind of event. W&B has these three levels. Error: the training may be lost.
Warning: the training is slower than it could be. Information: all other events."""


class Alert(NamedTuple):
    """A message to the user."""

    title: str
    text: str
    level: str
    """``"ERROR"``, ``"WARN"`` or ``"INFO"``."""


class Alerts:
    """Turns events into alerts, and drops events that come too soon after the last alert.

    The time since the last alert is counted separately for each kind of event and each loss. It is
    not reset by a new fit.

    Args:
        hours: least time between two alerts of one kind for one loss.
        clipped_fraction: see :class:`~lightning_alrc._telemetry.watcher.Watcher`.
        calm: see :class:`~lightning_alrc._telemetry.watcher.Watcher`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if ``hours`` or ``calm`` is negative or not finite, or ``clipped_fraction`` is
            not between 0 and 1.
    """

    def __init__(
        self, hours: float = 1.0, clipped_fraction: float | None = None, calm: float = CALM
    ) -> None:
        self.hours = arguments.not_negative("alerts['hours']", hours)
        self.clipped_fraction = clipped_fraction
        if clipped_fraction is not None:
            arguments.fraction("alerts['clipped_fraction']", clipped_fraction)
        self.calm = arguments.not_negative("alerts['calm']", calm)
        self._sent_at: dict[tuple[str, str], float] = {}

    def due(self, event: Event, seconds: float) -> Alert | None:
        """The alert to send for an event; ``None`` if it comes too soon after the last alert.

        Args:
            event: what happened.
            seconds: the time, by a monotonic clock.
        """
        key = event.loss, event.kind
        # After unpickling, the time of the last alert may be of another machine's clock, and later
        # than now.
        if 0 <= seconds - self._sent_at.get(key, -math.inf) < self.hours * 3600:
            return None
        self._sent_at[key] = seconds
        title = f"ALRC: {event.kind}: {event.loss}"[:LONGEST_TITLE]
        return Alert(title, f"The loss {event.loss!r}: {event.text}", LEVELS[event.kind])


def checked_alerts(alerts: Any) -> Alerts | None:
    """The alerts that the argument ``alerts`` of the callback asks for; ``None`` for ``False``.

    Args:
        alerts: ``True``, ``False``, or a mapping of settings.

    Raises:
        TypeError: if ``alerts`` is something else, or a setting is not a number.
        ValueError: if a setting has another name or is out of its range.
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
