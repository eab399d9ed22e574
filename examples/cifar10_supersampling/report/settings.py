"""The settings of a grid, and their titles."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...comparison.settings import Setting
from .rows import SETTING

MEASURES = {"train_loss": "training loss", "test_error": "test error"}
"""Columns that methods are compared by, and their names in the tables; lower is better."""


def settings_of(rows: pd.DataFrame) -> list[Setting]:
    """The settings of a grid, sorted by the columns of `SETTING`."""
    groups = [group for _, group in rows.groupby(SETTING)]
    titles = [_title(group.iloc[0]) for group in groups]
    return [
        Setting(title + _distinction(group, groups, titles), group, MEASURES)
        for title, group in zip(titles, groups, strict=True)
    ]


def _title(row: pd.Series) -> str:
    """The most important settings, as a title."""
    title = (
        f"{row['loss'].capitalize()}, batch {row['batch_size']}, "
        f"{row['optimizer']} {row['learning_rate']:.3g}"
    )
    if row["outlier_kind"]:
        kind = row["outlier_kind"].replace("_", " ")
        title += f", {kind} {100 * row['outlier_fraction']:g} %"
    return title


def _distinction(group: pd.DataFrame, groups: Sequence[pd.DataFrame], titles: Sequence[str]) -> str:
    """What must be added to a title that several settings share."""
    title = _title(group.iloc[0])
    alike = pd.DataFrame(
        [each.iloc[0] for each, its in zip(groups, titles, strict=True) if its == title]
    )
    differing = [column for column in SETTING if alike[column].nunique() > 1]
    return "".join(f", {column.replace('_', ' ')} {group[column].iloc[0]}" for column in differing)
