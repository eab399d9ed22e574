"""Shows the progress of trainings, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .backends import Event, Run

Report = Callable[[int], None]
"""Called with the number of steps done."""

REPORT_EVERY = 50


class Reporter(pl.Callback):
    """Report a training's steps, at the start and regularly after that.

    Args:
        report: called with the number of steps done; None to report nothing.
    """

    def __init__(self, report: Report | None) -> None:
        self.report = report

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Report after the first step and after every 50th."""
        done = trainer.fit_loop.total_batch_idx + 1
        if self.report is not None and (done == 1 or done % REPORT_EVERY == 0):
            self.report(done)


NAME, BAR = 34, 20
"""Widths of a training's name and of its bar, in characters. Percent and times take 24 more."""


def show(
    runs: Sequence[Run], events: Iterator[Event]
) -> Iterator[tuple[Run, BaseException | None]]:
    """Show the progress of trainings. Yields each training at its end, and its exception or None.

    Each line fits a terminal of 80 columns. A long name is cut at its start, because names differ
    most at their ends. The time left is estimated from each training's work: a step of 64 images
    takes longer than a step of 1.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(BAR),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # With a shorter window the estimate would jump at every test of a training.
        speed_estimate_period=3600,
    ) as progress:
        work = sum(run.work for run in runs)
        whole = progress.add_task(f"0 of {len(runs)} trainings", total=work)
        tasks: dict[int, TaskID] = {}
        seen: dict[int, int] = {}
        ended = 0
        for number, event in events:
            run = runs[number]
            step = event if isinstance(event, int) else run.steps
            if number not in tasks:
                tasks[number] = progress.add_task(_end(run.name), total=run.steps)
                # Steps from before a training was resumed say nothing about the speed.
                resumed = event if isinstance(event, int) else 0
                work -= resumed * run.work // run.steps
                seen[number] = resumed
                progress.update(whole, total=work)
            progress.update(tasks[number], completed=step)
            progress.advance(whole, (step - seen[number]) * run.work // run.steps)
            seen[number] = step
            if not isinstance(event, int):
                ended += 1
                progress.remove_task(tasks[number])
                progress.update(whole, description=f"{ended} of {len(runs)} trainings")
                end = "finished" if event is None else f"failed: {event!r}"
                # A file or a pipe shows the bars only at the end.
                if not progress.console.is_terminal:
                    end += f"; {_time_left(progress.tasks[0], len(runs) - ended)}"
                progress.console.print(f"{run.name} {end}", soft_wrap=True)
                yield run, event


def _end(name: str) -> str:
    """The last NAME characters of a name."""
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


def _time_left(whole: Task, left: int) -> str:
    """How many trainings are left, and the time they will take, if known."""
    if not left:
        return "none left"
    seconds = whole.time_remaining
    if seconds is None:
        return f"{left} left"
    minutes = max(1, round(seconds / 60))
    time = f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} hours"
    return f"{left} left, about {time}"
