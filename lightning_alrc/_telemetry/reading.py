"""Reads back what a training has logged, as columns, from files or from rows in memory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_alrc._spikes.places import record_files
from lightning_alrc._spikes.record import Spike
from lightning_alrc._spikes.record_file import FILE
from lightning_alrc._telemetry.chart_definitions import CHARTS
from lightning_alrc._telemetry.reading_csv import read_csv
from lightning_alrc._telemetry.reading_wandb import rows_of_wandb
from lightning_alrc._telemetry.wandb_dashboard import STEP

__all__ = ["RECORD", "Clip", "LoggedLoss", "Source", "read"]

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Spike]
"""A path, or rows or spikes in memory; :func:`read` has the details."""

RECORD = FILE
"""The usual name of a record of clips."""

KEY = re.compile(r"(?:.*?-)??alrc/(?:([^/]+)/)?(\w+)")
"""The key of a metric in a log. The logger's prefix and the name of the loss may be missing. The
shortest prefix is matched, because the name of a loss may end in ``-alrc``."""

STEPS = ("step", STEP)
"""Names of the step: in a CSV log, and in a W&B run."""

METRICS = {metric for chart in CHARTS for metric in chart.metrics}

ALLOWED = (
    "a CSVLogger's metrics.csv or its folder, a W&B run's folder with its run-<id>.wandb, a record "
    f"of clips ({RECORD}), rows in memory (mappings with a 'step' and metrics such as "
    "'alrc/loss'), or a callback's spikes"
)

Column = NDArray[np.float64]
Rows = tuple[Column, dict[str, Column]]
"""The rows of one loss in one source: the step of each row, and for each metric the value in each
row; all are [rows]. Missing values are NaN."""


class Clip(NamedTuple):
    """One loss that was clipped, and the threshold that it was clipped to."""

    step: float
    loss: float
    threshold: float


@dataclass(eq=False)
class LoggedLoss:
    """What was logged of one loss.

    Attributes:
        steps: the training step of each row, in order, [rows]. Rows of the same step stay in the
            order in which they were logged.
        columns: for each metric, for example ``"threshold"``, the value in each row, [rows].
            Missing values are NaN.
        clips: losses that were clipped, if there is a record of them.
    """

    steps: Column = field(default_factory=lambda: np.empty(0))
    columns: dict[str, Column] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)

    def series(self, metric: str) -> tuple[Column, Column]:
        """The steps of a metric's finite values, and these values; both are [values]."""
        if metric not in self.columns:
            return np.empty(0), np.empty(0)
        known = np.isfinite(self.columns[metric])
        return self.steps[known], self.columns[metric][known]


def read(*sources: Source) -> dict[str, LoggedLoss]:
    """Read what was logged of one training, in one or several places.

    A log is read together with the newest record of clips beside it, and a W&B run together with
    its table of clips. Two rows with the same step in one source are both kept. If two sources have
    the same metric at the same step, the value of the source given later is used, because that
    source may be of a resumed training.

    Args:
        sources: each of them is one of

            - the path of a CSVLogger's ``metrics.csv`` or its folder, of a W&B run's folder, or of
              a record of clips;
            - rows in memory: mappings with metrics and the training ``"step"``, or W&B's
              ``"trainer/global_step"``;
            - :attr:`ALRCCallback.spikes`.

    Returns:
        The losses by name. The loss that training_step returns is named ``"loss"``.

    Raises:
        TypeError: if a source is not a path, rows or spikes.
        FileNotFoundError: if a path does not exist.
        ValueError: if a source has another form, or no metrics or clips of ALRC.
        ImportError: if a source is a W&B run, and wandb is not installed.
    """
    rows: dict[str, list[Rows]] = {}
    clips: dict[str, list[Clip]] = {}
    records: set[Path] = set()
    for source in sources:
        record, in_memory = None, None
        if isinstance(source, (str, os.PathLike)):
            where = str(source)
            log, record = _files_of(Path(source))
            found = _Found({}, []) if log is None else _logged(log)
        else:
            where = f"rows in memory, of type {type(source).__name__},"
            in_memory = list(_checked(source))
            found = _in_memory(in_memory, where)
        if record is not None and record.resolve() not in records:
            records.add(record.resolve())
            found.clips.extend(_clips(record))
        # A training without a clip has an empty record, and an empty list of spikes.
        if record is None and in_memory != [] and not (found.rows or found.clips):
            raise ValueError(
                f"source must have ALRC's metrics ('alrc/loss' and so on), got {where} without: "
                "was the training run with ALRCCallback or ALRCMixin, and long enough to log?"
            )
        for name, found_rows in found.rows.items():
            rows.setdefault(name, []).append(found_rows)
        for name, clip in found.clips:
            clips.setdefault(name, []).append(clip)
    losses = {name: _joined(parts) for name, parts in rows.items()}
    for name, known in clips.items():
        loss = losses.setdefault(name, LoggedLoss())
        loss.clips = list(dict.fromkeys(known))  # a table and a record have the same clips
    return losses


class _Found(NamedTuple):
    """The rows and clips in one source."""

    rows: dict[str, Rows]
    clips: list[tuple[str, Clip]]


# ---- files


def _files_of(path: Path) -> tuple[Path | None, Path | None]:
    """The log at a path, and the record beside the log. Either may be missing.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if there is neither, or if the path is a file of another kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"source {str(path)!r} does not exist; it must be {ALLOWED}")
    if path.suffix == ".jsonl":
        return None, path
    if path.name == "files" and any(path.parent.glob("run-*.wandb")):
        path = path.parent  # wandb's ``run.dir`` is the subfolder "files"
    if path.is_dir():
        folder, logs = path, [path / "metrics.csv", *sorted(path.glob("run-*.wandb"))]
    else:
        folder, logs = path.parent, [path] if path.suffix in (".csv", ".wandb") else []
    log = next(filter(Path.is_file, logs), None)
    record = next(reversed(record_files(folder)), None)
    if log is None and (record is None or path.is_file()):
        raise ValueError(f"source must be {ALLOWED}; got {str(path)!r}")
    return log, record


def _clips(path: Path) -> Iterator[tuple[str, Clip]]:
    """Each clip of a record, with the name of its loss.

    Raises:
        ValueError: if a line is not a clip.
    """
    with path.open(encoding="utf-8") as file:
        for count, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                clip = Clip(*(_number(entry[key], key, str(path)) for key in Clip._fields))
                yield entry["name"], clip
            except (ValueError, KeyError, TypeError):
                if not line.endswith("\n"):
                    return  # the file is a copy whose end is missing
                raise ValueError(
                    f"line {count} of {path} must be a JSON object with name, step, loss and "
                    f"threshold, got {line.strip()!r:.100}"
                ) from None


# ---- rows


@cache
def _metric(key: str) -> tuple[str, str] | None:
    """The names of the loss and the metric in a key; ``None`` if it is not of a metric of ALRC."""
    matched = KEY.fullmatch(key)
    if matched is None or matched[2] not in METRICS:
        return None
    return matched[1] or "loss", matched[2]


def _logged(path: Path) -> _Found:
    """The rows and clips in a logger's file."""
    if path.suffix == ".csv":
        return _Found(_rows_of_csv(path), [])
    rows, table = rows_of_wandb(path)
    found = _in_memory(rows, str(path))
    clips = [(row["name"], Clip(*(row[key] for key in Clip._fields))) for row in table]
    return _Found(found.rows, clips)


def _rows_of_csv(path: Path) -> dict[str, Rows]:
    """The rows of each loss in a CSVLogger's file.

    Raises:
        ValueError: if the file is not CSV, a cell is not a number, or a row has no step.
    """
    columns = read_csv(path, lambda key: key in STEPS or _metric(key) is not None)
    found: dict[str, dict[str, Column]] = {}
    for key, column in columns.items():
        metric = _metric(key)
        if metric is not None:
            found.setdefault(metric[0], {})[metric[1]] = column
    steps = next((columns[key] for key in STEPS if key in columns), None)
    rows = {name: _rows_with_values(steps, of_loss, str(path)) for name, of_loss in found.items()}
    return {name: of_loss for name, of_loss in rows.items() if len(of_loss[0])}


def _rows_with_values(steps: Column | None, columns: dict[str, Column], where: str) -> Rows:
    """The rows that have at least one value.

    Raises:
        ValueError: if one of these rows has no step.
    """
    known = np.logical_or.reduce([~np.isnan(column) for column in columns.values()])
    at = np.full(len(known), math.nan)[known] if steps is None else steps[known]
    if np.isnan(at).any():
        raise ValueError(f"the step of a row must be a number, got none in {where}")
    return at, {metric: column[known] for metric, column in columns.items()}


def _in_memory(rows: Iterable[Mapping[str, Any] | Spike], where: str) -> _Found:
    """Make a table of rows for each loss, and a clip of each spike.

    Raises:
        ValueError: if a value is not a number, or a row has no step.
    """
    tables: dict[str, _Table] = {}
    clips = []
    for row in rows:
        if isinstance(row, Spike):
            clips.append((row.name, Clip(row.step, row.loss, row.threshold)))
            continue
        step = math.nan
        entered: set[str] = set()
        for key, value in row.items():
            metric = _metric(key) if isinstance(key, str) else None
            if metric is None or value is None:
                continue
            name, what = metric
            if not entered:
                at = next((row[each] for each in STEPS if each in row), None)
                step = _number(at, f"the step of {key}", where)
            if name not in entered:
                entered.add(name)
                tables.setdefault(name, _Table()).steps.append(step)
            tables[name].enter(what, _number(value, f"{key} at step {step:g}", where))
    return _Found({name: table.rows(where) for name, table in tables.items()}, clips)


class _Table:
    """The rows of one loss, in the order in which they are found."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.columns: dict[str, list[float]] = {}

    def enter(self, metric: str, value: float) -> None:
        """Enter a value into the last row."""
        column = self.columns.setdefault(metric, [])
        column.extend([math.nan] * (len(self.steps) - 1 - len(column)))
        column.append(value)

    def rows(self, where: str) -> Rows:
        for column in self.columns.values():
            column.extend([math.nan] * (len(self.steps) - len(column)))
        columns = {metric: np.array(column) for metric, column in self.columns.items()}
        return _rows_with_values(np.array(self.steps), columns, where)


def _checked(rows: Any) -> Iterator[Mapping[str, Any] | Spike]:
    """The same rows or spikes.

    Raises:
        TypeError: if they are something else.
    """
    if not isinstance(rows, Iterable):
        raise TypeError(f"source must be {ALLOWED}; got {rows!r:.100}")
    for row in rows:
        if not isinstance(row, (Mapping, Spike)):
            raise TypeError(f"source must be {ALLOWED}; got a row {row!r:.100}")
        yield row


def _joined(parts: list[Rows]) -> LoggedLoss:
    """Join the rows of one loss in several sources.

    If two sources have a metric at the same step, the value of the source given earlier becomes
    NaN.
    """
    for index, (steps, columns) in enumerate(parts):
        for later_steps, later in parts[index + 1 :]:
            for metric in columns.keys() & later.keys():
                replaced = np.isin(steps, later_steps[~np.isnan(later[metric])])
                columns[metric][replaced] = math.nan
    steps = np.concatenate([steps for steps, _ in parts])
    order = np.argsort(steps, kind="stable")
    metrics = dict.fromkeys(metric for _, columns in parts for metric in columns)
    columns = {
        metric: np.concatenate(
            [columns.get(metric, np.full(len(steps), math.nan)) for steps, columns in parts]
        )[order]
        for metric in metrics
    }
    return LoggedLoss(steps[order], columns)


def _number(value: Any, what: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be a number, got {value!r:.100} in {where}") from None
