"""A setting: trainings that differ only in the method and the seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .differences import Difference, differences

GRADIENT_CLIPPERS = ("norm", "value", "zclip", "autoclip", "autoclip10", "agc")
"""The methods that only clip gradients."""


def in_order(methods: Iterable[str]) -> list[str]:
    """Each method once, in this order: none, gradient clippers, others, combinations."""
    known = ("none", *GRADIENT_CLIPPERS, "huber")

    def place(method: str) -> tuple[int, int, str]:
        return method.count("+"), known.index(method) if method in known else len(known), method

    return sorted(set(methods), key=place)


@dataclass(frozen=True)
class Setting:
    """The trainings of one setting.

    Attributes:
        title: title, unique among the settings.
        rows: one row for each training, with the columns method and seed, those of `measures`, and
            more.
        measures: columns that methods are compared by, and their names in the tables; lower is
            better. The first is NaN if a training lost its weights: they became NaN or infinite.
    """

    title: str
    rows: pd.DataFrame = field(repr=False)
    measures: Mapping[str, str]

    def __getitem__(self, column: str) -> object:
        """The value that all trainings have in a column."""
        return self.rows[column].iloc[0]

    @property
    def name(self) -> str:
        """The title, for names of files."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")

    @property
    def methods(self) -> list[str]:
        """All methods, see `in_order`."""
        return in_order(self.rows["method"])

    @property
    def seeds(self) -> list[int]:
        """All seeds, in order."""
        return sorted(int(seed) for seed in self.rows["seed"].unique())

    def lost(self, measure: str) -> dict[str, tuple[int, int]]:
        """The number of lost trainings and of all trainings, for each method that lost any.

        A training counts as lost if ``measure`` or the first measure is NaN. The first measure is
        NaN if the training lost its weights; others may still have a value.
        """
        first = next(iter(self.measures))
        absent = self.rows[[first, measure]].isna().any(axis=1)
        by_method = absent.groupby(self.rows["method"])
        counted = zip(by_method.sum().items(), by_method.size(), strict=True)
        return {method: (int(lost), int(of)) for (method, lost), of in counted if lost}

    def values(self, measure: str) -> pd.DataFrame:
        """Values, seeds by methods, the lowest mean first; without methods that lost a training.

        NaN if a method was not run with a seed.
        """
        lost = self.lost(measure)
        kept = self.rows[~self.rows["method"].isin(list(lost))]
        values = kept.pivot(index="seed", columns="method", values=measure)
        return values[values.mean().sort_values(kind="stable").index]

    def best_clipper(self, measure: str) -> str | None:
        """The gradient clipper with the lowest mean, among those that lost no training."""
        return next((m for m in self.values(measure) if m in GRADIENT_CLIPPERS), None)

    def lowest(self, measure: str) -> list[str]:
        """The method with the lowest mean, and those whose difference from it may be chance.

        Empty if there is no verdict, for example with a single seed.
        """
        values = self.values(measure)
        if values.empty:
            return []
        first = values.columns[0]
        compared = differences(values, first)
        if all(np.isnan(each.p) for each in compared.values()):
            return []
        return [first, *(method for method, each in compared.items() if may_be_chance(each))]


def may_be_chance(difference: Difference) -> bool:
    """Whether there are enough seeds for a verdict, and the difference is not significant."""
    return not np.isnan(difference.p) and not difference.is_significant
