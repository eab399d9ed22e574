import copy
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from examples.comparison.clippers import (
    AdaptiveGradientClipping,
    AutoClipping,
    StepSkipping,
    ZClipping,
)
from examples.comparison.methods import trainer

MAKERS = {
    "zclip": lambda: ZClipping(warmup_steps=5),
    "autoclip": AutoClipping,
    "agc": lambda: AdaptiveGradientClipping(exclude_head=False),
}

TRAINER = trainer("none", steps=1)


@pytest.fixture(params=[("zclip", "zclip"), ("autoclip", "autoclip"), ("agc", "timm")])
def method(request):
    name, package = request.param
    pytest.importorskip(package)
    return name


@pytest.fixture(params=["zclip", "autoclip", "autoclip of all parameters"])
def history(request):
    """Returns a function that makes a callback with a history of norms.

    Given a network in place of None, the function also starts the callback.
    """
    pytest.importorskip(request.param.split()[0])
    make = {
        "zclip": lambda: ZClipping(warmup_steps=5, max_grad_norm=None),
        "autoclip": MAKERS["autoclip"],
        "autoclip of all parameters": lambda: AutoClipping(quantile=0.1, global_threshold=True),
    }[request.param]
    return lambda net: make() if net is None else started(make(), net)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))


def gradients(steps, spikes, net):
    """Each step's gradients; in some steps they are a hundred times as large."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(parameter.shape, generator=generator) * (100 if step in spikes else 1)
            for parameter in net.parameters()
        ]
        for step in range(steps)
    ]


def started(callback, net):
    """The callback, after its training has started."""
    callback.on_train_start(None, net)
    return callback


def clipped(callback, net, steps):
    """The gradients after a callback."""
    left = []
    for each in steps:
        for parameter, gradient in zip(net.parameters(), each, strict=True):
            parameter.grad = gradient.clone()
        callback.on_before_optimizer_step(None, net, None)
        left.append([parameter.grad.clone() for parameter in net.parameters()])
    return left


def by_the_package(method, net, steps):
    """The gradients after the package itself, used as in its documentation."""
    if method == "zclip":
        from zclip import ZClip

        clipper = ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=1.0, warmup_steps=5)
        step = lambda: clipper.step(net)  # noqa: E731
    elif method == "autoclip":
        from autoclip.torch import QuantileClip

        step = QuantileClip(net.parameters(), quantile=0.9, history_length=1000).step
    else:
        from timm.utils import adaptive_clip_grad

        step = lambda: adaptive_clip_grad(net.parameters(), clip_factor=0.01)  # noqa: E731
    left = []
    for each in steps:
        for parameter, gradient in zip(net.parameters(), each, strict=True):
            parameter.grad = gradient.clone()
        step()
        left.append([parameter.grad.clone() for parameter in net.parameters()])
    return left


def same(ours, theirs):
    return all(
        torch.equal(a, b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_callback_clips_like_its_package(method, net):
    steps = gradients(30, {10, 20}, net)
    callback = MAKERS[method]()
    callback.on_train_start(None, net)
    ours = clipped(callback, net, steps)
    assert same(ours, by_the_package(method, net, steps))
    assert not same(ours, steps)
    norm = torch.stack([gradient.norm() for gradient in ours[20]]).norm()
    assert norm < torch.stack([gradient.norm() for gradient in steps[20]]).norm() / 10


@pytest.mark.parametrize("cut", [3, 12])
def test_a_checkpoint_continues_as_without_an_interruption(method, net, cut, tmp_path):
    steps = gradients(30, {10, 20}, net)
    callback = MAKERS[method]()
    callback.on_train_start(None, net)
    expected = clipped(callback, net, steps)

    first, second = MAKERS[method](), MAKERS[method]()
    first.on_train_start(None, net)
    ours = clipped(first, net, steps[:cut])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = copy.deepcopy(net)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.on_train_start(None, resumed)
    ours += clipped(second, resumed, steps[cut:])
    assert same(ours, expected)


@pytest.mark.parametrize("of_all", [False, True])
def test_a_restored_history_is_on_the_device_of_the_network(of_all, net):
    """The device "meta" stands for a GPU."""
    pytest.importorskip("autoclip")
    first, second = (AutoClipping(global_threshold=of_all) for _ in range(2))
    clipped(started(first, net), net, gradients(3, set(), net))
    second.load_state_dict(first.state_dict())
    started(second, net.to("meta"))
    histories = second.clipper.state.values()
    assert {(each if of_all else each["history"]).device.type for each in histories} == {"meta"}


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 3, 5, 12])
def test_a_norm_that_is_not_finite_does_not_change_the_state(history, net, at, value):
    """Step 5 is the first after the warm-up of ZClip."""
    steps = gradients(30, {20}, net)
    overflow = [torch.full_like(each, value) for each in steps[0]]
    ours = clipped(history(net), net, [*steps[:at], overflow, overflow, *steps[at:]])
    del ours[at : at + 2]
    assert same(ours, clipped(history(net), net, steps))


def test_a_norm_that_is_not_finite_removes_no_norm_from_a_full_history(net):
    pytest.importorskip("autoclip")
    steps = gradients(8, set(), net)
    overflow = [torch.full_like(each, math.inf) for each in steps[0]]
    first, second = (started(AutoClipping(history_length=4), net) for _ in range(2))
    expected = clipped(first, net, steps)
    assert same(clipped(second, net, [*steps[:7], overflow, steps[7]])[-1:], expected[-1:])


def test_autoclip_keeps_the_finite_norms_of_the_other_parameters(net):
    pytest.importorskip("autoclip")
    steps = gradients(8, set(), net)
    steps[4][0].fill_(math.inf)
    callback = started(AutoClipping(), net)
    clipped(callback, net, steps)
    histories = [callback.clipper.state[each]["history"] for each in net.parameters()]
    assert [len(each) for each in histories] == [7, 8, 8, 8]
    assert torch.cat(histories).isfinite().all()


def test_a_step_without_gradients_leaves_no_norm(net):
    pytest.importorskip("autoclip")
    callback = started(AutoClipping(), net)
    callback.on_before_optimizer_step(None, net, None)
    assert not callback.clipper.state


class Regression(pl.LightningModule):
    """One layer. Its gradients overflow in half precision if the loss scale is too large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def scaled_training(callback, scaler):
    """40 steps with a GradScaler, as Lightning uses for 16-mixed on a GPU."""
    module = Regression()
    fit = pl.Trainer(
        accelerator="cpu",
        max_steps=40,
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randn(320, 4, generator=torch.Generator().manual_seed(0))
    fit.fit(module, DataLoader(rows, batch_size=8))
    return module


def test_steps_that_a_grad_scaler_skips_do_not_change_the_state(history):
    callback = history(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    module = scaled_training(callback, scaler)
    assert scaler.get_scale() < 2.0**20  # the scaler skipped some steps
    assert all(each.isfinite().all() for each in module.parameters())
    assert all(math.isfinite(each) for each in numbers(callback.state_dict()))
    assert module.losses[-1] < module.losses[0]


def numbers(state):
    """All numbers in a callback's state."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, torch.Tensor):
        return state.flatten().tolist()
    if isinstance(state, list):
        return [number for each in state for number in numbers(each)]
    return [] if state is None else [state]


def test_step_skipping_notes_losses_without_the_factor_of_a_grad_scaler():
    callback = StepSkipping()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10)
    module = scaled_training(callback, scaler)
    assert scaler.get_scale() == 4 * 2**4
    assert [each.item() for each in callback.losses] == pytest.approx(module.losses)
    assert callback.skipped == 0


def test_adaptive_gradient_clipping_leaves_out_the_head(net):
    pytest.importorskip("timm")
    (steps,) = gradients(1, set(), net)
    (left,) = clipped(AdaptiveGradientClipping(), net, [steps])
    assert [torch.equal(a, b) for a, b in zip(left, steps, strict=True)] == [False] * 2 + [True] * 2


def test_adaptive_gradient_clipping_raises_small_norms_of_weights_to_eps(net):
    pytest.importorskip("timm")
    (step,) = gradients(1, set(), net)
    (left,) = clipped(AdaptiveGradientClipping(eps=1e6, exclude_head=False), net, [step])
    assert all(torch.equal(a, b) for a, b in zip(left, step, strict=True))


def test_autoclip_can_clip_all_parameters_together(net):
    autoclip = pytest.importorskip("autoclip.torch")
    steps = gradients(12, {10}, net)
    callback = AutoClipping(quantile=0.1, global_threshold=True)
    callback.on_train_start(None, net)
    ours = clipped(callback, net, steps)
    clipper = autoclip.QuantileClip(
        net.parameters(), quantile=0.1, history_length=1000, global_threshold=True
    )
    package = SimpleNamespace(on_before_optimizer_step=lambda *_: clipper.step())
    assert same(ours, clipped(package, net, steps))


def test_zclip_takes_another_largest_norm(net):
    zclip = pytest.importorskip("zclip")
    steps = gradients(12, {10}, net)
    ours = clipped(ZClipping(warmup_steps=5, max_grad_norm=0.1), net, steps)
    clipper = zclip.ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=0.1, warmup_steps=5)
    package = SimpleNamespace(on_before_optimizer_step=lambda *_: clipper.step(net))
    assert same(ours, clipped(package, net, steps))


def are_skipped(callback, net, losses, norms):
    """Whether each step with these losses and gradient norms is skipped."""
    optimizer = torch.optim.Adam(net.parameters())
    parameter, skipped = next(net.parameters()), []
    for loss, norm in zip(losses, norms, strict=True):
        optimizer.zero_grad()
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = norm
        callback.on_before_backward(TRAINER, net, torch.tensor(loss))
        callback.on_before_optimizer_step(None, net, optimizer)
        skipped.append(parameter.grad is None)
    return skipped


def spiking(at, value, steps=20):
    """A sequence about 1 with one step of another value."""
    values = [1.0 + 0.1 * (step % 3) for step in range(steps)]
    values[at] = value
    return values


@pytest.mark.parametrize("of", ["loss", "norm"])
def test_a_step_far_above_the_last_steps_is_skipped(net, of):
    calm, spike = spiking(0, 1.0), spiking(15, 3.0)
    callback = StepSkipping(window=8)
    skipped = are_skipped(callback, net, *((spike, calm) if of == "loss" else (calm, spike)))
    assert [step for step, was in enumerate(skipped) if was] == [15]
    assert callback.skipped == 1


def test_step_skipping_has_the_limit_computed_by_hand(net):
    # The mean of 1, 1.1, 1.2 and 1 is 1.075, and their standard deviation 0.0957. The limit is 6
    # standard deviations above the mean: 1.6495.
    losses = [1.0, 1.1, 1.2, 1.0]
    for last, skips in ((1.64, False), (1.66, True), (math.nan, True), (math.inf, True)):
        skipped = are_skipped(
            StepSkipping(window=8), net, [*losses, last], [1.0, 1.1, 1.2, 1.0, 1.0]
        )
        assert skipped == [False] * 4 + [skips]


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(net):
    losses = spiking(10, math.nan)
    losses[12] = 3.0
    skipped = are_skipped(StepSkipping(window=8), net, losses, spiking(0, 1.0))
    assert [step for step, was in enumerate(skipped) if was] == [10, 12]


def test_a_finite_loss_after_losses_that_are_not_finite_is_not_skipped(net):
    losses, norms = [math.nan, math.nan, 1.0, 1.1], [1.0, 1.1, 1.2, 1.0]
    assert are_skipped(StepSkipping(window=4), net, losses, norms) == [False, True, False, False]


def test_nothing_is_skipped_before_half_the_window_is_filled(net):
    assert not any(
        are_skipped(StepSkipping(window=40), net, spiking(15, 9.0)[:19], spiking(0, 1.0)[:19])
    )


def test_a_skipped_step_changes_neither_weights_nor_optimizer(net):
    callback, optimizer = StepSkipping(window=8), torch.optim.Adam(net.parameters())
    for step in range(8):
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        optimizer.zero_grad()
        loss = net(torch.ones(1, 3, 5, 5)).square().mean() * (1e6 if step == 7 else 1.0)
        callback.on_before_backward(TRAINER, net, loss)
        loss.backward()
        callback.on_before_optimizer_step(None, net, optimizer)
        optimizer.step()
    after = (net.state_dict(), optimizer.state_dict())
    assert callback.skipped == 1
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_step_skipping_continues_from_a_checkpoint(net, tmp_path):
    losses, norms = spiking(15, 3.0), spiking(0, 1.0)
    first, second = StepSkipping(window=8), StepSkipping(window=8)
    are_skipped(first, net, losses[:15], norms[:15])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert are_skipped(second, net, losses[15:], norms[15:]) == [True, False, False, False, False]
    assert second.skipped == 1


def test_restored_losses_and_norms_are_on_the_device_of_the_network(net):
    """The device "meta" stands for a GPU."""
    first, second = StepSkipping(window=8), StepSkipping(window=8)
    are_skipped(first, net, [1.0] * 5, [1.0] * 5)
    second.load_state_dict(first.state_dict())
    started(second, Regression().to("meta"))
    assert len(second.losses) == len(second.norms) == 5
    assert {each.device.type for each in (*second.losses, *second.norms)} == {"meta"}
