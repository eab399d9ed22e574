"""Losses that are NaN or infinite: the effect of each policy on a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback
from tests import nets
from tests.conftest import paths_with
from tests.nets import SETTINGS, Net, WithALRC, callback_of, state_of, weights_of

Fit = Callable[..., Any]

GOOD = [*nets.loader(), *nets.loader()]
FEW = GOOD[:6]
PLACES = (0, 4, 5, 8)
"""Places among the few: the first, two in a row, and one before the last."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
}


def bad(value: float = math.nan, samples: int = 4) -> tuple[Tensor, Tensor]:
    """A batch in which the last samples' losses and gradients are not finite.

    If all samples are bad, the moments do not change.
    """
    x, y = GOOD[0]
    y = y.clone()
    y[-samples:] = value
    return x, y


def among(good: list[Any], *places: int, value: float = math.nan) -> list[Any]:
    """The good batches, with bad batches inserted at these indices."""
    batches = list(good)
    for place in places:
        batches.insert(place, bad(value))
    return batches


def loading(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Stepping(Net):
    """A net with one of the optimizers; its scheduler, if it has one, steps with the optimizer."""

    def __init__(self, optimizer: str, scheduled: bool = False, **network: Any) -> None:
        super().__init__("vector", **network)
        self.which, self.scheduled = optimizer, scheduled

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.which](self.parameters())
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def everything(trainer: Any) -> dict[str, Any]:
    """All that a bad batch must leave unchanged."""
    (optimizer,) = trainer.optimizers
    return {
        "weights": weights_of(trainer.lightning_module),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "schedulers": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        "moments": {name: state_of(each) for name, each in callback_of(trainer).losses.items()},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(map(math.isfinite, found["weights"]))


def skipping(fit: Fit, net: Any, batches: list[Any], **arguments: Any) -> dict[str, Any]:
    callback = ALRCCallback(**SETTINGS, nonfinite="skip")
    return everything(fit(net, callback, batches=loading(batches), max_epochs=1, **arguments))


# ---- skip


WAYS: dict[str, dict[str, bool]] = {"automatic": {}, "scheduled": {"scheduled": True}} | {
    "manual": {"manual": True}  # such a module steps its schedulers itself
}


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("each_path", "optimizer", "way"), paths_with(OPTIMIZERS, WAYS), indirect=["each_path"]
)
def test_skip_leaves_all_as_without_the_batch(fit: Fit, optimizer: str, way: str) -> None:
    batches = among(FEW, *PLACES, value=math.inf if way == "manual" else math.nan)
    found = skipping(fit, Stepping(optimizer, **WAYS[way]), batches)
    assert_same(found, skipping(fit, Stepping(optimizer, **WAYS[way]), FEW))


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("each_path", "optimizer", "place"), paths_with(OPTIMIZERS, [3, 4, 5]), indirect=["each_path"]
)
def test_skip_drops_a_whole_window_of_accumulation(fit: Fit, optimizer: str, place: int) -> None:
    batches = list(GOOD)
    batches[place] = bad()
    accumulating = {"accumulate_grad_batches": 3}
    found = skipping(fit, Stepping(optimizer), batches, **accumulating)
    expected = skipping(fit, Stepping(optimizer), GOOD[:3] + GOOD[6:], **accumulating)
    # The good batches of the dropped window still update the moments, so later weights differ from
    # those of the other run. Only the steps are compared.
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    assert all(map(math.isfinite, found["weights"]))

    def steps(run: dict[str, Any]) -> list[Any]:
        return [each.get("step") for each in run["optimizer"]["state"].values()]

    assert steps(found) == steps(expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skip_of_a_window_leaves_all_as_without_the_window_if_nothing_is_clipped(
    fit: Fit, optimizer: str
) -> None:
    runs = []
    for batches in (among(GOOD[:6], 3, 4, 5) + GOOD[6:], GOOD):
        callback = ALRCCallback(num_stddev=math.inf, nonfinite="skip")
        net = Stepping(optimizer)
        trainer = fit(
            net, callback, batches=loading(batches), max_epochs=1, accumulate_grad_batches=3
        )
        runs.append(everything(trainer) | {"moments": None})
    assert_same(*runs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_bad_sample_is_enough_to_skip(fit: Fit, optimizer: str) -> None:
    runs = []
    for batches in ([*GOOD[:3], bad(samples=1), *GOOD[3:]], GOOD):
        callback = ALRCCallback(num_stddev=math.inf, nonfinite="skip")
        trainer = fit(Stepping(optimizer), callback, batches=loading(batches), max_epochs=1)
        runs.append(everything(trainer) | {"moments": None})
    assert_same(*runs)


def test_skip_with_gradient_clipping_leaves_all_as_without_the_batch(fit: Fit) -> None:
    arguments = {"gradient_clip_val": 0.5}
    found = skipping(fit, Stepping("AdamW"), among(GOOD, 2), **arguments)
    assert_same(found, skipping(fit, Stepping("AdamW"), GOOD, **arguments))


class LossesInClosure(Stepping):
    """Optimizes manually, and computes its losses in the optimizer's closure."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer, manual=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.losses(batch)
            self.manual_backward(loss)
            return loss.mean()

        optimizer.step(closure=closure)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skip_of_losses_computed_in_a_closure_leaves_all_as_without_the_batch(
    fit: Fit, optimizer: str
) -> None:
    found = skipping(fit, LossesInClosure(optimizer), among(FEW, *PLACES))
    assert_same(found, skipping(fit, LossesInClosure(optimizer), FEW))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_raise_of_losses_computed_in_a_closure_comes_before_a_parameter_changes(
    fit: Fit, optimizer: str
) -> None:
    net, good = LossesInClosure(optimizer), LossesInClosure(optimizer)
    good.load_state_dict(net.state_dict())
    with pytest.raises(FloatingPointError, match="loss 'loss' is nan at step 2, batch_idx 2"):
        fit(net, ALRCCallback(nonfinite="raise"), batches=loading(among(GOOD, 2)))
    fit(good, ALRCCallback(), batches=loading(GOOD[:2]), max_epochs=1)
    assert weights_of(net) == weights_of(good)


class Quasi(Net):
    """Its optimizer calls a closure many times.

    The loss is NaN in call number ``bad_call``, counted from 1; 0 for no NaN.
    """

    def __init__(self, bad_call: int = 0) -> None:
        super().__init__("vector")
        self.calls, self.bad_call = 0, bad_call

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = self.losses(batch).mean()
        return loss * math.nan if self.calls == self.bad_call else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)


def test_skip_of_a_closure_that_runs_many_times_leaves_all_as_without_the_batch(fit: Fit) -> None:
    assert_same(skipping(fit, Quasi(), among(GOOD, 2)), skipping(fit, Quasi(), GOOD))


def test_skip_undoes_the_updates_before_a_later_bad_call_of_the_closure(fit: Fit) -> None:
    seen = []

    class Watching(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            seen.append((weights_of(trainer.lightning_module), optimizer.state_dict()))

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            starts.append(module.calls)
            if seen:
                seen[-1] = copy.deepcopy(seen[-1])

    starts: list[int] = []
    callback = ALRCCallback(nonfinite="skip")
    fit(Quasi(bad_call=5), callback, Watching(), batches=loading(GOOD[:4]), max_epochs=1)
    assert starts[1] + 1 < 5 <= starts[2]  # call 5 is in the second step, after its first call
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert seen[2][0] != seen[1][0]
    assert all(map(math.isfinite, seen[-1][0]))


def test_skip_undoes_the_first_step_of_an_optimizer_that_runs_its_closure_many_times(
    fit: Fit,
) -> None:
    net = Quasi(bad_call=2)
    before = weights_of(net)
    trainer = fit(net, ALRCCallback(nonfinite="skip"), batches=loading(GOOD[:1]), max_epochs=1)
    assert net.calls == 2
    assert weights_of(net) == before
    assert trainer.optimizers[0].state_dict()["state"] == {}


class Normalizing(Quasi):
    """Each call of its closure changes the statistics of a batch normalization."""

    def __init__(self, bad_call: int) -> None:
        super().__init__(bad_call)
        self.norm = torch.nn.BatchNorm1d(3)
        self.starts: list[tuple[int, dict[str, Tensor]]] = []

    def losses(self, batch: Any) -> Tensor:
        return super().losses((self.norm(batch[0]), batch[1]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.starts.append((self.calls, copy.deepcopy(self.state_dict())))


class Unusual(Stepping):
    """Has frozen parameters whose values PyTorch cannot check, and modules that it never calls."""

    def __init__(self) -> None:
        super().__init__("momentum")
        self.unused = torch.nn.ModuleList([torch.nn.LazyLinear(2), torch.nn.LazyBatchNorm1d()])
        frozen = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()]
        frozen.append(torch.ones(3).to(torch.float8_e4m3fn))
        for place, value in enumerate(frozen):
            self.register_parameter(f"frozen_{place}", torch.nn.Parameter(value, False))

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.which](self.layer.parameters())


@pytest.mark.filterwarnings("ignore:.*Lazy|.*lazy|Sparse CSR")
def test_skip_in_a_module_with_unusual_parameters(fit: Fit) -> None:
    net, reference = Unusual(), Stepping("momentum")
    for each, batches in ((net, among(GOOD, 0, 4)), (reference, GOOD)):
        callback = ALRCCallback(**SETTINGS, nonfinite="skip")
        fit(each, callback, batches=loading(batches), max_epochs=1)
    assert weights_of(net.layer) == weights_of(reference.layer)


@pytest.mark.filterwarnings("ignore:.*Lazy|.*lazy|Sparse CSR")
def test_a_parameter_that_a_skipped_step_made_nan_is_warned_of_beside_unusual_parameters(
    fit: Fit,
) -> None:
    class Changing(Unusual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4:
                self.layer.bias.data.fill_(math.nan)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="parameters are not finite after a step"):
        fit(Changing(), ALRCCallback(nonfinite="skip"), batches=loading(among(GOOD, 4)))


@pytest.mark.parametrize("bad_call", [2, 5, 6])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_buffers_are_as_before_a_step_whose_later_call_of_the_closure_was_bad(
    fit: Fit, policy: Any, bad_call: int
) -> None:
    net = Normalizing(bad_call)
    raises = pytest.raises(FloatingPointError) if policy == "raise" else nullcontext()
    with raises:
        fit(net, ALRCCallback(nonfinite=policy), batches=loading(GOOD[:4]), max_epochs=1)
    refused = max(index for index, (calls, _) in enumerate(net.starts) if calls < bad_call)
    calls, before = net.starts[refused]
    assert calls + 1 < bad_call  # an earlier call of the step was good
    is_last = refused + 1 == len(net.starts)
    after = net.state_dict() if is_last else net.starts[refused + 1][1]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_an_epochs_scheduler_steps_after_an_epoch_whose_last_step_was_skipped(fit: Fit) -> None:
    class Scheduled(Stepping):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    net, batches = Scheduled("AdamW"), loading([*GOOD[:3], bad()])
    trainer = fit(net, ALRCCallback(nonfinite="skip"), batches=batches, max_epochs=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 4)


class Unequal(WithALRC, Net):
    """One network steps after every batch, the other after every second batch."""

    def __init__(self) -> None:
        super().__init__("vector", manual=True)
        self.other = torch.nn.Linear(3, 2)

    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS, nonfinite="skip")

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.layer, self.other)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        often, seldom = self.optimizers()  # type: ignore[misc]
        losses = ((self.other(x) - y) ** 2).mean(1)
        self.manual_backward(self.alrc(losses, "seldom").mean())
        good = torch.nan_to_num(y, 0.0)
        often.zero_grad()
        self.manual_backward(self.alrc(((self.layer(x) - good) ** 2).mean(1), "often").mean())
        often.step()
        if batch_idx % 2:
            seldom.step()
            seldom.zero_grad()


@pytest.mark.parametrize("place", [2, 3])
def test_skip_refuses_the_bad_step_of_an_optimizer_that_steps_less_often_than_another(
    fit: Fit, place: int
) -> None:
    net, seen = Unequal(), []

    class Watching(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append([weights_of(part) for part in (net.layer, net.other)])

    fit(net, Watching(), batches=loading(among(GOOD[:8], place)), max_epochs=1)
    assert seen[1][1] == seen[3][1] != seen[5][1]
    assert seen[place - 1][0] == seen[place][0] != seen[place + 1][0]
    assert all(map(math.isfinite, weights_of(net)))


class Adversaries(WithALRC, Net):
    """Two losses and two optimizers, stepped one after the other or both at the end.

    Only the loss named ``poison`` is NaN on a bad batch.
    """

    def __init__(self, together: bool, poison: str) -> None:
        super().__init__("vector", manual=True)
        self.other = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.other.parameters():
                parameter.fill_(0.1)
        self.together, self.poison = together, poison

    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS, nonfinite="skip")

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), 0.05) for part in (self.layer, self.other)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), steps = batch[:2], []
        for name, part, optimizer in zip(
            ("first", "second"), (self.layer, self.other), self.optimizers(), strict=True
        ):
            target = torch.nan_to_num(y, 0.0) if name != self.poison else y
            optimizer.zero_grad()
            self.manual_backward(self.alrc(((part(x) - target) ** 2).mean(1), name).mean())
            steps.append(optimizer.step)
            if not self.together:
                steps.pop()()
        for step in steps:
            step()


@pytest.mark.parametrize("poison", ["first", "second"])
@pytest.mark.parametrize("together", [False, True], ids=["in turn", "together"])
def test_skip_keeps_every_network_of_several_from_its_bad_losses(
    fit: Fit, together: bool, poison: str
) -> None:
    net = Adversaries(together, poison)
    poisoned = {"first": net.layer, "second": net.other}[poison]
    seen = []

    class Watching(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(weights_of(poisoned))

    fit(net, Watching(), batches=loading(among(GOOD, 2)), max_epochs=1)
    assert seen[1] == seen[2] != seen[3]
    assert all(map(math.isfinite, weights_of(net)))


class Generating(Net):
    """A generator's fake samples are used in the steps of two optimizers, as in pix2pix."""

    def __init__(self) -> None:
        super().__init__("vector", manual=True)
        self.norm, self.other = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)

    def configure_optimizers(self) -> Any:
        generator = [*self.layer.parameters(), *self.norm.parameters()]
        return [torch.optim.SGD(each, 0.01) for each in (generator, self.other.parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), (generating, judging) = batch, self.optimizers()  # type: ignore[misc]
        fake = self.norm(self.layer(x))
        judging.zero_grad()
        self.manual_backward((self.other(fake.detach()) - self.other(y)).square().mean())
        judging.step()
        generating.zero_grad()
        self.manual_backward(self.other(fake).square().mean())  # through the norm
        generating.step()


def test_a_graph_made_before_a_skipped_step_can_be_differentiated_after_it(fit: Fit) -> None:
    net, reference = Generating(), Generating()
    reference.load_state_dict(net.state_dict())
    for each, batches in ((net, among(GOOD[:6], 2)), (reference, GOOD[:6])):
        callback = ALRCCallback(num_stddev=math.inf, nonfinite="skip")
        fit(each, callback, batches=loading(batches), max_epochs=1)
    torch.testing.assert_close(net.state_dict(), reference.state_dict(), rtol=0, atol=0)


class Reads(TorchDispatchMode):
    """Counts the reads that wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) == "aten._local_scalar_dense.default"
        return func(*args, **(kwargs or {}))


def reads(fit: Fit, optimizer: str, policy: Any) -> int:
    net, callback = Stepping(optimizer), ALRCCallback(**SETTINGS, nonfinite=policy)
    with Reads() as counted:
        fit(net, callback, batches=loading(among(GOOD, 2)), max_epochs=1)
    return counted.count


@pytest.mark.usefixtures("device_path")
def test_a_fused_optimizer_skips_on_the_device(fit: Fit) -> None:
    propagated = reads(fit, "fused AdamW", "propagate")
    # One read is allowed: the first step creates the optimizer's state, so the device cannot skip
    # that step.
    assert reads(fit, "fused AdamW", "skip") <= propagated + 1
    assert reads(fit, "AdamW", "skip") > propagated + 1  # the count finds the reads of AdamW


def test_a_fused_optimizer_is_as_before_after_a_skipped_step(fit: Fit) -> None:
    net, batches = Stepping("fused AdamW"), loading([*GOOD[:3], bad()])
    callback = ALRCCallback(**SETTINGS, nonfinite="skip")
    (optimizer,) = fit(net, callback, batches=batches, max_epochs=1).optimizers
    assert not hasattr(optimizer, "found_inf")
    before = weights_of(net)
    optimizer.zero_grad()
    net.losses(GOOD[0]).mean().backward()
    optimizer.step()
    assert weights_of(net) != before


class Growing(Stepping):
    """From batch 4 on, it trains a second layer, which begins in one of three ways."""

    def __init__(self, optimizer: str, way: str) -> None:
        super().__init__(optimizer)
        self.way = way
        self.second = torch.nn.Linear(3, 2)
        for parameter in self.second.parameters():
            torch.nn.init.zeros_(parameter)
        self.second.requires_grad_(way != "unfrozen")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4 and self.way == "new group":
            self.trainer.optimizers[0].add_param_group({"params": self.second.parameters()})
        if batch_idx == 4:
            self.second.requires_grad_()

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        is_used = self.way != "first used" or self.trainer.fit_loop.batch_idx >= 4
        found = self.layer(x) + self.second(x) if is_used else self.layer(x)
        return ((found - y) ** 2).mean(1)

    def configure_optimizers(self) -> Any:
        module = self.layer if self.way == "new group" else self
        return OPTIMIZERS[self.which](module.parameters())


@pytest.fixture
def _memory_of_nan() -> Iterator[None]:
    """New tensors whose values are not set are NaN, as any memory may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory_of_nan")
@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        ("fused SGD", "new group"),  # PyTorch's fused SGD allows no other way
        ("fused AdamW", "new group"),
        ("fused AdamW", "unfrozen"),
        ("fused AdamW", "first used"),
    ],
)
def test_skip_of_the_first_step_of_a_later_parameter_leaves_all_as_without_the_batch(
    fit: Fit, optimizer: str, way: str
) -> None:
    found = skipping(fit, Growing(optimizer, way), among(GOOD, 4, 7))
    assert_same(found, skipping(fit, Growing(optimizer, way), GOOD))


@pytest.mark.parametrize("optimizer", ["AdamW", "fused AdamW"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_with_a_grad_scaler_leaves_all_as_without_the_batch(
    fit: Fit, optimizer: str, scheduled: bool, value: float
) -> None:
    runs = []
    for batches in (among(GOOD, 0, 4, 5, value=value), GOOD):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        arguments = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
        runs.append(skipping(fit, Stepping(optimizer, scheduled), batches, **arguments))
        assert scaler.get_scale() == 1024.0  # the scaler did not skip the steps
    assert_same(*runs)


def test_skip_does_not_refuse_the_first_step_after_resuming(fit: Fit, tmp_path: Any) -> None:
    def run(*batches: Any, **arguments: Any) -> Any:
        callback = ALRCCallback(**SETTINGS, nonfinite="skip")
        net = Stepping("AdamW")
        return fit(net, callback, batches=loading(list(batches)), **arguments)

    run(bad(), *GOOD[:3], max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    # The bad batch before the checkpoint must not make the first batch after it count as bad.
    trainer = run(*GOOD[:4], max_epochs=2, ckpt_path=tmp_path / "saved.ckpt")
    assert callback_of(trainer).losses["loss"].nonfinite_total.item() == 4
    steps = [each["step"] for each in trainer.optimizers[0].state_dict()["state"].values()]
    assert set(map(float, steps)) == {3.0 + 4.0}


def test_skip_after_more_bad_losses_than_float32_counts(fit: Fit) -> None:
    callback, net = ALRCCallback(**SETTINGS, nonfinite="skip"), Stepping("momentum")
    fit(net, callback, batches=loading(GOOD[:1]), max_epochs=1)
    state = callback.state_dict()
    state["losses"]["loss"]["state"]["total_offending"] = 2.0**24
    callback.load_state_dict(state)
    fit(net, callback, batches=loading([bad(samples=1)]), max_epochs=1)
    assert callback.losses["loss"].offending_total.item() == 2**24 + 1
    assert all(map(math.isfinite, weights_of(net)))


@pytest.mark.usefixtures("quick_path")
def test_skip_whatever_the_default_device(fit: Fit) -> None:
    net, batches = Stepping("momentum"), nets.ResumableLoader()
    batches.batches.insert(2, bad())
    with torch.device("meta"):
        fit(net, ALRCCallback(**SETTINGS, nonfinite="skip"), batches=batches, max_epochs=1)
    assert all(map(math.isfinite, weights_of(net)))


# ---- raise


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("each_path", "optimizer", "step"),
    paths_with(OPTIMIZERS, product([False, True], [math.nan, math.inf])),
    indirect=["each_path"],
)
def test_raise_names_the_loss_before_a_parameter_changes(
    make_trainer: Fit, optimizer: str, step: tuple[bool, float]
) -> None:
    manual, value = step
    net, callback = (
        Stepping(optimizer, manual=manual),
        ALRCCallback(**SETTINGS, nonfinite="raise"),
    )
    seen = []

    class Watching(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(weights_of(net))

    trainer = make_trainer(net, callbacks=[callback, Watching()], max_epochs=1)
    expected = rf"'loss' is {value} at step 3, batch_idx 3.*nonfinite='raise'"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.fit(net, loading(among(GOOD, 3, value=value)))
    assert len(seen) == 3
    assert weights_of(net) == seen[-1]
    assert callback.losses["loss"].updates.item() <= 4


def test_raise_tells_of_a_loss_that_the_step_has_mended_since(make_trainer: Fit) -> None:
    class Mending(WithALRC, Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = self.losses(batch)
            clipped = self.alrc(losses, "mended").mean()
            with torch.no_grad():
                losses.nan_to_num_()
            return clipped

    net, callback = Mending("vector"), ALRCCallback(**SETTINGS, nonfinite="raise")
    trainer = make_trainer(net, callbacks=[callback], max_epochs=1)
    with pytest.raises(FloatingPointError, match="loss 'mended' is not finite at step 3"):
        trainer.fit(net, loading(among(GOOD, 3)))


def test_raise_tells_which_of_several_losses_is_bad(make_trainer: Fit) -> None:
    net = Adversaries(False, "second")
    callback = ALRCCallback(**SETTINGS, nonfinite="raise")
    trainer = make_trainer(net, callbacks=[callback], max_epochs=1)
    with pytest.raises(FloatingPointError, match=r"loss 'second' is nan at step .*batch_idx 2"):
        trainer.fit(net, loading(among(GOOD, 2)))


def test_an_error_that_a_manual_step_catches_is_raised_once(fit: Fit) -> None:
    raised = []

    class Catching(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch))
            try:
                optimizer.step()
            except FloatingPointError:
                raised.append(batch_idx)

    net, callback = Catching("vector", manual=True), ALRCCallback(**SETTINGS, nonfinite="raise")
    fit(net, callback, batches=loading(among(GOOD, 2)), max_epochs=1)
    assert raised == [2]
    assert all(map(math.isfinite, weights_of(net)))


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_policy_without_a_bad_loss_changes_nothing(fit: Fit, policy: Any) -> None:
    nets_ = [Stepping("fused AdamW", scheduled) for scheduled in (False, True, False, True)]
    for net, which in zip(nets_, [policy, policy, "propagate", "propagate"], strict=True):
        fit(net, ALRCCallback(**SETTINGS, nonfinite=which), batches=loading(GOOD), max_epochs=1)
    assert weights_of(nets_[0]) == weights_of(nets_[2])
    assert weights_of(nets_[1]) == weights_of(nets_[3])


# ---- propagate


def test_propagate_passes_bad_gradients_on_and_keeps_the_moments_finite(fit: Fit) -> None:
    net = Stepping("AdamW")
    trainer = fit(net, ALRCCallback(**SETTINGS), batches=loading(among(GOOD, 2)), max_epochs=1)
    assert all(map(math.isnan, weights_of(net)))
    assert math.isfinite(callback_of(trainer).losses["loss"].mu1.item())


@pytest.mark.parametrize("policy", ["Skip", None, True, ["skip"]])
def test_an_unknown_policy_raises_at_once(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"nonfinite must be one of.*propagate.*skip.*raise.*got"):
        ALRCCallback(nonfinite=policy)
