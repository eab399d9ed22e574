"""A step with 1 to 64 losses, each with moments of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_alrc import ALRCCallback
from tests.benchmarks.timing import in_turn
from tests.counting import allocated

COUNTS = [1, 2, 4, 8, 16, 32, 64]
WAYS = ["floor: as many empty autograd nodes", "floor: as many reads", "ALRC"]


@pytest.fixture(scope="module", params=COUNTS)
def case(request: pytest.FixtureRequest) -> Any:
    count = request.param
    losses = {f"loss{index}": torch.tensor(2.0, requires_grad=True) for index in range(count)}
    ALRCCallback().clip(losses["loss0"])
    callback = ALRCCallback()

    def alrc() -> None:
        for name, loss in losses.items():
            callback.clip(loss, name)

    def nodes() -> None:
        for loss in losses.values():
            loss.view_as(loss)

    def reads() -> None:
        for loss in losses.values():
            loss.item()

    size = allocated(alrc) / count
    for _ in range(20):
        alrc()
    times = in_turn(dict(zip(WAYS, [nodes, reads, alrc], strict=True)), seconds=0.7)
    return f"{count} named loss{'es' * (count > 1)}", times, size


@pytest.mark.parametrize("way", WAYS)
def test_a_step(booked: Callable[..., None], case: Any, way: str) -> None:
    name, times, size = case
    booked(name, way, times, **({"bytes_a_name": size} if way == "ALRC" else {}))
