"""Runs many trainings. Finished ones are skipped, and a failed one does not stop the others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from . import files
from .backends import BACKENDS, Run, Train
from .progress import show


def check_positive(**numbers: int | None) -> None:
    """Raise ValueError if a number is below 1; the message has the argument's name."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number!r}")


def check_each_once(**lists: Sequence[Any] | None) -> None:
    """Raise ValueError if a list is empty or repeats a value; the message has the argument's name.

    None is not checked.
    """
    for name, values in lists.items():
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name} must be some values, each once, got {list(values)!r}")


def default_workers(accelerator: str) -> int:
    """The number of trainings at a time on this machine: one per core on a CPU, otherwise one.

    Each worker's Trainer takes the first GPU, so several workers would share it.
    """
    return (os.cpu_count() or 1) if accelerator == "cpu" else 1


def run_all(
    train: Train,
    runs: Sequence[Run],
    output: Path,
    workers: int | None = None,
    backend: str = "local",
    cluster: Mapping[str, Any] | None = None,
) -> None:
    """Train what is not finished, showing progress and the time left.

    Args:
        train: trains and saves one run.
        runs: the trainings.
        output: directory of their results.
        workers: trainings at a time; default: one per core.
        backend: one of `backends.BACKENDS`.
        cluster: arguments of the backend.

    Raises:
        RuntimeError: trainings have failed; the others were run.
    """
    output.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not files.is_finished(output / run.name)]
    failures: list[tuple[Run, BaseException]] = []
    if todo:
        workers = workers or os.cpu_count() or 1
        # Closing the backend ends its workers, also on an interrupt.
        with closing(BACKENDS[backend](train, todo, output, workers, cluster or {})) as events:
            for run, failure in show(todo, events):
                if failure is not None:
                    failures.append((run, failure))
                files.update_table(output)
    files.write_table(output)
    if failures:
        run, failure = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {len(todo)} trainings failed, the first of them {run.name}: "
            f"{failure!r}"
        ) from failure
