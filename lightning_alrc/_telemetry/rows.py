"""What a Trainer's loggers are told: rows, charts, warnings, alerts and the table of spikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.alerts import Alerts
from lightning_alrc._telemetry.charts import History
from lightning_alrc._telemetry.dashboards import Dashboard, MLflow, TensorBoard
from lightning_alrc._telemetry.wandb_run import WandbRun
from lightning_alrc._telemetry.warning_signs import StepSizeLimiter
from lightning_alrc._trainer.named_losses import metric_name
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["Telemetry"]

DRAWN_AFTER = 300.0
"""Seconds after which the charts are first drawn; then each time a training has lasted as long
again, and at its end. Drawing takes about half a second for each loss."""

Rows = Mapping[str, Mapping[str, float]]
"""By name of the loss, as of :meth:`~lightning_alrc.ALRC.take_row`."""

DASHBOARDS: dict[str, type[Dashboard]] = {
    "WandbLogger": WandbRun,
    "TensorBoardLogger": TensorBoard,
    "MLFlowLogger": MLflow,
}
"""By the name of the logger's class, which both of Lightning's packages have."""


class Telemetry:
    """Tells the loggers of a Trainer, each what it can show. What fails costs one warning.

    Args:
        alerts: what people are alerted of; ``None`` for nothing.
        render: returns a spike's picture; ``None`` for no pictures.
        settings: of the callback.
    """

    def __init__(
        self,
        alerts: Alerts | None,
        render: Callable[[Spike], Any] | None,
        settings: Mapping[str, Any],
    ) -> None:
        self._alerts = alerts
        self._render = render
        self._settings = settings
        self._goes_on = self._may_draw = False
        self._limiter = StepSizeLimiter()
        self._history = History()
        self._described: set[str] = set()
        self._failed: set[str] = set()
        self._started_at = self._draws_at = 0.0

    def start(self, trainer: Any, losses: Mapping[str, ALRC], step: int) -> None:
        """A fit starts, at a step as loggers count."""
        self._goes_on = True
        self._history, self._limiter = History(), StepSizeLimiter()
        self._described, self._failed = set(), set()
        self._may_draw = find_spec("matplotlib") is not None
        self._describe(dashboards(trainer), losses)
        self._started_at = monotonic()
        self._draws_at = self._started_at + DRAWN_AFTER
        if self._alerts is not None:
            runs = [each for each in dashboards(trainer) if isinstance(each, WandbRun)]
            if not (runs or trainer.fast_dev_run):
                rank_zero_warn("alerts are sent by a WandbLogger, and this Trainer has none")
            totals = {
                name: {
                    "nonfinite_total": float(alrc.nonfinite_total),
                    "clipped_total": float(alrc.clipped_total),
                }
                for name, alrc in losses.items()
            }
            self._alerts.start(step, totals)

    def log(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        record: Path | None,
        step: int,
    ) -> None:
        """Log a row of each loss, and draw the charts when it is time. Reads the device.

        Every rank must call it.

        Args:
            trainer: whose loggers are told.
            losses: by name.
            record: the file of spikes, if there is one.
            step: as loggers count.
        """
        if losses:
            shown = dashboards(trainer)
            rows = {name: alrc.take_row() for name, alrc in losses.items()}
            self._log_rows(trainer, shown, losses, rows, step)
            if monotonic() >= self._draws_at:
                self._draw(shown, record, step)

    def _log_rows(
        self,
        trainer: Any,
        shown: list[Dashboard],
        losses: Mapping[str, ALRC],
        rows: Rows,
        step: int,
    ) -> None:
        if not losses.keys() <= self._described:
            self._describe(shown, losses)
        self._log_metrics(trainer, rows, step)
        for name, row in rows.items():
            message = self._limiter.message(name, step, row)
            if message is not None:
                rank_zero_warn(message)
                self._show(shown, "tell", metric_name(name, "warning"), message, step)
            if self._alerts is not None:
                alert = self._alerts.after(name, step, row, monotonic())
                if alert is not None:
                    self._show(shown, "alert", alert)
        if self._may_draw and any(dashboard.draws for dashboard in shown):
            self._history.enter(step, rows)

    def finish(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        spikes: list[Spike],
        record: Path | None,
        last_step: int,
        step: int,
    ) -> None:
        """A fit ends, in whatever way: what is left to log is logged, and all is drawn and shown.

        Args:
            trainer: whose loggers are told.
            losses: by name.
            spikes: the worst clips.
            record: the file of spikes, if there is one.
            last_step: that losses were seen in, as loggers count.
            step: at which the fit ends.
        """
        if not self._goes_on:
            return
        self._goes_on = False
        shown = dashboards(trainer)
        rows: dict[str, dict[str, float]] = {}
        with suppress(RuntimeError):  # of a device that is lost, which an error tells of already
            for name, alrc in losses.items() if trainer.loggers else ():
                # Where a fit was broken off, other ranks may never answer.
                if alrc.is_settled and alrc.has_row():
                    rows[name] = alrc.take_row()
        if rows:
            self._log_rows(trainer, shown, losses, rows, last_step)
        self._draw(shown, record, step)
        if spikes:
            self._show(shown, "show_spikes", spikes, self._render, step)

    def _describe(self, shown: list[Dashboard], losses: Mapping[str, ALRC]) -> None:
        new = [name for name in losses if name not in self._described]
        self._show(shown, "describe", losses, new, self._settings)
        self._described |= set(new)

    def _log_metrics(self, trainer: Any, rows: Rows, step: int) -> None:
        metrics = {
            metric_name(name, metric): value
            for name, row in rows.items()
            for metric, value in row.items()
        }
        for logger in trainer.loggers:
            try:
                logger.log_metrics(metrics, step=step)
            except Exception as error:  # a full disk, say, is no reason to stop training
                self._warn_once("row", f"{type(logger).__name__} lost a row of ALRC's: {error!r}")

    def _draw(self, shown: list[Dashboard], record: Path | None, step: int) -> None:
        drawing, rows = [each for each in shown if each.draws], self._history.rows()
        if not (drawing and rows):
            return
        now = monotonic()
        self._draws_at = now + max(now - self._started_at, DRAWN_AFTER)
        try:
            from lightning_alrc.plotting import draw_charts

            spikes = [record] if record is not None and record.exists() else []
            figure = draw_charts(rows, *spikes, count=len(self._history.names))
            self._show(drawing, "draw", figure, step)
        except Exception as error:
            self._warn_once("draw", f"ALRC's charts could not be drawn: {error!r}")

    def _show(self, shown: list[Dashboard], what: str, *args: Any) -> None:
        for dashboard in shown:
            try:
                getattr(dashboard, what)(*args)
            except Exception as error:  # a picture is no reason to lose a training
                kind = type(dashboard.logger).__name__
                message = f"ALRC could not {what.replace('_', ' ')} on the {kind}: {error!r}"
                self._warn_once(f"{kind} {what}", message)

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._failed:
            rank_zero_warn(message)
        self._failed.add(what)


def dashboards(trainer: Any) -> list[Dashboard]:
    """What a Trainer's loggers can show; nothing but on rank 0."""
    shown = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        bases = {base.__name__ for base in type(logger).__mro__}
        shown += [show(logger) for name, show in DASHBOARDS.items() if name in bases]
    return shown
