"""In every precision of a Trainer, the moments are float64 and match its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision

from lightning_alrc import ALRC, ALRCCallback
from tests import nets
from tests.conftest import on_device
from tests.nets import SETTINGS, MixinNet, Net, callback_of, weights_of
from tests.reference import Reference

PRECISIONS = ["32", "64", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def trainer_arguments(precision: str) -> dict[str, Any]:
    """On a CPU, Lightning turns 16-mixed into bf16-mixed, unless it gets the plugin of 16-mixed."""
    if precision == "16-mixed":
        return {"plugins": MixedPrecision(precision, "cpu", scaler())}
    return {"precision": precision}


class LayerNet(Net):
    """A network with the layer as a submodule, which is cast with the network."""

    def __init__(self, shape: str) -> None:
        super().__init__(shape)
        self.clip = ALRC(**SETTINGS)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.clip(super().training_step(batch, batch_idx)).mean()


def fitted(fit: Callable[..., Any], way: str, shape: str, **arguments: Any) -> tuple[Net, ALRC]:
    """A network, and the ALRC that clipped its losses."""
    net = {"callback": Net, "mixin": MixinNet, "layer": LayerNet}[way](shape)
    trainer = fit(net, *[ALRCCallback(**SETTINGS)] * (way == "callback"), **arguments)
    return net, net.clip if isinstance(net, LayerNet) else callback_of(trainer).losses["loss"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [("scalar", {}), ("vector", {"gradient_clip_val": 0.5})],
    ids=["scalar", "vector, norm clipped"],
)
@pytest.mark.parametrize(
    ("way", "path"),
    [("callback", "kernel"), ("mixin", "device"), ("layer", "host"), ("layer", "kernel")],
)
def test_moments_are_those_of_the_losses_in_float64(
    fit: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    shape: str,
    arguments: dict[str, Any],
    way: str,
    path: str,
) -> None:
    if path != "host":
        on_device(monkeypatch, path)
    arguments = trainer_arguments(precision) | arguments
    net, alrc = fitted(fit, way, shape, max_epochs=1, **arguments)
    reference = Reference(**SETTINGS)
    for loss in net.seen:
        reference(loss.double().numpy())
    assert alrc.mu1.dtype == alrc.stddev.dtype == torch.float64
    assert alrc.mu1.item() == pytest.approx(reference.mu[0], rel=1e-12)
    assert alrc.mu2.item() == pytest.approx(reference.mu[1], rel=1e-12)
    assert 0 < alrc.clipped_total.item() == reference.clipped_total


def test_16_mixed_clips_before_it_scales(fit: Callable[..., Any]) -> None:
    """ALRC on a scaled loss, or norm clipping of scaled gradients, would give other weights."""
    net, core, alrc = MixinNet("vector"), nets.Core("vector"), ALRC(**SETTINGS)
    fit(net, gradient_clip_val=0.5, **trainer_arguments("16-mixed"))
    optimizer, scaling = core.optimizer(), scaler()
    for batch in [*nets.loader(), *nets.loader()]:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = core.losses(batch)
        scaling.scale(alrc(loss).mean()).backward()
        scaling.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(core.parameters(), 0.5)
        scaling.step(optimizer)
        scaling.update()
    assert weights_of(net) == weights_of(core)
    assert alrc.clipped_total.item() > 0


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_resumed_fit_in_half_precision_has_float64_moments(
    fit: Callable[..., Any], tmp_path: Any, precision: str
) -> None:
    trainer = fit(Net("vector"), ALRCCallback(**SETTINGS), precision=precision)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = ALRCCallback(**SETTINGS)
    fit(Net("vector"), again, precision=precision, ckpt_path=tmp_path / "saved.ckpt")
    found, expected = (each.losses["loss"].mu1 for each in (again, callback_of(trainer)))
    assert found.item() == expected.item() != found.bfloat16().item()
