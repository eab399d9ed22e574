"""A training's losses as they were logged, read back from files or from rows in memory."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lightning_alrc._spikes.places import record_files
from lightning_alrc._spikes.record import Spike
from lightning_alrc._spikes.recording import FILE
from lightning_alrc._telemetry.charts import CHARTS
from lightning_alrc._telemetry.wandb_run import SPIKES, STEP

__all__ = ["RECORD", "Clip", "LoggedLoss", "Source", "read"]

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Spike]
"""A path, or rows or spikes in memory; :func:`read` has the details."""

RECORD = FILE

KEY = re.compile(r"(?:.*-)?alrc/(?:([^/]+)/)?(\w+)")
"""Of a metric: a logger's prefix, the name of the loss, and what it is of the loss."""

METRICS = {metric for chart in CHARTS for metric in chart.metrics}

ALLOWED = (
    "a CSVLogger's metrics.csv or its folder, a W&B run's folder with its run-<id>.wandb, a record "
    f"of clips ({RECORD}), rows in memory (mappings with a 'step' and metrics such as "
    "'alrc/loss'), or a callback's spikes"
)


class Clip(NamedTuple):
    """One loss that was clipped, and the threshold that it was clipped to."""

    step: float
    loss: float
    threshold: float


@dataclass
class LoggedLoss:
    """What was logged of one loss.

    Attributes:
        rows: by training step, what was logged there, as in ``{"loss": 2.5, "threshold": 4.0}``.
        clips: losses that were clipped, where there is a record of them.
    """

    rows: dict[float, dict[str, float]] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """The metric wherever it is known and finite: steps in order, and values; both [rows]."""
        values = {step: self.rows[step].get(metric, math.nan) for step in sorted(self.rows)}
        known = {step: value for step, value in values.items() if math.isfinite(value)}
        return list(known), list(known.values())


def read(*sources: Source) -> dict[str, LoggedLoss]:
    """Read what was logged of one training, in one or several places.

    Args:
        sources: each the path of a CSVLogger's ``metrics.csv`` or of its folder, of a W&B run's
            folder, or of a record of clips; or rows in memory, each a mapping with the training
            ``"step"`` (or W&B's ``"trainer/global_step"``) and metrics; or
            :attr:`ALRCCallback.spikes`. Where several have the same metric of the same step, the
            last is right: a training that was resumed went on from there. A record of clips in a
            folder, or in its ``checkpoints``, is found without being named, and so is the table of
            them in a W&B run.

    Returns:
        By the name of each loss; the one that training_step returns is named ``"loss"``.

    Raises:
        TypeError: if a source is no path, rows or spikes.
        FileNotFoundError: if a path does not exist.
        ValueError: if a source is of another form, or has nothing of ALRC's.
        ImportError: if wandb is not installed, and a W&B run is to be read.
    """
    losses: dict[str, LoggedLoss] = {}
    records: set[Path] = set()
    for source in sources:
        record = None
        if isinstance(source, (str, os.PathLike)):
            where = str(source)
            log, record = _files_of(Path(source))
            rows = iter(()) if log is None else _rows_of(log)
        else:
            where = f"rows in memory, of type {type(source).__name__},"
            rows = _in_memory(source)
        if record is not None and record.resolve() not in records:
            records.add(record.resolve())
            for name, clip in _clips(record):
                losses.setdefault(name, LoggedLoss()).clips.append(clip)
        found = record is not None
        for row in rows:
            found |= _enter(row, losses, where)
        if not found:
            raise ValueError(
                f"source must have ALRC's metrics ('alrc/loss' and so on), got {where} without: "
                "was the training run with ALRCCallback or ALRCMixin, and long enough to log?"
            )
    for loss in losses.values():
        loss.clips = list(dict.fromkeys(loss.clips))  # a table and a record have the same
    return losses


def _files_of(path: Path) -> tuple[Path | None, Path | None]:
    """The log that a path stands for and the record beside it; either may be missing.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"source {str(path)!r} does not exist; it must be {ALLOWED}")
    if path.suffix == ".jsonl":
        return None, path
    if path.name == "files" and any(path.parent.glob("run-*.wandb")):
        path = path.parent  # what wandb gives as a run's ``dir``
    if path.is_dir():
        folder, logs = path, [path / "metrics.csv", *sorted(path.glob("run-*.wandb"))]
    else:
        folder, logs = path.parent, [path] if path.suffix in (".csv", ".wandb") else []
    log = next(filter(Path.is_file, logs), None)
    # Of several runs in one folder the log is the last one's.
    record = next(reversed(record_files(folder)), None)
    if log is None and (record is None or path.is_file()):
        raise ValueError(f"source must be {ALLOWED}; got {str(path)!r}")
    return log, record


def _rows_of(path: Path) -> Iterator[Mapping[str, Any] | Spike]:
    return _rows_of_wandb(path) if path.suffix == ".wandb" else _rows_of_csv(path)


def _rows_of_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of Lightning's CSVLogger, without their empty cells.

    What a full disk or a training that still goes on left half-written is passed over.

    Raises:
        ValueError: if it is no CSV file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        whole = (line for line in file if line.endswith("\n"))
        try:
            for row in csv.DictReader(whole):
                if None not in row and None not in row.values():
                    yield {key: value for key, value in row.items() if value}
        except csv.Error as error:
            raise ValueError(f"source {str(path)!r} cannot be read as CSV: {error}") from error


def _rows_of_wandb(path: Path) -> Iterator[Mapping[str, Any] | Spike]:
    """Rows of Lightning's WandbLogger, by wandb's own reader; a run may still be going.

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if its reader fails.
    """
    # Where it is not installed, the folder that its runs are in can pass for the package.
    package = find_spec("wandb")
    if package is None or package.origin is None:
        raise ImportError(f"{path} is read by wandb: pip install 'lightning-alrc[wandb]'")
    reader = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        capture_output=True,
        encoding="utf-8",
    )
    if reader.returncode != 0:
        raise ValueError(
            f"source {str(path)!r} cannot be read by `wandb leet inspect`, which comes with wandb "
            f"0.29 and later: {reader.stderr.strip() or reader.stdout.strip()}"
        )
    for line in reader.stdout.splitlines():
        row = json.loads(line).get("history", {}).get("item", {})
        if STEP in row:
            yield row | {"step": row[STEP]}
        else:
            yield row
        if f"{SPIKES}.path" in row:
            yield from _spikes_of_wandb(path.parent / "files" / row[f"{SPIKES}.path"])


def _spikes_of_wandb(path: Path) -> Iterator[Spike]:
    """The rows of the table that a W&B run ends with, if it is still there."""
    if not path.exists():
        return
    table = json.loads(path.read_text(encoding="utf-8"))
    for row in table["data"]:
        values = dict(zip(table["columns"], row, strict=True))
        yield Spike(**{name: values[name] for name in Spike._fields if name in values})


def _in_memory(rows: Any) -> Iterator[Mapping[str, Any] | Spike]:
    """Rows or spikes, if they are any.

    Raises:
        TypeError: if not.
    """
    if not isinstance(rows, Iterable):
        raise TypeError(f"source must be {ALLOWED}; got {rows!r:.100}")
    for row in rows:
        if not isinstance(row, (Mapping, Spike)):
            raise TypeError(f"source must be {ALLOWED}; got a row {row!r:.100}")
        yield row


def _enter(row: Mapping[str, Any] | Spike, losses: dict[str, LoggedLoss], where: str) -> bool:
    """Enter a spike, or a row's metrics of ALRC; whether it has any.

    Raises:
        ValueError: if one is no number, or there is no step.
    """
    if isinstance(row, Spike):
        clip = Clip(row.step, row.loss, row.threshold)
        losses.setdefault(row.name, LoggedLoss()).clips.append(clip)
        return True
    found = False
    for key, value in row.items():
        matched = KEY.fullmatch(str(key))
        if matched is None or matched[2] not in METRICS or value is None:
            continue
        name, metric = matched[1] or "loss", matched[2]
        step = _number(row.get("step", row.get(STEP)), f"the step of {key}", where)
        number = _number(value, f"{key} at step {step:g}", where)
        at_step = losses.setdefault(name, LoggedLoss()).rows.setdefault(step, {})
        if not math.isnan(number):  # what pandas has where nothing was logged
            at_step[metric] = number
        found = True
    return found


def _clips(path: Path) -> Iterator[tuple[str, Clip]]:
    """Each clip of a record and the name of its loss.

    Raises:
        ValueError: if a line is something else.
    """
    with path.open(encoding="utf-8") as file:
        for count, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                clip = Clip(*(_number(entry[key], key, str(path)) for key in Clip._fields))
                yield entry["name"], clip
            except (ValueError, KeyError, TypeError):
                if not line.endswith("\n"):
                    return  # a training that still goes on has not finished the line
                raise ValueError(
                    f"line {count} of {path} must be a JSON object with name, step, loss and "
                    f"threshold, got {line.strip()!r:.100}"
                ) from None


def _number(value: Any, what: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be a number, got {value!r:.100} in {where}") from None
