"""What loggers' dashboards show besides logged rows: messages, figures, spikes and files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.alerts import Alert
from lightning_alrc._telemetry.pictures import Renderer
from lightning_alrc.alrc import ALRC

__all__ = ["FIGURE", "SPIKES", "Dashboard", "is_of_plotly", "table_of"]

FIGURE = "alrc/charts"
"""The name under which the charts are logged."""

SPIKES = "alrc/spikes"
"""The name under which the table of the worst clips is logged."""


class Dashboard:
    """The dashboard of one logger. A subclass overrides the methods for what the logger can show.

    Args:
        logger: one of Lightning's loggers.
    """

    figures: tuple[str, ...] = ()
    """packages whose figures the dashboard can show: ``"plotly"``, ``"matplotlib"`` or both"""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def describe(
        self, losses: Mapping[str, ALRC], new: Collection[str], settings: Mapping[str, Any]
    ) -> None:
        """Show the settings of the callback and of all losses.

        Args:
            losses: the ALRC of each loss, by name.
            new: names of the losses that were not described before.
            settings: settings of the callback.
        """

    def show_message(self, tag: str, message: str, step: int) -> None:
        """Show a message under a tag."""

    def alert(self, alert: Alert) -> None:
        """Send an alert to the user."""

    def draw(self, figure: Any, step: int) -> None:
        """Show the charts of all losses: a figure of one of the packages in :attr:`figures`."""

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        """Show the worst clips as a table, which replaces the previous table.

        Args:
            spikes: the worst clips.
            renderer: makes the pictures of spikes; ``None`` for no pictures.
            step: the step at which the table is shown.
        """

    def keep_files(self, files: Callable[[], Mapping[str, Path]]) -> None:
        """Store files with the run.

        Args:
            files: returns the files. The key of a file is the path to store it under.
        """


def is_of_plotly(figure: Any) -> bool:
    """Whether a figure is Plotly's. Does not import Plotly."""
    return type(figure).__module__.startswith("plotly")


def table_of(spikes: Iterable[Spike]) -> tuple[list[str], list[list[Any]]]:
    """The names of a table's columns, and a row for each spike.

    Ids are converted to strings, because all values of a column must have one type.
    """
    rows = []
    for spike in spikes:
        row = spike._asdict()
        row["id"] = None if spike.id is None else str(spike.id)
        rows.append(list(row.values()))
    return list(Spike._fields), rows
