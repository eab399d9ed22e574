"""Only the training steps of a fit clip and update moments, and a fit has one guard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRC, ALRCCallback
from tests import nets
from tests.nets import (
    BATCHES_IN_EPOCH,
    NAMED_NETS,
    NETS,
    SETTINGS,
    Net,
    WithALRC,
    callback_of,
    state_of,
    train_by_hand,
    weights_of,
)

Fit = Callable[..., Any]


def moments_by_hand() -> dict[str, float]:
    """The moments of a training by hand."""
    alrc = ALRC(**SETTINGS)
    train_by_hand(nets.Core("vector"), alrc)
    return state_of(alrc)


# ---- losses of other steps


class Adapting:
    """Differentiates losses in its validation, test and prediction steps, too.

    ``found`` has two gradient norms for each step: one with :meth:`differentiate`, which uses
    Lightning or ALRC, and one with PyTorch's ``backward`` alone.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.found: list[tuple[float, float]] = []

    def adapt(self, batch: Any) -> None:
        self.train()  # type: ignore[attr-defined]
        weights = [each.detach().clone() for each in self.parameters()]  # type: ignore[attr-defined]
        with torch.inference_mode(False), torch.enable_grad():
            losses = 1e4 * self.losses([each.clone() for each in batch])  # type: ignore[attr-defined]
            self.zero_grad()  # type: ignore[attr-defined]
            given = self.differentiate(losses)
            norm = self.layer.bias.grad.norm().item()  # type: ignore[attr-defined]
            self.zero_grad()  # type: ignore[attr-defined]
            losses.mean().backward()
        self.found.append((norm, self.layer.bias.grad.norm().item()))  # type: ignore[attr-defined]
        assert torch.equal(given, losses)
        self.zero_grad()  # type: ignore[attr-defined]
        for parameter, weight in zip(self.parameters(), weights, strict=True):  # type: ignore[attr-defined]
            assert torch.equal(parameter, weight)
        self.eval()  # type: ignore[attr-defined]

    def differentiate(self, losses: Tensor) -> Tensor:
        self.manual_backward(losses.mean(), retain_graph=True)  # type: ignore[attr-defined]
        return losses

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.adapt(batch)

    test_step = predict_step = validation_step

    def val_dataloader(self) -> Any:
        return nets.loader()

    test_dataloader = predict_dataloader = val_dataloader


class ByName(Adapting):
    def differentiate(self, losses: Tensor) -> Tensor:
        clipped: Tensor = self.alrc(losses)  # type: ignore[attr-defined]
        clipped.mean().backward(retain_graph=True)
        return clipped


class ByCallback(Adapting):
    def differentiate(self, losses: Tensor) -> Tensor:
        callback = callback_of(self.trainer)  # type: ignore[attr-defined]
        clipped: Tensor = callback.clip(losses)
        clipped.mean().backward(retain_graph=True)
        return clipped


@pytest.mark.parametrize(
    ("way", "manual"),
    [(Adapting, True), (ByName, True), (ByName, False), (ByCallback, True), (ByCallback, False)],
)
@pytest.mark.parametrize(
    ("namespace", "explicit"),
    [("pytorch_lightning", False), ("lightning.pytorch", True)],
    ids=["mixin", "both"],
)
def test_losses_of_other_steps_are_returned_as_they_are_and_update_no_moment(
    make_trainer: Fit, namespace: str, way: type[Any], manual: bool, explicit: bool
) -> None:
    class Adaptive(way, WithALRC, NETS[namespace]):  # type: ignore[misc]
        pass

    net = Adaptive("vector", "tensor", manual)
    arguments = {"val_check_interval": 2, "num_sanity_val_steps": 2, "inference_mode": False}
    trainer = make_trainer(net, callbacks=[ALRCCallback(**SETTINGS)] * explicit, **arguments)
    trainer.validate(net, verbose=False)
    trainer.fit(net)
    trainer.test(net, verbose=False)
    trainer.predict(net)
    callback = callback_of(trainer)
    assert len(net.found) == 2 + (1 + 2 * 3 + 2) * BATCHES_IN_EPOCH
    for found, unclipped in net.found:
        assert found == pytest.approx(unclipped)
    assert state_of(callback.losses["loss"]) == moments_by_hand()
    assert max(spike.loss for spike in callback.spikes) == max(map(torch.max, net.seen))


def test_a_training_step_gets_a_loss_without_a_graph_as_it_is(fit: Fit, namespace: str) -> None:
    kept: list[bool] = []

    class Looking(WithALRC, NETS[namespace]):  # type: ignore[misc]
        def losses(self, batch: Any) -> Tensor:
            losses: Tensor = super().losses(batch)
            with torch.no_grad():
                kept.append(self.alrc(losses, "looked-at") is losses)
            return losses

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ALRC")
        trainer = fit(Looking("vector"))
    assert kept == [True] * 2 * BATCHES_IN_EPOCH
    assert state_of(callback_of(trainer).losses["loss"]) == moments_by_hand()


def test_a_clipped_loss_shares_no_memory_with_the_loss_of_the_step(
    fit: Fit, namespace: str
) -> None:
    kept: list[bool] = []

    class Adding(WithALRC, NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = self.losses(batch)
            before = losses.detach().clone()
            total = self.alrc(losses, "loss")
            total += 1e3
            kept.append(torch.equal(losses, before))
            return total.mean()  # type: ignore[no-any-return]

    fit(Adding("vector"))
    assert kept == [True] * 2 * BATCHES_IN_EPOCH


@pytest.mark.parametrize("epochs", [2, 4])
def test_an_epoch_that_only_gathers_statistics_updates_no_moment(fit: Fit, epochs: int) -> None:
    """StochasticWeightAveraging adds this epoch, for the statistics of BatchNorm."""

    class Normed(WithALRC, Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.norm, self.runs = nn.BatchNorm1d(3), 0

        def losses(self, batch: Any) -> Tensor:
            x, y = batch
            self.runs += 1
            return self.alrc(super().losses((self.norm(x), y)), "named")

    net = Normed()
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer = fit(net, averaging, max_epochs=epochs)
    assert net.runs == (epochs + 1) * BATCHES_IN_EPOCH
    alrc = callback_of(trainer).losses["named"]
    assert alrc.updates.item() == epochs * BATCHES_IN_EPOCH
    assert {spike.epoch for spike in callback_of(trainer).spikes} <= set(range(epochs))


# ---- one guard for each fit


@pytest.mark.parametrize("inner_way", ["callback", "mixin", "none"])
def test_a_fit_within_a_step_of_another_fit_has_its_own_guard(
    make_trainer: Fit, namespace: str, inner_way: str
) -> None:
    inner: list[Any] = []

    class Outer(NAMED_NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                kinds = {"mixin": type("Inner", (WithALRC, NETS[namespace]), {})}
                net = kinds.get(inner_way, NETS[namespace])()
                callbacks = [ALRCCallback(**SETTINGS)] * (inner_way == "callback")
                trainer = make_trainer(net, callbacks=callbacks)
                with torch.enable_grad():
                    trainer.fit(net)
                inner.append((trainer, net))
            return super().training_step(batch, batch_idx)

    outer = Outer("matrix")
    trainer = make_trainer(outer, max_epochs=1)
    trainer.fit(outer)
    (inner_trainer, net), core = inner[0], nets.Core()
    alrc = None if inner_way == "none" else ALRC(**SETTINGS)
    train_by_hand(core, alrc)
    if alrc is not None:
        assert state_of(callback_of(inner_trainer).losses["loss"]) == state_of(alrc)
    assert weights_of(net) == weights_of(core)
    losses = callback_of(trainer).losses
    assert set(losses) == {"first", "second"}
    assert [each.updates.item() for each in losses.values()] == [BATCHES_IN_EPOCH] * 2


def test_processes_without_a_process_group_have_their_own_moments(fit: Fit) -> None:
    net, callback, strategy = Net("vector"), ALRCCallback(**SETTINGS), SingleDeviceStrategy("cpu")
    strategy.world_size = 2  # as on a TPU
    arguments = {"strategy": strategy, "use_distributed_sampler": False}
    with pytest.warns(UserWarning, match="moments of its own in each process") as warned:
        fit(net, callback, **arguments)
    assert sum("ALRC" in str(each.message) for each in warned) == 1
    assert state_of(callback.losses["loss"]) == moments_by_hand()


# ---- differential privacy


@pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore:.*Secure RNG", "ignore:.*hook")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("shape", ["scalar", "vector"])
def test_a_fit_with_opacus_warns_of_a_loss_of_a_whole_batch(
    fit: Fit, shape: str, manual: bool
) -> None:
    """With ALRC, one sample would change the scale of all other gradients."""
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed")

    class Private(Net):
        def configure_optimizers(self) -> Any:
            loader = DataLoader(TensorDataset(torch.zeros(24, 3)), batch_size=4)
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            self.layer, optimizer, _ = opacus.PrivacyEngine().make_private(
                module=self.layer,
                optimizer=optimizer,
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
            return optimizer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Private(shape, "tensor", manual), ALRCCallback(**SETTINGS))
    messages = [str(each.message) for each in caught if "ALRC" in str(each.message)]
    assert len(messages) == (shape == "scalar")
    assert all("one number for a batch" in each and "as a vector" in each for each in messages)
