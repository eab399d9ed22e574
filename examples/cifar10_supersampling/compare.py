"""The comparison: one training, unprotected and protected in several ways, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ..comparison import files
from ..comparison.figures import label
from ..comparison.running import check_positive, default_workers
from . import results
from .duration import expected_seconds
from .expansion import expand
from .figures import draw_training, save_curves, save_images
from .grid import check, run_all
from .results import Result
from .training import Run, Source


@dataclass(frozen=True)
class Scenario:
    """A part of the grid, short enough for a trial.

    Attributes:
        arguments: arguments of `expansion.expand`.
        steps: number of training steps.
        last_steps: number of last steps over which the training loss is averaged.
    """

    arguments: dict[str, Any]
    steps: int
    last_steps: int


SCENARIOS = {
    "outliers": Scenario({"experiments": ["outliers"]}, 1500, 750),
    "unstable": Scenario(
        {
            "experiments": ["unstable"],
            "losses": ["quartic"],
            "optimizers": ["adam"],
            "learning_rates": [0.002],
        },
        6000,
        2000,
    ),
    "paper": Scenario({"experiments": ["quartic"], "batch_sizes": [1]}, 10_000, 5000),
}


def compare(
    scenario: Literal["outliers", "unstable", "paper"] = "outliers",
    seeds: int = 1,
    data: Source = "photographs",
    root: Path = Path("data"),
    methods: Sequence[str] = ("none", "norm", "alrc2", "alrc2+norm"),
    steps: int | None = None,
    width: float = 0.25,
    workers: int | None = None,
    accelerator: str = "cpu",
    output: Path = Path("comparison"),
) -> None:
    """Train the same network unprotected and protected in several ways, and compare.

    By default there are four ways: unprotected, with Lightning's gradient clipping (norm 1), with
    ALRC of each sample's loss at 2 standard deviations, and with both. All trainings of one seed
    start from the same weights and see the same batches. Prints a table, and writes curves.png,
    images.png, results.csv, and a folder for each training. The folder of a training under ALRC
    also has a curves.png. Finished trainings are not run again, and interrupted ones are resumed.

    Args:
        scenario: "outliers": batches of 8, one image in twenty with hot pixels. "unstable":
            batches of 1 at a learning rate at which training diverges. "paper": batches of 1 at the
            paper's learning rate. All have quartic errors and Adam. "unstable" and "paper" need
            pytorch-lightning 2.6.
        seeds: number of seeds, from 0 up; more than one gives mean and standard deviation.
        data: "photographs" needs no download; "download" has torchvision download CIFAR-10 into
            root; "folder" reads root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        methods: methods, for instance [none,alrc3,zclip]; the grid's help lists all.
        steps: training steps; default: the scenario's own (1,500, 6,000 or 10,000).
        width: factor on the network's number of channels; 1 is the paper's network.
        workers: trainings at a time, each on one core; default: one per core on a CPU, else one.
        accelerator: accelerator of the Trainers: "cpu", "gpu" or "auto". Workers share one GPU.
        output: directory of the results.
    """
    check_positive(seeds=seeds, steps=steps, workers=workers)
    chosen = SCENARIOS[scenario]
    runs = list(
        expand(
            **chosen.arguments,
            methods=methods,
            seeds=range(seeds),
            steps=chosen.steps if steps is None else steps,
            last_steps=chosen.last_steps if steps is None else None,
            width=width,
            precision="32-true",
            average=False,
            data=data,
            root=root,
            accelerator=accelerator,
            every_image=True,
        )
    )
    check(runs, output)
    console = Console()
    workers = workers or default_workers(accelerator)
    announce(runs, output, workers, console)
    run_all(runs, output, workers)
    finished = [results.load(output / run.name) for run in runs]
    save_curves(finished, output / "curves.png")
    save_images(finished, output / "images.png")
    for run, result in zip(runs, finished, strict=True):
        if result.row["clipped"] is not None:
            draw_training(result).savefig(output / run.name / "curves.png", dpi=150)
    console.width = max(90, console.width)
    console.print(summary(finished), crop=False)
    console.print(
        f"Written to {output}:\n"
        "curves.png, images.png, results.csv, and a folder for each training",
        soft_wrap=True,
    )


def announce(runs: Sequence[Run], output: Path, workers: int, console: Console) -> None:
    """Print what will be trained, and how long it will take."""
    left = [run for run in runs if not files.is_finished(output / run.name)]
    if not left:
        return
    minutes = expected_seconds(left) / min(workers, len(left)) / 60
    names = ", ".join(dict.fromkeys(label(run.method) for run in left))
    console.print(
        f"Trains a network {len(left)} times, {left[0].steps:,} steps each: {names}.\n"
        f"That takes about {max(1, round(minutes))} min on a CPU, {workers} at a time."
    )


def summary(finished: Sequence[Result]) -> Table:
    """The table printed at the end, one row for each method, over all seeds."""
    rows = [result.row for result in finished]
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    table = Table(
        title=f"{first['experiment']}: {first['steps']:,} steps, "
        + ("seed 0" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"),
        caption="Quartic error x 25, lower is better.\n"
        f"Training: loss of clean images, last {first['last_steps']:,} steps.",
        # Without lines between columns the table of several seeds fits 80 characters.
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("training", "test", "losses\nclipped", "steps\nsurvived", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        clipped = [row["clipped"] for row in own]
        table.add_row(
            label(method),
            spread((row["train_loss"] for row in own), ".3f"),
            spread((row["test_error"] for row in own), ".3f"),
            "" if None in clipped else f"{mean(clipped):,.0f}",
            f"{mean(row['steps_survived'] for row in own):,.0f}",
            f"{mean(row['seconds'] for row in own):.0f}",
        )
    table.add_row("input as it is", "", f"{first['test_input_error']:.3f}")
    return table


def spread(values: Iterable[float | None], form: str) -> str:
    """The mean, and the standard deviation of several values; "lost" if a value is None."""
    numbers = []
    for value in values:
        if value is None:
            return "lost"
        numbers.append(value)
    deviation = f" ± {format(stdev(numbers), form)}" if len(numbers) > 1 else ""
    return format(mean(numbers), form) + deviation
