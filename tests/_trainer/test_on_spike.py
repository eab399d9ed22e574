"""Steps whose loss spikes, and the effect of skipping such steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_alrc import ALRCCallback
from tests._trainer.test_nonfinite import (
    FEW,
    GOOD,
    OPTIMIZERS,
    PLACES,
    WAYS,
    Adversaries,
    LossesInClosure,
    Quasi,
    Reads,
    Stepping,
    among,
    assert_same,
    everything,
    loading,
)
from tests.conftest import paths_with
from tests.nets import callback_of, weights_of

Fit = Callable[..., Any]

STEADY: dict[str, Any] = {
    "num_stddev": 6.0,
    "mu1_start": 1.0,
    "mu2_start": 1e4 + 1,
    "decay": 1 - 1e-12,
    "on_spike": "skip",
}
"""Settings that clip no good batch. The moments stay nearly constant, so that a spike does not
change later clips."""


def spiking(samples: int = 4) -> tuple[Tensor, Tensor]:
    """A batch whose last losses are far above all others."""
    x, y = GOOD[0]
    y = y.clone()
    y[-samples:] = 1000.0
    return x, y


def with_spikes(*places: int, samples: int = 4, good: list[Any] = GOOD) -> list[Any]:
    batches = list(good)
    for place in places:
        batches.insert(place, spiking(samples))
    return batches


def trained(fit: Fit, net: Any, batches: list[Any], **arguments: Any) -> dict[str, Any]:
    """All state except the moments, which a skipped spike updates."""
    callback = arguments.pop("callback", None) or ALRCCallback(**STEADY)
    trainer = fit(net, callback, batches=loading(batches), max_epochs=1, **arguments)
    return everything(trainer) | {"moments": None}


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("each_path", "optimizer", "way"), paths_with(OPTIMIZERS, WAYS), indirect=["each_path"]
)
def test_a_skipped_spike_leaves_all_as_without_the_batch(
    fit: Fit, optimizer: str, way: str
) -> None:
    net, plain = (Stepping(optimizer, **WAYS[way]) for _ in range(2))
    assert_same(trained(fit, net, with_spikes(*PLACES, good=FEW)), trained(fit, plain, FEW))
    assert callback_of(net.trainer).losses["loss"].clipped_total == 4 * 4


@pytest.mark.parametrize("shape", ["scalar", "matrix"])
def test_a_skipped_spike_of_any_shape_leaves_all_as_without_the_batch(fit: Fit, shape: str) -> None:
    net, plain = Stepping("AdamW"), Stepping("AdamW")
    net.shape = plain.shape = shape
    assert_same(trained(fit, net, with_spikes(3)), trained(fit, plain, GOOD))


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(("samples", "is_skipped"), [(1, False), (2, False), (3, True)])
def test_a_step_is_skipped_if_more_than_half_of_its_samples_are_clipped(
    fit: Fit, samples: int, is_skipped: bool
) -> None:
    net, clipping = Stepping("momentum"), Stepping("momentum")
    spikes = with_spikes(3, samples=samples, good=FEW)
    found = trained(fit, net, spikes)
    clips = ALRCCallback(**(STEADY | {"on_spike": "clip"}))
    batches = FEW if is_skipped else spikes
    assert_same(found, trained(fit, clipping, batches, callback=clips))


def test_a_step_that_spikes_is_taken_by_default(fit: Fit) -> None:
    net, plain = Stepping("momentum"), Stepping("momentum")
    default = ALRCCallback(**{name: STEADY[name] for name in STEADY if name != "on_spike"})
    assert trained(fit, net, with_spikes(3), callback=default) != trained(fit, plain, GOOD)


@pytest.mark.usefixtures("quick_path")
def test_steps_are_taken_again_after_a_lasting_rise(fit: Fit) -> None:
    class Rising(Stepping):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            generator = torch.Generator().manual_seed(batch_idx)
            noise = torch.rand((), generator=generator)
            return 0.0 * self.losses(batch).mean() + 1.0 + noise + 20.0 * (batch_idx >= 200)

    net, steps = Rising("momentum"), []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            steps.append(net.trainer.fit_loop.epoch_loop.batch_idx)
            return result

    net.configure_optimizers = lambda: Counting(net.parameters(), 0.1)  # type: ignore[method-assign]
    fit(net, ALRCCallback(num_stddev=6, on_spike="skip"), batches=loading(50 * GOOD), max_epochs=1)
    after = [step for step in steps if step >= 200]
    assert 200 not in steps
    assert len(after) > 50
    assert after[-1] == 50 * len(GOOD) - 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_spike_drops_a_whole_window_of_accumulation(fit: Fit, optimizer: str) -> None:
    batches = list(GOOD)
    batches[4] = spiking()
    found = trained(fit, Stepping(optimizer), batches, accumulate_grad_batches=3)
    rest = GOOD[:3] + GOOD[6:]
    assert_same(found, trained(fit, Stepping(optimizer), rest, accumulate_grad_batches=3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_spike_in_a_closure_leaves_all_as_without_the_batch(
    fit: Fit, optimizer: str
) -> None:
    found = trained(fit, LossesInClosure(optimizer), with_spikes(0, 4, 14))
    assert_same(found, trained(fit, LossesInClosure(optimizer), GOOD))


def test_a_skipped_spike_of_a_closure_that_runs_many_times_leaves_all_as_without_the_batch(
    fit: Fit,
) -> None:
    assert_same(trained(fit, Quasi(), with_spikes(2)), trained(fit, Quasi(), GOOD))


@pytest.mark.parametrize("together", [False, True])
def test_a_skipped_spike_of_a_named_loss_in_a_manual_step_leaves_all_as_without_the_batch(
    fit: Fit, together: bool
) -> None:
    runs = []
    for batches in (with_spikes(2), GOOD):
        net = Adversaries(together, "both")
        net.configure_alrc = lambda: ALRCCallback(**STEADY)  # type: ignore[method-assign]
        fit(net, batches=loading(batches), max_epochs=1)
        runs.append(weights_of(net))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_step_whose_loss_is_not_finite_is_skipped_as_well(fit: Fit, nonfinite: Any) -> None:
    callback = ALRCCallback(**STEADY, nonfinite=nonfinite)
    found = trained(fit, Stepping("AdamW"), among(with_spikes(5), 2), callback=callback)
    assert_same(found, trained(fit, Stepping("AdamW"), GOOD))


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_spikes_are_skipped_and_nan_raises_if_both_are_asked_for(fit: Fit, optimizer: str) -> None:
    callback = ALRCCallback(**STEADY, nonfinite="raise")
    net = Stepping(optimizer)
    found = trained(fit, net, with_spikes(2, good=FEW), callback=callback)
    assert_same(found, trained(fit, Stepping(optimizer), FEW))
    before = weights_of(net)
    with pytest.raises(FloatingPointError, match="loss 'loss' is nan at step 1"):
        fit(net, callback, batches=loading(among([GOOD[0]], 1)), max_epochs=1)
    assert before != weights_of(net)  # the first batch was trained on
    assert all(map(math.isfinite, weights_of(net)))


def reads(fit: Fit, optimizer: str, on_spike: Any) -> int:
    callback = ALRCCallback(**(STEADY | {"on_spike": on_spike}))
    with Reads() as counted:
        fit(Stepping(optimizer), callback, batches=loading(with_spikes(2)), max_epochs=1)
    return counted.count


@pytest.mark.usefixtures("device_path")
def test_a_fused_optimizer_skips_on_the_device(fit: Fit) -> None:
    clipped = reads(fit, "fused AdamW", "clip")
    # One read is allowed: the first step creates the optimizer's state, so the device cannot skip
    # that step.
    assert reads(fit, "fused AdamW", "skip") <= clipped + 1
    assert reads(fit, "AdamW", "skip") > clipped + 1


@pytest.mark.parametrize("on_spike", ["Skip", None, True, "raise"])
def test_an_unknown_on_spike_raises_at_once(on_spike: Any) -> None:
    with pytest.raises(ValueError, match=r"on_spike must be one of \['clip', 'skip'\], got"):
        ALRCCallback(on_spike=on_spike)


# ---- the gradient norm of a step that spikes


def norm_by_hand(net: Any, batch: Any, scale: float = 1.0) -> float:
    net.zero_grad()
    (net.losses(batch).mean() * scale).backward()
    norms = [parameter.grad.norm() for parameter in net.parameters()]
    net.zero_grad()
    return float(torch.stack(norms).norm())


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("precision", ["32", "16"])
def test_the_record_has_the_gradient_norm_of_a_skipped_step(fit: Fit, precision: str) -> None:
    from pytorch_lightning.plugins import MixedPrecision

    net = Stepping("AdamW")
    net.shape = "scalar"
    arguments: dict[str, Any] = {}
    if precision == "16":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        arguments = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    # No step changes the weights, so the gradients can be computed afterwards.
    trained(fit, net, [spiking()], **arguments)
    (spike,) = callback_of(net.trainer).spikes
    expected = norm_by_hand(net, spiking(), spike.scale)
    assert spike.gradient_norm == pytest.approx(expected, rel=1e-5 if precision == "32" else 0.01)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("on_spike", ["clip", "skip"])
def test_the_record_has_the_gradient_norm_that_lightning_clips_by(fit: Fit, on_spike: str) -> None:
    net = Stepping("momentum")
    net.shape = "scalar"
    expected = norm_by_hand(net, spiking())
    callback = ALRCCallback(**(STEADY | {"on_spike": on_spike}))
    trained(fit, net, [spiking(), *GOOD], callback=callback, gradient_clip_val=0.1)
    (spike,) = callback.spikes
    assert spike.gradient_norm == pytest.approx(expected * spike.scale, rel=1e-5)
    assert torch.nn.utils.clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"


def test_all_spikes_of_an_accumulated_step_have_its_gradient_norm(fit: Fit) -> None:
    net = Stepping("momentum")
    callback = ALRCCallback(**(STEADY | {"on_spike": "clip"}), save_batches=5)
    batches = with_spikes(1)[:4]
    arguments = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    trained(fit, net, batches, callback=callback, **arguments)
    assert len({spike.gradient_norm for spike in callback.spikes}) == 1
    assert callback.spikes[0].gradient_norm is not None


def test_a_spike_has_no_gradient_norm_if_nothing_computes_it(fit: Fit) -> None:
    callback = ALRCCallback(**(STEADY | {"on_spike": "clip"}))
    trained(fit, Stepping("momentum"), with_spikes(3), callback=callback)
    assert {spike.gradient_norm for spike in callback.spikes} == {None}


class Repeating(Stepping):
    """An optimizer that clips its gradients three times in a batch, and one that does so once."""

    def __init__(self, closures: bool) -> None:
        super().__init__("momentum")
        self.shape = "scalar"
        self.closures = self.automatic_optimization = closures
        self.norms: dict[int, list[list[float]]] = {}

    def configure_optimizers(self) -> Any:
        if self.closures:
            return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)
        return [torch.optim.SGD([each], 1e-3) for each in self.layer.parameters()]

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip(0, optimizer)

    def clip(self, number: int, optimizer: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        norm = torch.stack([each.grad.norm() for each in parameters]).norm().item()
        of_batch = self.norms.setdefault(self.trainer.fit_loop.epoch_loop.batch_idx, [[], []])
        of_batch[number].append(norm)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.closures:
            return self.losses(batch)
        for scale, number in ((1.0, 0), (3.0, 0), (2.0, 0), (1.0, 1)):
            optimizer = self.optimizers()[number]
            optimizer.zero_grad()
            self.manual_backward(scale * self.losses(batch))
            self.clip(number, optimizer)
            optimizer.step()
        return None


@pytest.mark.parametrize(
    ("closures", "on_spike"),
    [(True, "clip"), (False, "clip"), (False, "skip")],
    ids=["LBFGS", "manual", "skipped"],
)
def test_the_gradient_norm_counts_each_optimizer_once(
    fit: Fit, closures: bool, on_spike: str
) -> None:
    net = Repeating(closures)
    callback = ALRCCallback(**(STEADY | {"on_spike": on_spike}))
    fit(net, callback, batches=loading(with_spikes(3)), max_epochs=1)
    assert callback.spikes
    for spike in callback.spikes:
        first, second = net.norms[spike.batch_idx]
        assert len(first) > 1
        expected = math.hypot(max(first), *second)
        assert spike.gradient_norm == pytest.approx(expected, rel=1e-5)
