"""The time of a step inside a Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


class Stopwatch(pl.Callback):
    """Times periods of ``period`` steps, with all callbacks and loggers.

    Args:
        period: a multiple of the steps between rows, so that all periods have equally many rows.
        warm_up: number of first steps that are not timed.
        clock: returns the time in seconds.
    """

    def __init__(
        self, period: int, warm_up: int, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self.period, self.warm_up, self.clock = period, warm_up, clock
        self.seconds: list[float] = []
        """seconds of a step, for each period"""
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        steps = batch_idx - self.warm_up
        if steps >= 0 and steps % self.period == 0:
            now = self.clock()
            if steps:
                self.seconds.append((now - self._start) / self.period)
            self._start = now
