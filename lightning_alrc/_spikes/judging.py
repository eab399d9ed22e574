"""Whether a spike is of the data or of the optimizer: what the losses beside it are like.

After a spike of the data the losses are as they were before it. In a divergence they stay above
that, whatever the batch. So each call that spiked waits for the next 50 calls of its loss, and is
judged by their median, and that of the next 10:

- ``"divergence"`` if both lie above nine in ten of the 50 calls before,
- ``"data"`` if not.

No threshold is in this rule: thresholds follow a lasting rise within some hundred steps, or some
tens where ``num_stddev`` is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments.sums import Sums

__all__ = ["DATA", "DIVERGENCE", "KINDS", "PATIENCE", "Judge", "checked_judging"]

DATA, DIVERGENCE = "data", "divergence"
KINDS = (DATA, DIVERGENCE)

PATIENCE = 50
"""Calls before and after a spike that it is judged by."""

LEAST = 10
"""Calls before it, at least, and the next after it. At the end of a fit these do."""

BEFORE = 0.9
"""Share of the calls before it that a divergence lies above."""

Place = tuple[int, int, int, int]
"""Step, epoch, batch and call of a spike."""


class Judge:
    """Judges the calls of one loss on one rank.

    A level is the mean of a call's finite losses before clipping, and infinite where it has none.
    Levels stay on the device until a spike waits for them.
    """

    def __init__(self) -> None:
        self._levels: list[Any] = []
        """of the last calls: floats, and then tensors that are still to be read"""
        self._first = 0
        """number of the calls before these"""
        self._waiting: list[tuple[int, Place]] = []
        """the numbers and places of spikes that are not judged yet, in order"""
        self._ceiling: float | None = None
        """of the level, where the last spike that was judged is of a divergence"""

    @property
    def count(self) -> int:
        """Number of calls so far."""
        return self._first + len(self._levels)

    @property
    def waits(self) -> bool:
        """Whether any spike is not judged yet."""
        return bool(self._waiting)

    @property
    def kept(self) -> int:
        """Number of calls that are kept."""
        return len(self._levels)

    def observe(self, sums: Sums) -> None:
        """Take note of a call, by the sums of its losses. Waits for nothing."""
        loss, losses = sums.loss, sums.losses
        if isinstance(loss, Tensor):
            self._levels.append((loss, losses))
        else:
            self._levels.append(loss / losses if losses else math.inf)

    def enter(self, number: int, place: Place) -> None:
        """Let a spike wait for its verdict.

        Args:
            number: of calls before its own, not below that of spikes entered before.
            place: of the spike.
        """
        if not self._waiting or self._waiting[-1][1] != place:
            self._waiting.append((number, place))

    def verdicts(self, at_end: bool = False) -> dict[Place, str]:
        """The kinds of spikes for which there are enough calls by now. May wait for the device.

        Args:
            at_end: of a fit, where fewer calls do.
        """
        found: dict[Place, str] = {}
        least = LEAST if at_end else PATIENCE
        while self._waiting and self.count - self._waiting[0][0] > least:
            number, place = self._waiting.pop(0)
            self._read()
            # Later spikes of a divergence have others of it before them.
            if self._ceiling is None:
                self._ceiling = self._ceiling_before(number)
            if self._ceiling is None:
                continue
            at = number + 1 - self._first
            after = self._levels[at : at + PATIENCE]
            has_diverged = min(median(after), median(after[:LEAST])) > self._ceiling
            found[place] = DIVERGENCE if has_diverged else DATA
            if not (has_diverged and self._waiting):
                self._ceiling = None
        return found

    def _ceiling_before(self, number: int) -> float | None:
        at = number - self._first
        before = sorted(self._levels[max(at - PATIENCE, 0) : at])
        return before[int(BEFORE * (len(before) - 1))] if len(before) >= LEAST else None

    def _read(self) -> None:
        unread = [each for each in self._levels if isinstance(each, tuple)]
        if unread:
            pairs = torch.stack([number for pair in unread for number in pair]).tolist()
            losses = zip(pairs[::2], pairs[1::2], strict=True)
            read = [loss / count if count else math.inf for loss, count in losses]
            self._levels[len(self._levels) - len(read) :] = read

    def trim(self) -> None:
        """Forget what no spike needs, if each call so far that spiked has been entered."""
        needed = self._waiting[0][0] if self._waiting else self.count
        old = needed - PATIENCE - self._first
        if old > 0:
            del self._levels[:old]
            self._first += old

    def dump(self, count: int | None = None) -> dict[str, Any]:
        """What is remembered, as plain numbers. May wait for the device.

        Args:
            count: as it was when there had been this many calls; ``None`` for now.
        """
        count = self.count if count is None else count
        self._read()
        return {
            "levels": self._levels[: max(count - self._first, 0)][-2 * PATIENCE :],
            "waiting": [[count - at, *place] for at, place in self._waiting if at < count],
            "ceiling": self._ceiling,
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Judge:
        """Continue from what :func:`checked_judging` found sound."""
        judge = cls()
        judge._levels = list(dumped["levels"])
        for back, step, epoch, batch_idx, call in dumped["waiting"]:
            number = len(judge._levels) - back
            if number >= 0:
                judge._waiting.append((number, (step, epoch, batch_idx, call)))
        judge._ceiling = dumped["ceiling"]
        return judge


def checked_judging(state: Any) -> dict[str, Judge]:
    """By name of the loss, judges from what :meth:`Judge.dump` returned.

    Raises:
        ValueError: if it is something else.
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
