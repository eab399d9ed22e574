"""The settings that a replay restores before its step; tests/test_replay.py runs whole replays."""

from __future__ import annotations

from torch import nn

from lightning_alrc._spikes.replaying import _set_modes


def test_submodules_get_the_recorded_modes_inside_any_wrapper() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), nn.Dropout())
    net.eval()
    _set_modes(net, ["0._orig_mod.1._fsdp_wrapped_module"])
    assert [name for name, part in net.named_modules() if not part.training] == ["0.1"]
    _set_modes(net, None)
    assert [name for name, part in net.named_modules() if not part.training] == ["0.1"]
