"""What the dashboards of loggers can show beside their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_alrc.alerts import Alert
from lightning_alrc.alrc import ALRC
from lightning_alrc.charts import History
from lightning_alrc.spikes import Spike

__all__ = ["FIGURE", "Dashboard", "MLflow", "TensorBoard", "drawn"]

FIGURE = "alrc/charts"
"""What the charts are logged as."""


class Dashboard:
    """Shows nothing; a dashboard overrides what it can show.

    Args:
        logger: of Lightning's.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def describe(self, losses: Mapping[str, ALRC], nonfinite: str) -> None:
        """Show the settings of all losses, and what becomes of losses that are not finite."""

    def tell(self, tag: str, message: str, step: int) -> None:
        """Show a message."""

    def alert(self, alert: Alert) -> None:
        """Send people a message."""

    def draw(self, history: History, record: Path | None, step: int) -> None:
        """Show the charts of all losses so far, with the spikes if their record has a file."""

    def show_spikes(
        self, spikes: list[Spike], render: Callable[[Spike], Any] | None, step: int
    ) -> None:
        """Show the worst clips, with pictures if ``render`` makes them."""


class TensorBoard(Dashboard):
    """Lightning's TensorBoardLogger: messages, and the charts as a figure."""

    def tell(self, tag: str, message: str, step: int) -> None:
        self.logger.experiment.add_text(tag, message, step)

    def draw(self, history: History, record: Path | None, step: int) -> None:
        figure = drawn(history, record)
        if figure is not None:
            self.logger.experiment.add_figure(FIGURE, figure, step, close=False)


class MLflow(Dashboard):
    """Lightning's MLFlowLogger: messages, as tags of the run."""

    def tell(self, tag: str, message: str, step: int) -> None:
        self.logger.experiment.set_tag(self.logger.run_id, tag, message)


def drawn(history: History, record: Path | None) -> Any:
    """A figure of the charts so far; ``None`` if there is nothing to draw, or no matplotlib."""
    rows = history.rows()
    if not rows or find_spec("matplotlib") is None:
        return None
    from lightning_alrc.plotting import draw_charts

    return draw_charts(rows, *([record] if record is not None and record.exists() else []))
