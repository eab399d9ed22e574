"""What ALRC adds to a step of 1 to 4 real processes that train together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.scripts import timed_ranks as script
from tests.scripts.launching import launch, reports

COUNTS = [1, 2, 3, 4]


@pytest.fixture(scope="module", params=COUNTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    launch(script, folder, request.param)
    (found,) = reports(folder, "ranks", 1)
    plain, one, _, several = found["collectives"].values()
    added = [one - plain, several - plain]
    return f"{request.param} rank{'s' * (request.param > 1)}", found["times"], added


@pytest.mark.parametrize("way", script.WAYS)
def test_a_step(booked: Callable[..., None], case: Any, way: str) -> None:
    name, times, added = case
    booked(name, way, times, **({"collectives_added": added} if way == "ALRC" else {}))
