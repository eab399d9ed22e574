"""``Telemetry``: gives a fit's rows to loggers and callbacks, and a fit's events to the user.

Whenever Lightning logs, one row is taken for each loss. ``ALRC.take_row`` in ``alrc.py`` makes the
row, with means over the losses since the last row. A row goes to

- ``trainer.callback_metrics``, for callbacks that monitor a metric;
- all loggers;
- the watcher, which finds events for the console, dashboards and alerts;
- the charts, which dashboards show as a figure.

No loss has two rows at one step. A row is taken only if its step is later than the step of the last
row. Otherwise the losses go into the next row. If a fit resumes another fit, its first row must
have a later step than the other fit's last row. At the end of a fit, losses that are in no row yet
get a row, at least one step after the last row.
"""

from __future__ import annotations

import math
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
from lightning_alrc._telemetry.watcher import (
    CLIP_AFTER_CALM,
    DATA_EVENT,
    DIVERGENCE_EVENT,
    MANY_CLIPS,
    Event,
    Watcher,
    event_of_spike,
)
from lightning_alrc._trainer.lightning import metrics_of_callbacks
from lightning_alrc._trainer.named_losses import metric_name
from lightning_alrc._trainer.namespaces import rank_zero_info, rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["Telemetry", "checked_last_row_step"]

FIRST_SHOWN_AFTER = 300.0
"""Seconds from the start of a fit until the charts and the table of spikes are first shown.

They are shown again whenever the fit has lasted twice as long as when they were last shown, and at
the end of the fit. Drawing the charts takes about half a second for each loss."""

SHORTEST_FIT_WITH_CHARTS = 60.0
"""A fit that has lasted fewer seconds gets no charts: drawing them would take too much of its
time."""

STEPS_BEFORE_WARNING = 1000
"""The console and the dashboards warn of :data:`MANY_CLIPS` once it has lasted this many steps. An
alert of it is sent without this delay."""

Rows = Mapping[str, Mapping[str, float]]
"""What :meth:`~lightning_alrc.ALRC.take_row` returns, by name of the loss."""

VALUES_BEFORE_THE_FIRST = {
    "loss": math.nan,
    "loss_clipped": math.nan,
    "scale": math.nan,
    "clipped_fraction": math.nan,
    "mu1": math.nan,
    "stddev": math.nan,
    "threshold": math.inf,
    "spike_score": math.nan,
    "spike_score_total": math.nan,
}
"""What callbacks find for these metrics before the first row that has them.

If EarlyStopping, for example, found nothing, it would raise an error and so end the fit. All other
metrics are in each row."""

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
    """Takes the rows of a Trainer's fits and distributes them.

    A failure does not stop the training. Each kind of failure gives one warning a fit.

    Args:
        alerts: turns events into alerts; ``None`` sends no alerts.
        render: returns a spike's picture; ``None`` for no pictures.
        draws: whether dashboards get charts.
        settings: settings of the callback.
    """

    def __init__(
        self,
        alerts: Alerts | None,
        render: Callable[[Spike], Any] | None,
        draws: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.last_row_step: int | None = None
        """step of the last row; before this fit's first row, that of the fit that it resumes"""
        self._alerts = alerts
        self._renderer = None if render is None else Renderer(render)
        self._drawing = Drawing(draws)
        self._settings = settings
        self._is_running = self._has_unread_row = False
        self._row_read_after: int | None = None
        """``total_batch_idx`` of the batch after which callbacks first read a row; of the newest
        such row"""
        self._watcher = Watcher()
        self._chart_rows = ChartRows()
        self._described: set[str] = set()
        self._shown_events: set[tuple[str, str]] = set()
        """losses and kinds of events that the console has shown"""
        self._clip_after_calm_steps: dict[str, range] = {}
        """by loss, the steps covered by the latest row that had a :data:`CLIP_AFTER_CALM`"""
        self._handled_places: set[tuple[Any, ...]] = set()
        """places of the spikes that were judged before this fit, or that
        :meth:`_report_judged_spikes` has seen: they are not reported again"""
        self._warned_of: set[str] = set()
        self._shown_spikes: list[Spike] = []
        """the spikes in the table that was shown last"""
        self._started_at = self._shows_at = 0.0

    def start(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        step: int,
        spikes: Iterable[Spike] = (),
        is_resumed: bool = False,
    ) -> None:
        """Start a fit.

        Args:
            trainer: the Trainer of the fit.
            losses: the ALRC of each loss, by name.
            step: the step at which the fit starts, as loggers count.
            spikes: the spikes in the record.
            is_resumed: whether ``last_row_step`` is from the checkpoint that the fit resumes.
        """
        self._handled_places = {spike.place for spike in spikes if spike.kind is not None}
        self._is_running, self._has_unread_row, self._row_read_after = True, False, None
        is_new = step == 0 and not is_resumed
        if is_new or (self.last_row_step is not None and self.last_row_step > step):
            self.last_row_step = None  # a new training, or a return to an older checkpoint
        self._watcher = self._new_watcher(losses, step)
        self._chart_rows = ChartRows()
        self._described, self._shown_events, self._warned_of = set(), set(), set()
        self._clip_after_calm_steps, self._shown_spikes = {}, []
        if self._renderer is not None:
            self._renderer.has_warned = False
        dashboards = dashboards_of(trainer)
        self._describe(dashboards, losses)
        self._started_at = monotonic()
        self._shows_at = self._started_at + FIRST_SHOWN_AFTER
        has_run = any(isinstance(dashboard, WandbRun) for dashboard in dashboards)
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
        """Take a row for each loss, and distribute the rows. Show charts and spikes if it is time.

        Reads the device. Every rank must call this method, whether or not the Trainer has loggers.

        Args:
            trainer: the Trainer of the fit.
            losses: the ALRC of each loss, by name.
            step: the step of the rows, as loggers count.
            spikes: the worst clips.
        """
        if not (losses and self.may_take_row(step)):
            return
        dashboards = dashboards_of(trainer)
        rows = {name: alrc.take_row() for name, alrc in losses.items()}
        self._distribute_rows(trainer, dashboards, losses, rows, step, trainer.current_epoch)
        self._report_judged_spikes(dashboards, spikes, losses, step)
        now = monotonic()
        if now >= self._shows_at:
            self._shows_at = now + max(now - self._started_at, FIRST_SHOWN_AFTER)
            self._show_spikes_and_charts(dashboards, spikes, step)

    def may_take_row(self, step: int) -> bool:
        """Whether a row may be taken at a step: the step must be later than the last row's."""
        return self.last_row_step is None or step > self.last_row_step

    def publish_early(self, trainer: Any, losses: Mapping[str, ALRC]) -> None:
        """Let callbacks monitor the losses since the last row.

        Called before metrics are read: before a validation, when an epoch ends, and before a
        plateau scheduler with interval ``"step"``. If metrics are read more often than rows are
        logged, their readers would otherwise find an old value, or none. EarlyStopping would then
        stop a fit whose loss still falls.

        If callbacks have not read the last logged row before this batch, nothing is published: they
        find that row. In all other cases, this method reads the device. Every rank must call this
        method.
        """
        batch = trainer.fit_loop.total_batch_idx
        if self._has_unread_row:
            self._has_unread_row, self._row_read_after = False, batch
        # There is nothing to publish in two cases: callbacks read a new row now, or the epoch ends,
        # and the validation after its last batch has read the row already.
        if self._row_read_after == batch:
            return
        rows = {}
        for name, alrc in losses.items():
            settings: dict[str, Any] = dict(alrc.settings)
            # If the loss's own ALRC made this row, its next row would lack these losses, and
            # loggers would never get them.
            copy = ALRC(**settings)
            copy.set_extra_state(alrc.get_extra_state())
            rows[name] = copy.take_row()
        _publish(trainer, rows)

    def finish(
        self,
        trainer: Any,
        losses: Mapping[str, ALRC],
        spikes: list[Spike],
        files: Callable[[], Mapping[str, Path]],
        last_step: int,
        step: int,
    ) -> None:
        """End a fit, even a failed one.

        Logs a row of the losses since the last row, shows charts and spikes, and keeps files.

        Args:
            trainer: the Trainer of the fit.
            losses: the ALRC of each loss, by name.
            spikes: the worst clips.
            files: returns the files of the spikes. The key of a file is the path to store it under.
            last_step: the last step that had losses, as loggers count.
            step: the step at which the fit ends.
        """
        if not self._is_running:
            return
        self._is_running = False
        dashboards = dashboards_of(trainer)
        rows: dict[str, dict[str, float]] = {}
        with suppress(RuntimeError):  # a lost device has ended the fit, and raises again here
            for name, alrc in losses.items():
                # After an exception, other ranks may never answer a pending all-reduce.
                if alrc.is_flushed and alrc.has_row():
                    rows[name] = alrc.take_row()
            if rows:
                if self.last_row_step is not None:
                    last_step = max(last_step, self.last_row_step + 1)
                # Once an epoch has ended, current_epoch is the number of the next epoch.
                epoch = trainer.fit_loop.epoch_progress.current.ready - 1
                self._distribute_rows(trainer, dashboards, losses, rows, last_step, epoch)
            self._report_judged_spikes(dashboards, spikes, losses, step)
        self._show_spikes_and_charts(dashboards, spikes, step)
        if spikes:
            self._call_each(dashboards, "keep_files", files)

    def _distribute_rows(
        self,
        trainer: Any,
        dashboards: list[Dashboard],
        losses: Mapping[str, ALRC],
        rows: Rows,
        step: int,
        epoch: int,
    ) -> None:
        before, self.last_row_step, self._has_unread_row = self.last_row_step, step, True
        if not losses.keys() <= self._described:
            self._describe(dashboards, losses)
        self._log_metrics(trainer, _metrics(rows) | {"epoch": epoch}, step)
        _publish(trainer, rows)
        for event in self._watcher.events(step, rows, losses):
            self._report_event(dashboards, event, step)
            if event.kind == CLIP_AFTER_CALM:
                self._clip_after_calm_steps[event.loss] = range(
                    0 if before is None else before + 1, step + 1
                )
        if any(self._drawing.can_draw_for(dashboard) for dashboard in dashboards):
            self._chart_rows.enter(step, rows)

    def _report_event(self, dashboards: list[Dashboard], event: Event, step: int) -> None:
        """Tell the user of an event, by an alert, the console or the dashboards.

        Events of all kinds may be sent as alerts. The console shows, for each loss, only the
        first :data:`DATA_EVENT`, the first :data:`DIVERGENCE_EVENT`, and the first
        :data:`MANY_CLIPS` that has lasted :data:`STEPS_BEFORE_WARNING` steps. The dashboards show
        the same events except :data:`DATA_EVENT`.
        """
        lasts = event.kind == MANY_CLIPS and event.lasted >= STEPS_BEFORE_WARNING
        key = event.loss, event.kind
        is_shown = lasts or event.kind in (DATA_EVENT, DIVERGENCE_EVENT)
        if is_shown and key not in self._shown_events:
            self._shown_events.add(key)
            message = f"ALRC: {event.kind}. Loss {event.loss!r}: {event.text}"
            if event.kind == DATA_EVENT:
                rank_zero_info(message)
            else:
                rank_zero_warn(message)
                what = metric_name(event.loss, "warning" if lasts else "divergence")
                self._call_each(dashboards, "show_message", what, message, step)
        clip_after_calm_steps = self._clip_after_calm_steps.get(event.loss, ())
        if event.kind == DATA_EVENT and event.spike_step not in clip_after_calm_steps:
            return  # an alert is sent only if the spike ended a long calm
        alert = None if self._alerts is None else self._alerts.due(event, monotonic())
        if alert is not None:
            self._call_each(dashboards, "alert", alert)

    def _report_judged_spikes(
        self,
        dashboards: list[Dashboard],
        spikes: list[Spike],
        losses: Mapping[str, ALRC],
        step: int,
    ) -> None:
        """Report the spikes that have been judged since the last call.

        At most one event is reported for each loss and kind: the first.
        """
        reported: set[tuple[str, str]] = set()
        new = [each for each in spikes if each.kind and each.place not in self._handled_places]
        for spike in sorted(new, key=lambda each: each.step):
            self._handled_places.add(spike.place)
            # After an exception, other ranks may never answer a pending all-reduce.
            if spike.name in losses and losses[spike.name].is_flushed:
                event = event_of_spike(spike, spikes, losses[spike.name])
                if event is not None and (event.loss, event.kind) not in reported:
                    reported.add((event.loss, event.kind))
                    self._report_event(dashboards, event, step)

    def _describe(self, dashboards: list[Dashboard], losses: Mapping[str, ALRC]) -> None:
        new = [name for name in losses if name not in self._described]
        self._call_each(dashboards, "describe", losses, new, self._settings)
        self._described |= set(new)

    def _log_metrics(self, trainer: Any, metrics: Mapping[str, float], step: int) -> None:
        for logger in trainer.loggers:
            try:
                logger.log_metrics(metrics=metrics, step=step)
            except Exception as error:  # for example a full disk, which must not end the training
                kind = type(logger).__name__
                self._warn_once(f"{kind} row", f"{kind} lost a row of ALRC's: {error!r}")

    def _show_spikes_and_charts(
        self, dashboards: list[Dashboard], spikes: list[Spike], step: int
    ) -> None:
        if spikes and spikes != self._shown_spikes:
            self._shown_spikes = list(spikes)
            self._call_each(dashboards, "show_spikes", spikes, self._renderer, step)
        if monotonic() - self._started_at >= SHORTEST_FIT_WITH_CHARTS:
            self._draw(dashboards, spikes, step)

    def _draw(self, dashboards: list[Dashboard], spikes: list[Spike], step: int) -> None:
        rows, count = self._chart_rows.rows(), len(self._chart_rows.names)
        if not rows:
            return
        try:
            for figure, group in self._drawing.figures(dashboards, rows, spikes, count):
                self._call_each(group, "draw", figure, step)
        except Exception as error:
            self._warn_once("draw", f"ALRC's charts could not be drawn: {error!r}")

    def _call_each(self, dashboards: list[Dashboard], method: str, *args: Any) -> None:
        for dashboard in dashboards:
            try:
                getattr(dashboard, method)(*args)
            except Exception as error:  # a failed dashboard is no reason to stop the training
                kind = type(dashboard.logger).__name__
                message = f"ALRC could not {method.replace('_', ' ')} on the {kind}: {error!r}"
                self._warn_once(f"{kind} {method}", message)

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned_of:
            rank_zero_warn(message)
        self._warned_of.add(what)


def checked_last_row_step(step: Any) -> int | None:
    """The step of the last row, from a checkpoint.

    Raises:
        ValueError: if it is invalid.
    """
    if step is not None and (type(step) is not int or step < 0):
        raise ValueError(
            "ALRCCallback state 'last_row' must be a whole number, 0 or above, or None, got "
            f"{step!r:.100}"
        )
    return step


def dashboards_of(trainer: Any) -> list[Dashboard]:
    """The dashboards of a Trainer's loggers. Only rank 0 has any."""
    found = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        bases = {base.__name__ for base in type(logger).__mro__}
        found += [dashboard(logger) for name, dashboard in DASHBOARDS.items() if name in bases]
    return found


def _metrics(rows: Rows) -> dict[str, float]:
    """The values of all losses' rows at one step, under the names that are logged."""
    return {
        metric_name(name, metric): value
        for name, row in rows.items()
        for metric, value in row.items()
    }


def _publish(trainer: Any, rows: Rows) -> None:
    """Let callbacks monitor rows.

    The values are 0-d tensors on the Trainer's device, as Lightning's own metrics are.
    """
    initial = _metrics(dict.fromkeys(rows, VALUES_BEFORE_THE_FIRST))
    known = metrics_of_callbacks(trainer)
    metrics = {name: value for name, value in initial.items() if name not in known} | _metrics(rows)
    values = torch.tensor(list(metrics.values()), device=trainer.strategy.root_device)
    known.update(zip(metrics, values.unbind(), strict=True))
