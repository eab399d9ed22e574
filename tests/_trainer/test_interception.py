"""A Trainer is unchanged after a fit, however the fit ends, and can be copied during a fit."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from pytorch_lightning import Callback

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._trainer.interception import Interception, Shadow
from tests import nets
from tests.nets import (
    MIXIN_NETS,
    NETS,
    SETTINGS,
    MixinNet,
    Net,
    callback_of,
    state_of,
    train_by_hand,
    weights_of,
)

Fit = Callable[..., Any]


def assert_without_shadows(trainer: Any) -> None:
    """Assert that no object of the Trainer has an attribute that hides a method of its class."""
    loop = trainer.fit_loop
    for optimizer in trainer.optimizers:
        assert "step" not in vars(optimizer)
    for owner in (
        trainer,
        trainer.strategy,
        trainer.precision_plugin,
        loop,
        loop.epoch_loop,
        loop.epoch_loop.automatic_optimization,
        loop.epoch_loop.manual_optimization,
    ):
        hidden = [name for name in vars(owner) if callable(getattr(type(owner), name, None))]
        assert not hidden, owner


def test_the_check_finds_the_shadows_of_a_fit(fit: Fit, namespace: str) -> None:
    class Looking(NETS[namespace]):  # type: ignore[misc]
        def on_train_start(self) -> None:
            assert_without_shadows(self.trainer)

    with pytest.raises(AssertionError):
        fit(Looking(), ALRCCallback())


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_a_fit_leaves_the_trainer_as_before(
    fit: Fit, namespace: str, way: str, manual: bool
) -> None:
    net = (MIXIN_NETS if way == "mixin" else NETS)[namespace]("scalar", "tensor", manual)
    assert_without_shadows(fit(net, *[ALRCCallback()] * (way == "callback")))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_trainer_as_before(
    make_trainer: Fit, namespace: str, error: type[BaseException]
) -> None:
    class Failing(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(Failing(), callbacks=[ALRCCallback()])
    with pytest.raises((error, SystemExit)):
        trainer.fit(Failing())
    assert_without_shadows(trainer)


def test_another_callback_that_fails_in_setup_leaves_the_trainer_as_before(
    make_trainer: Fit, namespace: str
) -> None:
    class Failing(nets.NAMESPACES[namespace].Callback):  # type: ignore[name-defined, misc]
        def setup(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop")

    trainer = make_trainer(NETS[namespace](), callbacks=[ALRCCallback(), Failing()])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(NETS[namespace]())
    assert_without_shadows(trainer)


def test_validate_and_test_are_not_intercepted(make_trainer: Fit, namespace: str) -> None:
    trainers: list[Any] = []

    class Evaluating(NETS[namespace]):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert_without_shadows(self.trainer)
            trainers.append(self.trainer)

        test_step = validation_step

    net = Evaluating()
    trainer = make_trainer(net, callbacks=[ALRCCallback()])
    trainer.validate(net, nets.loader(), verbose=False)
    trainer.test(net, nets.loader(), verbose=False)
    assert len(trainers) == 2 * nets.BATCHES_IN_EPOCH


def test_a_callback_continues_in_a_new_trainer(fit: Fit, namespace: str) -> None:
    callback, net = ALRCCallback(**SETTINGS), NETS[namespace]("vector")
    core, alrc = nets.Core("vector"), ALRC(**SETTINGS)
    for _ in range(2):
        fit(net, callback)
        train_by_hand(core, alrc)
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)


@pytest.mark.parametrize("declared", [None, {"loss": {}}], ids=["met", "declared"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_the_moments_start_afresh_for_another_module(
    fit: Fit, namespace: str, is_gone: bool, declared: dict[str, Any] | None
) -> None:
    callback, fresh = (ALRCCallback(**SETTINGS, losses=declared) for _ in range(2))
    first = NETS[namespace]("vector")
    trainer = fit(first, callback)
    assert callback.losses["loss"].clipped_total > 0
    if is_gone:
        gone = weakref.ref(first)
        del (
            first,
            trainer,
            callback.log,
            callback.log_dict,
        )  # the methods log and log_dict refer to the Trainer
        gc.collect()
        assert gone() is None
    second, alone = NETS[namespace]("vector"), NETS[namespace]("vector")
    fit(second, callback)
    fit(alone, fresh)
    assert weights_of(second) == weights_of(alone)
    assert state_of(callback.losses["loss"]) == state_of(fresh.losses["loss"])


def test_another_module_does_not_get_the_names_of_the_module_before(
    fit: Fit, namespace: str
) -> None:
    callback = ALRCCallback(**SETTINGS)
    callback.clip(torch.ones((), requires_grad=True), "generator")
    fit(NETS[namespace]("vector"), callback)
    assert set(callback.losses) == {"generator", "loss"}
    fit(NETS[namespace]("vector"), callback)
    assert set(callback.losses) == {"loss"}


def test_another_module_continues_with_loaded_moments(fit: Fit, namespace: str) -> None:
    callback = ALRCCallback(**SETTINGS)
    fit(NETS[namespace]("vector"), callback)
    losses = callback.losses["loss"].losses_total
    callback.load_state_dict(callback.state_dict())
    fit(NETS[namespace]("vector"), callback)
    assert callback.losses["loss"].losses_total == 2 * losses


def test_a_lower_learning_rate_in_another_module_is_no_drop(fit: Fit, namespace: str) -> None:
    class Slow(NETS[namespace]):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            for group in optimizer.param_groups:
                group["lr"] /= 10
            return optimizer

    callback = ALRCCallback(**SETTINGS, reset_on_lr_drop=0.5)
    fit(NETS[namespace]("vector"), callback)
    fit(Slow("vector"), callback)
    assert callback.losses["loss"].take_row()["resets"] == 0


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_a_callback_that_joins_the_trainer_late_clips(fit: Fit, namespace: str, hook: str) -> None:
    net, callback = NETS[namespace](), ALRCCallback(**SETTINGS)
    setattr(net, hook, lambda **_: net.trainer.callbacks.append(callback))
    fit(net)
    assert callback.losses["loss"].clipped_total > 0


def test_a_vector_without_losses_counts_as_zero(fit: Fit, namespace: str) -> None:
    class Masked(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)[4 * (batch_idx == 2) :]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            returned.append(float(outputs["loss"]))

    returned: list[float] = []
    fit(Masked("vector"), ALRCCallback(**SETTINGS, nonfinite="raise"))
    assert returned[2] == 0.0
    assert all(map(math.isfinite, returned))


def test_a_trainer_fits_twice(fit: Fit, namespace: str) -> None:
    callback, net = ALRCCallback(**SETTINGS), NETS[namespace]("vector")
    trainer = fit(net, callback)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(net)
    assert callback.losses["loss"].losses_total.item() == 4 * 24
    assert_without_shadows(trainer)


def test_a_fit_after_a_failed_fit_clips_each_loss_once(make_trainer: Fit, namespace: str) -> None:
    class Failing(NETS[namespace]):  # type: ignore[misc]
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    net, callback = Failing("vector"), ALRCCallback(**SETTINGS)
    trainer = make_trainer(net, callbacks=[callback], max_epochs=1)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(net)
    net.fails = False
    trainer.fit(net)
    assert callback.losses["loss"].losses_total.item() == 24


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_end"])
def test_a_fit_within_a_fit_with_the_same_precision_plugin_leaves_both_alone(
    fit: Fit, namespace: str, hook: str
) -> None:
    package = nets.NAMESPACES[namespace]
    plugin = package.plugins.precision.Precision()

    def trained(*others: Any) -> ALRCCallback:
        callback = ALRCCallback(**SETTINGS)
        net = NETS[namespace]("vector")
        trainer = fit(net, callback, *others, plugins=[plugin], gradient_clip_val=0.5)
        assert_without_shadows(trainer)
        return callback

    alone, inner = trained(), []

    def probe(*_: Any) -> None:
        callback = ALRCCallback(**SETTINGS)
        arguments = {"plugins": [plugin], "gradient_clip_val": 0.5}
        fit(NETS[namespace]("vector"), callback, **arguments)
        inner.append(callback)

    outer = trained(type("Probing", (package.Callback,), {hook: probe})())
    assert len(inner) > 0
    assert all(spike.gradient_norm is not None for spike in alone.spikes)
    for callback in (outer, *inner):
        assert state_of(callback.losses["loss"]) == state_of(alone.losses["loss"])
        assert callback.spikes == alone.spikes


# ---- other code that replaces the same methods


POLICIES = ["propagate", "skip", "raise"]


class Callable_:
    """A callable object that replaces a method. Some decorators make one."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Bound(Callable_):
    """A callable object that is bound like a method."""

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self.function, owner)


KINDS: dict[str, Callable[[Any, str], Any]] = {
    "static method": lambda found, name: staticmethod(getattr(found, name)),
    "partial": lambda found, name: functools.partial(getattr(found, name)),
    "object": lambda found, name: Callable_(getattr(found, name)),
    "bound object": lambda found, name: Bound(getattr(type(found), name)),
    "mock": lambda found, name: mock.MagicMock(side_effect=getattr(found, name)),
}
METHODS = ["training_step", "backward", "optimizer_step"]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("kind", "on_class"),
    [(kind, True) for kind in KINDS] + [(kind, False) for kind in ("partial", "object", "mock")],
    ids=[*KINDS, *(f"{kind} of the object" for kind in ("partial", "object", "mock"))],
)
def test_a_method_of_the_strategy_may_be_any_callable(
    make_trainer: Fit, kind: str, name: str, manual: bool, on_class: bool
) -> None:
    core, alrc, net = nets.Core("vector"), ALRC(**SETTINGS), Net("vector", "tensor", manual)
    for _ in range(2):
        train_by_hand(core, alrc, epochs=1)
    callback = ALRCCallback(**SETTINGS, nonfinite="skip")
    trainer = make_trainer(net, callbacks=[callback], max_epochs=1)
    if on_class:
        replacement = KINDS[kind](trainer.strategy, name)
        trainer.strategy.__class__ = type("Another", (type(trainer.strategy),), {name: replacement})
    else:
        setattr(trainer.strategy, name, KINDS[kind](trainer.strategy, name))
    before = dict(vars(trainer.strategy))
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net)
        after = vars(trainer.strategy)
        assert {each: after.get(each) for each in METHODS} == {
            each: before.get(each) for each in METHODS
        }
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)


def test_a_mock_in_place_of_a_method_shows_its_attributes_through_the_shadow(
    make_trainer: Fit,
) -> None:
    seen = []

    class Asking(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(self.trainer.strategy.training_step.call_count)

    trainer = make_trainer(net := Asking("vector"), callbacks=[ALRCCallback()], max_epochs=1)
    with mock.patch.object(trainer.strategy, "training_step", wraps=trainer.strategy.training_step):
        trainer.fit(net)
    assert seen == list(range(1, nets.BATCHES_IN_EPOCH + 1))
    assert_without_shadows(trainer)


def test_a_fit_leaves_a_strategy_that_is_a_mock_as_before(make_trainer: Fit) -> None:
    trainer = make_trainer(Net())
    strategy = mock.Mock(spec=[*METHODS, "lightning_module"])
    trainer._accelerator_connector.strategy = strategy
    before = {name: getattr(strategy, name) for name in METHODS}
    guard = mock.Mock()
    interception = Interception(trainer, guard, may_refuse=True)
    interception.install()
    strategy.backward(loss := torch.ones(()), None)
    interception.remove()
    before["backward"].assert_called_once_with(loss, None)
    assert {name: getattr(strategy, name) for name in METHODS} == before


class Wrapping:
    """Wraps ``strategy.training_step`` at one hook of a fit, and removes the wrapper at another."""

    def __init__(self, callback: type[Any], begins: str, ends: str) -> None:
        self.calls = 0

        def wrap(_: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
            found = self.found = trainer.strategy.training_step
            if hasattr(found, "calls"):
                return

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return found(*args, **kwargs)

            trainer.strategy.training_step = wrapper

        def put_back(_: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
            trainer.strategy.training_step = self.found

        hooks = {begins: wrap} | ({ends: put_back} if ends != "never" else {})
        self.callback = type("Wraps", (callback,), hooks)()


@pytest.mark.parametrize(
    ("namespace", "begins"),
    [
        ("pytorch_lightning", "setup"),
        ("lightning.pytorch", "on_fit_start"),
        ("pytorch_lightning", "on_train_epoch_start"),
    ],
)
@pytest.mark.parametrize("ends", ["on_train_end", "teardown", "never"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrapper_over_the_shadow_may_stay_or_go(
    make_trainer: Fit, namespace: str, begins: str, ends: str, policy: Any
) -> None:
    fits, net, core, alrc = 3, NETS[namespace]("vector"), nets.Core("vector"), ALRC(**SETTINGS)
    for _ in range(fits):
        train_by_hand(core, alrc, epochs=1)
    callback = ALRCCallback(**SETTINGS, nonfinite=policy)
    wrapping = Wrapping(nets.NAMESPACES[namespace].Callback, begins, ends)
    trainer = make_trainer(net, callbacks=[callback, wrapping.callback])
    for epochs in range(1, fits + 1):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net)
    assert wrapping.calls >= fits * nets.BATCHES_IN_EPOCH
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)


def test_the_next_fit_drops_a_shadow_that_other_code_has_put_back(
    make_trainer: Fit,
) -> None:
    depths = []

    def depth(trainer: Any, *_: Any) -> None:
        found, count = trainer.strategy.training_step, 0
        while isinstance(found, Shadow):
            found, count = found.interception.displaced.get("training_step"), count + 1
        depths.append(count)

    class Putting(Callback):
        def setup(self, trainer: Any, *_: Any, **stage: Any) -> None:
            self.found = trainer.strategy.training_step
            trainer.strategy.training_step = functools.partial(self.found)

        def teardown(self, trainer: Any, *_: Any, **stage: Any) -> None:
            trainer.strategy.training_step = self.found
            depth(trainer)

    net, callback = Net("vector"), ALRCCallback(**SETTINGS)
    trainer = make_trainer(net, callbacks=[callback, Putting()])
    for epochs in (1, 2, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net)
    assert depths == [1, 1, 1]
    # Outside a fit, the method clips nothing.
    trainer.strategy.training_step(next(iter(nets.loader())), 0)
    assert callback.losses["loss"].losses_total.item() == 3 * 24


def test_another_shadow_of_the_strategy_is_called_and_left_in_place(
    make_trainer: Fit, namespace: str
) -> None:
    net = NETS[namespace]("vector")
    trainer = make_trainer(net, callbacks=[ALRCCallback(**SETTINGS)], max_epochs=1)
    original, calls = trainer.strategy.training_step, []

    def another(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    trainer.strategy.training_step = another
    trainer.fit(net)
    assert len(calls) == nets.BATCHES_IN_EPOCH
    assert vars(trainer.strategy)["training_step"] is another
    assert callback_of(trainer).losses["loss"].losses_total.item() == 24


@pytest.mark.parametrize("policy", POLICIES)
def test_an_optimizer_whose_step_a_scheduler_wraps_in_the_fit_still_steps_afterwards(
    make_trainer: Fit, policy: Any
) -> None:
    class Kept(Net):
        """Its optimizer is the same in each fit."""

        kept: Any = None

        def configure_optimizers(self) -> Any:
            self.kept = self.kept or self.optimizer()
            return self.kept

        def on_train_start(self) -> None:
            torch.optim.lr_scheduler.ConstantLR(self.kept, factor=1.0)

    net, core, alrc = Kept("vector"), nets.Core("vector"), ALRC(**SETTINGS)
    train_by_hand(core, alrc, epochs=3)
    callback = ALRCCallback(**SETTINGS, nonfinite=policy)
    trainer = make_trainer(net, callbacks=[callback])
    for epochs in (1, 2, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net)
    assert weights_of(net) == weights_of(core)
    net.kept.zero_grad()
    net.losses(next(iter(nets.loader()))).mean().backward()
    net.kept.step()
    assert weights_of(net) != weights_of(core)


class Wrapper(torch.optim.SGD):
    """Steps an inner optimizer, which it has under two names and which may refer back to it."""

    def __init__(self, inner: Any, refers_back: bool) -> None:
        super().__init__(inner.param_groups, lr=0.0)
        self.inner = self.base_optimizer = inner
        if refers_back:
            inner.outer = self

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("refers_back", [False, True])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_optimizer_that_is_reached_by_several_ways_is_intercepted_once(
    make_trainer: Fit, policy: Any, manual: bool, refers_back: bool
) -> None:
    class Wrapped(Net):
        def configure_optimizers(self) -> Any:
            return Wrapper(self.optimizer(), refers_back)

        def on_train_batch_start(self, *_: Any) -> None:
            (self.wrapper,) = self.trainer.optimizers
            for optimizer in (self.wrapper, self.wrapper.inner):
                assert ("step" in vars(optimizer)) == (policy != "propagate")

    net, core, alrc = Wrapped("vector", "tensor", manual), nets.Core("vector"), ALRC(**SETTINGS)
    train_by_hand(core, alrc)
    callback = ALRCCallback(**SETTINGS, nonfinite=policy)
    make_trainer(net, callbacks=[callback]).fit(net)
    assert weights_of(net) == weights_of(core)
    for optimizer in (net.wrapper, net.wrapper.inner):
        assert "step" not in vars(optimizer)


# ---- a fit that fails at any hook


HOOKS = [
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "validation_step",
    "on_train_epoch_end",
    "on_train_end",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_fit_that_fails_at_any_hook_leaves_no_shadow_and_the_next_fit_clips(
    make_trainer: Fit, namespace: str, hook: str, manual: bool
) -> None:
    class Breaking(NETS[namespace]):  # type: ignore[misc]
        breaks = True

        def break_off(self, *args: Any, **kwargs: Any) -> Any:
            if self.breaks:
                self.breaks = False
                raise RuntimeError("stop")
            method = getattr(super(), hook)
            return method(*args, **kwargs)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def val_dataloader(self) -> Any:
            return nets.loader()

    if manual and hook == "on_before_zero_grad":
        pytest.skip("a module that optimizes manually has no such hook")
    setattr(Breaking, hook, Breaking.break_off)
    net, callback = Breaking("vector", "tensor", manual), ALRCCallback(nonfinite="skip")
    trainer = make_trainer(net, callbacks=[callback], max_epochs=1)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(net)
    assert_without_shadows(trainer)
    seen = sum(loss.numel() for loss in net.seen)
    learned = int(callback.losses["loss"].losses_total) if callback.losses else 0
    trainer.fit(net)
    assert_without_shadows(trainer)
    newly_seen = sum(loss.numel() for loss in net.seen) - seen
    assert callback.losses["loss"].losses_total.item() == learned + newly_seen


class Copying:
    """Copies the Trainer, its callback or its module in the middle of a fit."""

    duplicates: list[Any]

    def __init__(self, how: str, what: str) -> None:
        self.how, self.what, self.duplicates = how, what, []

    def __call__(self, trainer: Any, net: Any, *_: Any) -> None:
        if trainer.global_step != 4:
            return
        original = {"trainer": trainer, "callback": callback_of(trainer), "module": net}[self.what]
        made, self.duplicates = self.duplicates, []  # a copy has none of the earlier copies
        if self.how == "deepcopy":
            made.append(copy.deepcopy(original))
        else:
            made.append(pickle.loads(pickle.dumps(original)))
        self.duplicates = made


def copying(how: str, what: str) -> tuple[Any, Copying]:
    """A callback that can itself be copied, and the :class:`Copying` that it calls in a fit."""
    from pytorch_lightning.callbacks import LambdaCallback

    work = Copying(how, what)
    return LambdaCallback(on_train_batch_end=work), work


@pytest.mark.parametrize("net_class", [Net, MixinNet])
@pytest.mark.parametrize("what", ["trainer", "callback"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_made_within_a_fit_does_not_change_the_fit_and_has_its_own_moments(
    fit: Fit, how: str, what: str, net_class: type[Any], manual: bool, policy: Any
) -> None:
    if net_class is MixinNet and policy != "propagate":
        pytest.skip("this module has its own callback, with its own policy")
    callbacks = [ALRCCallback(**SETTINGS, nonfinite=policy)] * (net_class is Net)
    core, alrc, net = nets.Core("vector"), ALRC(**SETTINGS), net_class("vector", "tensor", manual)
    train_by_hand(core, alrc)
    copier, work = copying(how, what)
    callback = callback_of(fit(net, *callbacks, copier))
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)
    (duplicate,) = work.duplicates
    copied = callback_of(duplicate) if what == "trainer" else duplicate
    assert copied is not callback
    assert copied.losses["loss"].updates.item() == 4


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_trainer_clips_by_its_own_moments(fit: Fit, how: str) -> None:
    copier, work = copying(how, "trainer")
    callback = callback_of(fit(Net("vector"), ALRCCallback(**SETTINGS), copier))
    before = state_of(callback.losses["loss"])
    (trainer,) = work.duplicates
    batch = next(iter(nets.loader()))
    with torch.enable_grad():
        loss = trainer.strategy.training_step(batch, 0)
    assert loss.shape == ()
    assert callback_of(trainer).losses["loss"].updates.item() == 5
    assert state_of(callback.losses["loss"]) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_module_copied_within_a_fit_has_its_own_moments(fit: Fit, how: str) -> None:
    copier, work = copying(how, "module")
    net, alrc = MixinNet("vector"), ALRC(**SETTINGS)
    callback = callback_of(fit(net, copier))
    before = state_of(callback.losses["loss"])
    for loss in net.seen[:4]:
        alrc(loss.requires_grad_())
    (duplicate,) = work.duplicates
    spike = torch.tensor([1.0, 1e6], requires_grad=True)
    assert duplicate.alrc(spike).tolist() == alrc(spike).tolist()
    assert state_of(callback.losses["loss"]) == before
