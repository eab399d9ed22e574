"""Reads the numbers that a run has logged, with or without ALRC."""

from __future__ import annotations

import math
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_alrc._telemetry.reading_csv import read_csv
from lightning_alrc._telemetry.reading_wandb import rows_of_wandb

__all__ = ["Logged", "read_run"]

STEPS = ("step", "trainer/global_step", "global_step", "iteration", "_step")
"""Names of the step. The first that is found is used. In a CSV file, their case may be another."""

ALLOWED = (
    "a CSV file, a CSVLogger's folder, a folder with TensorBoard's event files, a W&B run's folder "
    "with its run-<id>.wandb, or MLflow's database file or mlruns folder"
)

Column = NDArray[np.float64]
Wanted = Callable[[str], bool]


class Logged(NamedTuple):
    """The values logged under one name, and their steps; both are [values].

    They are in the order of the log. Values that are NaN are left out.
    """

    steps: Column
    values: Column


def read_run(path: Path, wanted: Wanted, run: str | None = None) -> dict[str, Logged]:
    """Read what a run has logged.

    Args:
        path: path of one of :data:`ALLOWED`. In a folder with logs of several kinds, the first of
            these kinds is read.
        wanted: returns whether the values of a given name are to be read. Called for all names.
        run: id of the run, if MLflow has several.

    Returns:
        The values by name. Names without values are left out.

    Raises:
        FileNotFoundError: if the path does not exist.
        ImportError: if the package that reads the log is not installed.
        ValueError: if the path is something else or cannot be read, or if MLflow has several runs
            and ``run`` is not the id of one.
    """
    if not path.exists():
        raise FileNotFoundError(f"source {str(path)!r} does not exist; it must be {ALLOWED}")
    found = _read(path, wanted, run)
    known = {name: _without_nan(*logged) for name, logged in found.items()}
    return {name: logged for name, logged in known.items() if len(logged.values)}


def _read(path: Path, wanted: Wanted, run: str | None) -> dict[str, Logged]:
    if path.name == "files" and any(path.parent.glob("run-*.wandb")):
        path = path.parent  # wandb's ``run.dir`` is the subfolder "files"
    is_folder = path.is_dir()
    within = sorted(path.iterdir()) if is_folder else [path]

    def first(*patterns: str) -> Path | None:
        return next((each for each in within if any(map(each.match, patterns))), None)

    if table := first("metrics.csv") if is_folder else first("*.csv", "*.csv.gz"):
        return _of_csv(table, wanted)
    if log := first("run-*.wandb"):
        return _of_wandb(log, wanted)
    if first("*tfevents*"):
        return _of_tensorboard(path, wanted)
    if database := next(filter(_is_mlflow_database, within), None):
        return _of_mlflow_database(database, wanted, run)
    if any(path.glob("meta.yaml")) or any(path.glob("*/meta.yaml")):
        return _of_mlflow_folder(path, wanted, run)
    runs = sorted(path.glob("version_*/metrics.csv"), key=lambda each: each.stat().st_mtime)
    hint = f", which has {str(runs[-1].parent)!r}" if runs else ""
    raise ValueError(f"source must be {ALLOWED}; got {str(path)!r}{hint}")


def _without_nan(steps: Column, values: Column) -> Logged:
    known = ~np.isnan(values)
    return Logged(steps[known], values[known])


def _of_csv(path: Path, wanted: Wanted) -> dict[str, Logged]:
    columns = read_csv(path, lambda name: wanted(name) or name.lower() in STEPS)
    in_lower_case = {name.lower(): column for name, column in columns.items()} | columns
    steps = next((in_lower_case[name] for name in STEPS if name in in_lower_case), None)
    found = {}
    for name, column in columns.items():
        if name.lower() in STEPS:
            continue
        at = np.arange(len(column), dtype=np.float64) if steps is None else steps
        if np.isnan(at[~np.isnan(column)]).any():
            raise ValueError(f"the step of a row must be a number, got none in {path}")
        found[name] = Logged(at, column)
    return found


def _of_wandb(path: Path, wanted: Wanted) -> dict[str, Logged]:
    rows, _ = rows_of_wandb(path)
    found: dict[str, list[tuple[float, float]]] = {}
    names = list(dict.fromkeys(name for row in rows for name in row))
    # wandb's reader gives each field of a media object, such as a histogram, a name of its own.
    media = tuple(name.removesuffix("_type") for name in names if name.endswith("._type"))
    names = [name for name in names if name not in STEPS and not name.startswith(media)]
    chosen = set(filter(wanted, names))
    for row in rows:
        step = next((row[name] for name in STEPS if name in row), None)
        for name in chosen & row.keys():
            try:  # wandb's reader gives NaN and infinity as strings
                pair = float(step), float(row[name])  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name} must be a number at each step, got {row[name]!r:.100} at step "
                    f"{step!r} in {path}"
                ) from None
            found.setdefault(name, []).append(pair)
    return {name: _of_pairs(pairs) for name, pairs in found.items()}


def _of_tensorboard(path: Path, wanted: Wanted) -> dict[str, Logged]:
    accumulators = _package(
        "tensorboard.backend.event_processing.event_accumulator", "tensorboard", path
    )
    # A size of 0 loads all values. By default, TensorBoard loads a sample of 10,000.
    events = accumulators.EventAccumulator(str(path), size_guidance={accumulators.SCALARS: 0})
    events.Reload()
    return {
        name: _of_pairs([(each.step, each.value) for each in events.Scalars(name)])
        for name in events.Tags()[accumulators.SCALARS]
        if wanted(name)
    }


def _of_mlflow_folder(path: Path, wanted: Wanted, run: str | None) -> dict[str, Logged]:
    # MLflow itself, for example release 3.17, refuses such a folder unless an environment variable
    # is set.
    if (path / "metrics").is_dir():  # the folder of a run
        folders = [path.resolve()]
    else:  # the folder of an experiment, which may also have models, or of all experiments
        pattern = "*/metrics" if (path / "meta.yaml").exists() else "*/*/metrics"
        folders = [each.parent for each in path.glob(pattern) if each.is_dir()]
    folders.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    runs = {each.name: each for each in folders if _is_run(each)}
    metrics_of_run = runs[_checked_run(run, list(runs), path)] / "metrics"
    files = [each for each in sorted(metrics_of_run.rglob("*")) if each.is_file()]
    names = {each.relative_to(metrics_of_run).as_posix(): each for each in files}
    return {name: _of_mlflow_file(file) for name, file in names.items() if wanted(name)}


def _is_run(folder: Path) -> bool:
    """Whether a folder has a run. MLflow keeps the folder of a run that was deleted."""
    about = folder / "meta.yaml"
    return about.is_file() and "lifecycle_stage: deleted\n" not in about.read_text(encoding="utf-8")


def _of_mlflow_file(path: Path) -> Logged:
    """The values of a metric. MLflow adds a line for each: time, value, step, and maybe more."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last line may be incomplete
    pairs = []
    for line in lines:
        try:
            _, value, *others = line.split()
            pairs.append((float(others[0]) if others else 0.0, float(value)))
        except ValueError:
            raise ValueError(
                f"source {str(path)!r} cannot be read: got the line {line!r:.100}, which must have "
                "a time, a value and a step"
            ) from None
    return _of_pairs(pairs)


def _of_mlflow_database(path: Path, wanted: Wanted, run: str | None) -> dict[str, Logged]:
    # MLflow itself would change the tables of a database of an earlier release when it opens it.
    # The earlier release then could not open the database any more.
    try:
        with closing(_opened(path)) as database:
            runs = database.execute(
                "select run_uuid from runs join experiments using (experiment_id) where "
                "runs.lifecycle_stage = 'active' and experiments.lifecycle_stage = 'active' "
                "order by start_time desc"
            )
            run = _checked_run(run, [each for (each,) in runs], path)
            names = database.execute("select distinct key from metrics where run_uuid = ?", (run,))
            history = (
                "select step, value, is_nan from metrics where run_uuid = ? and key = ? "
                "order by timestamp, step, value"  # MLflow's own order
            )
            return {
                name: _of_pairs(
                    [
                        (step, math.nan if is_nan else _of_database(value))
                        for step, value, is_nan in database.execute(history, (run, name))
                    ]
                )
                for (name,) in names.fetchall()
                if wanted(name)
            }
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"source {str(path)!r} cannot be read as MLflow's database: {error}"
        ) from error


def _checked_run(run: str | None, runs: list[str], path: Path) -> str:
    """The run to read: the only run if ``run`` is ``None``."""
    if run is None and len(runs) == 1:
        return runs[0]
    if run is None or run not in runs:
        raise ValueError(
            f"run must be the id of one of the {len(runs)} runs in {str(path)!r} "
            f"({', '.join(runs[:20])}), got {run!r}"
        )
    return run


def _is_mlflow_database(path: Path) -> bool:
    """Whether a file is MLflow's database."""
    if path.suffix not in (".db", ".sqlite"):
        return False
    try:
        with closing(_opened(path)) as database:
            rows = database.execute("select name from sqlite_master where type = 'table'")
            return {"alembic_version", "runs", "metrics"} <= {name for (name,) in rows}
    except (sqlite3.DatabaseError, OSError):  # not a database, or not a file
        return False


def _opened(path: Path) -> sqlite3.Connection:
    """Open a database. Nothing is written to it."""
    with path.open("rb") as file:
        has_log = file.read(19)[18:] == b"\2"  # SQLite's mark of a write-ahead log
    # If no log exists, no other program has the database open. SQLite would then create a log, and
    # leave it there.
    is_closed = has_log and not path.with_name(f"{path.name}-wal").exists()
    mode = "immutable=1" if is_closed else "mode=ro"
    return sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)


def _of_database(value: float) -> float:
    """The value that was logged. MLflow's database has the greatest float in place of infinity."""
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value


def _package(module: str, package: str, path: Path) -> Any:
    # If a package is not installed, ``find_spec`` may find a folder of runs with the same name.
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"{path} is read by {package}: pip install 'lightning-alrc[preview]'")
    return import_module(module)


def _of_pairs(pairs: list[tuple[float, float]]) -> Logged:
    columns = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return Logged(columns[:, 0], columns[:, 1])
