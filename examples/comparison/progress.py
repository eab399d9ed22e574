"""How far the trainings of a grid are, and how long the rest will take."""

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
"""Told of a training's steps done."""

REPORT_EVERY = 50


class Reporter(pl.Callback):
    """Report a training's steps, at the start and now and then.

    Args:
        report: told of the number of steps done; None for nobody.
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
        """Report, if it is time."""
        done = trainer.fit_loop.total_batch_idx + 1
        if self.report is not None and (done == 1 or done % REPORT_EVERY == 0):
            self.report(done)


NAME, BAR = 34, 20
"""Characters of a training's name and of its bar; 24 are for percent and times."""


def show(
    runs: Sequence[Run], events: Iterator[Event]
) -> Iterator[tuple[Run, BaseException | None]]:
    """Show the progress of trainings, and hand on which is finished, or why it failed.

    Each line fits a terminal of 80 columns: of long names it has the end, which tells them apart.

    The time left is estimated by the work of each: a step of 64 images takes longer than one of 1.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(BAR),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # Fewer seconds would have the estimate jump with every test of a training.
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
                # What was done before it was resumed says nothing of the speed.
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
                if not progress.console.is_terminal:  # the bars are seen at the end only
                    end += f"; {_told(progress.tasks[0], len(runs) - ended)}"
                progress.console.print(f"{run.name} {end}", soft_wrap=True)
                yield run, event


def _end(name: str) -> str:
    """The end of a name, of NAME characters at most."""
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


def _told(whole: Task, left: int) -> str:
    """How many trainings are left, and the hours they will take as far as that is known."""
    if not left:
        return "none left"
    seconds = whole.time_remaining
    return f"{left} left" + ("" if seconds is None else f", about {seconds / 3600:.1f} hours")
