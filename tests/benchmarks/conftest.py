"""One thread for all benchmarks, and a fixture that passes measured times to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.benchmarks.timing import Times, clock


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "booked" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def booked(benchmark: Any) -> Callable[..., None]:
    """Records the rounds of one way (see ``timing``) under its group, with further facts."""

    def book(group: str, way: str, times: Times, **extra_info: Any) -> None:
        if way not in times:
            pytest.skip(f"{way} is not installed")
        benchmark.group, benchmark.name = group, way
        benchmark.extra_info |= extra_info
        clock.book(benchmark, times[way])

    return book
