"""A step of ALRC and of gradient clippers, by number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from lightning_alrc import ALRC
from tests.benchmarks.timing import in_turn

SIZES = {"1 M parameters": 1, "25 M parameters": 25, "250 M parameters": 250}
WIDTH = 1000


def model(millions: int) -> nn.Module:
    """Square layers of a million parameters each, with gradients."""
    layers = []
    for _ in range(millions):
        layer = nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False)
        layer.weight.data.fill_(0.01)
        layer.weight.grad = torch.full((WIDTH, WIDTH), 1e-3)
        layers.append(layer)
    return nn.Sequential(*layers)


def node(model: nn.Module) -> Callable[[], object]:
    loss = torch.tensor(2.0, requires_grad=True)
    return lambda: loss.view_as(loss)


def read(model: nn.Module) -> Callable[[], object]:
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return lambda: [gradient.sum() for gradient in gradients]


def alrc(model: nn.Module) -> Callable[[], object]:
    layer, loss = ALRC(), torch.tensor(2.0, requires_grad=True)
    for _ in range(20):
        layer(loss)
    return lambda: layer(loss)


def clip_grad_norm(model: nn.Module) -> Callable[[], object]:
    parameters = list(model.parameters())
    return lambda: nn.utils.clip_grad_norm_(parameters, 1.0)


def zclip(model: nn.Module) -> Callable[[], object]:
    from zclip import ZClip

    clipper = ZClip(warmup_steps=1)
    return lambda: clipper.step(model)


def autoclip(model: nn.Module) -> Callable[[], object]:
    from autoclip.torch import QuantileClip

    clipper = QuantileClip(model.parameters(), global_threshold=True)
    clipper.state["global_history"] = torch.rand(1000)
    return clipper.step


def adaptive_clip_grad(model: nn.Module) -> Callable[[], object]:
    from timm.utils.agc import adaptive_clip_grad

    parameters = list(model.parameters())
    return lambda: adaptive_clip_grad(parameters)


WAYS = {
    "floor: an empty autograd node": node,
    "floor: a read of the gradients": read,
    "ALRC": alrc,
    "peer: clip_grad_norm_": clip_grad_norm,
    "peer: ZClip": zclip,
    "peer: AutoClip": autoclip,
    "peer: timm's adaptive_clip_grad": adaptive_clip_grad,
}
NEEDS = {zclip: "zclip", autoclip: "autoclip", adaptive_clip_grad: "timm"}


@pytest.fixture(scope="module", params=SIZES)
def case(request: pytest.FixtureRequest) -> Any:
    # The largest network takes 2 GB, so only one network exists at a time.
    network = model(SIZES[request.param])
    ways = {
        name: make(network) for name, make in WAYS.items() if find_spec(NEEDS.get(make, "torch"))
    }
    return request.param, in_turn(ways, seconds=5.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_step(booked: Callable[..., None], case: Any, way: str) -> None:
    booked(case[0], way, case[1])
