"""torch.compile: of a fitted module, and of ALRC itself within a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from pytorch_lightning import Callback
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lightning_alrc import ALRC, ALRCCallback, ALRCMixin
from tests.nets import SETTINGS, MixinNet, NamedNet, Net, callback_of, state_of, weights_of

names_in_one_graph = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"),
    reason="torch 2.5 breaks the graph of a step that looks up a loss by name",
)


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "backend"),
    [({}, "inductor"), (SETTINGS, "aot_eager")],
    ids=["first losses", "start"],
)
def test_a_compiled_function_with_alrc_is_one_graph_and_equals_eager(
    settings: dict[str, float], backend: str
) -> None:
    alrc, eager = ALRC(**settings), ALRC(**settings)

    def step(weight: Tensor, x: Tensor) -> Tensor:
        return alrc((weight * x) ** 2).mean()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
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


class Still(Net):
    """Its step changes no attribute of the module, because each change would recompile the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()


class Returning(Still):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch)


class Layered(Still):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.clip = ALRC(**SETTINGS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.clip(self.losses(batch)).mean()  # type: ignore[no-any-return]


class Mixed(ALRCMixin, Returning):
    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS)


class Named(Mixed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.losses(batch).unbind(-1)
        return self.alrc(first, "first").mean() + self.alrc(second, "second").mean()


class Declared(Named):
    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS, losses={"first": {}, "second": {}})


@pytest.mark.parametrize("net_class", [Returning, Mixed, NamedNet])
def test_a_compiled_module_trains_like_an_uncompiled_module(
    fit: Callable[..., Any], net_class: type[Any]
) -> None:
    net, eager = net_class("matrix"), net_class("matrix")
    callbacks = [[ALRCCallback(**SETTINGS)] * (net_class is Returning) for _ in range(2)]
    trainer = fit(torch.compile(net, backend="aot_eager"), *callbacks[0], max_epochs=5)
    expected = fit(eager, *callbacks[1], max_epochs=5)
    assert weights_of(net) == pytest.approx(weights_of(eager), rel=1e-5)
    for name, alrc in callback_of(expected).losses.items():
        found = callback_of(trainer).losses[name]
        assert state_of(found) == pytest.approx(state_of(alrc), rel=1e-5)
        assert 0 < found.clipped_total.item() < found.losses_total.item()


def graphs_by_step(fit: Callable[..., Any], net: Any, *callbacks: Any) -> list[int]:
    """The number of graphs after each of 54 steps. No step may break the graph."""
    counter, graphs = CompileCounterWithBackend("eager"), []

    class Watching(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            graphs.append(counter.frame_count)

    fit(torch.compile(net, backend=counter), *callbacks, Watching(), max_epochs=9)
    assert not counters["graph_break"]
    return graphs


@pytest.mark.parametrize(
    ("net_class", "callbacks"),
    [
        (Still, []),
        (Returning, [ALRCCallback(**SETTINGS)]),
        (Layered, []),
        (Mixed, []),
        pytest.param(Declared, [], marks=names_in_one_graph),
    ],
    ids=["without", "callback", "layer", "mixin", "names"],
)
def test_a_compiled_step_is_one_graph_in_all_steps(
    fit: Callable[..., Any], net_class: type[Any], callbacks: list[Any]
) -> None:
    assert graphs_by_step(fit, net_class("matrix"), *callbacks) == [1] * 54


@names_in_one_graph
def test_a_compiled_step_with_undeclared_names_is_compiled_twice(
    fit: Callable[..., Any],
) -> None:
    assert graphs_by_step(fit, Named("matrix")) == [1] + [2] * 53


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_a_compiled_step_with_manual_optimization_trains_like_an_uncompiled_step(
    fit: Callable[..., Any], way: str
) -> None:
    kind, callbacks = (Net, [ALRCCallback(**SETTINGS)]) if way == "callback" else (MixinNet, [])

    class Manual(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch))
            optimizer.step()

    net, eager = Manual("vector", "tensor", True), Manual("vector", "tensor", True)
    trainer = fit(torch.compile(net, backend="eager"), *callbacks, max_epochs=5)
    expected = fit(eager, *[ALRCCallback(**SETTINGS)] * len(callbacks), max_epochs=5)
    assert weights_of(net) == pytest.approx(weights_of(eager), rel=1e-4)
    found, alrc = (callback_of(each).losses["loss"] for each in (trainer, expected))
    assert state_of(found) == pytest.approx(state_of(alrc), rel=1e-4)
    assert found.clipped_total.item() > 0
