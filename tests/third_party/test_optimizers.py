"""Optimizers of other packages that change parameters before they call their closure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_alrc import ALRCCallback
from tests.nets import NETS
from tests.nets import loader as samples
from tests.third_party.conftest import loader

NAN_AT = 4


def _with_base(kind: str) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        package = pytest.importorskip(
            "pytorch_optimizer", reason="pytorch_optimizer is not installed"
        )
        return getattr(package, kind)(parameters, base_optimizer=torch.optim.SGD, lr=0.01)

    return make


def _schedule_free(kind: str) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        package = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
        return getattr(package, kind)(parameters, lr=0.01)

    return make


OPTIMIZERS = {
    "SAM": _with_base("SAM"),
    "FriendlySAM": _with_base("FriendlySAM"),
    "LookSAM": _with_base("LookSAM"),
    "SGDScheduleFreeClosure": _schedule_free("SGDScheduleFreeClosure"),
    "AdamWScheduleFreeClosure": _schedule_free("AdamWScheduleFreeClosure"),
    "RAdamScheduleFreeClosure": _schedule_free("RAdamScheduleFreeClosure"),
}


def batches() -> Any:
    found = [batch for _ in range(3) for batch in samples()]
    x, y = found[NAN_AT]
    found[NAN_AT] = x, torch.full_like(y, torch.nan)
    return loader(found)


def net_with(make: Callable[[Any], Any], namespace: str) -> Any:
    """A net that keeps its weights before and after the batch with NaN."""

    class Watched(NETS[namespace]):  # type: ignore[misc]
        kept: list[Any]

        def configure_optimizers(self) -> Any:
            return make(self.parameters())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self._keep(batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self._keep(batch_idx)

        def _keep(self, batch_idx: int) -> None:
            if batch_idx == NAN_AT:
                self.kept.append(copy.deepcopy(self.layer.state_dict()))

    net = Watched()
    net.kept = []
    return net


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_the_weights(
    fit: Callable[..., Any], namespace: str, name: str
) -> None:
    net = net_with(OPTIMIZERS[name], namespace)
    callback = ALRCCallback(nonfinite="skip")
    fit(net, callback, batches=batches(), max_epochs=1)
    before, after = net.kept
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert callback.losses["loss"].nonfinite_total > 0
    assert all(each.isfinite().all() for each in net.parameters())
    assert not torch.equal(net.layer.weight, after["weight"])  # later steps are taken


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_raises_leaves_the_weights(
    fit: Callable[..., Any], namespace: str, name: str
) -> None:
    net = net_with(OPTIMIZERS[name], namespace)
    with pytest.raises(FloatingPointError, match="loss 'loss' is nan at step"):
        fit(net, ALRCCallback(nonfinite="raise"), batches=batches(), max_epochs=1)
    (before,) = net.kept
    torch.testing.assert_close(net.layer.state_dict(), before, rtol=0, atol=0)
