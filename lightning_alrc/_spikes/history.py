"""What a ledger keeps of samples: a few numbers of each, and how those of more losses join them.

All of it are sums over columns of a float64 tensor, [numbers, samples], on any device. Nothing here
waits for one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_alrc._moments.sums import LARGEST_DEVIATION

__all__ = ["Numbers", "grouped", "grown", "joined"]


class Numbers(NamedTuple):
    """The losses of each of some samples. Each field has one number a sample."""

    finite: Tensor
    """how many were finite; the next four are of those, and 0 where there are none"""
    mean: Tensor
    squares: Tensor
    """sum of the squared deviations from the mean"""
    last: Tensor
    largest: Tensor
    stddevs: Tensor
    """sum of the standard deviations that they lay above the running mean of all losses"""
    clipped: Tensor
    """how many were clipped"""
    nonfinite: Tensor
    """how many were NaN or infinite"""


def joined(first: Numbers, then: Numbers) -> Numbers:
    """The numbers of losses and of later ones together, sample by sample.

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances" (1979).
    """
    finite = first.finite + then.finite
    share = then.finite / finite.clamp(min=1.0)
    apart = then.mean - first.mean
    has_more = then.finite > 0
    larger = has_more & ((first.finite == 0) | (then.largest > first.largest))
    return Numbers(
        finite=finite,
        mean=first.mean + apart * share,
        squares=first.squares + then.squares + _square(apart) * first.finite * share,
        last=torch.where(has_more, then.last, first.last),
        largest=torch.where(larger, then.largest, first.largest),
        stddevs=first.stddevs + then.stddevs,
        clipped=first.clipped + then.clipped,
        nonfinite=first.nonfinite + then.nonfinite,
    )


def grouped(
    rows: Tensor, losses: Tensor, stddevs: Tensor, clipped: Tensor
) -> tuple[Tensor, Numbers]:
    """The numbers of losses of which several may be of one sample.

    Args:
        rows: int64 [losses], where the sample of each is in a table.
        losses: floats [losses], in the order in which they came.
        stddevs: floats [losses], how many standard deviations each lay above the running mean.
        clipped: bool [losses], whether each was clipped.

    Returns:
        Where each sample is in the table, int64 [losses], and the numbers of each. There are fewer
        samples than losses. The rest of the places are 0, and their numbers mean nothing.
    """
    # To find how many samples there are would wait for the device.
    rows, order = rows.sort(stable=True)
    losses, stddevs, clipped = losses[order], stddevs[order], clipped[order]
    is_first = torch.ones_like(rows)
    is_first[1:] = rows[1:] != rows[:-1]
    group = is_first.cumsum(0) - 1
    finite = losses.isfinite()
    values = torch.where(finite, losses, 0.0)

    def total(each: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, group, each)

    def most(each: Tensor, least: float) -> Tensor:
        return torch.full_like(each, least).scatter_reduce_(0, group, each, "amax")

    count = total(finite.to(values.dtype))
    mean = total(values) / count.clamp(min=1.0)
    position = torch.arange(len(rows), device=rows.device)
    last = most(torch.where(finite, position, 0), 0)
    largest = most(torch.where(finite, losses, -torch.inf), -torch.inf)
    numbers = Numbers(
        finite=count,
        mean=mean,
        squares=total(torch.where(finite, _square(values - mean[group]), 0.0)),
        last=values[last],
        largest=torch.where(count > 0, largest, 0.0),
        stddevs=total(torch.where(finite, stddevs, 0.0)),
        clipped=total((clipped & finite).to(values.dtype)),
        nonfinite=total((~finite).to(values.dtype)),
    )
    return torch.zeros_like(rows).index_copy_(0, group, rows), numbers


def _square(deviation: Tensor) -> Tensor:
    limit = LARGEST_DEVIATION[deviation.dtype]
    return deviation.clamp(-limit, limit).square()


def grown(table: Tensor, columns: int) -> Tensor:
    """A table of at least as many columns, the new ones 0."""
    missing = columns - table.shape[1]
    return table if missing <= 0 else torch.nn.functional.pad(table, (0, missing))
