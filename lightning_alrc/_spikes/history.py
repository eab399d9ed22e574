"""The running statistics that a ledger keeps of each sample, and how they are merged.

A table of these statistics is a float tensor, [numbers, samples], on any device. It has a row for
each field of :class:`Numbers`, and a column for each sample. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_alrc._moments.sums import LARGEST_DEVIATION

__all__ = ["Numbers", "by_sample", "merged", "padded"]


class Numbers(NamedTuple):
    """Statistics of the losses of samples. Each field is [samples]."""

    finite: Tensor
    """number of finite losses; the next five fields are statistics of these losses, or 0 if there
    are none"""
    mean: Tensor
    squared_deviation: Tensor
    """sum of the squared deviations from the mean"""
    last: Tensor
    largest: Tensor
    stddevs: Tensor
    """sum of the signed distances of the losses from the running mean of all losses, in standard
    deviations; a loss above the mean has a positive distance"""
    clipped: Tensor
    """number of clipped losses"""
    nonfinite: Tensor
    """number of losses that were NaN or infinite"""


def merged(first: Numbers, then: Numbers) -> Numbers:
    """Merge the statistics of earlier and later losses, sample by sample.

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances" (1979).
    """
    finite = first.finite + then.finite
    share = then.finite / finite.clamp(min=1.0)
    delta = then.mean - first.mean
    has_more = then.finite > 0
    larger = has_more & ((first.finite == 0) | (then.largest > first.largest))
    return Numbers(
        finite=finite,
        mean=first.mean + delta * share,
        squared_deviation=first.squared_deviation
        + then.squared_deviation
        + _square(delta) * first.finite * share,
        last=torch.where(has_more, then.last, first.last),
        largest=torch.where(larger, then.largest, first.largest),
        stddevs=first.stddevs + then.stddevs,
        clipped=first.clipped + then.clipped,
        nonfinite=first.nonfinite + then.nonfinite,
    )


def by_sample(
    columns: Tensor, losses: Tensor, stddevs: Tensor, clipped: Tensor
) -> tuple[Tensor, Numbers]:
    """The statistics of losses by sample. Several losses may belong to one sample.

    Args:
        columns: int64 [losses], the column of each loss's sample in a table.
        losses: floats [losses], in the order in which they came.
        stddevs: floats [losses], each loss's distance above the running mean, in standard
            deviations.
        clipped: bool [losses], whether each loss was clipped.

    Returns:
        The column of each sample in the table, int64 [losses], and the statistics of each sample.
        If there are fewer samples than losses, the last columns are 0, with meaningless statistics.
    """
    # Counting the samples would wait for the device, so the results are as long as the losses.
    columns, order = columns.sort(stable=True)
    losses, stddevs, clipped = losses[order], stddevs[order], clipped[order]
    is_first = torch.ones_like(columns)
    is_first[1:] = columns[1:] != columns[:-1]
    group = is_first.cumsum(0) - 1
    finite = losses.isfinite()
    values = torch.where(finite, losses, 0.0)

    def total(each: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, group, each)

    def most(each: Tensor, least: float) -> Tensor:
        return torch.full_like(each, least).scatter_reduce_(0, group, each, "amax")

    count = total(finite.to(values.dtype))
    mean = total(values) / count.clamp(min=1.0)
    position = torch.arange(len(columns), device=columns.device)
    last = most(torch.where(finite, position, 0), 0)
    largest = most(torch.where(finite, losses, -torch.inf), -torch.inf)
    numbers = Numbers(
        finite=count,
        mean=mean,
        squared_deviation=total(torch.where(finite, _square(values - mean[group]), 0.0)),
        last=values[last],
        largest=torch.where(count > 0, largest, 0.0),
        stddevs=total(torch.where(finite, stddevs, 0.0)),
        clipped=total((clipped & finite).to(values.dtype)),
        nonfinite=total((~finite).to(values.dtype)),
    )
    return torch.zeros_like(columns).index_copy_(0, group, columns), numbers


def _square(deviation: Tensor) -> Tensor:
    limit = LARGEST_DEVIATION[deviation.dtype]
    return deviation.clamp(-limit, limit).square()


def padded(table: Tensor, columns: int) -> Tensor:
    """The table with at least ``columns`` columns; new columns are 0."""
    missing = columns - table.shape[1]
    return table if missing <= 0 else torch.nn.functional.pad(table, (0, missing))
