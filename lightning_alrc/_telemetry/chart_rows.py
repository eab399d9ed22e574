"""``ChartRows``: a bounded number of rows, from which the charts of a fit are drawn.

The rows are copies of the logged rows. ``ALRC.take_row`` makes the logged rows, and
``telemetry.py`` logs them.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_alrc._telemetry.chart_definitions import LOSSES_IN_CHARTS
from lightning_alrc._trainer.named_losses import metric_name

__all__ = ["ChartRows"]

MEANS = {"loss", "loss_clipped", "scale", "clipped_fraction"}
"""Metrics that are means over the losses since the last row. Other metrics are values at a step."""


class ChartRows:
    """Keeps at most 1,024 rows for each loss.

    When a loss has more, every two neighbouring rows of each loss are merged into one. The merged
    rows are as if rows had been logged half as often.
    """

    MOST_ROWS = 1024
    """Most rows kept for each loss."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, _MergedRow]] = {}
        self._calls = 0
        """number of calls of ``enter``"""
        self._calls_in_row = 1
        self.names: set[str] = set()
        """names of all losses, including the losses after the first 8, which are not drawn"""

    def enter(self, step: int, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Keep all losses' rows at one step; ``rows`` has them by name of the loss."""
        self.names |= rows.keys()
        for name, row in rows.items():
            if name in self._rows or len(self._rows) < LOSSES_IN_CHARTS:
                kept = self._rows.setdefault(name, {})
                _put(kept, self._calls // self._calls_in_row, (1, {"step": step, **row}))
        self._calls += 1
        if any(len(kept) > self.MOST_ROWS for kept in self._rows.values()):
            self._merge()

    def _merge(self) -> None:
        self._calls_in_row *= 2
        for name, kept in self._rows.items():
            fewer: dict[int, _MergedRow] = {}
            for index, row in kept.items():
                _put(fewer, index // 2, row)
            self._rows[name] = fewer

    def rows(self) -> list[dict[str, float]]:
        """The rows kept, with the logged names of their values, for :func:`lightning_alrc.plot`."""
        return [
            {key if key == "step" else metric_name(name, key): row[key] for key in row}
            for name, kept in self._rows.items()
            for _, row in kept.values()
        ]


_MergedRow = tuple[int, dict[str, float]]
"""The number of rows that were merged into one row, and that row."""


def _put(kept: dict[int, _MergedRow], index: int, later: _MergedRow) -> None:
    """Keep a row at an index, or merge it into the row that is already there."""
    number, row = kept.get(index, (0, {}))
    more, last = later
    merged = row | last
    for metric in MEANS & row.keys() & last.keys():
        merged[metric] = (number * row[metric] + more * last[metric]) / (number + more)
    kept[index] = number + more, merged
