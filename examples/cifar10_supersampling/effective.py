"""How many losses ALRC clips as stated in the paper and as in the authors' code.

    python -m examples.cifar10_supersampling.effective

Losses are log-normal. Many sequences of them are clipped side by side, one loss a step, until the
moments have settled; then clips are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_alrc import functional

from . import published

# Clipped fractions of the stated algorithm are interpolated between these numbers.
STATED_NS = tuple(np.arange(0.25, 8.01, 0.25))

DECAY = 0.999

# The number of steps before clips are counted, and the number of steps in which they are counted.
# The moments settle several times as slowly as their decay suggests, because they are updated by
# losses after clipping.
SETTLING, COUNTED = 20_000, 10_000


def stated_step(moments: tuple[Tensor, Tensor], losses: Tensor, n: Tensor) -> Any:
    """The moments (mean and variance) after a step, and which losses were clipped."""
    mu1, variance = moments
    clipped = functional.clip(losses, mu1, functional.threshold(mu1, variance, n))
    moved = functional.update(mu1, variance, clipped.bounded - mu1, None, DECAY)
    return moved, clipped.scale < 1.0


def published_step(moments: tuple[Tensor, Tensor], losses: Tensor, n: Tensor) -> Any:
    """The same as `stated_step`, with the authors' moments."""
    mu1, mu2 = moments
    clipped = functional.clip(losses, mu1, published.threshold(mu1, mu2, n))
    return published.moved(mu1, mu2, clipped.bounded[..., None]), clipped.scale < 1.0


def clipped_fractions(
    step: Callable[[tuple[Tensor, Tensor], Tensor, Tensor], Any],
    ns: Sequence[float],
    spread: float,
    sequences: int,
    seed: int,
) -> list[float]:
    """The fraction of log-normal losses of mean 1 that an algorithm clips, for each n.

    Args:
        step: step of the algorithm.
        ns: values of `num_stddev`.
        spread: standard deviation of the losses divided by their mean.
        sequences: number of sequences of losses.
        seed: seed of the losses, which are the same for each n.
    """
    generator = torch.Generator().manual_seed(seed)
    sigma = math.sqrt(math.log1p(spread**2))
    n = torch.tensor(ns, dtype=torch.float64)[:, None]
    start = torch.ones(len(ns), sequences, dtype=torch.float64)
    moments = (start, (1.0 + spread**2) * start)
    counts = torch.zeros(len(ns), dtype=torch.float64)
    for number in range(SETTLING + COUNTED):
        normal = torch.randn(sequences, generator=generator, dtype=torch.float64)
        losses = (sigma * normal - 0.5 * sigma**2).exp().expand(len(ns), -1)
        moments, clipped = step(moments, losses, n)
        if number >= SETTLING:
            counts += clipped.double().mean(1)
    return (counts / COUNTED).tolist()


def effective(
    spreads: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0), sequences: int = 100, seed: int = 0
) -> None:
    """Print clipped fractions, and the n at which both algorithms clip equally many losses.

    Args:
        spreads: standard deviations of the losses divided by their mean.
        sequences: number of sequences of losses.
        seed: seed of the losses.
    """
    table = Table(
        title="Losses clipped, as stated and as published",
        caption="Effective n: where the stated algorithm clips as many.",
        box=box.SIMPLE_HEAD,
    )
    for head in ("spread", "n", "stated", "published", "effective n"):
        table.add_column(head, justify="right")
    for spread in spreads:
        ns = (2.0, 3.0, 4.0)
        stated = clipped_fractions(stated_step, STATED_NS, spread, sequences, seed)
        theirs = clipped_fractions(published_step, ns, spread, sequences, seed)
        for n, fraction in zip(ns, theirs, strict=True):
            of_stated = stated[STATED_NS.index(n)]
            table.add_row(
                f"{spread:g}",
                f"{n:g}",
                f"{of_stated:.1%}",
                f"{fraction:.1%}",
                effective_n(stated, fraction),
            )
    Console(width=80).print(table)


def effective_n(stated: Sequence[float], fraction: float) -> str:
    """The n at which the stated algorithm clips a fraction of the losses.

    Args:
        stated: fractions that the stated algorithm clips, at `STATED_NS`.
        fraction: the fraction to clip.
    """
    if fraction <= stated[-1]:
        return f"above {STATED_NS[-1]:g}"
    # Fractions fall with n, roughly exponentially.
    logarithms = np.log(np.maximum(stated, 1e-12))
    return f"{np.interp(-math.log(fraction), -logarithms, STATED_NS):.2f}"


if __name__ == "__main__":
    auto_cli(
        effective, as_positional=False, prog="python -m examples.cifar10_supersampling.effective"
    )
