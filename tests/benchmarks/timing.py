"""Ways that are compared are timed in turn, round by round, and pytest-benchmark keeps the books.

pytest-benchmark by itself times one test after another. On a machine that others use, what one of
them meets is then not what the next one meets, and their ratio means little. Here a round of every
way follows a round of every other; noise only ever adds, so that the least of a way's rounds is
what the way itself takes. For the same reason the clock is the thread's own, which stands still
while another process has the core: everything is done in one thread, so that on an idle machine it
is the wall's. Only ranks, which wait for each other, are timed by the wall's.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

Ways = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]
"""By way, the seconds of a call in each round."""

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
        ways: by name, what is called again and again.
        seconds: how long it may take, roughly.
        least: how many rounds it is to have however long it takes.
        clock: tells the time, in seconds; ``time.process_time`` where a way has threads.
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
    """Each round starts with another way, so that none always follows the same one."""
    start = index % len(names)
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
    """A clock that goes on by what a round took when it was timed: pytest-benchmark reads it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def book(self, benchmark: Any, seconds: list[float]) -> None:
        """Enter the rounds of one way."""
        rounds = iter(seconds)

        def one() -> None:
            self.now += next(rounds)

        if benchmark.enabled:
            benchmark.pedantic(one, rounds=len(seconds))


clock = Replay()
