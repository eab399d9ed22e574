"""What the dashboards of loggers show beside the rows: messages, figures, spikes and files."""

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
    """The dashboard of one logger. This one shows nothing; each subclass overrides what it can.

    Args:
        logger: one of Lightning's loggers.
    """

    figures: tuple[str, ...] = ()
    """The packages whose figures it shows: ``"plotly"`` or ``"matplotlib"``, or both."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def describe(
        self, losses: Mapping[str, ALRC], new: Collection[str], settings: Mapping[str, Any]
    ) -> None:
        """Show the settings of the callback and of all losses.

        Args:
            losses: by name.
            new: names of the losses that were not described before.
            settings: of the callback.
        """

    def tell(self, tag: str, message: str, step: int) -> None:
        """Show a message under a tag."""

    def alert(self, alert: Alert) -> None:
        """Send people a message."""

    def draw(self, figure: Any, step: int) -> None:
        """Show the charts of all losses, a figure of one of :attr:`figures`."""

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        """Show the worst clips as a table, in place of the one that was shown before.

        Args:
            spikes: the rows of the table.
            renderer: makes their pictures; ``None`` for no pictures.
            step: the step at which the table is shown.
        """

    def keep(self, files: Callable[[], Mapping[str, Path]]) -> None:
        """Keep what ``files`` returns with the run: files, by the path that each has there."""


def is_of_plotly(figure: Any) -> bool:
    """Whether a figure is one of Plotly's. Plotly itself is not imported."""
    return type(figure).__module__.startswith("plotly")


def table_of(spikes: Iterable[Spike]) -> tuple[list[str], list[list[Any]]]:
    """The names of a table's columns and its rows, one for each spike.

    Ids are strings: all values of a column must be of one type.
    """
    rows = []
    for spike in spikes:
        row = spike._asdict()
        row["id"] = None if spike.id is None else str(spike.id)
        rows.append(list(row.values()))
    return list(Spike._fields), rows
