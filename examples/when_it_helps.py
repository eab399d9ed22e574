"""The table of docs/when-it-helps.md: what ALRC gains or loses on each task of the examples.

    python -m examples.when_it_helps

It reads the rows that are kept beside the examples, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .cifar10_supersampling.report.rows import read_rows
from .comparison.differences import difference
from .comparison.settings import Setting
from .comparison.tables import Cell, Table, change, markdown

HERE = Path(__file__).parent
COLUMNS = [
    "task",
    "what is unstable",
    "which losses are clipped",
    "ALRC, against none",
    "ALRC, against the best clipper",
    "ALRC and norm clipping, against the best clipper",
]
NOTE = (
    "Differences in percent, paired by seed, with 95 % intervals that are not corrected for the "
    "number of comparisons; lower is better. Bold: lower, and the interval does not contain 0. "
    "“× 5” is an error 5 times as large. A training diverged if it ended with weights that are not "
    "finite."
)


@dataclass(frozen=True)
class Task:
    """Trainings in which methods are compared.

    Attributes:
        name: what is trained, and what is measured.
        unstable: what makes the training unstable.
        clipped: what counts as one loss for ALRC, for example "one per image".
        rows: one row for each training, with columns for method, seed and measure.
        measure: column of the measure; lower is better, NaN if the weights of a training
            became NaN or infinite.
        alrc: name of the method that is ALRC alone.
    """

    name: str
    unstable: str
    clipped: str
    rows: pd.DataFrame
    measure: str
    alrc: str


def supersampling() -> Iterator[Task]:
    """Restoring photographs. The measure is the loss on clean images in the last steps."""
    folder = HERE / "cifar10_supersampling" / "measured"
    rows = pd.concat(
        read_rows(folder / f"{name}.csv") for name in ("outliers", "squared", "quartic", "unstable")
    )
    rows = rows[rows["alrc_start"] == "first_losses"]
    names = ["experiment", "loss", "optimizer", "learning_rate", "outlier_kind", "outlier_fraction"]
    for values, group in rows.groupby([*names, "precision"], sort=False):
        experiment, loss, optimizer, rate, kind, fraction, _ = values
        trainings = group["method"].value_counts()
        if min(trainings.get("none", 0), trainings.get("alrc2", 0)) < 5:
            continue
        unstable = f"{kind.replace('_', ' ')} in {100 * fraction:g} % of the images"
        if experiment == "unstable":
            unstable = f"the rate, {optimizer} {rate:g}"
        elif not kind:
            unstable = "nothing"
        batch = group["batch_size"].iloc[0]
        name = f"Supersampling, {loss} errors, batch {batch}"
        clipped = "one per batch" if batch == 1 else "one per image"
        yield Task(name, unstable, clipped, group, "train_loss", "alrc2")


def kept(example: str) -> pd.DataFrame:
    """The rows of an example, from its file in ``measured``."""
    return pd.read_csv(HERE / "measured" / f"{example}.csv")


def flight_delays() -> Iterator[Task]:
    """Delays of flights. The measures are errors in minutes, and the perplexity of densities."""
    rows = kept("flight_delays")
    errors = {"rms": "root mean square", "mean": "mean error", "median": "median error"}
    settings = {
        "squared": ("squared errors", errors),
        "quartic": ("quartic errors", errors),
        "density": ("a density", {**errors, "perplexity": "perplexity"}),
    }
    for setting, (loss, measures) in settings.items():
        group = rows[rows["setting"] == setting]
        for measure, label in measures.items():
            name = f"Flight delays, {loss}: {label}"
            yield Task(name, "the data: a heavy tail", "one per flight", group, measure, "alrc2")


def forecasting() -> Iterator[Task]:
    """Winds. The measure is the root mean square error."""
    rows = kept("forecasting")
    unstable = {
        "repaired": "nothing",
        "shipped": "one wrong hour in the data",
        "often": "1 wrong hour in 1,000",
    }
    for setting, label in unstable.items():
        group = rows[rows["setting"] == setting]
        yield Task("Forecasting wind, darts", label, "one per batch", group, "rms", "alrc2")


def language_model() -> Iterator[Task]:
    """Source text. The measure is the cross-entropy of clean text."""
    rows = kept("language_model")
    for setting, label in {"calm": "1 % noise", "spikes": "the rate, and 1 % noise"}.items():
        group = rows[rows["setting"] == setting]
        for unit in ("token", "sequence", "batch"):
            yield Task("Language model", label, f"one per {unit}", group, "loss", f"alrc3-{unit}")


def partial_stem() -> Iterator[Task]:
    """Completions of micrographs. The measures are errors on test crops and in training."""
    rows = kept("partial_stem")
    measures = {
        "rms_errors": "test error of the first stage",
        "mse_outer": "training error of the first stage",
        "rms": "test error with discriminators",
    }
    for measure, label in measures.items():
        name = f"Micrographs, batch 1: {label}"
        unstable, clipped = "nothing: some crops are harder", "each of the four losses"
        yield Task(name, unstable, clipped, rows, measure, "alrc3")


def compared(task: Task, method: str, baseline: str | None) -> Cell:
    """A method's difference from a baseline, as text.

    If trainings with one of the two diverged, the text has the numbers of diverged trainings with
    each. It is empty if one of the two was not run.
    """
    setting = Setting(task.name, task.rows, {task.measure: task.measure})
    values, lost = setting.values(task.measure), setting.lost(task.measure)
    if baseline is None or not {method, baseline} <= {*values, *lost}:
        return Cell("")
    if lost.keys() & {method, baseline}:
        counts = dict.fromkeys(values, (0, len(setting.seeds))) | lost
        name = "ALRC" if method == task.alrc else "ALRC and norm"
        against = "unprotected" if baseline == "none" else baseline
        diverged = ((name, *counts[method]), (against, *counts[baseline]))
        return Cell("; ".join(f"{name}: {count} of {of} diverged" for name, count, of in diverged))
    found = difference(values[method], values[baseline])
    return Cell(change(found), bold=bool(np.isfinite(found.high) and found.high < 1))


def row(task: Task) -> list[Cell]:
    """A task's row of the table."""
    best = Setting("", task.rows, {task.measure: ""}).best_clipper(task.measure)
    against_best = compared(task, task.alrc, best)
    if best is not None and against_best.text and "diverged" not in against_best.text:
        against_best = against_best._replace(text=f"{best}: {against_best.text}")
    return [
        *map(Cell, (task.name, task.unstable, task.clipped)),
        compared(task, task.alrc, "none"),
        against_best,
        compared(task, f"{task.alrc}+norm", best),
    ]


def table() -> Table:
    """All tasks."""
    found = [*flight_delays(), *forecasting(), *language_model(), *supersampling(), *partial_stem()]
    return Table("All tasks", COLUMNS, [row(task) for task in found], [NOTE])


if __name__ == "__main__":
    print(markdown(table(), 2), end="")
