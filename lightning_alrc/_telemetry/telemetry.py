"""``Telemetry``: what the loggers, monitors and user of a Trainer are told of a fit.

Rows are taken at a flush. There is one whenever Lightning logs. It takes one row of each loss, with
means over the losses since the last row. A row goes to

- ``trainer.callback_metrics``, for callbacks that monitor a metric;
- all loggers;
- the watcher, whose events are warned of on the console, shown on dashboards and sent as alerts;
- the charts, which dashboards show as a figure, together with the table of spikes.

The step of a row is always later than the step of the last row, also where a fit resumes another.
Losses that would need a row at an earlier step are in the next row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.alerts import Alerts
from lightning_alrc._telemetry.chart_rows import ChartRows
from lightning_alrc._telemetry.dashboards import Dashboard
from lightning_alrc._telemetry.drawing import Drawing
from lightning_alrc._telemetry.other_dashboards import (
    Aim,
    Comet,
    MLflow,
    SwanLab,
    TensorBoard,
    Trackio,
)
from lightning_alrc._telemetry.pictures import Renderer
from lightning_alrc._telemetry.wandb_dashboard import WandbRun
from lightning_alrc._telemetry.watcher import DATA, DIVERGENCE, LIMIT, SPIKE, Event, Watcher, judged
from lightning_alrc._trainer.named_losses import metric_name
from lightning_alrc._trainer.namespaces import rank_zero_info, rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["Telemetry", "checked_last_row"]

SHOWN_AFTER = 300.0
"""Seconds after which the charts and the table of spikes are first shown.

They are shown again whenever a fit has lasted twice as long, and at its end. Drawing the charts
takes about half a second for each loss."""

SHORTEST = 60.0
"""Seconds. A fit that is shorter has no charts: drawing them would be too much of its time."""

WARNED_AFTER = 1000
"""Steps that a limit on the step size must last before the console and the dashboards show it.
Alerts are sent at once."""

Rows = Mapping[str, Mapping[str, float]]
"""By name of the loss, as of :meth:`~lightning_alrc.ALRC.take_row`."""

DASHBOARDS: dict[str, type[Dashboard]] = {
    "WandbLogger": WandbRun,
    "TensorBoardLogger": TensorBoard,
    "MLFlowLogger": MLflow,
    "CometLogger": Comet,
    "SwanLabLogger": SwanLab,
    "TrackioLogger": Trackio,
    "AimLogger": Aim,
}
"""By name of the logger's class, which is the same in both of Lightning's packages."""


class Telemetry:
    """Takes the rows of a Trainer's fits and hands them on. Whatever fails costs one warning.

    Args:
        alerts: which events are sent as alerts; ``None`` for none.
        render: returns a spike's picture; ``None`` for no pictures.
        draws: whether dashboards are given charts.
        settings: of the callback.
    """

    def __init__(
        self,
        alerts: Alerts | None,
        render: Callable[[Spike], Any] | None,
        draws: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.last_row: int | None = None
        """Step of the last row, also of the fit that this one resumes."""
        self._alerts = alerts
        self._renderer = None if render is None else Renderer(render)
        self._drawing = Drawing(draws)
        self._settings = settings
        self._is_running = self._has_row = False
        self._watcher = Watcher()
        self._chart_rows = ChartRows()
        self._described: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        """losses and kinds of events that the console was told of"""
        self._after_calm: dict[str, range] = {}
        """by loss, the steps before those of the last row with the first clip for long"""
        self._judged: set[tuple[Any, ...]] = set()
        """places of the spikes whose kinds were looked at"""
        self._failed: set[str] = set()
        self._shown_spikes: list[Spike] = []
        """as the table has them"""
        self._started_at = self._shows_at = 0.0

    def start(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        step: int,
        spikes: Iterable[Spike] = (),
        is_resumed: bool = False,
    ) -> None:
        """A fit starts.

        Args:
            trainer: the Trainer that fits.
            losses: by name.
            step: the step at which it starts, as loggers count.
            spikes: in the record so far.
            is_resumed: whether ``last_row`` is that of the checkpoint which the fit resumes.
        """
        self._judged = {spike.place for spike in spikes if spike.kind is not None}
        self._is_running, self._has_row = True, False
        is_new = step == 0 and not is_resumed
        if is_new or (self.last_row is not None and self.last_row > step):
            self.last_row = None  # a new training, or one that went back to an old checkpoint
        self._watcher = self._new_watcher(losses, step)
        self._chart_rows = ChartRows()
        self._described, self._told, self._failed = set(), set(), set()
        self._after_calm, self._shown_spikes = {}, []
        if self._renderer is not None:
            self._renderer.has_warned = False
        shown = dashboards(trainer)
        self._describe(shown, losses)
        self._started_at = monotonic()
        self._shows_at = self._started_at + SHOWN_AFTER
        has_run = any(isinstance(dashboard, WandbRun) for dashboard in shown)
        if self._alerts is not None and not (has_run or trainer.fast_dev_run):
            rank_zero_warn("alerts are sent by a WandbLogger, and this Trainer has none")

    def _new_watcher(self, losses: Mapping[str, ALRC], step: int) -> Watcher:
        totals = {
            name: {
                "nonfinite_total": float(alrc.nonfinite_total),
                "clipped_total": float(alrc.clipped_total),
            }
            for name, alrc in losses.items()
        }
        if self._alerts is None:
            return Watcher(step, totals)
        return Watcher(step, totals, self._alerts.clipped_fraction, self._alerts.calm)

    def log(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        step: int,
        spikes: list[Spike],
    ) -> None:
        """Flush: take a row of each loss and hand it on. Show charts and spikes if it is time to.

        Reads the device. Every rank must call it, whether or not the Trainer has loggers.

        Args:
            trainer: the Trainer that fits.
            losses: by name.
            step: of the rows, as loggers count.
            spikes: the worst clips.
        """
        if not (losses and self.takes_row(step)):
            return
        shown = dashboards(trainer)
        rows = {name: alrc.take_row() for name, alrc in losses.items()}
        self._hand_on(trainer, shown, losses, rows, step, trainer.current_epoch)
        self._tell_of_kinds(shown, spikes, losses, step)
        now = monotonic()
        if now >= self._shows_at:
            self._shows_at = now + max(now - self._started_at, SHOWN_AFTER)
            self._show_spikes_and_charts(shown, spikes, step)

    def takes_row(self, step: int) -> bool:
        """Whether a row may be taken at a step, so that it is later than the last."""
        return self.last_row is None or step > self.last_row

    def show_monitors(self, trainer: Any, losses: Mapping[str, ALRC]) -> None:
        """Let callbacks monitor the losses so far, if this fit has had no row yet.

        Called where callbacks read metrics: before a validation, and when an epoch ends. Without
        it, a monitor of an epoch shorter than ``log_every_n_steps`` would find no metric. Reads
        the device until the first row. Every rank must call it.
        """
        if self._has_row:
            return
        rows = {}
        for name, alrc in losses.items():
            settings: dict[str, Any] = dict(alrc.settings)
            copy = ALRC(**settings)  # the row of the loss itself goes on
            copy.set_extra_state(alrc.get_extra_state())
            rows[name] = copy.take_row()
        _publish(trainer, _metrics(rows))

    def finish(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        spikes: list[Spike],
        files: Callable[[], Mapping[str, Path]],
        last_step: int,
        step: int,
    ) -> None:
        """A fit ends, in whatever way. Log what is left, show charts and spikes, keep the files.

        Args:
            trainer: the Trainer that fits.
            losses: by name.
            spikes: the worst clips.
            files: returns the files of the spikes, by the path that each is to have among them.
            last_step: the last step in which losses were seen, as loggers count.
            step: the step at which the fit ends.
        """
        if not self._is_running:
            return
        self._is_running = False
        shown = dashboards(trainer)
        rows: dict[str, dict[str, float]] = {}
        with suppress(RuntimeError):  # a lost device raises again; its first error is on its way
            for name, alrc in losses.items():
                # After an exception other ranks may never answer, so nothing is waited for.
                if alrc.is_flushed and alrc.has_row():
                    rows[name] = alrc.take_row()
            if rows:
                if self.last_row is not None:
                    last_step = max(last_step, self.last_row + 1)
                # Once an epoch has ended, current_epoch is the next one.
                epoch = trainer.fit_loop.epoch_progress.current.ready - 1
                self._hand_on(trainer, shown, losses, rows, last_step, epoch)
            self._tell_of_kinds(shown, spikes, losses, step)
        self._show_spikes_and_charts(shown, spikes, step)
        if spikes:
            self._show(shown, "keep", files)

    def _hand_on(
        self,
        trainer: Any,
        shown: list[Dashboard],
        losses: Mapping[str, ALRC],
        rows: Rows,
        step: int,
        epoch: int,
    ) -> None:
        before, self.last_row, self._has_row = self.last_row, step, True
        if not losses.keys() <= self._described:
            self._describe(shown, losses)
        metrics = _metrics(rows)
        _publish(trainer, metrics)
        self._log_metrics(trainer, metrics | {"epoch": epoch}, step)
        for event in self._watcher.events(step, rows, losses):
            self._tell(shown, event, step)
            if event.kind == SPIKE:
                self._after_calm[event.loss] = range(-1 if before is None else before, step)
        if any(self._drawing.can_draw_for(dashboard) for dashboard in shown):
            self._chart_rows.enter(step, rows)

    def _tell(self, shown: list[Dashboard], event: Event, step: int) -> None:
        """Tell of an event: on the console and the dashboards once, by alert once an hour."""
        lasts = event.kind == LIMIT and event.steps >= WARNED_AFTER
        key = event.loss, event.kind
        if (lasts or event.kind in (DATA, DIVERGENCE)) and key not in self._told:
            self._told.add(key)
            message = f"ALRC: {event.kind}: of the loss {event.loss!r}, {event.text}"
            if event.kind == DATA:
                rank_zero_info(message)
            else:
                rank_zero_warn(message)
                what = metric_name(event.loss, "warning" if lasts else "divergence")
                self._show(shown, "tell", what, message, step)
        if event.kind == DATA and event.steps - 1 not in self._after_calm.get(event.loss, ()):
            return  # alerts are of the first spike after a long calm
        alert = None if self._alerts is None else self._alerts.due(event, monotonic())
        if alert is not None:
            self._show(shown, "alert", alert)

    def _tell_of_kinds(
        self, shown: list[Dashboard], spikes: list[Spike], losses: Mapping[str, ALRC], step: int
    ) -> None:
        """Tell of the spikes that have been judged since this was last called.

        Of several of one loss and kind, the first that is worth it is told.
        """
        told: set[tuple[str, str]] = set()
        new = [each for each in spikes if each.kind and each.place not in self._judged]
        for spike in sorted(new, key=lambda each: each.step):
            self._judged.add(spike.place)
            # After an exception other ranks may never answer.
            if spike.name in losses and losses[spike.name].is_flushed:
                event = judged(spike, spikes, losses[spike.name])
                if event is not None and (event.loss, event.kind) not in told:
                    told.add((event.loss, event.kind))
                    self._tell(shown, event, step)

    def _describe(self, shown: list[Dashboard], losses: Mapping[str, ALRC]) -> None:
        new = [name for name in losses if name not in self._described]
        self._show(shown, "describe", losses, new, self._settings)
        self._described |= set(new)

    def _log_metrics(self, trainer: Any, metrics: Mapping[str, float], step: int) -> None:
        for logger in trainer.loggers:
            try:
                logger.log_metrics(metrics=metrics, step=step)
            except Exception as error:  # a full disk, say, must not stop the training
                kind = type(logger).__name__
                self._warn_once(f"{kind} row", f"{kind} lost a row of ALRC's: {error!r}")

    def _show_spikes_and_charts(
        self, shown: list[Dashboard], spikes: list[Spike], step: int
    ) -> None:
        if spikes and spikes != self._shown_spikes:
            self._shown_spikes = list(spikes)
            self._show(shown, "show_spikes", spikes, self._renderer, step)
        if monotonic() - self._started_at >= SHORTEST:
            self._draw(shown, spikes, step)

    def _draw(self, shown: list[Dashboard], spikes: list[Spike], step: int) -> None:
        rows, count = self._chart_rows.rows(), len(self._chart_rows.names)
        if not rows:
            return
        try:
            for figure, dashboards in self._drawing.figures(shown, rows, spikes, count):
                self._show(dashboards, "draw", figure, step)
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


def checked_last_row(step: Any) -> int | None:
    """The step of the last row, from a checkpoint.

    Raises:
        ValueError: if it is anything else.
    """
    if step is not None and (type(step) is not int or step < 0):
        raise ValueError(
            "ALRCCallback state 'last_row' must be a whole number, 0 or above, or None, got "
            f"{step!r:.100}"
        )
    return step


def dashboards(trainer: Any) -> list[Dashboard]:
    """The dashboards of a Trainer's loggers. Only rank 0 has any."""
    shown = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        bases = {base.__name__ for base in type(logger).__mro__}
        shown += [show(logger) for name, show in DASHBOARDS.items() if name in bases]
    return shown


def _metrics(rows: Rows) -> dict[str, float]:
    """The rows of a flush under the names they are logged by."""
    return {
        metric_name(name, metric): value
        for name, row in rows.items()
        for metric, value in row.items()
    }


def _publish(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Let callbacks monitor metrics: as 0-d tensors on the Trainer's device, as Lightning's are."""
    values = torch.tensor(list(metrics.values()), device=trainer.strategy.root_device)
    trainer.callback_metrics.update(zip(metrics, values.unbind(), strict=True))
