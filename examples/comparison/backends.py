"""Where trainings run: in processes of this machine, on a Slurm cluster, or on a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Protocol

import torch

from .extras import imported

# A forked process would inherit torch's threads in an unusable state.
CONTEXT = multiprocessing.get_context("spawn")

POLL_SECONDS = 0.2

# A training fails when this many of its processes have died, for example for lack of memory.
MOST_DEATHS = 3
CLUSTER_POLL_SECONDS = 2.0


class Run(Protocol):
    """What a backend needs to know of a training.

    Attributes:
        name: name of the training's folder, unique in the output.
        steps: number of training steps.
        work: expected duration, in a unit that all runs share.
    """

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def work(self) -> int: ...


Train = Callable[..., None]
"""``train(run, output, report=None)`` trains and saves one run; it calls ``report`` with the
number of steps done. Worker processes import ``train`` by name."""

# The index of a training, and what happened: the number of steps done, None if the training is
# finished, or the exception that ended it.
Event = tuple[int, "int | BaseException | None"]
Backend = Callable[
    [Train, Sequence[Run], Path, int, Mapping[str, Any]], Generator[Event, None, None]
]
"""``backend(train, runs, output, workers, cluster)`` trains all runs and yields events. ``output``
is the directory of their results. ``workers`` is the number of trainings at a time."""

# The queue for reports, set in each worker process.
_reports: SimpleQueue[tuple[int, int]] | None = None


def run_locally(
    train: Train, runs: Sequence[Run], output: Path, workers: int, cluster: Mapping[str, Any]
) -> Generator[Event, None, None]:
    """A `Backend` of parallel processes with one thread each, which end when this process ends.

    ``cluster`` must be empty.
    """
    if cluster:
        raise ValueError(f"cluster must be empty where backend is 'local', got {dict(cluster)!r}")
    # The pipe carries nothing. The workers end when its sender is closed, which also
    # happens if this process is killed.
    lifeline, sender = CONTEXT.Pipe(duplex=False)
    idle = [Worker(lifeline) for _ in range(min(workers, len(runs)))]
    waiting = list(enumerate(runs))[::-1]
    pending: dict[Future[None], tuple[int, Worker]] = {}
    deaths: Counter[int] = Counter()
    try:
        while waiting or pending:
            while waiting and idle:
                number, run = waiting.pop()
                worker = idle.pop()
                future = worker.pool.submit(train_in_worker, train, number, run, output)
                pending[future] = number, worker
            done, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for _, worker in pending.values():
                while not worker.reports.empty():
                    yield worker.reports.get()
            for future in done:
                number, worker = pending.pop(future)
                failure = future.exception()
                if isinstance(failure, BrokenProcessPool):
                    worker = Worker(lifeline)
                    deaths[number] += 1
                    if deaths[number] < MOST_DEATHS:
                        waiting.append((number, runs[number]))
                        idle.append(worker)
                        continue
                idle.append(worker)
                yield number, failure
    finally:
        sender.close()
        for worker in [*idle, *(worker for _, worker in pending.values())]:
            worker.pool.shutdown(cancel_futures=True)


class Worker:
    """One process, and its reports. If the process dies, other trainings continue.

    Args:
        lifeline: pipe whose closing ends the process.
    """

    def __init__(self, lifeline: Connection) -> None:
        self.reports: SimpleQueue[tuple[int, int]] = CONTEXT.SimpleQueue()
        self.pool = ProcessPoolExecutor(
            1, CONTEXT, initializer=start_worker, initargs=(self.reports, lifeline)
        )


def start_worker(reports: SimpleQueue[tuple[int, int]], lifeline: Connection) -> None:
    """Prepare a worker process."""
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    # Otherwise every training would repeat Lightning's advice on devices and worker processes.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # Lightning would treat a keyboard interrupt as the end of training.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=(lifeline,), daemon=True).start()


def end_with_parent(lifeline: Connection) -> None:
    """End this process at once when the parent's end of the pipe is closed."""
    lifeline.poll(None)
    os._exit(1)


def train_in_worker(train: Train, number: int, run: Run, output: Path) -> None:
    """Train in a worker process, reporting under the run's number."""

    def report(step: int) -> None:
        if _reports is not None:
            _reports.put((number, step))

    train(run, output, report)


class Job:
    """A training as a Slurm job. When its time limit ends, it continues in a new job.

    Args:
        train: trains and saves one run.
    """

    def __init__(self, train: Train) -> None:
        self.train = train

    def __call__(self, run: Run, output: Path) -> None:
        self.train(run, output)

    def checkpoint(self, run: Run, output: Path) -> Any:
        """What submitit submits when the cluster ends the job early: the same job again."""
        return imported("submitit.helpers", "cluster").DelayedSubmission(self, run, output)


def run_on_slurm(
    train: Train, runs: Sequence[Run], output: Path, workers: int, cluster: Mapping[str, Any]
) -> Generator[Event, None, None]:
    """A `Backend` of an array of Slurm jobs, which continue if this process ends.

    ``output`` must be on a file system that the nodes share. ``cluster`` has parameters of
    submitit's AutoExecutor, like timeout_min, slurm_partition and gpus_per_node. For a trial,
    ``{"cluster": "local"}`` runs the jobs in processes of this machine.
    """
    submitit = imported("submitit", "cluster")
    parameters = {"name": "alrc", "cpus_per_task": 1} | dict(cluster)
    where = parameters.pop("cluster", "slurm")
    executor = submitit.AutoExecutor(folder=output / "jobs", cluster=where)
    executor.update_parameters(slurm_array_parallelism=workers, **parameters)
    jobs = executor.map_array(Job(train), runs, [output] * len(runs))
    pending = dict(enumerate(jobs))
    while pending:
        for number in [number for number, job in pending.items() if job.done()]:
            yield number, pending.pop(number).exception()
        time.sleep(CLUSTER_POLL_SECONDS)


def run_on_ray(
    train: Train, runs: Sequence[Run], output: Path, workers: int, cluster: Mapping[str, Any]
) -> Generator[Event, None, None]:
    """A `Backend` of tasks on a Ray cluster. A task is resumed if its node is lost.

    ``output`` must be on a file system that the nodes share. ``cluster`` has arguments of ray.init,
    like address. Its num_cpus and num_gpus are what each task needs; ray.init does not get them.
    """
    ray = imported("ray", "cluster")
    arguments = dict(cluster)
    needs = {"num_cpus": 1} | {
        name: arguments.pop(name) for name in ("num_cpus", "num_gpus") if name in arguments
    }
    ray.init(ignore_reinit_error=True, **arguments)
    task = ray.remote(max_retries=3, **needs)(train)
    waiting = list(enumerate(runs))[::-1]
    pending: dict[Any, int] = {}
    try:
        while waiting or pending:
            while waiting and len(pending) < workers:
                number, run = waiting.pop()
                pending[task.remote(run, output)] = number
            (done,), _ = ray.wait(list(pending))
            number = pending.pop(done)
            try:
                ray.get(done)
            except Exception as error:
                yield number, error
            else:
                yield number, None
    finally:
        ray.shutdown()


BACKENDS: dict[str, Backend] = {
    "local": run_locally,
    "slurm": run_on_slurm,
    "ray": run_on_ray,
}
