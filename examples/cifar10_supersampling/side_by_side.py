"""Compares seconds per step of stacked trainings with those of one training under a Trainer.

    python -m examples.cifar10_supersampling.side_by_side --accelerator gpu
    python -m examples.cifar10_supersampling.side_by_side --runs 8 --width 0.25 --steps 128

About the first 60 steps of each way are not timed.
"""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import auto_cli
from rich.console import Console

from .datamodule import CIFAR10Supersampling
from .expansion import PAPER_METHODS, expand
from .grid import Precision
from .together import STEPS_AT_A_TIME, Trainings, tester
from .training import Run, Source, train_in


class StopError(Exception):
    """Ends a training after the last step that is timed."""


def side_by_side(
    runs: int = 80,
    steps: int = 500,
    width: float = 1.0,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    data: Source = "photographs",
    root: Path = Path("data"),
) -> None:
    """Time the paper's trainings with batches of one image.

    They have squared or quartic errors, and ALRC at n = 2, 3 or 4, or no ALRC.

    Args:
        runs: number of stacked trainings. They are the first of the paper's 80, in order of seed.
        steps: number of steps that are timed.
        width: factor on the network's number of channels; 1 is the paper's network.
        precision: precision of all trainings.
        accelerator: accelerator of all trainings.
        data: see `grid`.
        root: see `grid`.
    """
    if runs < 2 or steps < 50:
        raise ValueError(f"runs and steps must be at least 2 and 50, got {runs!r} and {steps!r}")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    every = list(
        islice(
            expand(
                experiments=("squared", "quartic"),
                methods=PAPER_METHODS,
                batch_sizes=(1,),
                seeds=range(runs),
                steps=100_000,
                width=width,
                precision=precision,
                average=True,
                data=data,
                root=root,
                accelerator=accelerator,
            ),
            runs,
        )
    )
    CIFAR10Supersampling(data=data, root=root).prepare_data()
    alone, together = seconds_alone(every[1], steps), seconds_together(every, steps)
    ratio = alone * runs / together
    device = tester(every[0]).strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    Console(width=100).print(
        f"{name}, torch {torch.__version__}, {precision}, width {width:g}, {steps} steps, ms a "
        f"step:\none under a Trainer {1e3 * alone:.2f}, {runs} at once {1e3 * together:.2f}. "
        f"At once they are {ratio:.1f} times as fast as one after the other.\n"
        f"100,000 steps of {runs}: {together * 100_000 / 60:.1f} minutes at once, "
        f"{alone * runs * 100_000 / 60:.1f} one after the other."
    )


def seconds_together(runs: list[Run], steps: int) -> float:
    """Seconds per step of all trainings stacked."""
    device = tester(runs[0]).strategy.root_device
    trainings = Trainings(runs, device)
    # On a GPU, a step is captured as a graph during these steps.
    trainings.train(STEPS_AT_A_TIME)
    start = time.perf_counter()
    trainings.train(STEPS_AT_A_TIME + steps)
    return (time.perf_counter() - start) / steps


def seconds_alone(run: Run, steps: int) -> float:
    """Seconds per step of one training under its Trainer."""
    times: dict[int, float] = {}

    def report(step: int) -> None:
        times[step] = time.perf_counter()
        if step >= 50 + steps:
            raise StopError

    with TemporaryDirectory() as folder, suppress(StopError):
        train_in(Path(folder), run, report)
    (first, started), *_, (last, ended) = ((n, t) for n, t in times.items() if n)
    return (ended - started) / (last - first)


if __name__ == "__main__":
    auto_cli(
        side_by_side,
        as_positional=False,
        prog="python -m examples.cifar10_supersampling.side_by_side",
    )
