"""``Watcher``: finds events that the user should know of, in the rows of a fit.

An event has one kind and one loss. Events of three kinds are found in the rows, each kind
independently of the others:

- losses that are NaN or infinite;
- so many clips that ALRC limits the step size instead of guarding against spikes;
- the first clip after a long calm, which is a time without clips.

Events of two more kinds are found in the record, once a spike is judged: the spike comes from the
data, or the losses diverge.

How many clips are too many depends on ``num_stddev``. A low threshold always clips many ordinary
losses. :func:`clipped_limit` has the rule, and :data:`USUAL` the measurements that it uses.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lightning_alrc import functional
from lightning_alrc._spikes import judging
from lightning_alrc._spikes.record import Spike
from lightning_alrc.alrc import ALRC

__all__ = [
    "CLIP_AFTER_CALM",
    "DATA_EVENT",
    "DIVERGENCE_EVENT",
    "MANY_CLIPS",
    "NONFINITE",
    "Event",
    "Watcher",
    "clipped_limit",
    "event_of_spike",
]

NONFINITE = "a loss is not finite"
MANY_CLIPS = "many losses are clipped"
CLIP_AFTER_CALM = "a loss spiked"
DATA_EVENT = "a spike comes from the data"
DIVERGENCE_EVENT = "losses diverge"

FRACTION = 0.2
"""Smallest limit of the clipped fraction. It applies where ``num_stddev`` is so large that at most
10 % of ordinary losses are clipped."""

WINDOW = 100
"""Least number of steps over which a clipped fraction is taken. In fewer steps, a few clips would
already exceed the limit."""

CALM = 1000
"""Steps without a clip after which the next clip is an event."""

USUAL = {
    0.5: (0.74, 0.69),
    0.75: (0.55, 0.46),
    1.0: (0.38, 0.28),
    1.25: (0.27, 0.16),
    1.5: (0.19, 0.09),
    1.75: (0.13, 0.05),
    2.0: (0.10, 0.03),
    3.0: (0.04, 0.00),
}
"""Fraction of ordinary losses that ALRC clips, by ``num_stddev``.

The first number is the largest fraction among three distributions: Gaussian, log-normal with a
standard deviation as large as its mean, and exponential. The second number is the Gaussian's.
``test_watcher.py`` measures both."""


class Event(NamedTuple):
    """Something that a user should know of."""

    kind: str
    """:data:`NONFINITE`, :data:`MANY_CLIPS`, :data:`CLIP_AFTER_CALM`, :data:`DATA_EVENT` or
    :data:`DIVERGENCE_EVENT`"""
    loss: str
    """name of the loss"""
    text: str
    """what happened, in one or two sentences"""
    lasted: int = 0
    """number of steps for which the clipped fraction has been above its limit; 0 for other kinds
    than :data:`MANY_CLIPS`"""
    spike_step: int | None = None
    """step of the spike, for :data:`DATA_EVENT` and :data:`DIVERGENCE_EVENT`; ``None`` for other
    kinds"""


class Watcher:
    """Watches the rows of one fit.

    Args:
        step: the step at which the fit starts.
        totals: ``nonfinite_total`` and ``clipped_total`` at that step, by name of the loss. Losses
            counted before the fit give no event.
        clipped_fraction: limit of the clipped fraction. A larger fraction over 100 or more steps is
            an event. ``None`` takes :func:`clipped_limit` for each loss.
        calm: number of steps without a clip after which the next clip is an event. Only the
            steps of rows without a clip are counted, because a row does not tell at which of its
            steps losses were clipped.
    """

    def __init__(
        self,
        step: int = 0,
        totals: Mapping[str, Mapping[str, float]] | None = None,
        clipped_fraction: float | None = None,
        calm: float = CALM,
    ) -> None:
        self._step = step
        self._watched = {name: _Watched(step, known) for name, known in (totals or {}).items()}
        self._clipped_fraction = clipped_fraction
        self._calm = calm

    def events(
        self, step: int, rows: Mapping[str, Mapping[str, float]], losses: Mapping[str, ALRC]
    ) -> list[Event]:
        """The events in all losses' rows at one step.

        Args:
            step: the step of the rows.
            rows: by name of the loss, as returned by :meth:`~lightning_alrc.ALRC.take_row`.
            losses: the ALRC of each loss, by name.
        """
        found = []
        for name, row in rows.items():
            watched = self._watched.setdefault(name, _Watched(self._step, {}))
            limit = self._clipped_fraction
            if limit is None:
                limit = clipped_limit(losses[name].num_stddev, losses[name].num_stddev_below)
            for event in (
                watched.take_nonfinite(name, step, row),
                watched.take_many_clips(name, step, row, limit),
                watched.take_clip_after_calm(name, step, row, self._calm),
            ):
                if event is not None:
                    found.append(event)
            watched.last_row_step = step
        self._step = step
        return found


def event_of_spike(spike: Spike, spikes: Iterable[Spike], alrc: ALRC) -> Event | None:
    """The event of a spike that has been judged.

    Args:
        spike: the spike. Its kind is known.
        spikes: all spikes of the record. The text lists the epochs in which the same sample spiked.
        alrc: the ALRC of the spike's loss. Its moments are read from the device.

    Returns:
        The event. ``None`` for a spike that comes from the data and is at most 6 standard
        deviations from the mean, because every training has spikes that small. The mean is that at
        the time of this call. A spike is judged about 50 calls after it, so the mean is about that
        much later than the spike. The standard deviation follows from this mean and the spike's
        threshold.
    """
    where = f"step {spike.step:,}, epoch {spike.epoch:,}, batch {spike.batch_idx:,}"
    if spike.sample is not None:
        where += f", sample {spike.sample:,}"
    if spike.id is not None and type(spike.id) is not list:
        where += f", id {spike.id!r}"
    what = f"{spike.loss:.4g} at {where}, clipped to {spike.threshold:.4g}"
    if spike.gradient_norm is not None:
        what += f"; the gradient norm was then {spike.gradient_norm:.4g}, before norm clipping"
    if spike.kind == judging.DIVERGENCE:
        text = (
            f"{what}. The losses after it stay above those before it, so this batch alone is not "
            "the cause. Lower the learning rate, or go back to a checkpoint before that step. "
            "Losses that rise because the data changes for good look the same"
        )
        return Event(DIVERGENCE_EVENT, spike.name, text, spike_step=spike.step)
    mu1 = alrc.mu1.item()
    is_below = spike.loss < spike.threshold
    number = alrc.num_stddev_below if is_below else alrc.num_stddev
    # A spike below the mean may come from an earlier fit that had a lower bound. If this fit has
    # none, ``number`` is None. The deviation is then 0, so the spike is always reported.
    deviation = abs(spike.threshold - mu1) / (number or math.inf)
    if not abs(spike.loss - mu1) > functional.SPIKE * deviation:
        return None
    epochs = sorted({each.epoch for each in spikes if _is_same_sample(each, spike)})
    again = f" The same sample spiked in the epochs {epochs}." if len(epochs) > 1 else ""
    falls = " Losses that fall for good look the same." if is_below else ""
    text = f"{what}. The losses after it do not stay high: look at the data.{falls}{again}"
    return Event(DATA_EVENT, spike.name, text, spike_step=spike.step)


def _is_same_sample(each: Spike, other: Spike) -> bool:
    has_id = each.id is not None and type(each.id) is not list
    return has_id and (each.name, each.id) == (other.name, other.id)


class _Watched:
    """The watcher's state for one loss."""

    def __init__(self, step: int, totals: Mapping[str, float]) -> None:
        self._totals = {"nonfinite_total": 0.0, "clipped_total": 0.0, **totals}
        self._last_clip_step = step
        self.last_row_step = step
        self._window_start = step
        self._window_steps = 0
        self._window_clipped = 0.0
        self._high_since: int | None = None
        """step since which the clipped fraction is above the limit"""

    def _take_increase(self, total: str, row: Mapping[str, float]) -> float:
        """The increase of a total since the last row. Sets the total to that of this row."""
        before, self._totals[total] = self._totals[total], row[total]
        return row[total] - before

    def take_nonfinite(self, name: str, step: int, row: Mapping[str, float]) -> Event | None:
        count = self._take_increase("nonfinite_total", row)
        if not count:
            return None
        return Event(NONFINITE, name, f"{count:,.0f} NaN or infinite up to step {step:,}")

    def take_clip_after_calm(
        self, name: str, step: int, row: Mapping[str, float], calm: float
    ) -> Event | None:
        count = self._take_increase("clipped_total", row)
        if not count:
            return None
        steps, self._last_clip_step = self.last_row_step - self._last_clip_step, step
        if steps < calm:
            return None
        text = f"{count:,.0f} clipped up to step {step:,}, the first for {steps:,} steps or more"
        return Event(CLIP_AFTER_CALM, name, text)

    def take_many_clips(
        self, name: str, step: int, row: Mapping[str, float], limit: float
    ) -> Event | None:
        steps = step - self.last_row_step
        if "clipped_fraction" in row:  # a row without finite losses has no clipped fraction
            self._window_steps += steps
            self._window_clipped += steps * row["clipped_fraction"]
        if self._window_steps < WINDOW:
            return None
        fraction, since = self._window_clipped / self._window_steps, self._window_start
        self._window_start, self._window_steps, self._window_clipped = step, 0, 0.0
        if fraction <= limit:
            self._high_since = None
            return None
        if self._high_since is None:
            self._high_since = since
        lasted = step - self._high_since
        text = (
            f"{fraction:.0%} clipped up to step {step:,}, and more than {limit:.0%} for "
            f"{lasted:,} steps. ALRC has become a limit on the step size rather than a guard "
            "against spikes. Raise num_stddev, lower the learning rate, or call "
            "ALRCCallback.reset() if the losses have changed for good"
        )
        return Event(MANY_CLIPS, name, text, lasted=lasted)


def clipped_limit(num_stddev: float, num_stddev_below: float | None = None) -> float:
    """The clipped fraction above which ALRC limits the step size.

    It is twice the usual fraction at this ``num_stddev``, and at least 20 %. If the usual fraction
    is above a third, the limit is halfway between the usual fraction and 100 %.

    >>> [round(clipped_limit(num_stddev), 2) for num_stddev in (3, 2, 1.5, 1, 0.5)]
    [0.2, 0.2, 0.38, 0.69, 0.87]

    Args:
        num_stddev: see :class:`~lightning_alrc.ALRC`. Below 0.5, the limit is that of 0.5.
        num_stddev_below: see :class:`~lightning_alrc.ALRC`.
    """
    usual, usual_of_gaussian = _usual(num_stddev)
    if num_stddev_below is not None:
        # Of the three distributions, only the Gaussian has a tail on both sides. So only the two
        # fractions of the Gaussian are added.
        usual = max(usual, usual_of_gaussian + _usual(num_stddev_below)[1])
    return max(FRACTION, min(2 * usual, (1 + usual) / 2))


def _usual(num_stddev: float) -> tuple[float, float]:
    """The two fractions at any ``num_stddev``, interpolated linearly in :data:`USUAL`."""
    known = list(USUAL)
    index = bisect_right(known, num_stddev)
    if index in (0, len(known)):
        return USUAL[known[0 if index == 0 else -1]]
    low, high = known[index - 1], known[index]
    part = (num_stddev - low) / (high - low)
    (first, second), (first_high, second_high) = USUAL[low], USUAL[high]
    return first + part * (first_high - first), second + part * (second_high - second)
