"""The dashboards of loggers other than Weights & Biases: what each of them can show."""

from __future__ import annotations

import csv
import io
from typing import Any

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.dashboards import FIGURE, SPIKES, Dashboard, is_of_plotly, table_of
from lightning_alrc._telemetry.pictures import Renderer

__all__ = ["Aim", "Comet", "MLflow", "SwanLab", "TensorBoard", "Trackio"]


class TensorBoard(Dashboard):
    """Lightning's TensorBoardLogger: messages as text, and the charts as a figure."""

    figures = ("matplotlib",)

    def show_message(self, tag: str, message: str, step: int) -> None:
        self.logger.experiment.add_text(tag, message, step)

    def draw(self, figure: Any, step: int) -> None:
        self.logger.experiment.add_figure(FIGURE, figure, step, close=False)


class MLflow(Dashboard):
    """Lightning's MLFlowLogger: messages as tags of the run, charts and spikes as artifacts.

    Artifacts have no step. Each artifact replaces the previous one of the same name.
    """

    figures = ("matplotlib",)

    def show_message(self, tag: str, message: str, step: int) -> None:
        self.logger.experiment.set_tag(self.logger.run_id, tag, message)

    def draw(self, figure: Any, step: int) -> None:
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{FIGURE}.png")

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        columns, rows = table_of(spikes)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        self.logger.experiment.log_text(self.logger.run_id, text.getvalue(), f"{SPIKES}.csv")


class Comet(Dashboard):
    """Lightning's CometLogger: messages as "other" values, charts, and spikes as a table."""

    figures = ("matplotlib",)

    def show_message(self, tag: str, message: str, step: int) -> None:
        self.logger.experiment.log_other(tag, message)

    def draw(self, figure: Any, step: int) -> None:
        self.logger.experiment.log_figure(FIGURE, figure, step=step)

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        columns, rows = table_of(spikes)
        self.logger.experiment.log_table(f"{SPIKES}.csv", rows, columns)


class SwanLab(Dashboard):
    """SwanLab's SwanLabLogger: messages as text, charts as an image, and spikes as a table."""

    figures = ("matplotlib",)

    def show_message(self, tag: str, message: str, step: int) -> None:
        import swanlab

        self.logger.experiment.log({tag: swanlab.Text(message)}, step=step)

    def draw(self, figure: Any, step: int) -> None:
        import swanlab

        self.logger.experiment.log({FIGURE: swanlab.Image(figure)}, step=step)

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        import swanlab

        table = swanlab.echarts.Table()
        table.add(*table_of(spikes))
        self.logger.experiment.log({SPIKES: table}, step=step)


class Trackio(Dashboard):
    """Any logger whose class is named TrackioLogger. Its experiment must be a run of Trackio."""

    figures = ("plotly", "matplotlib")

    def show_message(self, tag: str, message: str, step: int) -> None:
        import trackio

        self.logger.experiment.log({tag: trackio.Markdown(message)}, step)

    def draw(self, figure: Any, step: int) -> None:
        self.logger.experiment.log({FIGURE: figure}, step)

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        import trackio

        columns, rows = table_of(spikes)
        self.logger.experiment.log({SPIKES: trackio.Table(columns, rows)}, step)


class Aim(Dashboard):
    """Aim's AimLogger: messages as text, and the charts as a figure. Aim has no tables."""

    figures = ("plotly", "matplotlib")

    def show_message(self, tag: str, message: str, step: int) -> None:
        import aim

        self.logger.experiment.track(aim.Text(message), name=tag, step=step)

    def draw(self, figure: Any, step: int) -> None:
        import aim

        shown = aim.Figure(figure) if is_of_plotly(figure) else aim.Image(figure)
        self.logger.experiment.track(shown, name=FIGURE, step=step)
