"""The comparison: one training, unprotected and protected in three ways, side by side."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_alrc import ALRCCallback

from .datamodule import CIFAR10Supersampling
from .figures import save_curves, save_images
from .module import Supersampling
from .training import METHODS, SCENARIOS, Result, Run, Source, train

MethodName = Literal["none", "norm", "alrc", "both"]

POLL_SECONDS = 0.2

# Set in each worker process: where to report (number of run, steps done).
_reports: SimpleQueue[tuple[int, int]] | None = None


def compare(
    scenario: Literal["outliers", "unstable", "paper"] = "outliers",
    seeds: int = 1,
    data: Source = "photographs",
    root: Path = Path("data"),
    methods: Sequence[MethodName] = ("none", "norm", "alrc", "both"),
    steps: int | None = None,
    width: float = 0.25,
    num_stddev: float = 2.0,
    workers: int | None = None,
    output: Path = Path("comparison"),
) -> None:
    """Train the same network unprotected and protected in three ways, and compare.

    The four ways are: unprotected, with Lightning's gradient clipping (norm 1), with ALRC of each
    sample's loss, and with both. For one seed the four start from the same weights and see the
    same batches. Prints a table, and writes curves.png, images.png, results.csv (a row is added
    for each training) and history/*.npz.

    Args:
        scenario: "outliers": batches of 8, one image in twenty with hot pixels. "unstable":
            batches of 1 at a learning rate where training diverges. "paper": batches of 1 at the
            paper's learning rate. All have quartic errors and Adam.
        seeds: number of seeds, 0 and up; more than one gives mean and standard deviation.
        data: "photographs" needs no download; "download" has torchvision download CIFAR-10 into
            root; "folder" reads root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        methods: which of the four ways, for instance [none,alrc].
        steps: training steps; the scenario's own unless given (2,000, 6,000 or 10,000).
        width: factor on the network's number of channels; 1 is the paper's network.
        num_stddev: standard deviations above the mean loss at which ALRC clips.
        workers: trainings at a time, each on one core; unless given, as many as there are cores.
        output: directory that the results are written to.
    """
    for name, number in {"seeds": seeds, "steps": steps, "workers": workers}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number!r}")
    if not methods or unknown_or_repeated(methods):
        raise ValueError(f"methods must be some of {list(METHODS)}, each once, got {methods!r}")
    # Wrong arguments raise here, and not in each of the worker processes.
    Supersampling(width=width)
    ALRCCallback(num_stddev=num_stddev)
    output.mkdir(parents=True, exist_ok=True)
    table_path = output / "results.csv"
    check_columns(table_path)
    # Downloaded once and ahead of the trainings, so that what is missing is said at once.
    CIFAR10Supersampling(data=data, root=root).prepare_data()

    runs = [
        Run(
            scenario=scenario,
            method=method,
            seed=seed,
            steps=SCENARIOS[scenario].steps if steps is None else steps,
            width=width,
            num_stddev=num_stddev,
            data=data,
            root=root,
        )
        for seed in range(seeds)
        for method in methods
    ]
    results = train_all(
        runs, workers or os.cpu_count() or 1, lambda result: save_result(result, output)
    )
    save_curves(results, output / "curves.png")
    save_images(results, output / "images.png")
    console = Console()
    console.print(summary(results))
    console.print(
        f"Written to {output}: curves.png, images.png, results.csv, history/", soft_wrap=True
    )


def unknown_or_repeated(methods: Sequence[str]) -> bool:
    """Whether the methods' names are not each known and given once."""
    return not set(methods) <= set(METHODS) or len(set(methods)) < len(methods)


def train_all(
    runs: Sequence[Run], workers: int, on_result: Callable[[Result], None]
) -> list[Result]:
    """Train in parallel processes of one thread each, showing how far each training is.

    Args:
        runs: the trainings.
        workers: processes.
        on_result: called here with each result as soon as it is there.

    Returns:
        The results in the order of the runs.
    """
    # A forked process would inherit torch's threads in an unusable state.
    context = multiprocessing.get_context("spawn")
    reports: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
    with (
        ProcessPoolExecutor(
            min(workers, len(runs)), context, initializer=start_worker, initargs=(reports,)
        ) as pool,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ) as progress,
    ):
        tasks = [
            progress.add_task(
                f"{METHODS[run.method].label}, seed {run.seed}", total=run.steps, start=False
            )
            for run in runs
        ]
        futures: list[Future[Result]] = [
            pool.submit(run_in_worker, number, run) for number, run in enumerate(runs)
        ]
        number_of = {future: number for number, future in enumerate(futures)}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                while not reports.empty():
                    number, step = reports.get()
                    progress.start_task(tasks[number])
                    progress.update(tasks[number], completed=step)
                for future in done:
                    result = future.result()
                    task = tasks[number_of[future]]
                    progress.update(task, completed=result.survived)
                    progress.stop_task(task)
                    on_result(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def start_worker(reports: SimpleQueue[tuple[int, int]]) -> None:
    """Prepare a worker process."""
    global _reports
    _reports = reports
    torch.set_num_threads(1)


def run_in_worker(number: int, run: Run) -> Result:
    """Train in a worker process, reporting under the run's number."""

    def report(step: int) -> None:
        if _reports is not None:
            _reports.put((number, step))

    return train(run, report)


def row(result: Result) -> dict[str, str | int | float]:
    """What `results.csv` says of a training."""
    run, settings = result.run, SCENARIOS[result.run.scenario]
    return {
        "scenario": run.scenario,
        "method": run.method,
        "seed": run.seed,
        "data": run.data,
        "width": run.width,
        "loss": settings.loss,
        "guard": settings.guard,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "outlier_fraction": settings.outlier_fraction,
        "num_stddev": run.num_stddev if METHODS[run.method].alrc else "",
        "steps": run.steps,
        "last_steps": run.last_steps,
        "train_loss": result.train_loss,
        "test_error": result.test["error"],
        "test_input_error": result.test["input_error"],
        "test_mse": result.test["mse"],
        "test_psnr": result.test["psnr"],
        "test_ssim": result.test["ssim"],
        "losses_clipped": result.clips,
        "steps_survived": result.survived,
        "seconds": round(result.seconds, 1),
    }


COLUMNS = [
    "scenario",
    "method",
    "seed",
    "data",
    "width",
    "loss",
    "guard",
    "batch_size",
    "learning_rate",
    "outlier_fraction",
    "num_stddev",
    "steps",
    "last_steps",
    "train_loss",
    "test_error",
    "test_input_error",
    "test_mse",
    "test_psnr",
    "test_ssim",
    "losses_clipped",
    "steps_survived",
    "seconds",
]


def check_columns(path: Path) -> None:
    """Raise ValueError if a table is there that rows cannot be added to."""
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file), None)
        if columns != COLUMNS:
            raise ValueError(
                f"output: {path} has the columns {columns}, and must have {COLUMNS} for rows to "
                "be added; remove it or give another directory"
            )


def save_result(result: Result, output: Path) -> None:
    """Add a training's row to `results.csv`, and save its steps in `history`."""
    path = output / "results.csv"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerow(row(result))
    before = path.read_bytes() if path.exists() else b""
    write_whole(path, before + text.getvalue().encode())

    arrays: dict[str, Any] = result.history
    history = io.BytesIO()
    np.savez_compressed(history, **arrays)
    (output / "history").mkdir(exist_ok=True)
    write_whole(output / "history" / f"{result.run.name}.npz", history.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees part of it."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def summary(results: Sequence[Result]) -> Table:
    """The table printed at the end, one row for each method, over all seeds."""
    last_steps, steps = results[0].run.last_steps, results[0].run.steps
    seeds = len({result.run.seed for result in results})
    table = Table(
        title=f"{results[0].run.scenario}: {steps:,} steps, "
        + ("seed 0" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"),
        caption="Quartic error x 25, lower is better.\n"
        f"Training: loss of clean images, last {last_steps:,} steps.",
        # Without lines between columns the table of several seeds fits 80 characters.
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("training", "test", "losses\nclipped", "steps\nsurvived", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, properties in METHODS.items():
        own = [result for result in results if result.run.method == method]
        if own:
            table.add_row(
                properties.label,
                spread((result.train_loss for result in own), ".3f"),
                spread((result.test["error"] for result in own), ".3f"),
                f"{mean(result.clips for result in own):,.0f}" if properties.alrc else "",
                f"{mean(result.survived for result in own):,.0f}",
                f"{mean(result.seconds for result in own):.0f}",
            )
    table.add_row("input as it is", "", f"{results[0].test['input_error']:.3f}")
    return table


def spread(values: Iterable[float], form: str) -> str:
    """The mean and, of several values, the standard deviation; "lost" if one is NaN."""
    numbers = list(values)
    if any(number != number for number in numbers):
        return "lost"
    deviation = f" ± {format(stdev(numbers), form)}" if len(numbers) > 1 else ""
    return format(mean(numbers), form) + deviation
