"""How soon the threshold follows a lasting rise of the losses.

``python -m tests.benchmarks.rises`` prints the table of ``docs/acting-on-spikes.md``.
"""

from __future__ import annotations

import torch

from lightning_alrc import ALRC

BEFORE = 3000
RISE = 100
"""Height of the rise, in standard deviations of the losses."""
WINDOW = 200
"""Number of steps over which a clipped fraction is taken."""


def steps_until_usual(num_stddev: float, full: bool, limit: int = 4000) -> int | None:
    """Steps from the rise until the clipped fraction is at most 0.05 above that before the rise.

    Args:
        num_stddev: setting of ALRC.
        full: whether the decay has its final value, 0.999, from the first loss on. Otherwise the
            decay is that of a training after 3,000 losses.
        limit: number of steps observed after the rise.

    Returns:
        A multiple of 10; ``None`` if it is more than ``limit - 200``.
    """
    generator = torch.Generator().manual_seed(0)
    losses = 1.0 + 0.01 * torch.randn(BEFORE + limit, generator=generator, dtype=torch.float64)
    losses[BEFORE:] += 0.01 * RISE
    starts = {"mu1_start": 1.0, "mu2_start": 1.0 + 1e-4} if full else {}
    alrc, totals = ALRC(num_stddev=num_stddev, **starts), {}
    for step, loss in enumerate(losses, 1):
        alrc(loss.clone().requires_grad_())
        if step % 10:
            continue
        totals[step], first = alrc.clipped_total.item(), step - WINDOW
        if first >= BEFORE:
            usual = (totals[BEFORE] - totals[1000]) / (BEFORE - 1000)
            if (totals[step] - totals[first]) / WINDOW <= usual + 0.05:
                return first - BEFORE
    return None


if __name__ == "__main__":
    tried = (0.5, 1.0, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0)
    print("num_stddev", *tried, sep="\t")
    for full, where in ((False, "3,000 in"), (True, "full decay")):
        print(where, *(steps_until_usual(each, full) for each in tried), sep="\t")
