"""A call with one loss, a batch's losses, or up to ten million losses; clipped or not clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.spike import SpikeDetection
from torch import Tensor

from lightning_alrc import ALRC
from tests.benchmarks.timing import Times, in_turn
from tests.conftest import on_device
from tests.counting import operations

COUNTS = [10**power for power in range(1, 8)]
CASES = {
    "1 loss": {"count": 1},
    **{f"{count:,} losses": {"count": count} for count in sorted([*COUNTS, 256])},
    "1 loss, clipped": {"count": 1, "clips": True},
    "256 losses, one clipped": {"count": 256, "clips": True},
    **{
        f"{name}, as on an accelerator": {"count": count, "device": True}
        for name, count in {"1 loss": 1, "256 losses": 256, "1,000,000 losses": 10**6}.items()
    },
    "1 loss, forwards and backwards": {"count": 1, "backwards": True},
    "1 loss, clipped, forwards and backwards": {"count": 1, "clips": True, "backwards": True},
}


def losses(count: int, clips: bool) -> Tensor:
    """Losses of about 2 that require a gradient. With ``clips``, one of them is a spike."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(count, generator=generator) * 0.1 + 2.0
    if clips:
        values[0] = 50.0
    return (values.squeeze() if count == 1 else values).requires_grad_()


def alrc(loss: Tensor, clips: bool) -> Callable[[], object]:
    """ALRC that clips in every call or in no call.

    With ``clips``, its moments are nearly constant.
    """
    if clips:
        layer = ALRC(num_stddev=1.0, decay=1 - 1e-12, mu1_start=2.0, mu2_start=8.0)
    else:
        layer = ALRC(num_stddev=6.0)
    for _ in range(20):
        layer(loss)
    return lambda: layer(loss)


def raw_moments(loss: Tensor, clips: bool) -> Callable[[], object]:
    """The authors' formula in plain PyTorch, in float32.

    It does not handle NaN or negative losses.
    """
    mu1, mu2 = torch.tensor(25.0), torch.tensor(900.0)

    def clip() -> Tensor:
        nonlocal mu1, mu2
        threshold = mu1 + 3.0 * (mu2 - mu1**2 + 1e-8).sqrt()
        factor = torch.where(loss < threshold, 1.0, threshold / loss).detach()
        clipped = loss * factor
        values = clipped.detach()
        mu1 = 0.999 * mu1 + 0.001 * values.mean()
        mu2 = 0.999 * mu2 + 0.001 * (values**2).mean()
        return clipped

    return clip


def spike_detection(loss: Tensor, clips: bool) -> Callable[[], object]:
    callback = SpikeDetection(rtol=1e9)
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return lambda: callback.on_train_batch_end(trainer, None, loss, None, 0)  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Tensor, bool], Callable[[], Any]]] = {
    "floor: an empty autograd node": lambda loss, _: lambda: loss.view_as(loss),
    "floor: a read of the losses": lambda loss, _: lambda: (loss * loss).mean(),
    "floor: the sum of the losses": lambda loss, _: lambda: loss.sum(),
    "ALRC": alrc,
    "peer: raw moments, word for word": raw_moments,
    "peer: Lightning's SpikeDetection, its hook": spike_detection,
}


def differentiated(way: Callable[[], Tensor], loss: Tensor) -> Callable[[], object]:
    """A way with its backward pass, from the gradient of the result to that of the loss."""
    gradient = torch.ones_like(loss)

    def both() -> None:
        result = way()
        if result is not loss:
            torch.autograd.backward(result, gradient, inputs=[loss])

    return both


@contextmanager
def path(device: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if device:
            on_device(patch)
        yield


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Times, dict[str, int]]:
    """The name of a case, its times, and the operations of ALRC."""
    settings: dict[str, Any] = {"clips": False, "device": False, "backwards": False}
    settings |= CASES[request.param]
    loss = losses(settings["count"], settings["clips"])
    with path(settings["device"]):
        ways = {
            name: make(loss, settings["clips"])
            for name, make in WAYS.items()
            if "SpikeDetection" not in name or (loss.ndim == 0 and not settings["backwards"])
        }
        counted = operations(ways["ALRC"])
        if settings["backwards"]:
            ways = {name: differentiated(way, loss) for name, way in ways.items()}
        times = in_turn(ways)
    counts = {"operations": len(counted.calls), "launches": len(counted.launches)}
    return request.param, times, counts


@pytest.mark.parametrize("way", WAYS)
def test_a_call(booked: Callable[..., None], case: Any, way: str) -> None:
    name, times, counts = case
    if way not in times:
        pytest.skip("it has one loss a step, and no backward pass")
    booked(name, way, times, **(counts if way == "ALRC" else {}))
