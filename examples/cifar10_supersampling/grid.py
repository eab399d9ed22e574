"""The grid: the paper's 320 trainings, or any others, each run once and none lost.

    python -m examples.cifar10_supersampling.grid --help
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from . import results
from .backends import Event, run_locally
from .command_line import EXPERIMENTS, experiment_config, method_configs, method_name
from .datamodule import CIFAR10Supersampling
from .module import Supersampling
from .training import Run, Source, check_same, train

PROGRAM = "python -m examples.cifar10_supersampling.grid"

PAPER_METHODS = ("none", "alrc2", "alrc3", "alrc4")
PAPER_BATCH_SIZES = (1, 4, 16, 64)
UNSTABLE_RATES = {"adam": (0.0001, 0.002), "sgd": (0.0001, 0.003)}

Loss = Literal["squared", "quartic"]
Optimizer = Literal["adam", "sgd"]
OutlierKind = Literal["hot_pixels", "noise", "wrong_target"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


def grid(
    experiments: Sequence[str] = ("squared", "quartic"),
    methods: Sequence[str] = PAPER_METHODS,
    losses: Sequence[Loss] | None = None,
    batch_sizes: Sequence[int] | None = None,
    optimizers: Sequence[Optimizer] | None = None,
    learning_rates: Sequence[float] | None = None,
    outlier_kinds: Sequence[OutlierKind] | None = None,
    outlier_fractions: Sequence[float] | None = None,
    repeats: int = 10,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    width: float = 1.0,
    precision: Precision = "32-true",
    average: bool = True,
    data: Source = "photographs",
    root: Path = Path("data"),
    output: Path = Path("grid"),
    workers: int | None = None,
    accelerator: str = "auto",
    checkpoint_every: int = 1000,
    dry_run: bool = False,
) -> None:
    """Train every combination of what is given, and keep one row of results for each.

    Without arguments these are the paper's 320 trainings: squared and quartic errors, batches of
    1, 4, 16 and 64, ALRC at 2, 3, 4 standard deviations and none, 10 repeats. What is finished is
    skipped and what was cut off is resumed, so that a grid may be stopped and started again, and
    extended by other arguments with the same output. Lists are written as [none,alrc2+norm].

    Args:
        experiments: of squared, quartic, unstable and outliers, the configurations in `configs`.
        methods: of none, alrc2, alrc3, alrc4, norm, value, zclip, autoclip, agc and huber, the
            configurations in `configs/methods`; several at once as alrc2+norm; or paths of
            configurations of your own, ending in .yaml.
        losses: squared, quartic; the experiment's own unless given.
        batch_sizes: images in a batch; unless given, the paper's four for squared and quartic,
            and the experiment's own for the others.
        optimizers: adam, sgd; unless given both for unstable, and the experiment's own otherwise.
        learning_rates: unless given, the paper's two of each optimizer for unstable, and the
            experiment's own otherwise.
        outlier_kinds: hot_pixels, noise, wrong_target; the experiment's own unless given.
        outlier_fractions: probabilities that an image is an outlier; the experiment's own unless
            given.
        repeats: seeds from 0 up.
        seeds: which, in place of repeats.
        steps: of training; the experiment's own unless given.
        width: factor on the network's number of channels; 1 is the paper's network.
        precision: of the Trainer, for instance bf16-mixed.
        average: test the moving average of the weights as well, where the experiment keeps one.
        data: "photographs" needs no download; "download" has torchvision download CIFAR-10 into
            root; "folder" reads root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        output: directory of the results: results.csv, and a folder for each training.
        workers: trainings at a time, each on one core; unless given, as many as there are cores.
        accelerator: of the Trainer.
        checkpoint_every: steps from which a training that is cut off is resumed.
        dry_run: show the trainings, and run none.
    """
    check_positive(repeats=repeats, steps=steps, workers=workers, checkpoint_every=checkpoint_every)
    runs = list(
        expand(
            experiments=experiments,
            methods=methods,
            losses=losses,
            batch_sizes=batch_sizes,
            optimizers=optimizers,
            learning_rates=learning_rates,
            outlier_kinds=outlier_kinds,
            outlier_fractions=outlier_fractions,
            seeds=range(repeats) if seeds is None else seeds,
            steps=steps,
            width=width,
            precision=precision,
            average=average,
            data=data,
            root=root,
            accelerator=accelerator,
            checkpoint_every=checkpoint_every,
        )
    )
    console = Console()
    if dry_run:
        console.print(overview(runs, output))
        return
    run_all(runs, output, workers)
    finished = sum(results.is_finished(output / run.name) for run in runs)
    console.print(f"{finished} of {len(runs)} trainings finished: {output / results.TABLE}")


def check_positive(**numbers: int | None) -> None:
    """Raise ValueError for a number below 1, by its name."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number!r}")


def expand(
    *,
    experiments: Sequence[str],
    methods: Sequence[str],
    losses: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    optimizers: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    outlier_kinds: Sequence[str] | None = None,
    outlier_fractions: Sequence[float] | None = None,
    seeds: Iterable[int],
    steps: int | None = None,
    last_steps: int | None = None,
    **common: Any,
) -> Iterator[Run]:
    """All combinations, as `grid` describes them; those of one seed are neighbours."""
    for method in methods:
        method_configs(method)
    for seed, experiment in itertools.product(seeds, experiments):
        config = yaml.safe_load(experiment_config(experiment).read_text())
        trainer, model, images = config["trainer"], config["model"], config["data"]
        own_sizes = PAPER_BATCH_SIZES if experiment in ("squared", "quartic") else None
        for loss, batch_size, (optimizer, rate), (kind, fraction), method in itertools.product(
            losses or [model["loss"]],
            batch_sizes or own_sizes or [images["batch_size"]],
            rates(experiment, model, optimizers, learning_rates),
            outliers(images, outlier_kinds, outlier_fractions),
            methods,
        ):
            run_steps = trainer["max_steps"] if steps is None else steps
            yield Run(
                experiment=experiment,
                method=method,
                loss=loss,
                batch_size=batch_size,
                optimizer=optimizer,
                learning_rate=rate,
                outlier_kind=kind,
                outlier_fraction=fraction,
                seed=seed,
                steps=run_steps,
                last_steps=last_steps or min(5000, max(1, round(0.4 * run_steps))),
                **common,
            )


def rates(
    experiment: str,
    model: dict[str, Any],
    optimizers: Sequence[str] | None,
    learning_rates: Sequence[float] | None,
) -> list[tuple[str, float]]:
    """The pairs of optimizer and learning rate of an experiment."""
    unstable = experiment == "unstable"
    names = optimizers or (list(UNSTABLE_RATES) if unstable else [model["optimizer"]])
    return [
        (name, rate)
        for name in names
        for rate in learning_rates
        or (UNSTABLE_RATES[name] if unstable else [model["learning_rate"]])
    ]


def outliers(
    images: dict[str, Any], kinds: Sequence[str] | None, fractions: Sequence[float] | None
) -> list[tuple[str | None, float]]:
    """The pairs of kind and fraction of outliers, with one pair for none at all."""
    pairs: list[tuple[str | None, float]] = []
    for kind in kinds or [images.get("outlier_kind", "hot_pixels")]:
        for fraction in [images.get("outlier_fraction", 0.0)] if fractions is None else fractions:
            pairs.append((kind, fraction) if fraction else (None, 0.0))
    return list(dict.fromkeys(pairs))


def run_all(runs: Sequence[Run], output: Path, workers: int | None = None) -> None:
    """Train what is not finished, showing progress and the time left.

    Raises:
        RuntimeError: trainings have failed; the others were run.
    """
    check(runs, output)
    output.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not results.is_finished(output / run.name)]
    failures: dict[str, BaseException] = {}
    if todo:
        events = run_locally(todo, output, workers or os.cpu_count() or 1)
        for run, failure in show(todo, events):
            if failure is not None:
                failures[run.name] = failure
            else:
                results.write_table(output)
    results.write_table(output)
    if failures:
        name, first = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(failures)} of {len(todo)} trainings failed, the first of them {name}: {first!r}"
        ) from first


def check(runs: Sequence[Run], output: Path) -> None:
    """Raise before anything is trained, where arguments are wrong or results would be mixed."""
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise ValueError(f"each training must be asked for once, got {twice[0]} more than once")
    for run in runs:
        check_same(run, output)
        Supersampling(width=run.width, learning_rate=run.learning_rate)
        datamodule = CIFAR10Supersampling(
            data=run.data,
            root=run.root,
            batch_size=run.batch_size,
            outlier_fraction=run.outlier_fraction,
            seed=run.seed,
        )
    # Downloaded once and ahead of the trainings, so that what is missing is said at once.
    if runs:
        datamodule.prepare_data()


def show(
    runs: Sequence[Run], events: Iterator[Event]
) -> Iterator[tuple[Run, BaseException | None]]:
    """Show the progress of trainings, and hand on which is finished, or why it failed."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # A training's speed is known after seconds, the grid's after many trainings.
        speed_estimate_period=3600,
    ) as progress:
        whole = progress.add_task(f"{len(runs)} trainings", total=sum(run.steps for run in runs))
        tasks: dict[int, Any] = {}
        steps = [0] * len(runs)
        for number, event in events:
            run = runs[number]
            if number not in tasks:
                tasks[number] = progress.add_task(run.name, total=run.steps)
            steps[number] = event if isinstance(event, int) else run.steps
            progress.update(tasks[number], completed=steps[number])
            progress.update(whole, completed=sum(steps))
            if not isinstance(event, int):
                progress.remove_task(tasks[number])
                progress.console.print(f"{run.name}: {'finished' if event is None else event!r}")
                yield run, event


def overview(runs: Sequence[Run], output: Path) -> Table:
    """The trainings, as a table."""
    table = Table(caption=f"{len(runs)} trainings, {sum(run.steps for run in runs):,} steps")
    table.add_column("training", no_wrap=True)
    table.add_column("steps", justify="right")
    table.add_column("")
    for run in runs:
        folder = output / run.name
        state = "finished" if results.is_finished(folder) else "begun" if folder.exists() else ""
        table.add_row(run.name, f"{run.steps:,}", state)
    return table


if __name__ == "__main__":
    auto_cli(grid, as_positional=False, prog=PROGRAM)
