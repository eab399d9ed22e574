"""The grid: the paper's 320 trainings, or any others, each run once.

python -m examples.cifar10_supersampling.grid --help
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from pytorch_lightning import callbacks
from rich.console import Console
from rich.table import Table

from ..comparison import files, running
from ..comparison.clippers import PACKAGES
from ..comparison.extras import imported
from ..comparison.running import check_each_once, check_positive, default_workers
from .cifar10 import fingerprint, require_folder
from .datamodule import CIFAR10Supersampling
from .duration import expected_seconds
from .expansion import PAPER_METHODS, expand
from .together import CUT_OFF_TABLE, train_together, write_cut_off
from .together import check as check_together
from .training import Run, Source, check_same, train

PROGRAM = "python -m examples.cifar10_supersampling.grid"

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
    backend: Literal["local", "slurm", "ray"] = "local",
    cluster: dict[str, Any] | None = None,
    accelerator: str = "cpu",
    checkpoint_every: int = 1000,
    alrc_start: Literal["first_losses", "authors"] = "first_losses",
    wandb: bool = False,
    together: int | None = None,
    cut_off: bool = False,
    dry_run: bool = False,
) -> None:
    """Train every combination of the settings, and keep one row of results for each.

    By default these are the paper's 320 trainings: squared and quartic errors, batches of 1, 4, 16
    and 64, ALRC at 2, 3 or 4 standard deviations or no ALRC, 10 repeats. Finished trainings are
    skipped, and interrupted ones are resumed. So a grid can be stopped and started again, and
    extended by other arguments with the same output. Lists are written like [none,alrc2+norm].

    Args:
        experiments: squared, quartic, unstable or outliers: the configurations in `configs`.
        methods: none, alrc2, alrc3, alrc4, norm, value, zclip, autoclip, autoclip10, agc or huber,
            the configurations in `configs/methods`; several together, like alrc2+norm; or paths of
            your own configurations, ending in .yaml.
        losses: squared, quartic; default: the experiment's own.
        batch_sizes: images in a batch; default: the paper's four for squared and quartic, and the
            experiment's own for the others.
        optimizers: adam, sgd; default: both for unstable, otherwise the experiment's own.
        learning_rates: default: for unstable, the two rates that the paper has for each optimizer;
            otherwise the experiment's own.
        outlier_kinds: hot_pixels, noise, wrong_target; default: the experiment's own.
        outlier_fractions: probabilities that an image is an outlier; default: the experiment's own.
        repeats: number of seeds, from 0 up.
        seeds: list of seeds, in place of repeats.
        steps: number of training steps; default: the experiment's own.
        width: factor on the network's number of channels; 1 is the paper's network.
        precision: precision of the Trainer, for instance bf16-mixed.
        average: test the moving average of the weights, too, if the experiment keeps one.
        data: "photographs" needs no download; "download" has torchvision download CIFAR-10 into
            root; "folder" reads root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        output: directory of the results: results.csv, and a folder for each training.
        workers: trainings at a time, each on one core; default: one per core with accelerator cpu,
            otherwise one.
        backend: "local" trains in processes of this machine, "slurm" in an array of jobs, "ray"
            in tasks of a Ray cluster. For slurm and ray, output must be on a shared file system.
        cluster: for slurm, parameters of submitit's AutoExecutor, for instance
            {timeout_min: 600, slurm_partition: gpu, gpus_per_node: 1} with accelerator gpu, or
            {cluster: local} for a trial on this machine. For ray, arguments of ray.init, for
            instance {address: auto}, and a training's num_cpus and num_gpus.
        accelerator: accelerator of the Trainers: "cpu", "gpu" or "auto".
        checkpoint_every: steps between checkpoints, from which an interrupted training is resumed.
        alrc_start: "first_losses" lets ALRC set its moments from the first losses; "authors" starts
            from the moments of the paper's authors.
        wandb: make each training a run of Weights & Biases, as `configs/sweep.yaml` needs it.
        together: number of trainings to stack on one device; see `together`. These methods can be
            stacked: none, norm, alrc2 to alrc4, published2 to published4, and these six with norm.
            At width 1 each image of each training's batch needs about 50 MB, so that 80 trainings
            need 4 GB with batches of one, and 64 times as much with batches of 64.
        cut_off: train nothing, and write cut-off.csv: a row for each stacked training that was
            interrupted, at the step of its last checkpoint. The training can still be resumed.
        dry_run: show the trainings and their expected time, and run none.
    """
    check_positive(
        repeats=repeats,
        steps=steps,
        workers=workers,
        checkpoint_every=checkpoint_every,
        together=together,
    )
    if together is not None and (workers is not None or backend != "local"):
        raise ValueError(
            f"together takes neither workers nor a backend, got workers={workers!r} and "
            f"backend={backend!r}"
        )
    lists: dict[str, Any] = {
        "experiments": experiments,
        "methods": methods,
        "losses": losses,
        "batch_sizes": batch_sizes,
        "optimizers": optimizers,
        "learning_rates": learning_rates,
        "outlier_kinds": outlier_kinds,
        "outlier_fractions": outlier_fractions,
    }
    check_lists(**lists, seeds=seeds)
    runs = list(
        expand(
            **lists,
            seeds=range(repeats) if seeds is None else seeds,
            steps=steps,
            width=width,
            precision=precision,
            average=average,
            data=data,
            # Nodes of a cluster may work in another directory.
            root=root.resolve(),
            accelerator=accelerator,
            alrc_start=alrc_start,
            checkpoint_every=checkpoint_every,
            wandb=wandb,
        )
    )
    if together is not None:
        check_together(runs)
    console = Console()
    workers = workers or default_workers(accelerator if backend == "local" else "cpu")
    if dry_run:
        check(runs, output)
        console.print(overview(runs, output, workers))
        return
    if cut_off:
        check(runs, output)
        written = write_cut_off(runs, output)
        where = f": {output / CUT_OFF_TABLE}" if written else ""
        console.print(f"{written} trainings cut off{where}")
        return
    if together is not None:
        check(runs, output)
        CIFAR10Supersampling(data=data, root=root).prepare_data()
        train_together(runs, output.resolve(), together)
    else:
        run_all(runs, output.resolve(), workers, backend, cluster or {})
    finished = sum(files.is_finished(output / run.name) for run in runs)
    console.print(f"{finished} of {len(runs)} trainings finished: {output / files.TABLE}")


ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "batch_sizes": ("at least 1", lambda size: size >= 1),
    "learning_rates": ("above 0", lambda rate: rate > 0),
    "outlier_fractions": ("from 0 to 1", lambda fraction: 0 <= fraction <= 1),
    "seeds": ("at least 0", lambda seed: seed >= 0),
}


def check_lists(**lists: Sequence[Any] | None) -> None:
    """Raise ValueError for a list that is empty, repeats a value or has a wrong value."""
    check_each_once(**lists)
    for name, (allowed, is_allowed) in ALLOWED.items():
        for value in lists.get(name) or ():
            if not is_allowed(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")


def run_all(
    runs: Sequence[Run],
    output: Path,
    workers: int | None = None,
    backend: str = "local",
    cluster: Mapping[str, Any] | None = None,
) -> None:
    """Check the trainings, and run them as `comparison.running.run_all` does.

    Raises:
        RuntimeError: trainings have failed; the others were run.
        ValueError: arguments are wrong, or the output holds other trainings of the same names.
    """
    check(runs, output)
    # The download comes before the trainings, so that it runs once and fails early.
    CIFAR10Supersampling(data=runs[0].data, root=runs[0].root).prepare_data()
    running.run_all(train, runs, output, workers, backend, cluster)


def check(runs: Sequence[Run], output: Path) -> None:
    """Raise if arguments are wrong or the output holds other trainings, before any is run."""
    if not runs:
        raise ValueError("no training was asked for: a list is empty")
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise ValueError(f"every training must be asked for once, got {name} {count} times")
    fingerprint.cache_clear()  # a folder may have changed since the last check
    for run in runs:
        if run.experiment != "outliers" and not hasattr(callbacks, "EMAWeightAveraging"):
            raise RuntimeError(
                f"the experiment {run.experiment!r} keeps the moving average of the weights, "
                "for which pytorch-lightning must be 2.6 or later"
            )
        if run.data == "folder":
            require_folder(run.root)
        check_same(run, output)
        for method in run.method.split("+"):
            if method in PACKAGES:
                imported(PACKAGES[method], "peers")
        CIFAR10Supersampling(
            data=run.data,
            root=run.root,
            batch_size=run.batch_size,
            outlier_fraction=run.outlier_fraction,
            seed=run.seed,
        )
        if not run.width > 0:
            raise ValueError(f"width must be a number above 0, got {run.width!r}")
        if not run.learning_rate > 0:
            raise ValueError(f"learning_rates must be numbers above 0, got {run.learning_rate!r}")


def overview(runs: Sequence[Run], output: Path, workers: int) -> Table:
    """The trainings as a table, with the time left."""
    left = [run for run in runs if not files.is_finished(output / run.name)]
    hours = expected_seconds(left) / workers / 3600
    table = Table(
        caption=f"{len(runs)} trainings, {len(runs) - len(left)} finished. The others: "
        f"{sum(run.steps for run in left):,} steps, about {hours:,.1f} hours with {workers} "
        "workers. This is estimated from steps that were just timed on a CPU of this machine."
    )
    table.add_column("training", no_wrap=True)
    table.add_column("steps", justify="right")
    table.add_column("")
    for run in runs:
        folder = output / run.name
        state = "finished" if files.is_finished(folder) else "begun" if folder.exists() else ""
        table.add_row(run.name, f"{run.steps:,}", state)
    return table


def main() -> None:
    """Run `grid` by its command line."""
    parser = ArgumentParser(prog=PROGRAM, description=(grid.__doc__ or "").split("Args:")[0])
    parser.add_argument("--config", action="config", help="a YAML file of these arguments")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the trainings and the time, and run none"
    )
    parser.add_function_arguments(grid, skip={"dry_run"})
    arguments = parser.parse_args()
    del arguments["config"]
    grid(**arguments.as_dict())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
