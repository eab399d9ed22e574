"""The mixin: what it adds to a LightningModule, and several losses by name."""

from __future__ import annotations

import abc
import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_alrc import ALRC, ALRCCallback, ALRCMixin
from tests import nets
from tests.nets import (
    MIXIN_NETS,
    NAMED_NETS,
    NAMESPACES,
    NETS,
    SETTINGS,
    Core,
    MixinNet,
    WithALRC,
    callback_of,
    loader,
    state_of,
    train_by_hand,
    weights_of,
)

pytestmark = pytest.mark.quick

Fit = Callable[..., Any]


def loss_of(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


# ---- several losses, each with moments of its own


class Adversaries(nn.Module):
    """A small generator and a small discriminator, with spikes that ALRC clips."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(3, 2), nn.Linear(2, 1)

    def generator_loss(self, x: Tensor) -> Tensor:
        return (self.discriminator(self.generator(x)) - 1.0).square().mean()

    def discriminator_losses(self, x: Tensor, y: Tensor) -> Tensor:
        real, fake = self.discriminator(y), self.discriminator(self.generator(x).detach())
        return (real - 1.0).square()[:, 0] + fake.square()[:, 0]

    def two_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), lr=0.05) for part in parts]


class AdversarialSteps(Adversaries):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        of_generator, of_discriminator = self.optimizers()  # type: ignore[operator]
        loss_g = self.alrc(self.generator_loss(x), "generator")  # type: ignore[operator]
        of_generator.zero_grad()
        self.manual_backward(loss_g)  # type: ignore[operator]
        of_generator.step()
        losses_d = self.alrc(self.discriminator_losses(x, y), "discriminator")  # type: ignore[operator]
        of_discriminator.zero_grad()
        self.manual_backward(losses_d.mean())  # type: ignore[operator]
        of_discriminator.step()

    def configure_optimizers(self) -> Any:
        return self.two_optimizers()

    def train_dataloader(self) -> Any:
        return nets.loader()


def train_adversaries_by_hand(net: Adversaries, alrcs: dict[str, ALRC], epochs: int) -> None:
    of_generator, of_discriminator = net.two_optimizers()
    for _ in range(epochs):
        for x, y in nets.loader():
            of_generator.zero_grad()
            alrcs["generator"](net.generator_loss(x)).backward()
            of_generator.step()
            of_discriminator.zero_grad()
            alrcs["discriminator"](net.discriminator_losses(x, y)).mean().backward()
            of_discriminator.step()


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("explicit", [False, True], ids=["mixin alone", "both"])
def test_adversaries_equal_a_loop_by_hand(fit: Fit, namespace: str, explicit: bool) -> None:
    module = nets.NAMESPACES[namespace].LightningModule
    own = {"generator": {"num_stddev": 0.1}, "discriminator": {}}
    settings: dict[str, Any] = {"num_stddev": 0.5, "decay": 0.9, "losses": own}

    class Net(ALRCMixin, AdversarialSteps, module):  # type: ignore[misc, valid-type]
        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(**settings)

    by_hand = Adversaries()
    alrcs = {"generator": ALRC(0.1, 0.9), "discriminator": ALRC(0.5, 0.9)}
    train_adversaries_by_hand(by_hand, alrcs, epochs=4)
    net = Net()
    callback = callback_of(fit(net, *[ALRCCallback(**settings)] * explicit, max_epochs=4))
    assert weights_of(net) == weights_of(by_hand)
    assert set(callback.losses) == set(alrcs)
    for name, alrc in alrcs.items():
        assert state_of(callback.losses[name]) == state_of(alrc)
        assert alrc.clipped_total.item() > 0


@pytest.mark.parametrize("explicit", [False, True], ids=["mixin alone", "both"])
def test_named_losses_equal_a_loop_by_hand(fit: Fit, namespace: str, explicit: bool) -> None:
    first, second = ALRC(**SETTINGS), ALRC(**SETTINGS)

    class ByHand(nets.Core):
        def losses(self, batch: Any) -> Tensor:
            errors = super().losses(batch)
            return first(errors[..., 0]).mean() + 0.5 * second(errors[..., 1]).mean()

    core = ByHand("matrix")
    train_by_hand(core, None)
    net = NAMED_NETS[namespace]("matrix")
    callback = callback_of(fit(net, *[ALRCCallback(**SETTINGS)] * explicit))
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["first"]) == state_of(first)
    assert state_of(callback.losses["second"]) == state_of(second)
    assert first.clipped_total.item() > 0


def test_a_step_that_clips_its_loss_is_not_clipped_again(fit: Fit, namespace: str) -> None:
    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def losses(self, batch: Any) -> Tensor:
            return self.alrc(super().losses(batch))  # type: ignore[no-any-return]

    core, alrc = nets.Core("vector"), ALRC(**SETTINGS)
    train_by_hand(core, alrc)
    net = Net("vector")
    callback = callback_of(fit(net))
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)


def test_a_step_that_clips_some_losses_itself_has_the_others_clipped(
    fit: Fit, namespace: str
) -> None:
    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.losses(batch)
            return self.alrc(loss, "own") if batch_idx % 2 else loss  # type: ignore[no-any-return]

    callback = callback_of(fit(Net("vector"), max_epochs=1))
    assert callback.losses["own"].updates.item() == 3
    assert callback.losses["loss"].updates.item() == 3


def test_a_loss_is_still_clipped_after_a_call_under_no_grad(fit: Fit, namespace: str) -> None:
    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.alrc(self.losses(batch), "no-grad")  # returned unchanged
            return self.losses(batch)  # type: ignore[no-any-return]

    callback = callback_of(fit(Net("vector"), max_epochs=1))
    assert callback.losses["loss"].updates.item() == 6


# ---- the callback that the mixin adds


def test_an_existing_module_needs_only_the_mixin_as_a_base_class(fit: Fit, namespace: str) -> None:
    class Net(WithALRC, NETS[namespace]):  # type: ignore[misc]
        pass

    assert callback_of(fit(Net())).losses["loss"].updates.item() == 12


def test_configure_alrc_is_called_once(fit: Fit, namespace: str) -> None:
    calls: list[Any] = []

    class Net(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def configure_alrc(self) -> ALRCCallback:
            calls.append(self)
            return ALRCCallback(num_stddev=7)

    net = Net()
    callback = callback_of(fit(net))
    fit(net)
    assert len(calls) == 1
    assert callback.losses["loss"].num_stddev == 7


def test_the_default_settings_are_those_of_the_layer(fit: Fit, namespace: str) -> None:
    class Net(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        pass

    assert callback_of(fit(Net())).losses["loss"].settings == ALRC().settings


def test_an_explicit_callback_replaces_the_mixins_and_clips_once(fit: Fit, namespace: str) -> None:
    mine = ALRCCallback(num_stddev=2)
    net = MIXIN_NETS[namespace]("vector")
    trainer = fit(net, mine)
    assert callback_of(trainer) is mine
    assert mine.losses["loss"].losses_total.item() == 2 * 24


@pytest.mark.parametrize("returned", ["list", "one", "empty", "super"])
def test_other_callbacks_of_the_module_stay(fit: Fit, namespace: str, returned: str) -> None:
    package = nets.NAMESPACES[namespace]
    other = package.callbacks.LambdaCallback(on_fit_start=lambda *_: None)

    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            if returned == "super":
                return [*super().configure_callbacks(), other]
            return {"list": [other], "one": other, "empty": []}[returned]

    trainer = fit(Net())
    assert callback_of(trainer).losses["loss"].updates.item() == 12
    assert (other in trainer.callbacks) == (returned != "empty")


def test_one_callback_is_added_if_every_class_overrides_configure_callbacks(
    fit: Fit, namespace: str
) -> None:
    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            return []

    class Below(Net):
        def configure_callbacks(self) -> Any:
            return super().configure_callbacks()

    assert callback_of(fit(Below())).losses["loss"].updates.item() == 12


KINDS_OF_METHOD: dict[str, Callable[[Any], Any]] = {
    "static method": lambda other: staticmethod(lambda: [other]),
    "class method": lambda other: classmethod(lambda _: [other]),
    "partial": lambda other: functools.partial(list, [other]),
    "property": lambda other: property(lambda _: lambda: [other]),
}


@pytest.mark.parametrize("kind", KINDS_OF_METHOD)
def test_configure_callbacks_may_be_any_callable(fit: Fit, namespace: str, kind: str) -> None:
    other = nets.NAMESPACES[namespace].callbacks.Timer()
    configured = {"configure_callbacks": KINDS_OF_METHOD[kind](other)}
    trainer = fit(type("Configured", (MIXIN_NETS[namespace],), configured)())
    assert other in trainer.callbacks
    assert callback_of(trainer).losses["loss"].updates.item() == 12


def test_a_class_method_may_call_configure_callbacks_of_its_base(fit: Fit, namespace: str) -> None:
    package = nets.NAMESPACES[namespace].callbacks
    first, second = package.Timer(), package.LambdaCallback()

    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        @classmethod
        def configure_callbacks(cls) -> Any:
            return [first]

    class Below(Net):
        @classmethod
        def configure_callbacks(cls) -> Any:
            return [*super().configure_callbacks(), second]

    trainer = fit(Below())
    assert [each for each in trainer.callbacks if each in (first, second)] == [first, second]
    assert callback_of(trainer).losses["loss"].updates.item() == 12


def test_a_plain_configure_callbacks_can_be_abstract_and_called_by_the_class(
    namespace: str,
) -> None:
    class Base(MIXIN_NETS[namespace], abc.ABC):  # type: ignore[misc]
        @abc.abstractmethod
        def configure_callbacks(self) -> Any:
            """Say which."""
            return []

    with pytest.raises(TypeError, match="abstract"):
        Base()
    below = type("Below", (Base,), {"configure_callbacks": lambda self: []})()
    (callback,) = Base.configure_callbacks(below)
    assert isinstance(callback, ALRCCallback)
    assert Base.configure_callbacks.__doc__ == "Say which."


def test_a_callback_from_configure_callbacks_replaces_the_mixins(fit: Fit, namespace: str) -> None:
    mine = ALRCCallback(num_stddev=5)

    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            return [mine]

    assert callback_of(fit(Net())) is mine


def test_a_second_fit_goes_on_with_the_moments(fit: Fit, namespace: str) -> None:
    net, core, alrc = MIXIN_NETS[namespace]("vector"), nets.Core("vector"), ALRC(**SETTINGS)
    for _ in range(2):
        train_by_hand(core, alrc)
        trainer = fit(net)
    assert weights_of(net) == weights_of(core)
    assert state_of(callback_of(trainer).losses["loss"]) == state_of(alrc)


@pytest.mark.parametrize("mixin", [ALRCMixin, WithALRC])
@pytest.mark.parametrize("direct", [False, True])
def test_the_wrong_order_of_bases_raises(namespace: str, mixin: type[Any], direct: bool) -> None:
    base = nets.NAMESPACES[namespace].LightningModule if direct else NETS[namespace]
    names = mixin.__name__, base.__name__
    expected = r"{0} must come before {1} .* of It, as in class It\({0}, {1}\)$".format(*names)
    with pytest.raises(TypeError, match=expected):
        type("It", (base, mixin), {})
    type("It", (mixin, base), {})


@pytest.mark.parametrize("kind", ["super", "own", "static", "module"])
def test_another_base_with_configure_callbacks_may_come_before_the_mixin(
    fit: Fit, namespace: str, kind: str
) -> None:
    package: Any = nets.NAMESPACES[namespace]
    other = package.callbacks.Timer()

    class WithSuper:
        def configure_callbacks(self) -> Any:
            return [*super().configure_callbacks(), other]  # type: ignore[misc]

    class WithOwn:
        def configure_callbacks(self) -> Any:
            return [other]

    class WithStatic:
        configure_callbacks = staticmethod(lambda: [other])

    class Module(WithOwn, package.LightningModule):  # type: ignore[misc, name-defined]
        pass

    bases = {"super": WithSuper, "own": WithOwn, "static": WithStatic, "module": Module}
    trainer = fit(type("It", (bases[kind], MIXIN_NETS[namespace]), {})())
    assert other in trainer.callbacks
    assert callback_of(trainer).losses["loss"].updates.item() == 12


def test_configure_alrc_must_return_a_callback(fit: Fit, namespace: str) -> None:
    class Net(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def configure_alrc(self) -> Any:
            return ALRC()

    with pytest.raises(TypeError, match=r"configure_alrc must return an ALRCCallback.*ALRC"):
        fit(Net())


# ---- without a Trainer


@pytest.mark.usefixtures("each_path")
def test_the_mixin_clips_without_a_trainer(namespace: str) -> None:
    net, alrc = MIXIN_NETS[namespace](), ALRC(**SETTINGS)
    for loss in (loss_of(1.0, 500.0), loss_of(2.0, 700.0)):
        assert net.alrc(loss).tolist() == alrc(loss).tolist() != loss.tolist()


def test_a_module_trains_in_a_loop_by_hand(namespace: str) -> None:
    core, alrc, net = nets.Core("vector"), ALRC(**SETTINGS), MIXIN_NETS[namespace]("vector")
    train_by_hand(core, alrc)
    train_by_hand(net, net.alrc)
    assert weights_of(net) == weights_of(core)


def test_named_losses_without_a_trainer_do_not_mix(namespace: str) -> None:
    net, alrc = MIXIN_NETS[namespace](), ALRC(**SETTINGS)
    net.alrc(loss_of(500.0), "a")
    assert net.alrc(loss_of(500.0), "b").tolist() == alrc(loss_of(500.0)).tolist()


def test_a_module_that_trains_in_eval_mode_keeps_the_names_of_its_losses(
    fit: Fit, namespace: str
) -> None:
    package: Any = NAMESPACES[namespace]

    class Frozen(WithALRC, package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.core = Core("vector")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.alrc(self.core.losses(batch), "named").mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            losses = self.core.losses(batch)
            assert self.alrc(losses, "validated") is losses

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.core.optimizer()

        def train_dataloader(self) -> Any:
            return loader()

        val_dataloader = train_dataloader

    losses = callback_of(fit(Frozen().eval())).losses
    assert list(losses) == ["named"]
    assert losses["named"].updates.item() > 0


def test_losses_pass_in_eval_mode(namespace: str) -> None:
    net = MIXIN_NETS[namespace]().eval()
    loss = torch.tensor(1e6)
    assert net.alrc(loss) is loss


def test_losses_pass_under_no_grad(namespace: str) -> None:
    with torch.no_grad():
        assert MIXIN_NETS[namespace]().alrc(torch.tensor(1e6)).item() == 1e6


@pytest.mark.parametrize(
    ("loss", "name", "error", "message"),
    [
        (torch.tensor(1), "loss", TypeError, "loss.*floating.*int64"),
        (torch.tensor(1j), "loss", TypeError, "loss.*floating.*complex64"),
        (1.0, "loss", TypeError, "loss.*tensor.*1.0"),
        (torch.tensor(1.0), "loss", ValueError, "loss.*require a gradient"),
        (loss_of(1.0), "a/b", ValueError, "name.*letters.*'a/b'"),
        (loss_of(1.0), None, ValueError, "name.*string.*None"),
    ],
)
def test_wrong_arguments_raise(
    namespace: str, loss: Any, name: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MIXIN_NETS[namespace]().alrc(loss, name)


def test_an_unknown_name_raises(namespace: str) -> None:
    class Net(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(losses={"generator": {}})

    with pytest.raises(ValueError, match=r"name.*\['generator'\].*got 'critic'"):
        Net().alrc(loss_of(1.0), "critic")


# ---- as a module


def test_the_state_dict_is_that_of_the_module_without_the_mixin(namespace: str) -> None:
    net = MIXIN_NETS[namespace]()
    net.alrc(loss_of(1.0))
    assert list(net.state_dict()) == list(nets.Core().state_dict())


def test_a_fitted_module_is_exported_as_torchscript(fit: Fit, namespace: str) -> None:
    class Net(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    net = Net("vector")
    fit(net)
    if not hasattr(net, "to_torchscript"):
        pytest.skip("this Lightning exports no TorchScript")
    x = torch.ones(2, 3)
    assert torch.equal(net.to_torchscript()(x), net(x))


def test_a_copy_has_moments_of_its_own(namespace: str) -> None:
    net = MIXIN_NETS[namespace]()
    net.alrc(loss_of(1.0))
    expected = copy.deepcopy(net).alrc(loss_of(500.0)).tolist()
    assert net.alrc(loss_of(500.0)).tolist() == expected


class LargeDataset(Dataset[Any]):
    """Some samples, a megabyte of zeros, and a function that cannot be pickled."""

    def __init__(self) -> None:
        self.samples, self.more = list(nets.dataset()), torch.zeros(250_000)
        self.transform = lambda sample: sample

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.samples[index])


class LargeData(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(LargeDataset(), batch_size=4, num_workers=1, persistent_workers=True)

    def sample_ids(self, batch: Any) -> list[str]:
        return [str(each) for each in batch[0].tolist()]


class KeepsAll(MixinNet):
    """A module whose callback has every option by which the callback refers to a running fit."""

    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS, nonfinite="skip", save_batches=True, ledger=True)


def pickled(thing: Any) -> Any:
    content = pickle.dumps(thing)
    assert len(content) < 100_000
    return pickle.loads(content)


@pytest.mark.parametrize("hook", ["on_after_backward", "on_train_epoch_end"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_made_in_a_fit_leaves_the_trainer_out(
    fit: Fit, hook: str, duplicate: Callable[[Any], Any]
) -> None:
    copies: list[Any] = []

    def keep_copy(trainer: Any, net: Any, *_: Any) -> None:
        copies.append(duplicate(net))

    net, undisturbed = KeepsAll("vector"), KeepsAll("vector")
    trainer = fit(net, LambdaCallback(**{hook: keep_copy}), batches=LargeData())
    callback, expected = callback_of(trainer), callback_of(fit(undisturbed, batches=LargeData()))
    assert weights_of(net) == weights_of(undisturbed)
    assert state_of(callback.losses["loss"]) == state_of(expected.losses["loss"])
    assert callback.spikes == expected.spikes

    copied, seen = copies[-1], copies[-1].seen[:]
    alrc = ALRC(**SETTINGS)
    for loss in seen:
        alrc(loss.requires_grad_())
    assert state_of(copied._alrc_callback.losses["loss"]) == state_of(alrc)
    spikes = copied._alrc_callback.spikes
    copied.alrc(loss_of(1e6))  # the copy is not in a fit, so nothing is recorded
    assert copied._alrc_callback.spikes == spikes

    weights, bad = weights_of(copied), [(x, y * math.nan) for x, y in loader()]
    fit(copied, batches=DataLoader(bad, batch_size=None))  # type: ignore[arg-type]
    assert weights_of(copied) == weights
    fit(copied, batches=loader())
    assert weights_of(copied) != weights
    assert callback_of(trainer).losses["loss"].losses_total == 48


def test_hyperparameters_are_saved_and_loaded(fit: Fit, tmp_path: Path, namespace: str) -> None:
    class Net(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def __init__(self, num_stddev: float = 3.0) -> None:
            super().__init__()
            self.save_hyperparameters()

        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(self.hparams.num_stddev)

    fit(Net(2.0), max_epochs=1).save_checkpoint(tmp_path / "net.ckpt")
    net = Net.load_from_checkpoint(tmp_path / "net.ckpt")
    assert callback_of(fit(net)).losses["loss"].num_stddev == 2.0


def test_configure_callbacks_may_return_none(fit: Fit, namespace: str) -> None:
    class Sometimes(WithALRC, NETS[namespace]):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            return None

    assert callback_of(fit(Sometimes())).losses["loss"].losses_total.item() > 0


class Special(ALRCCallback):
    pass


@pytest.mark.parametrize("kind", [ALRCCallback, Special])
@pytest.mark.parametrize("is_part", [False, True], ids=["whole", "part"])
def test_each_module_that_a_trainer_fits_has_its_own_callback(
    fit: Fit, namespace: str, kind: type[ALRCCallback], is_part: bool
) -> None:
    class First(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def configure_alrc(self) -> ALRCCallback:
            return kind(num_stddev=5)

    class Second(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(num_stddev=2)

    class Whole(NETS[namespace]):  # type: ignore[misc]
        def __init__(self, part: Any) -> None:
            super().__init__("vector")
            self.part = part

        def losses(self, batch: Any) -> Tensor:
            return self.part.alrc(self.part.losses(batch))

    first, second = First("vector"), Second("vector")
    trainer = fit(Whole(first) if is_part else first)
    seen = callback_of(trainer).losses["loss"].losses_total.item()
    trainer.fit_loop.max_epochs *= 2
    trainer.fit(Whole(second) if is_part else second, nets.loader())
    assert callback_of(trainer) is second._alrc_callback
    assert callback_of(trainer).losses["loss"].num_stddev == 2
    assert first._alrc_callback.losses["loss"].losses_total.item() == seen


@pytest.mark.parametrize("is_part", [False, True], ids=["whole", "part"])
def test_a_modules_callback_leaves_the_trainer_before_a_fit_of_a_plain_module(
    fit: Fit, namespace: str, is_part: bool
) -> None:
    net, plain, expected = MIXIN_NETS[namespace]("vector"), NETS[namespace](), NETS[namespace]()
    whole = NETS[namespace]("vector")
    whole.part = net
    trainer = fit(whole if is_part else net)
    losses = callback_of(trainer).losses
    state = state_of(losses["loss"])
    trainer.fit_loop.max_epochs *= 2
    trainer.fit(plain, nets.loader())
    assert not any(isinstance(each, ALRCCallback) for each in trainer.callbacks)
    assert state_of(losses["loss"]) == state
    fit(expected)
    assert weights_of(plain) == weights_of(expected)
    trainer.fit_loop.max_epochs *= 2
    trainer.fit(whole if is_part else net, nets.loader())
    assert callback_of(trainer).losses is losses
    assert losses["loss"].losses_total > state["losses_total"]
