"""Times functions in turn, round by round, and passes the times to pytest-benchmark.

The functions are called *ways*, because they are different ways to do one task.

pytest-benchmark by itself times one test after another. On a shared machine, the load may change
between two tests, so their ratio means little. Here all ways take turns. Noise only adds time, so
the least of a way's rounds is the time of the way itself. For the same reason the clock is CPU time
of the thread, which stops while another process has the core. Most ways run in one thread, so on an
idle machine CPU time is wall time. There are two exceptions. The clock for reading a log is CPU
time of the process, because pandas has several threads. The clock for ranks is wall time, because
ranks wait for each other.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

Ways = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]
"""Seconds of a call in each round, by way."""

ROUND = 2e-3
"""Seconds that a round of a quick way takes: too short to be interrupted often."""


def in_turn(
    ways: Ways,
    seconds: float = 1.5,
    least: int = 5,
    clock: Callable[[], float] = time.thread_time,
) -> Times:
    """Time ways in turn.

    Args:
        ways: functions by name.
        seconds: approximate total time.
        least: least number of rounds, however long they take.
        clock: returns the time in seconds; ``time.process_time`` for ways with threads.
    """
    calls = {name: _calls_in_a_round(way, clock) for name, way in ways.items()}
    once = sum(_round(way, calls[name], clock) * calls[name] for name, way in ways.items())
    rounds = max(least, int(seconds / once))
    times: Times = {name: [] for name in ways}
    for index in range(rounds):
        for name in in_order(list(ways), index):
            times[name].append(_round(ways[name], calls[name], clock))
    return times


def in_order(names: list[str], index: int) -> list[str]:
    """The names, rotated by ``index``, so that a way does not always follow the same way."""
    start = index % max(len(names), 1)
    return names[start:] + names[:start]


def _calls_in_a_round(way: Callable[[], object], clock: Callable[[], float]) -> int:
    calls = 1
    while (seconds := _round(way, calls, clock) * calls) < ROUND / 2:
        calls *= 2 if seconds > ROUND / 20 else 10
    return calls


def _round(way: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    collects = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in itertools.repeat(None, calls):
            way()
        return (clock() - start) / calls
    finally:
        if collects:
            gc.enable()


class Replay:
    """A clock for pytest-benchmark that advances by the recorded time of each round."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def book(self, benchmark: Any, seconds: list[float]) -> None:
        """Record the rounds of one way."""
        rounds = iter(seconds)

        def one() -> None:
            self.now += next(rounds)

        if benchmark.enabled:
            benchmark.pedantic(one, rounds=len(seconds))


clock = Replay()
