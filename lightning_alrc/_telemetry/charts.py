"""What is drawn of a loss, and the rows that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lightning_alrc._trainer.named_losses import metric_name

__all__ = ["CHARTS", "LOSSES_IN_CHARTS", "Chart", "History"]

LOSSES_IN_CHARTS = 8
"""Each takes half a second to draw, and a training waits for it."""

MEANS = {"loss", "loss_clipped", "scale", "clipped_fraction"}
"""Metrics that are means since the row before; the others are as they stand."""


class Chart(NamedTuple):
    """One chart of a loss; the metrics are named without their prefix."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    log_scale: bool = False


CHARTS = (
    Chart(
        "Loss and the threshold above which it is clipped",
        "loss",
        ("loss", "threshold", "loss_clipped"),
        log_scale=True,  # a spike would flatten all else
    ),
    Chart("Fraction of the losses that were clipped", "fraction", ("clipped_fraction",)),
    Chart("Mean factor on the gradient, 1 while nothing is clipped", "factor", ("scale",)),
    Chart(
        "Running mean and standard deviation, which set the threshold", "loss", ("mu1", "stddev")
    ),
    Chart(
        "Losses that were clipped, or were NaN or infinite, since the start of training",
        "count",
        ("clipped_total", "nonfinite_total"),
    ),
    # By itself: beside thousands of clips a step from 0 to 1 would not be seen.
    Chart("Resets of the moments since the start of training", "count", ("resets",)),
)


class History:
    """The rows that were logged, merged so that their number is bounded.

    They are then those that would have been logged at every second of the steps, or fourth.
    """

    LARGEST = 1024
    """Rows that are kept of a loss; where there would be more, every two become one."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, _Merged]] = {}
        self._logged = 0
        self._merged = 1
        self.names: set[str] = set()
        """of all losses, also those beyond the first few that are drawn"""

    def enter(self, step: int, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Keep the rows of the first losses that were logged at a step."""
        self.names |= rows.keys()
        for name, row in rows.items():
            if name in self._rows or len(self._rows) < LOSSES_IN_CHARTS:
                kept = self._rows.setdefault(name, {})
                _put(kept, self._logged // self._merged, (1, {"step": step, **row}))
        self._logged += 1
        if any(len(kept) > self.LARGEST for kept in self._rows.values()):
            self._merge()

    def _merge(self) -> None:
        self._merged *= 2
        for name, kept in self._rows.items():
            fewer: dict[int, _Merged] = {}
            for index, row in kept.items():
                _put(fewer, index // 2, row)
            self._rows[name] = fewer

    def rows(self) -> list[dict[str, float]]:
        """What is kept, under the names it was logged by, for :func:`lightning_alrc.plot`."""
        return [
            {key if key == "step" else metric_name(name, key): row[key] for key in row}
            for name, kept in self._rows.items()
            for _, row in kept.values()
        ]


_Merged = tuple[int, dict[str, float]]
"""So many rows in one."""


def _put(kept: dict[int, _Merged], index: int, later: _Merged) -> None:
    """Keep a row, or merge it into the one that is kept there."""
    number, row = kept.get(index, (0, {}))
    more, last = later
    merged = row | last
    for metric in MEANS & row.keys() & last.keys():
        merged[metric] = (number * row[metric] + more * last[metric]) / (number + more)
    kept[index] = number + more, merged
