"""The report's tables that only this example has; `comparison.tables` has the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd

from ...comparison import tables
from ...comparison.settings import Setting, in_order
from ...comparison.tables import Cell, Table, lost, number, spread
from .rows import SETTING

PAPER = {
    ("squared", "quartic"): ["loss", "batch_size"],
    ("unstable",): ["loss", "batch_size", "optimizer", "learning_rate"],
}
"""For each table of the paper: its experiments, and the settings that its columns vary."""


def paper_tables(settings: Iterable[Setting]) -> list[Table]:
    """The paper's tables: training losses by loss, batch size and method, without outliers.

    There is one table for each combination of the other settings. Unstable learning rates have
    tables of their own.
    """
    rows = pd.concat([each.rows for each in settings])
    rows = rows[rows["outlier_kind"] == ""]
    tables = []
    for experiments, columns in PAPER.items():
        shared = [name for name in SETTING if name not in ("experiment", *columns)]
        for _, group in rows[rows["experiment"].isin(experiments)].groupby(shared):
            # If the grid was given `losses`, squared and quartic may have the same trainings.
            group = group.drop_duplicates([*columns, "method", "seed"])
            cells = [cell for _, cell in group.groupby(columns)]
            first = group.iloc[0]
            tables.append(
                Table(
                    _paper_title(first, shared),
                    ["", *(_paper_heading(cell.iloc[0], columns) for cell in cells)],
                    [
                        [Cell(method), *(_paper_cell(cell, method) for cell in cells)]
                        for method in in_order(group["method"])
                    ],
                    [
                        f"Mean of the last {first['last_steps']:,} training losses × 100: "
                        "mean ± standard deviation of the repeats."
                    ],
                )
            )
    return tables


def _paper_title(row: pd.Series, shared: Sequence[str]) -> str:
    """The settings that a whole table shares."""
    optimizer = f"{row['optimizer']} {row['learning_rate']:.3g}"
    rates = optimizer if "optimizer" in shared else "Unstable learning rates"
    return f"{rates}, {row['steps']:,} steps, width {row['width']:g}, {row['precision']}"


def _paper_heading(row: pd.Series, columns: Sequence[str]) -> str:
    """The settings that a column's trainings share."""
    heading = f"{row['loss']}, batch {row['batch_size']}"
    if "optimizer" in columns:
        heading += f", {row['optimizer']} {row['learning_rate']:.3g}"
    return heading


def _paper_cell(rows: pd.DataFrame, method: str) -> Cell:
    """Mean and standard deviation x100 of a method's training losses."""
    losses = 100 * rows[rows["method"] == method]["train_loss"]
    if losses.empty:
        return Cell("")
    if losses.isna().any():
        return Cell(lost(losses.isna().sum(), len(losses)))
    mean = losses.mean()
    return Cell(spread(mean, losses.std(), like=max(mean, 100.0)))


def comparison_table(setting: Setting, measure: str, baseline: str | None) -> Table:
    """`comparison.tables.comparison_table`, with the error of the input."""
    table = tables.comparison_table(setting, measure, baseline)
    if measure != "test_error":
        return table
    first, *others = table.notes
    unrestored = number(setting.rows["test_input_error"].mean())
    note = f"The input as it is, not restored: {unrestored}."
    return replace(table, notes=[first, note, *others])


ALSO_MEASURED = {
    "test_mse": "test MSE",
    "test_psnr": "PSNR",
    "test_ssim": "SSIM",
    "ema_test_error": "test error of averaged weights",
    "clipped": "losses clipped",
    "steps_survived": "steps survived",
    "seconds": "seconds",
}


def also_measured_table(setting: Setting) -> Table:
    """A table of the other measures in a setting's rows."""
    counts = ("clipped", "steps_survived", "seconds")
    return tables.also_measured_table(setting, ALSO_MEASURED, counts)
