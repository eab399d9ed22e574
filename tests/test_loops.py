"""The ways a Trainer runs: tuners, averages of weights, early ends, copies in mid-fit, Fabric.

In every loop, the moments must be those of the training steps' losses.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LambdaCallback,
    StochasticWeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRC, ALRCCallback
from tests import nets
from tests.conftest import paths_with
from tests.nets import SETTINGS, MixinNet, Net, WithALRC, callback_of, state_of, weights_of
from tests.scripts.ranks import FinderInFit

Fit = Callable[..., Any]


def state_after(seen: list[Tensor]) -> dict[str, float]:
    """The state of an ALRC that was given these losses."""
    alrc = ALRC(**SETTINGS)
    for loss in seen:
        alrc(loss.clone().requires_grad_())
    return state_of(alrc)


def assert_moments_match(trainer: Any, net: Any) -> None:
    found = state_of(callback_of(trainer).losses["loss"])
    assert found == state_after(net.seen)
    assert found["clipped_total"] > 0


class Tuned(Net):
    """A network with the hyperparameters that tuners change."""

    def __init__(self, lr: float = 0.01, batch_size: int = 2) -> None:
        super().__init__("vector")
        self.lr, self.batch_size = lr, batch_size
        self.save_hyperparameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(nets.dataset(), self.batch_size)


def used() -> ALRCCallback:
    """A callback that has already clipped losses."""
    callback = ALRCCallback(**SETTINGS)
    callback.clip(torch.tensor([1.0, 50.0], requires_grad=True))
    return callback


def lr_find(trainer: Any, net: Any) -> None:
    Tuner(trainer).lr_find(net, num_training=20, early_stop_threshold=None)


def scale_batch_size(trainer: Any, net: Any) -> None:
    Tuner(trainer).scale_batch_size(net, max_trials=2, steps_per_trial=2)


@pytest.mark.parametrize("make", [ALRCCallback, used], ids=["new", "used"])
@pytest.mark.parametrize("tune", [lr_find, scale_batch_size])
def test_a_tuner_puts_the_moments_back(
    make_trainer: Fit, tune: Callable[..., None], make: Callable[[], ALRCCallback]
) -> None:
    net, callback = Tuned(), make()
    before = copy.deepcopy(callback.state_dict())
    trainer = make_trainer(net, callbacks=[callback])
    tune(trainer, net)
    assert len(net.seen) > 0
    assert callback.state_dict() == before


class TunedMixin(WithALRC, Tuned):
    pass


@pytest.mark.parametrize("net_class", [Tuned, TunedMixin])
@pytest.mark.parametrize("tune", [lr_find, scale_batch_size])
def test_a_fit_after_tuning_has_moments_of_its_own_losses(
    make_trainer: Fit, tune: Callable[..., None], net_class: type[Any]
) -> None:
    net, callbacks = net_class(), [ALRCCallback(**SETTINGS)] * (net_class is Tuned)
    trainer = make_trainer(net, callbacks=callbacks, max_epochs=1)
    tune(trainer, net)
    net.seen.clear()
    trainer.fit(net)
    assert_moments_match(trainer, net)


class BatchSizeFinderInFit(BatchSizeFinder):
    """Searches at the start of an epoch."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.scale_batch_size(trainer, module)


def lr_finder_in_fit() -> Callback:
    return FinderInFit(num_training_steps=6, update_attr=False, early_stop_threshold=None)


def batch_size_finder_in_fit() -> Callback:
    return BatchSizeFinderInFit(init_val=4, max_trials=1, steps_per_trial=6)


class Poisoned(Tuned):
    """The third of its six batches has a bad sample. It keeps the weights at each batch's start."""

    def __init__(self, lr: float = 0.01, batch_size: int = 4) -> None:
        super().__init__(lr, batch_size)
        self.weights: list[list[float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, fused=True)

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = nets.dataset().tensors
        y[9] = torch.nan
        return DataLoader(TensorDataset(x, y), self.batch_size)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weights.append(weights_of(self))


@pytest.mark.parametrize("finder", [lr_finder_in_fit, batch_size_finder_in_fit])
def test_a_search_in_a_fit_skips_only_the_step_whose_loss_is_bad(
    fit: Fit, finder: Callable[[], Callback]
) -> None:
    gradients: list[bool] = []

    def look(trainer: Any, net: Any, optimizer: Any) -> None:
        gradients.append(bool(net.layer.weight.grad.isfinite().all()))

    net, reference = Poisoned(), Poisoned()
    fit(reference, ALRCCallback(nonfinite="skip"), max_epochs=1)
    looking = LambdaCallback(on_before_optimizer_step=look)
    fit(net, ALRCCallback(nonfinite="skip"), finder(), looking, max_epochs=1)
    of_search, of_fit = net.weights[:6], net.weights[6:]
    assert [one != other for one, other in pairwise(of_search)] == [True, True, False, True, True]
    assert of_fit == reference.weights
    assert gradients == [True] * 5  # the fit's own steps, without the one that was skipped


def test_a_batch_that_fails_after_a_search_in_a_fit_is_left_out_of_the_state(fit: Fit) -> None:
    class Failing(Net):
        def on_after_backward(self) -> None:
            if len(self.seen) == 6 + 6 + 1:
                raise KeyError

    class Second(FinderInFit):
        """Searches in the second epoch."""

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                super().on_train_epoch_start(trainer, module)

    callback, states = ALRCCallback(**SETTINGS), []
    keeping = LambdaCallback(on_exception=lambda *_: states.append(callback.state_dict()))
    finder = Second(num_training_steps=6, update_attr=False, early_stop_threshold=None)
    with pytest.raises(KeyError):
        fit(Failing(), callback, finder, keeping, max_epochs=3)
    assert states[0]["losses"]["loss"]["state"]["updates"] == 6
    assert callback.losses["loss"].updates == 7


def averaging() -> Callback:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


def moving_average() -> Callback:
    callbacks = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    return callbacks.EMAWeightAveraging(decay=0.9)  # type: ignore[no-any-return]


class Stopping(EarlyStopping):
    """Ends the fit in its second epoch."""

    def __init__(self) -> None:
        super().__init__("loss", patience=1, check_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.callback_metrics["loss"] = torch.tensor(float(trainer.current_epoch))
        super().on_train_epoch_end(trainer, module)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("each_path", "make", "way"),
    paths_with([averaging, moving_average, Stopping], ["callback", "mixin"]),
    indirect=["each_path"],
)
def test_moments_match_the_losses_beside_other_callbacks(
    fit: Fit, make: Callable[[], Callback], way: str
) -> None:
    net = (Net if way == "callback" else MixinNet)("vector")
    callbacks = [ALRCCallback(**SETTINGS)] if way == "callback" else []
    assert_moments_match(fit(net, *callbacks, make(), max_epochs=3), net)


@pytest.mark.parametrize("make", [averaging, moving_average])
def test_averaged_weights_equal_those_of_a_network_that_clips_in_its_step(
    fit: Fit, make: Callable[[], Callback]
) -> None:
    class Clipping(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.alrc = ALRC(**SETTINGS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.alrc(self.losses(batch)).mean()

    by_hand, net = Clipping(), Net("vector")
    fit(by_hand, make(), max_epochs=4)
    fit(net, ALRCCallback(**SETTINGS), make(), max_epochs=4)
    assert weights_of(net) == weights_of(by_hand)


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit_train_batches": 4},
        {"limit_train_batches": 0.5},
        {"max_steps": 5},
        {"min_epochs": 3, "max_epochs": 3},
        {"fast_dev_run": 3},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 4, "limit_train_batches": 5},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"reload_dataloaders_every_n_epochs": 1},
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None, "val_check_interval": 3},
    ],
    ids=str,
)
def test_moments_match_the_losses_under_any_trainer_argument(
    fit: Fit, arguments: dict[str, Any]
) -> None:
    net = Net("vector")
    assert_moments_match(fit(net, ALRCCallback(**SETTINGS), **arguments), net)


@pytest.mark.usefixtures("each_path")
def test_alrc_clips_in_every_closure_call_of_lbfgs(fit: Fit) -> None:
    class Quasi(MixinNet):
        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    net, core, alrc = Quasi("vector"), nets.Core("vector"), ALRC(**SETTINGS)
    trainer = fit(net)
    optimizer = torch.optim.LBFGS(core.parameters(), lr=0.01, max_iter=3)
    for batch in [*nets.loader(), *nets.loader()]:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = alrc(core.losses(batch)).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert weights_of(net) == weights_of(core)
    assert_moments_match(trainer, net)


class Adversaries(WithALRC, Net):
    """A generator and a discriminator of numbers, in manual optimization, with accumulation."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__("vector", manual=True)
        torch.manual_seed(0)
        self.generator, self.discriminator = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        self.accumulate = accumulate
        self.by_name: dict[str, list[Tensor]] = {"generator": [], "discriminator": []}

    def clipped(self, loss: Tensor, name: str) -> Tensor:
        self.by_name[name].append(loss.detach().clone())
        return self.alrc(loss, name).mean() / self.accumulate

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        is_stepping = (batch_idx + 1) % self.accumulate == 0
        fake = self.generator(x)
        self.toggle_optimizer(first)
        loss = self.clipped((self.discriminator(fake) - 1)[:, 0] ** 2, "generator")
        self.manual_backward(loss)
        if is_stepping:
            first.step()
            first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        real, made = self.discriminator(y)[:, 0], self.discriminator(fake.detach())[:, 0]
        self.manual_backward(self.clipped((real - 1) ** 2 + made**2, "discriminator"))
        if is_stepping:
            second.step()
            second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), 0.01) for part in parts]


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_adversary_has_its_own_moments(fit: Fit, accumulate: int) -> None:
    net = Adversaries(accumulate)
    callback = callback_of(fit(net))
    assert set(callback.losses) == {"generator", "discriminator"}
    for name, seen in net.by_name.items():
        assert len(seen) == 2 * nets.BATCHES_IN_EPOCH
        assert state_of(callback.losses[name]) == state_after(seen)


# ---- copies made in mid-fit train on


class Copying:
    """Duplicates the Trainer, its callback or its module after four steps."""

    def __init__(self, duplicate: Callable[[Any], Any], what: str) -> None:
        self.duplicate, self.what, self.copies = duplicate, what, []  # type: ignore[var-annotated]

    def __call__(self, trainer: Any, net: Any, *_: Any) -> None:
        if trainer.global_step == 4 and not self.copies:
            whole = {"trainer": trainer, "callback": callback_of(trainer), "module": net}
            self.copies.append(None)  # a copy of this object then makes no further copies
            self.copies[0] = self.duplicate(whole[self.what])


def pickled_and_loaded(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture(params=[copy.deepcopy, pickled_and_loaded], ids=["deepcopy", "pickle"])
def duplicate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = request.param
    return function


def copy_in_mid_fit(fit: Fit, duplicate: Any, what: str, net: Any, *callbacks: Any) -> Any:
    copying = Copying(duplicate, what)
    fit(net, *callbacks, LambdaCallback(on_train_batch_end=copying))
    return copying.copies[0]


def test_a_copied_callback_trains_on(fit: Fit, duplicate: Any) -> None:
    original, net = Net("vector"), Net("vector")
    callback = copy_in_mid_fit(fit, duplicate, "callback", original, ALRCCallback(**SETTINGS))
    fit(net, callback)
    assert state_of(callback.losses["loss"]) == state_after(original.seen[:4] + net.seen)


def test_a_copied_callback_leaves_the_module_out(fit: Fit, duplicate: Any) -> None:
    class Uncopied(Net):
        def __reduce__(self) -> Any:
            raise AssertionError("the module was copied")

    callback = ALRCCallback(**SETTINGS)
    fit(Uncopied("vector"), callback)
    assert state_of(duplicate(callback).losses["loss"]) == state_of(callback.losses["loss"])


def test_a_copied_module_trains_on(fit: Fit, duplicate: Any) -> None:
    net = copy_in_mid_fit(fit, duplicate, "module", MixinNet("vector"))
    trainer = fit(net)
    assert len(net.seen) == 4 + 2 * nets.BATCHES_IN_EPOCH
    assert_moments_match(trainer, net)


@pytest.mark.parametrize("net_class", [Net, MixinNet])
def test_a_copied_trainer_trains_on(fit: Fit, duplicate: Any, net_class: type[Any]) -> None:
    original = net_class("vector")
    callbacks = [ALRCCallback(**SETTINGS)] * (net_class is Net)
    trainer = copy_in_mid_fit(fit, duplicate, "trainer", original, *callbacks)
    net, before = trainer.lightning_module, len(original.seen)
    trainer.fit(net)
    assert len(net.seen) > 4
    assert_moments_match(trainer, net)
    assert len(original.seen) == before


# ---- unusual ends


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_after_an_exception_goes_on_with_the_moments(
    make_trainer: Fit, error: type[BaseException]
) -> None:
    class Failing(Net):
        fails = True

        def on_after_backward(self) -> None:
            if self.fails and len(self.seen) == 4:
                raise error

    net, callback = Failing("vector"), ALRCCallback(**SETTINGS)
    trainer = make_trainer(net, callbacks=[callback], max_epochs=1)
    with pytest.raises((error, SystemExit)):
        trainer.fit(net)
    net.fails = False
    again = make_trainer(net, callbacks=[callback], max_epochs=1)
    again.fit(net)
    assert len(net.seen) == 4 + nets.BATCHES_IN_EPOCH
    assert_moments_match(again, net)


def test_the_layer_in_fabric_equals_a_loop_by_hand() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    core, by_hand = nets.Core("vector"), nets.Core("vector")
    alrc, expected = ALRC(**SETTINGS), ALRC(**SETTINGS)
    nets.train_by_hand(by_hand, expected)
    net, optimizer = fabric.setup(core, core.optimizer())
    net.mark_forward_method("losses")
    for batch in [*nets.loader(), *nets.loader()]:
        optimizer.zero_grad()
        fabric.backward(alrc(net.losses(batch)).mean())
        optimizer.step()
    assert weights_of(core) == weights_of(by_hand)
    assert state_of(alrc) == state_of(expected)


def test_fabric_saves_and_loads_the_layer(tmp_path: Any) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    alrc, again = ALRC(**SETTINGS), ALRC(**SETTINGS)
    alrc(torch.tensor([1.0, 50.0], requires_grad=True))
    fabric.save(tmp_path / "saved.ckpt", {"alrc": alrc})
    fabric.load(tmp_path / "saved.ckpt", {"alrc": again})
    assert state_of(again) == state_of(alrc)


def test_the_checkpoint_of_a_mixin_net_loads_without_a_trainer(fit: Fit, tmp_path: Any) -> None:
    net = MixinNet("vector")
    trainer = fit(net)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = MixinNet.load_from_checkpoint(tmp_path / "saved.ckpt", shape="vector")
    assert weights_of(loaded) == weights_of(net)
