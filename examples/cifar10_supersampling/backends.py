"""Where trainings run: processes of this machine, a Slurm cluster, or a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from .training import Run, train

POLL_SECONDS = 0.2

# What is told of a training: its number among the runs, and the number of steps done, or None
# when it is finished, or the exception that ended it.
Event = tuple[int, "int | BaseException | None"]

# Set in each worker process: where to report to.
_reports: SimpleQueue[tuple[int, int]] | None = None


def run_locally(runs: Sequence[Run], output: Path, workers: int) -> Iterator[Event]:
    """Train in parallel processes of one thread each, which end if this process does.

    Args:
        runs: the trainings.
        output: directory of their results.
        workers: processes.
    """
    # A forked process would inherit torch's threads in an unusable state.
    context = multiprocessing.get_context("spawn")
    reports: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
    # Nothing is ever sent: the workers end when the sender closes, by whatever death.
    lifeline, sender = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        min(workers, len(runs)), context, initializer=start_worker, initargs=(reports, lifeline)
    )
    try:
        futures: dict[Future[None], int] = {
            pool.submit(train_in_worker, number, run, output): number
            for number, run in enumerate(runs)
        }
        pending = set(futures)
        while pending:
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            while not reports.empty():
                yield reports.get()
            for future in done:
                yield futures[future], future.exception()
    finally:
        sender.close()
        pool.shutdown(cancel_futures=True)


def start_worker(reports: SimpleQueue[tuple[int, int]], lifeline: Connection) -> None:
    """Prepare a worker process."""
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    # Lightning's advice on devices and worker processes would be repeated by every training.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # Lightning would take an interrupt from the keyboard for the end of training.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=(lifeline,), daemon=True).start()


def end_with_parent(lifeline: Connection) -> None:
    """End this process at once when the parent's end of the pipe is closed."""
    lifeline.poll(None)
    os._exit(1)


def train_in_worker(number: int, run: Run, output: Path) -> None:
    """Train in a worker process, reporting under the run's number."""

    def report(step: int) -> None:
        if _reports is not None:
            _reports.put((number, step))

    train(run, output, report)
