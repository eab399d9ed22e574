"""The statistics: means over seeds, and differences of methods, paired by seed.

Trainings of one seed start from the same weights and see the same batches, so methods are compared
seed by seed. Losses and errors vary by factors, in a diverging training by orders of magnitude. So
the difference of two methods is the mean difference of logarithms. It is given as a ratio, with
Student's t interval and p value.

References:
    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6 (1979) 65.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
"""Confidence level of intervals. A p value below 1 - CONFIDENCE counts as a difference."""


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: mean of the values.
        half_width: half width of the mean's confidence interval; NaN for a single value.
    """

    mean: float
    half_width: float


def mean_interval(values: Sequence[float]) -> Mean:
    """The mean of at least one value, and the half width of its t interval."""
    if len(values) < 2:
        return Mean(float(np.mean(values)), float("nan"))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Mean(float(np.mean(values)), float(quantile * stats.sem(values)))


@dataclass(frozen=True)
class Difference:
    """How a method's values compare with a baseline's.

    Attributes:
        seeds: number of seeds that both have.
        ratio: the method's geometric mean over those seeds, divided by the baseline's.
        low: lower end of the ratio's confidence interval; NaN below two seeds.
        high: upper end of that interval.
        p: p value, not corrected; NaN below two seeds.
        p_corrected: p value corrected by Holm's method for all comparisons with the baseline.
        comparisons: number of those comparisons.
    """

    seeds: int
    ratio: float
    low: float
    high: float
    p: float
    p_corrected: float = float("nan")
    comparisons: int = 1

    @property
    def verdict(self) -> str:
        """In words: "lower", "higher", "inside the noise", or why there is no verdict."""
        if self.seeds == 0:
            return "no seed in common"
        if self.ratio == self.low == self.high == 1:
            return "identical"
        if self.seeds == 1:
            return "one seed: unknown"
        if self.p >= 1 - CONFIDENCE:
            return "inside the noise"
        if self.p_corrected >= 1 - CONFIDENCE:
            return f"inside the noise of {self.comparisons} comparisons"
        return "lower" if self.ratio < 1 else "higher"

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant."""
        return self.verdict in ("lower", "higher")


def difference(values: pd.Series, baseline: pd.Series) -> Difference:
    """Compare a method's values with a baseline's; both are positive and indexed by seed."""
    pairs = pd.concat([values, baseline], axis=1, join="inner").dropna()
    logarithms = np.log(pairs.to_numpy(dtype=float))
    changes = logarithms[:, 0] - logarithms[:, 1]
    nan = float("nan")
    if len(changes) == 0:
        return Difference(0, nan, nan, nan, nan)
    if not changes.any():
        return Difference(len(changes), 1.0, 1.0, 1.0, 1.0)
    ratio = float(np.exp(changes.mean()))
    if len(changes) == 1:
        return Difference(1, ratio, nan, nan, nan)
    test = stats.ttest_rel(*logarithms.T)
    low, high = np.exp(test.confidence_interval(CONFIDENCE))
    return Difference(len(changes), ratio, float(low), float(high), float(test.pvalue))


def differences(values: pd.DataFrame, baseline: str) -> dict[str, Difference]:
    """Compare each method with a baseline.

    Args:
        values: positive values, seeds by methods; NaN if a method has no value for a seed.
        baseline: one of the methods.

    Returns:
        The difference of each other method. P values are corrected for all these comparisons.
    """
    compared = {
        method: difference(values[method], values[baseline])
        for method in values.columns
        if method != baseline
    }
    tested = [method for method, each in compared.items() if not np.isnan(each.p)]
    corrected = holm([compared[method].p for method in tested])
    for method, p in zip(tested, corrected, strict=True):
        compared[method] = replace(compared[method], p_corrected=p, comparisons=len(tested))
    return compared


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number.

    If all corrected values below 0.05 count as differences, the probability that the list has any
    false difference is at most 5 %.
    """
    corrected = np.empty(len(p_values))
    order = np.argsort(p_values)
    largest = 0.0
    for rank, position in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[position])
        corrected[position] = min(1.0, largest)
    return corrected.tolist()
