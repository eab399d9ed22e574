"""Decides whether a spike comes from the data or from a divergence of the training.

Here, a spike is a clipped loss. (For the logged ``spike_score``, it is a loss more than 6 standard
deviations above the mean.) In a divergence, the losses stay high on every batch. After a spike that
comes from the data, they do not. A loss below the lower bound is judged by the same rule, so losses
that fall for good count as data: a fall is no reason for a warning.

A call gives ALRC the losses of a batch, or of a part of it. The level of a call is the mean of its
finite losses before clipping, or infinity if no loss is finite. A call without losses, such as that
of a task with no sample in the batch, has no level and is not counted. A spike is judged after the
next 50 calls of its loss, by two medians: of the levels of the next 10 calls, and of all 50 calls.
The spike is

- ``"divergence"`` if both medians lie above the 0.9 quantile of the levels of the 50 calls before
  the spike,
- ``"data"`` otherwise.

A spike with fewer than 25 calls before it is not judged. If 10 calls before it were enough, 1 in
300 spikes would be judged a divergence although the training does not diverge. At the end of a fit,
10 calls after the spike are enough.

The rule does not use ALRC's threshold, because the threshold follows a lasting rise within a few
hundred steps, or within a few dozen steps if ``num_stddev`` is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments.sums import Sums

__all__ = ["DATA", "DIVERGENCE", "KINDS", "WINDOW", "CallKey", "Judge", "checked_judging"]

DATA, DIVERGENCE = "data", "divergence"
KINDS = (DATA, DIVERGENCE)

WINDOW = 50
"""A spike is judged by up to this many calls before it, and by up to this many calls after it."""

LEAST_BEFORE = 25
"""A spike with fewer calls before it is not judged."""

LEAST_AFTER = 10
"""At the end of a fit, a spike with fewer calls after it is not judged. The first median is always
of this many calls."""

QUANTILE = 0.9
"""Both medians of a divergence lie above this quantile of the levels before its first spike."""

CallKey = tuple[int, int, int, int]
"""Step, epoch, batch_idx and call of a spike. Spikes of one call have the same key."""


class Judge:
    """Judges the spikes of one loss on one rank.

    Levels stay on the device until a spike needs them.
    """

    def __init__(self) -> None:
        self._levels: list[Any] = []
        """levels of the last calls. A level that the host has not read yet is a pair of tensors:
        sum and number of the finite losses. All others are floats."""
        self._dropped = 0
        """number of calls whose levels were dropped"""
        self._waiting: list[tuple[int, CallKey]] = []
        """one pair for each call whose spikes are not judged yet, in the order of the calls: the
        number of calls before it, and its key"""
        self._ceiling: float | None = None
        """quantile of the levels before the first spike of a divergence; kept while later spikes of
        the same divergence wait to be judged"""

    @property
    def count(self) -> int:
        """Number of calls so far."""
        return self._dropped + len(self._levels)

    @property
    def has_unjudged(self) -> bool:
        """Whether any spike is not judged yet."""
        return bool(self._waiting)

    @property
    def levels_kept(self) -> int:
        """Number of calls whose levels are kept."""
        return len(self._levels)

    def observe(self, sums: Sums) -> None:
        """Add a call's level, from the sums of its losses. Never waits for the device."""
        loss_sum, count = sums.loss, sums.losses
        if isinstance(loss_sum, Tensor):
            self._levels.append((loss_sum, count))
        else:
            self._levels.append(loss_sum / count if count else math.inf)

    def enter(self, number: int, key: CallKey) -> None:
        """Add a spike to be judged. Spikes must be entered in the order of their calls.

        Args:
            number: number of calls before the call of the spike.
            key: key of the call.
        """
        if not self._waiting or self._waiting[-1][1] != key:
            self._waiting.append((number, key))

    def take_verdicts(self, at_end: bool = False) -> dict[CallKey, str]:
        """Judge the spikes with enough calls after them, and return their kinds.

        May read the device. Spikes with too few calls before them are dropped, and have no kind.

        Args:
            at_end: whether the fit has ended; then 10 later calls are enough.
        """
        found: dict[CallKey, str] = {}
        least = LEAST_AFTER if at_end else WINDOW
        while self._waiting and self.count - self._waiting[0][0] > least:
            number, key = self._waiting.pop(0)
            self._read()
            # Before a later spike of a divergence, the losses are high already. So the ceiling of
            # the divergence's first spike is kept.
            if self._ceiling is None:
                self._ceiling = self._ceiling_before(number)
            if self._ceiling is None:
                continue
            at = number + 1 - self._dropped
            after = self._levels[at : at + WINDOW]
            has_diverged = min(median(after), median(after[:LEAST_AFTER])) > self._ceiling
            found[key] = DIVERGENCE if has_diverged else DATA
            if not (has_diverged and self._waiting):
                self._ceiling = None
        return found

    def _ceiling_before(self, number: int) -> float | None:
        at = number - self._dropped
        before = sorted(self._levels[max(at - WINDOW, 0) : at])
        return before[int(QUANTILE * (len(before) - 1))] if len(before) >= LEAST_BEFORE else None

    def _read(self) -> None:
        unread = [at for at, each in enumerate(self._levels) if isinstance(each, tuple)]
        if unread:
            # Losses of one name may be on several devices.
            device = self._levels[unread[-1]][0].device
            pairs = torch.stack([n.to(device) for at in unread for n in self._levels[at]])
            for at, (loss_sum, count) in zip(unread, pairs.view(-1, 2).tolist(), strict=True):
                self._levels[at] = loss_sum / count if count else math.inf

    def trim(self) -> None:
        """Drop levels that no spike needs. All spikes so far must have been entered."""
        needed = self._waiting[0][0] if self._waiting else self.count
        old = needed - WINDOW - self._dropped
        if old > 0:
            del self._levels[:old]
            self._dropped += old

    def dump(self, count: int | None = None) -> dict[str, Any]:
        """The state, as plain numbers. May read the device.

        Args:
            count: return the state after this many calls; ``None`` returns the current state.
        """
        count = self.count if count is None else count
        self._read()
        return {
            "levels": self._levels[: max(count - self._dropped, 0)][-2 * WINDOW :],
            "waiting": [[count - n, *key] for n, key in self._waiting if n < count],
            "ceiling": self._ceiling,
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Judge:
        """A judge that continues from a state that :func:`checked_judging` accepted."""
        judge = cls()
        judge._levels = list(dumped["levels"])
        for back, step, epoch, batch_idx, call in dumped["waiting"]:
            number = len(judge._levels) - back
            if number >= 0:
                judge._waiting.append((number, (step, epoch, batch_idx, call)))
        judge._ceiling = dumped["ceiling"]
        return judge


def checked_judging(state: Any) -> dict[str, Judge]:
    """A :class:`Judge` for each loss, by its name, from what :meth:`Judge.dump` returned for it.

    Raises:
        ValueError: if the state is something else.
    """
    if not isinstance(state, Mapping) or not all(map(_is_dumped, state.values())):
        raise ValueError(
            "a recording's 'judging' must map each loss to its 'levels', 'waiting' and 'ceiling', "
            f"got {state!r:.300}"
        )
    return {str(name): Judge.load(each) for name, each in state.items()}


def _is_dumped(each: Any) -> bool:
    return (
        isinstance(each, Mapping)
        and set(each) == {"levels", "waiting", "ceiling"}
        and isinstance(each["levels"], list)
        and all(type(level) is float for level in each["levels"])
        and isinstance(each["waiting"], list)
        and all(
            isinstance(row, list) and len(row) == 5 and all(type(n) is int and n >= 0 for n in row)
            for row in each["waiting"]
        )
        and type(each["ceiling"]) in (float, type(None))
    )
