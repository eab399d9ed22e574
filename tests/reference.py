"""ALRC as in the paper, in float64 NumPy with raw moments. The package must equal it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_alrc._moments.bounds import BURN_IN
from lightning_alrc._moments.rules import RAMP_HORIZON


class Reference:
    """ALRC of one loss. Without start moments it has a burn-in and a ramped decay."""

    def __init__(
        self,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        mu1_start: float | None = None,
        mu2_start: float | None = None,
        num_stddev_below: float = np.inf,
        mu2_decay: float | None = None,
    ) -> None:
        self.above, self.below = num_stddev, num_stddev_below
        self.decays = np.array([decay, decay if mu2_decay is None else mu2_decay])
        self.ramped = mu1_start is None
        self.mu = np.array([mu1_start or 0.0, mu2_start or 0.0])
        self.updates = self.losses = 0
        self.clipped_recently = 0.0
        self.last_change = 0.0
        """The last change of the mean."""
        self.clipped_total = 0

    @property
    def stddev(self) -> float:
        return float(np.sqrt(max(self.mu[1] - self.mu[0] ** 2, 0.0) + 1e-8))

    @property
    def bounds(self) -> tuple[float, float]:
        return self.bounds_at(self.below, self.above)

    def bounds_at(self, below: float, above: float) -> tuple[float, float]:
        if self.ramped and self.losses < BURN_IN:
            return -np.inf, np.inf
        return self.mu[0] - below * self.stddev, self.mu[0] + above * self.stddev

    def __call__(self, loss: Any) -> tuple[Any, Any]:
        """The clipped losses and the factors on their gradients. Updates the moments."""
        loss = np.asarray(loss, np.float64)
        finite = np.isfinite(loss)
        lower, upper = self.bounds
        clipped = np.where(finite, np.clip(loss, lower, upper), loss)
        stuck = self.clipped_recently > 0.9
        wide = (3.0 if stuck and n < 2.0 else n for n in (self.below, self.above))
        learned = np.clip(loss[finite], *self.bounds_at(*wide))
        scale = np.ones_like(loss)
        changed = finite & (clipped != loss)
        # For a loss above the upper bound and a positive mean, the factor is measured from zero, as
        # in the paper. In all other cases this factor could be outside [0, 1], so it is measured
        # from the mean.
        origin = np.where((loss > upper) & (self.mu[0] > 0), 0.0, self.mu[0])
        scale[changed] = (clipped[changed] - origin[changed]) / (loss[changed] - origin[changed])
        if finite.any():
            spread = np.clip(self.updates / RAMP_HORIZON, 1.0, RAMP_HORIZON)
            ramp = self.updates / (self.updates + spread)
            decays = np.minimum(self.decays, ramp) if self.ramped else self.decays
            means = np.array([learned.mean(), (learned**2).mean()])
            if min(self.below, self.above) < 2.0:
                decays = np.minimum(decays, 0.99) if stuck else decays
                fraction = (clipped != loss)[finite].mean()
                self.clipped_recently += 0.01 * (fraction - self.clipped_recently)
            before = self.mu[0]
            self.mu = decays * self.mu + (1 - decays) * means
            self.last_change = abs(self.mu[0] - before)
            # Two decays could make the variance negative.
            self.mu[1] = max(self.mu[1], self.mu[0] ** 2)
            self.updates += 1
            self.losses += finite.sum()
        self.clipped_total += int((clipped != loss)[finite].sum())
        return clipped, scale
