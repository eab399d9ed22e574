"""What is drawn of a loss, and the rows that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lightning_alrc.named_losses import metric_name

__all__ = ["CHARTS", "Chart", "History"]


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
    """The rows that were logged, thinned so that their number is bounded."""

    LARGEST = 1024
    """Rows that are kept of a loss; where there would be more, every other one is let go."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, dict[str, float]]] = {}
        self._logged = 0
        self._stride = 1

    def enter(self, step: int, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Keep the rows of all losses that were logged at a step."""
        newest, self._logged = self._logged - 1, self._logged + 1
        if newest % self._stride:
            for kept in self._rows.values():
                kept.pop(newest, None)
        for name, row in rows.items():
            kept = self._rows.setdefault(name, {})
            metrics = {metric_name(name, metric): value for metric, value in row.items()}
            kept[self._logged - 1] = {"step": step, **metrics}
            if len(kept) > self.LARGEST:
                self._thin()

    def _thin(self) -> None:
        self._stride *= 2
        self._rows = {
            name: {index: row for index, row in kept.items() if index % self._stride == 0}
            for name, kept in self._rows.items()
        }

    def rows(self) -> list[dict[str, float]]:
        """What is kept, under the names it was logged by, for :func:`lightning_alrc.plot`."""
        return [row for kept in self._rows.values() for row in kept.values()]
