"""The tables of docs/what-the-authors-ran.md: the authors' code against the stated algorithm.

    python -m examples.cifar10_supersampling.report.published

It reads the rows that are kept in ``measured``, and trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ...comparison.differences import differences
from ...comparison.settings import Setting
from ...comparison.tables import Cell, Table, change, markdown, spread
from .rows import read_rows

MEASURED = Path(__file__).parents[1] / "measured"

METHODS = {
    "none": "unprotected",
    "norm": "norm 1",
    "alrc2": "ALRC at 2, as stated",
    "authors": "the same with the authors' start moments",
    "alrc1": "ALRC at 1, as stated",
    "guard": "the guard alone",
    "published2": "published, n = 2",
    "published3": "published, n = 3",
    "published4": "published, n = 4",
}
"""Methods, and their names in the tables."""

STATED = "alrc2"
"""The method that the others are compared with."""

SEEDS = 5
"""If a method was run with fewer seeds, its cell says how many."""

NOTE = (
    "The difference from ALRC at 2 as stated, paired by seed, with its 95 % interval; minus is "
    "better. Bold: significant after Holm's correction for the comparisons of the column."
)


class Column(NamedTuple):
    """A column of a table: the trainings of one setting.

    Attributes:
        heading: heading of the column.
        file: name of the file of rows.
        where: columns of the rows, and the value that the trainings have there.
    """

    heading: str
    file: str
    where: dict[str, Any]


def unstable(optimizer: str, rate: float) -> Column:
    """Squared errors at a learning rate that is too high."""
    where = {"loss": "squared", "optimizer": optimizer, "learning_rate": rate}
    return Column(f"rate too high: {optimizer} {rate:g}", "unstable", where)


COLUMNS = {
    "Quartic errors": [
        Column(
            "hot pixels in 5 % of the images",
            "outliers",
            {"loss": "quartic", "outlier_kind": "hot_pixels", "outlier_fraction": 0.05},
        ),
        Column("rate too high: adam 0.002", "unstable", {"loss": "quartic"}),
        Column("batches of one", "quartic", {"precision": "32-true"}),
    ],
    "Squared errors": [
        unstable("adam", 0.0001),
        unstable("adam", 0.002),
        unstable("sgd", 0.0001),
        unstable("sgd", 0.003),
        Column("batches of one", "squared", {"precision": "bf16-mixed"}),
    ],
}
"""The columns of each table."""


def losses(column: Column) -> pd.DataFrame:
    """Training losses, seeds by methods, of the trainings of a column."""
    rows = read_rows(MEASURED / f"{column.file}.csv")
    for name, value in column.where.items():
        rows = rows[rows[name] == value]
    rows["method"] = rows["method"].where(rows["alrc_start"] != "authors", "authors")
    return Setting(column.heading, rows, {"train_loss": "training loss"}).values("train_loss")


def cells(values: pd.DataFrame, methods: list[str], baseline: str) -> list[Cell]:
    """A column of a table: each method's losses, and the difference from the baseline."""
    run = [method for method in methods if method in values]
    compared = differences(values[run], baseline) if baseline in run else {}
    found = []
    for method in methods:
        if method not in run:
            found.append(Cell(""))
            continue
        own = values[method].dropna()
        text = spread(own.mean(), own.std())
        if len(own) < SEEDS:
            text += f" ({len(own)} seeds)"
        if method in compared:
            told = change(compared[method])
            text += f": **{told}**" if compared[method].is_significant else f": {told}"
        found.append(Cell(text))
    return found


def table(title: str, with_norm: bool) -> Table:
    """One table: every method of `METHODS` that was run, alone or with norm clipping.

    Args:
        title: a key of `COLUMNS`.
        with_norm: whether norm clipping is added to the methods, and to the baseline.
    """
    names = METHODS
    if with_norm:
        names = {f"{method}+norm": name for method, name in METHODS.items()}
        names = {"norm": "without ALRC"} | names
    columns = [losses(column) for column in COLUMNS[title]]
    measured = [method for method in names if any(method in column for column in columns)]
    baseline = f"{STATED}+norm" if with_norm else STATED
    texts = [cells(column, measured, baseline) for column in columns]
    return Table(
        title + (", each with norm 1" if with_norm else ""),
        ["", *(column.heading for column in COLUMNS[title])],
        [
            [Cell(names[method], bold=method == baseline), *row]
            for method, row in zip(measured, zip(*texts, strict=True), strict=True)
        ],
        [NOTE],
    )


def tables() -> list[Table]:
    """All tables of the page."""
    return [table(title, with_norm) for title in COLUMNS for with_norm in (False, True)]


if __name__ == "__main__":
    print("\n".join(markdown(each, 3) for each in tables()), end="")
