"""torch.compile: of a module that is fitted, and of ALRC itself within a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lightning_alrc import ALRC, ALRCCallback
from tests.nets import SETTINGS, MixinNet, NamedNet, Net, callback_of, state_of, weights_of


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_flush_denormal(False)  # which Inductor's kernels of torch 2.5 leave on


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["first losses", "start"])
def test_alrc_in_a_compiled_function_is_one_graph_and_equals_eager(
    settings: dict[str, float],
) -> None:
    alrc, eager = ALRC(**settings), ALRC(**settings)

    def step(weight: Tensor, x: Tensor) -> Tensor:
        return alrc((weight * x) ** 2).mean()

    compiled = torch.compile(step, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor(1.0, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(50):
            x = torch.randn(4, generator=generator) * (9.0 if index % 10 == 9 else 1.0)
            loss, expected = compiled(weight, x), eager((weight * x) ** 2).mean()
            (gradient,) = torch.autograd.grad(loss, weight)
            (expected_gradient,) = torch.autograd.grad(expected, weight)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            assert gradient.item() == pytest.approx(expected_gradient.item(), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert state_of(alrc) == pytest.approx(state_of(eager), rel=1e-6)
    assert alrc.clipped_total.item() > 0


@pytest.mark.parametrize("net_class", [Net, MixinNet, NamedNet])
def test_a_compiled_module_is_fitted_like_any_other(
    fit: Callable[..., Any], net_class: type[Any]
) -> None:
    net, eager = net_class("matrix"), net_class("matrix")
    callbacks = [[ALRCCallback(**SETTINGS)] * (net_class is Net) for _ in range(2)]
    trainer = fit(torch.compile(net, backend="aot_eager"), *callbacks[0], max_epochs=5)
    expected = fit(eager, *callbacks[1], max_epochs=5)
    assert weights_of(net) == pytest.approx(weights_of(eager), rel=1e-5)
    for name, alrc in callback_of(expected).losses.items():
        found = callback_of(trainer).losses[name]
        assert state_of(found) == pytest.approx(state_of(alrc), rel=1e-5)
        assert 0 < found.clipped_total.item() < found.losses_total.item()


def compiled_by_step(fit: Callable[..., Any], net: Any, *callbacks: Any) -> list[int]:
    """How many graphs there are after each of 54 steps."""
    counter, graphs = CompileCounterWithBackend("eager"), []
    torch._dynamo.reset()

    class Watching(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            graphs.append(counter.frame_count)

    fit(torch.compile(net, backend=counter), *callbacks, Watching(), max_epochs=9)
    return graphs


def test_the_callback_adds_no_graph_to_a_compiled_module(fit: Callable[..., Any]) -> None:
    without = compiled_by_step(fit, Net())
    assert compiled_by_step(fit, Net(), ALRCCallback(**SETTINGS)) == without


def test_named_losses_in_a_compiled_step_stop_compiling(fit: Callable[..., Any]) -> None:
    graphs = compiled_by_step(fit, NamedNet("matrix"))
    assert graphs[9] == graphs[-1] > 0
