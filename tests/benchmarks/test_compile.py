"""A compiled step with ALRC in it, beside the same step without ALRC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_alrc import ALRC
from tests.benchmarks.timing import in_turn
from tests.counting import generated

COUNTS = {"1 loss, compiled": 1, "256 losses, compiled": 256}
WAYS = ["floor: the step without", "ALRC", "peer: ALRC eagerly, after the compiled step"]


@pytest.fixture(scope="module", params=COUNTS)
def case(request: pytest.FixtureRequest) -> Any:
    """Forwards and backwards through a loss of the given size."""
    torch._dynamo.reset()
    counters.clear()
    x = torch.linspace(1.0, 2.0, COUNTS[request.param])
    weight = torch.ones_like(x, requires_grad=True)
    within, after = ALRC(), ALRC()

    def losses() -> Tensor:
        return ((weight * x) ** 2).squeeze()

    without = torch.compile(lambda: losses().mean(), fullgraph=True)
    compiled = torch.compile(lambda: within(losses()).mean(), fullgraph=True)
    of_losses = torch.compile(losses, fullgraph=True)

    def backward(loss: Tensor) -> None:
        torch.autograd.backward(loss, inputs=[weight])

    steps = [
        lambda: backward(without()),
        lambda: backward(compiled()),
        lambda: backward(after(of_losses()).mean()),
    ]
    times = in_turn(dict(zip(WAYS, steps, strict=True)))
    graphs = counters["stats"]["unique_graphs"]
    breaks = sum(counters["graph_break"].values())
    loss = (x**2).squeeze().requires_grad_()
    functions, loops = generated(ALRC(), loss)
    counts = {
        "functions": functions,
        "loops": loops,
        "graph_breaks": breaks,
        "recompilations": graphs - len(WAYS),
    }
    torch._dynamo.reset()
    return request.param, times, counts


@pytest.mark.parametrize("way", WAYS)
def test_a_step(booked: Callable[..., None], case: Any, way: str) -> None:
    name, times, counts = case
    booked(name, way, times, **(counts if way == "ALRC" else {}))
