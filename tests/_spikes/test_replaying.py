"""The settings that a replay restores before its step; tests/test_replay.py runs whole replays."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lightning_alrc._spikes.replaying import _rebind, _set_modes, _with_leaves


def test_submodules_get_the_recorded_modes_inside_any_wrapper() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), nn.Dropout())
    net.eval()
    _set_modes(net, ["0._orig_mod.1._fsdp_wrapped_module"])
    assert [name for name, part in net.named_modules() if not part.training] == ["0.1"]
    _set_modes(net, None)
    assert [name for name, part in net.named_modules() if not part.training] == ["0.1"]


def test_a_batch_that_was_moved_to_a_device_has_leaves_again() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    moved = {"x": [x.double()], "y": y.double()}  # a copy to a device has a graph, too
    found = _with_leaves(moved)
    assert found["x"][0].is_leaf
    assert found["x"][0].requires_grad
    assert not found["y"].requires_grad


def test_a_function_that_holds_itself_and_an_empty_cell_uses_the_copy() -> None:
    net: Any = nn.Linear(1, 1)

    def function(which: str) -> Any:
        return {"net": lambda: net, "function": lambda: function, "later": lambda: later}[which]()

    net.function = function
    copies: dict[int, Any] = {}
    copied = copy.deepcopy(net, copies)
    _rebind(copied, copies)
    assert copied.function("net") is copied
    assert net.function("net") is net
    later = "known"
    assert copied.function("later") == later


def test_a_function_that_holds_no_copied_object_stays_as_it_is() -> None:
    def activation(x: torch.Tensor) -> torch.Tensor:
        return factor * x

    factor = 2.0
    net: Any = nn.Linear(1, 1)
    given: list[Any] = [activation, torch.compile(activation, backend="eager")]
    net.given = dict(enumerate(given))
    copies: dict[int, Any] = {}
    copied = copy.deepcopy(net, copies)
    _rebind(copied, copies)
    assert list(copied.given.values()) == given
