"""What a step costs: ALRC beside its peers, and beside work that nobody can do without.

Run with ``python -m pytest tests/benchmarks --benchmark-only``; the times are for comparison within
one run, and nothing here passes or fails by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_alrc.alrc
from lightning_alrc import ALRC

Benchmark = Callable[..., Any]
SHAPES = {"scalar": (), "256 samples": (256,), "a million": (1_000_000,)}
PARAMETERS = {"1 M": 1_000_000, "25 M": 25_000_000}


def losses(shape: tuple[int, ...]) -> Tensor:
    """Losses that need a gradient and spike now and then, as in training."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 0.1 + 2.0).requires_grad_()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.benchmark(group="losses")
class TestLosses:
    def test_floor_an_empty_autograd_node(
        self, benchmark: Benchmark, shape: tuple[int, ...]
    ) -> None:
        loss = losses(shape)
        benchmark(lambda: loss.view_as(loss))

    def test_floor_a_read_of_the_losses(self, benchmark: Benchmark, shape: tuple[int, ...]) -> None:
        loss = losses(shape)
        benchmark(lambda: (loss * loss).mean())

    @pytest.mark.parametrize("path", ["host", "device"])
    def test_alrc(
        self,
        benchmark: Benchmark,
        shape: tuple[int, ...],
        path: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(lightning_alrc.alrc, "_on_host", lambda loss: path == "host")
        alrc, loss = ALRC(num_stddev=6.0), losses(shape)
        for _ in range(20):
            alrc(loss)
        benchmark(alrc, loss)


@pytest.fixture(params=PARAMETERS.values(), ids=PARAMETERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A network of that many parameters in square layers, with gradients."""
    width = 1000
    layers = [nn.Linear(width, width, bias=False) for _ in range(request.param // width**2)]
    for layer in layers:
        layer.weight.grad = torch.randn(width, width) * 1e-3
    return nn.Sequential(*layers)


@pytest.mark.benchmark(group="parameters")
class TestParameters:
    def test_alrc(self, benchmark: Benchmark, model: nn.Module) -> None:
        benchmark(ALRC(), losses(()))

    def test_clip_grad_norm(self, benchmark: Benchmark, model: nn.Module) -> None:
        benchmark(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)

    def test_zclip(self, benchmark: Benchmark, model: nn.Module) -> None:
        benchmark(pytest.importorskip("zclip").ZClip(warmup_steps=1).step, model)

    def test_autoclip(self, benchmark: Benchmark, model: nn.Module) -> None:
        quantile = pytest.importorskip("autoclip.torch").QuantileClip
        clipper = quantile(model.parameters(), global_threshold=True)
        clipper.state["global_history"] = torch.rand(1000)
        benchmark(clipper.step)

    def test_adaptive_clip_grad(self, benchmark: Benchmark, model: nn.Module) -> None:
        clip = pytest.importorskip("timm.utils.agc").adaptive_clip_grad
        benchmark(clip, list(model.parameters()))
