"""The replay of a batch that spiked gives the same losses as the training."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from packaging.version import Version
from pytorch_lightning.callbacks import Callback, Timer
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback, ALRCMixin, replay
from lightning_alrc.spikes import Spike, read_spikes
from tests import spikes as made_up
from tests.nets import NAMESPACES, SETTINGS, Net, callback_of, loader, weights_of

Fit = Callable[..., Any]


def saving(namespace: str, folder: Path) -> Any:
    """A callback that saves a checkpoint after every step."""
    return NAMESPACES[namespace].callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1
    )


def fickle_class(namespace: str) -> type[Any]:
    """A module class whose loss depends on weights, random numbers, batch, epoch and step."""
    package: Any = NAMESPACES[namespace]

    class Fickle(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
            self.given: list[tuple[int, ...]] = []

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return x + torch.randn_like(x), y

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            self.given.append((batch_idx, self.current_epoch, self.global_step))
            self.log("batch_idx", float(batch_idx))
            scale = 1.0 + batch_idx + 10 * self.current_epoch + self.global_step / 7
            return scale * (self.net(x) - y).square().mean(1)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": plateau, "monitor": "batch_idx"}]

        def train_dataloader(self) -> Any:
            return loader()

    return Fickle


def test_losses_are_identical_with_the_weights_of_the_step(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    net = fickle_class(namespace)()
    callback = ALRCCallback(num_stddev=0.5, save_batches=5)
    arguments = {"enable_checkpointing": True, "max_epochs": 4}
    fit(net, callback, saving(namespace, tmp_path), **arguments)
    paths = {path.name: path for path in (tmp_path / "alrc_batches").iterdir()}
    spikes = [spike for spike in callback.spikes if spike.batch_file in paths]
    assert len(spikes) >= len(paths) == 5
    assert any(spike.epoch > 0 and spike.batch_idx > 0 for spike in spikes)
    for spike in spikes:
        checkpoint = torch.load(tmp_path / f"step={spike.step}.ckpt", weights_only=True)
        net.load_state_dict(checkpoint["state_dict"])
        losses = replay(paths[spike.batch_file], net)["loss"]
        assert losses[spike.sample].item() == spike.loss
        assert losses.dtype == torch.float32


def test_a_replay_leaves_the_module_and_the_random_state_unchanged(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    net = fickle_class(namespace)()
    trainer = fit(
        net,
        ALRCCallback(num_stddev=0.5, save_batches=1),
        saving(namespace, tmp_path),
        enable_checkpointing=True,
        max_epochs=4,
    )
    (path,) = (tmp_path / "alrc_batches").iterdir()
    net.eval()
    before, steps = {k: v.clone() for k, v in net.state_dict().items()}, list(net.given)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert replay(path, net)["loss"].shape == (4,)
    assert torch.equal(torch.rand(3), expected)
    assert net.trainer is trainer
    assert not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.given == steps
    assert replay(path, net)["loss"].tolist() == replay(path, net)["loss"].tolist()


def two_losses(namespace: str, named: bool) -> Any:
    package: Any = NAMESPACES[namespace]

    class Adversaries(ALRCMixin, package.LightningModule):  # type: ignore[misc, name-defined]
        """Two networks and two optimizers, stepped by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(**SETTINGS, save_batches=1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            names = ("first", "second")
            for name, optimizer in zip(names, self.optimizers(), strict=True):
                loss = (getattr(self, name)(x) - y).square().mean()
                optimizer.zero_grad()
                self.manual_backward(self.alrc(loss, name) if named else loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), 0.01) for net in (self.first, self.second)]

        def train_dataloader(self) -> Any:
            return loader()

    return Adversaries()


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_losses_of_manual_optimization(
    fit: Fit, tmp_path: Path, namespace: str, named: bool
) -> None:
    net = two_losses(namespace, named)
    callback = callback_of(fit(net, saving(namespace, tmp_path), enable_checkpointing=True))
    (path,) = (tmp_path / "alrc_batches").iterdir()
    (spike, *_) = callback.spikes
    assert path.name == spike.batch_file
    # Lightning counts the steps of both optimizers.
    checkpoint = torch.load(tmp_path / f"step={2 * spike.step}.ckpt", weights_only=True)
    net.load_state_dict(checkpoint["state_dict"])
    before = weights_of(net)
    losses = replay(path, net)
    assert weights_of(net) == before
    if named:
        assert set(losses) == {"first", "second"}
        assert losses[spike.name].shape == ()
    else:
        assert set(losses) == {"loss"}
        assert losses["loss"].shape == (2,)
    assert spike.loss in losses[spike.name].flatten().tolist()


def worst_batch(fit: Fit, folder: Path, net: Net) -> tuple[Path, Spike]:
    """Fit with constant weights; return the file of the worst spike's batch, and the spike."""
    net.optimizer = lambda: torch.optim.SGD(net.parameters(), 0.0)  # type: ignore[method-assign]
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    fit(net, callback, saving("pytorch_lightning", folder), enable_checkpointing=True)
    spike = callback.spikes[0]
    return folder / "alrc_batches" / spike.batch_file, spike


def assert_replayed(fit: Fit, folder: Path, net: Net) -> None:
    """Assert that a replay gives exactly the loss of the worst spike. The weights are constant."""
    path, spike = worst_batch(fit, folder, net)
    losses = replay(path, net)["loss"]
    assert spike.sample is not None
    assert losses[spike.sample].item() == spike.loss


def test_layers_that_are_made_in_setup_keep_their_weights(fit: Fit, tmp_path: Path) -> None:
    class Late(Net):
        def setup(self, stage: str) -> None:
            self.layer = nn.Linear(3, 2)

    assert_replayed(fit, tmp_path, Late("vector"))


def test_random_numbers_drawn_before_a_step_are_drawn_again(fit: Fit, tmp_path: Path) -> None:
    class Drawing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            torch.rand(5)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.losses(batch) * (1.0 + torch.rand(()))

    assert_replayed(fit, tmp_path, Drawing("vector"))


class Mixing(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[1] = batch[1] * (1.0 + torch.rand(()))


class MixingInPlace(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[1].mul_(2.0)


@pytest.mark.parametrize("kind", [Mixing, MixingInPlace])
def test_a_batch_that_a_hook_changes_before_the_step_is_replayed_as_changed(
    fit: Fit, tmp_path: Path, kind: type[Net]
) -> None:
    path, spike = worst_batch(fit, tmp_path, net := kind("vector"))
    for _ in range(2):
        assert replay(path, net)["loss"][spike.sample].item() == spike.loss


def test_a_batch_that_a_callback_changes_before_the_step_is_replayed_as_changed(
    fit: Fit, tmp_path: Path
) -> None:
    class Doubling(Callback):
        def on_train_batch_start(self, _: Any, net: Any, batch: Any, batch_idx: int) -> None:
            batch[1] = batch[1] * 2.0

    class WithDoubling(Net):
        def configure_callbacks(self) -> Any:
            return [Doubling()]

    assert_replayed(fit, tmp_path, WithDoubling("vector"))


def test_a_manual_step_has_its_global_step(fit: Fit, tmp_path: Path) -> None:
    class Counting(Net):
        def losses(self, batch: Any) -> Tensor:
            return super().losses(batch) * (1.0 + self.global_step)

    assert_replayed(fit, tmp_path, Counting("vector", manual=True))


def test_a_submodule_in_eval_mode_stays_in_eval_mode(fit: Fit, tmp_path: Path) -> None:
    class Frozen(Net):
        def __init__(self, shape: str) -> None:
            super().__init__(shape)
            self.norm = nn.BatchNorm1d(3).eval()

        def losses(self, batch: Any) -> Tensor:
            assert not self.norm.training
            x, y = batch
            return super().losses((self.norm(x), y))

    assert_replayed(fit, tmp_path, Frozen("vector"))


class Penalized(Net):
    """Differentiates its output with respect to its input, as for physics-informed networks."""

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        assert x.is_leaf
        assert x.grad is None
        (slope,) = torch.autograd.grad(self.layer(x).sum(), x, create_graph=True)
        x.sum().backward()
        return super().losses(batch) + slope.square().mean(1)


class PenalizedByHook(Penalized):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(2.0).requires_grad_()


class PenalizedAfterTransfer(Penalized):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].requires_grad_()
        return batch


@pytest.mark.parametrize("after_step", [False, True], ids=["step", "after"])
@pytest.mark.parametrize("kind", [PenalizedByHook, PenalizedAfterTransfer])
def test_a_batch_that_requires_gradients_does_so_in_the_replay(
    fit: Fit, tmp_path: Path, kind: type[Net], after_step: bool
) -> None:
    path, spike = worst_batch(fit, tmp_path, net := kind("vector"))
    losses = replay(path, net, after_step=after_step)["loss"]
    assert losses[spike.sample].item() == spike.loss


class Keeping(Net):
    """Keeps tensors with a graph, which PyTorch does not copy."""

    def losses(self, batch: Any) -> Tensor:
        self.last = super().losses(batch)
        self.kept = {"all": [self.last]}
        return self.last


def normalized(function: Any) -> Net:
    net = Net("vector")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net.layer = function(net.layer)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: Keeping("vector"),
        lambda: normalized(nn.utils.weight_norm),
        lambda: normalized(nn.utils.spectral_norm),
        lambda: normalized(nn.utils.parametrizations.weight_norm),
    ],
    ids=["kept", "weight_norm", "spectral_norm", "parametrized"],
)
def test_modules_that_hold_tensors_with_a_graph_are_replayed(
    fit: Fit, tmp_path: Path, make: Callable[[], Net]
) -> None:
    net = make()
    path, spike = worst_batch(fit, tmp_path, net)
    losses = replay(path, net)["loss"]
    assert losses[spike.sample].item() == pytest.approx(spike.loss, rel=1e-3)


def test_a_loss_that_the_step_changes_in_place_is_returned_unchanged(
    fit: Fit, tmp_path: Path
) -> None:
    class Weighting(ALRCMixin, Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.alrc(self.losses(batch)).mul_(0.5).mean()

    assert_replayed(fit, tmp_path, Weighting("vector"))


def test_a_replay_runs_no_validation(fit: Fit, tmp_path: Path) -> None:
    class Validating(Net):
        allowed = True

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.allowed

        def val_dataloader(self) -> Any:
            assert self.allowed
            return loader()

    net = Validating("vector")
    path, _ = worst_batch(fit, tmp_path, net)
    net.allowed = False
    replay(path, net)


class Noting(Callback):
    def __init__(self) -> None:
        self.started = 0

    def on_train_start(self, *_: Any) -> None:
        self.started += 1


def test_a_replay_runs_the_given_callbacks_and_not_those_of_the_module(
    fit: Fit, tmp_path: Path
) -> None:
    class Bringing(Net):
        def configure_callbacks(self) -> Any:
            return [own]

    own, given = Noting(), Noting()
    net = Bringing("vector")
    path, spike = worst_batch(fit, tmp_path, net)
    losses = replay(path, net, callbacks=[given])["loss"]
    assert (own.started, given.started) == (1, 1)
    assert losses[spike.sample].item() == spike.loss


def test_a_replay_takes_arguments_of_the_trainer(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    net = Net("vector")
    fit(net, callback, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    (path,) = (tmp_path / "alrc_batches").iterdir()
    exact = replay(path, net, accelerator="cpu")["loss"]
    rough = replay(path, net, precision="bf16-mixed")["loss"]
    assert torch.equal(rough, exact) is False
    assert torch.allclose(rough, exact, rtol=0.1)


def test_a_spike_of_a_record_leads_to_its_batch(fit: Fit, tmp_path: Path) -> None:
    """A spike names the file of its batch. The checkpoint of the spike's step has the weights."""
    fit(
        Net("vector"),
        ALRCCallback(**SETTINGS, save_batches=True),
        saving("pytorch_lightning", tmp_path),
        enable_checkpointing=True,
    )
    (worst, *_) = read_spikes(tmp_path / "alrc_spikes.jsonl")
    net = Net("vector")
    state = torch.load(tmp_path / f"step={worst.step}.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict(state)
    losses = replay(tmp_path / "alrc_batches" / worst.batch_file, net)
    assert losses["loss"][worst.sample].item() == worst.loss


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Record:
    x: Any
    y: Any


class Graph:
    """An object of a class that neither PyTorch nor Lightning knows."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        (lambda x, y: {"x": x, "y": y, "id": ["a", "b", "c", "d"]}, []),
        (lambda x, y: [x, (y, 1, None)], []),
        (Pair, [Pair]),
        (Record, [Record]),
        (Graph, [Graph]),
        (lambda x, y: Pair(x.numpy(), y.numpy()), [Pair]),
        (lambda x, y: [pack_sequence([*x]), y], []),
    ],
    ids=["dict", "list", "named tuple", "dataclass", "object", "arrays", "packed"],
)
def test_batches_of_any_kind_are_replayed_if_their_classes_are_allowed(
    fit: Fit, tmp_path: Path, kind: Callable[..., Any], allowed: list[Any]
) -> None:
    class OfKind(Net):
        def losses(self, batch: Any) -> Tensor:
            if isinstance(batch, dict):
                x, y = batch["x"], batch["y"]
            elif isinstance(batch, list) and isinstance(batch[0], PackedSequence):
                x, y = torch.stack(unpack_sequence(batch[0])), batch[1]
            elif isinstance(batch, list):
                x, (y, *_) = batch
            else:
                x, y = batch.x, batch.y
            return super().losses((torch.as_tensor(x), torch.as_tensor(y)))

    batches: Any = DataLoader(
        [kind(*each) for each in loader()], None, collate_fn=lambda each: each
    )
    callback, net = ALRCCallback(**SETTINGS, save_batches=1), OfKind("vector")
    keeping = saving("pytorch_lightning", tmp_path)
    fit(net, callback, keeping, batches=batches, enable_checkpointing=True)
    (path,) = (tmp_path / "alrc_batches").iterdir()
    spike = callback.spikes[0]
    state = torch.load(tmp_path / f"step={spike.step}.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict(state)
    if allowed:
        with pytest.raises(ValueError, match=r"allow them with torch\.serialization"):
            replay(path, net)
    with torch.serialization.safe_globals(allowed):
        assert replay(path, net)["loss"][spike.sample].item() == spike.loss


def test_random_numbers_of_numpy_and_python_are_drawn_again(fit: Fit, tmp_path: Path) -> None:
    class Noisy(Net):
        def losses(self, batch: Any) -> Tensor:
            return super().losses(batch) * (1.0 + random.random() + np.random.rand())

    net = Noisy("vector")
    assert_replayed(fit, tmp_path, net)
    states = random.getstate(), np.random.get_state()[1].tolist()
    replay(next((tmp_path / "alrc_batches").iterdir()), net)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize("freezes", ["at once", "in training"])
def test_each_submodule_has_its_mode_of_the_training(
    fit: Fit, tmp_path: Path, freezes: str
) -> None:
    """This holds for a module in eval mode, in training mode, and newly made with these weights."""

    class Partly(Net):
        def __init__(self, freezes: str = "") -> None:
            super().__init__("vector")
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.5)
            self.freezes = freezes
            if freezes == "at once":
                self.norm.eval()

        def on_train_epoch_start(self) -> None:
            if self.freezes == "in training":
                self.norm.eval()

        def losses(self, batch: Any) -> Tensor:
            x, y = batch
            return super().losses((self.drop(self.norm(x)), y))

    net = Partly(freezes)
    path, spike = worst_batch(fit, tmp_path, net)
    for module in (net.eval(), net.train(), Partly()):
        module.load_state_dict(net.state_dict())
        losses = replay(path, module)["loss"]
        assert losses[spike.sample].item() == spike.loss


def test_learning_rates_are_those_of_the_replayed_step(fit: Fit, tmp_path: Path) -> None:
    class Rated(Net):
        def losses(self, batch: Any) -> Tensor:
            rate = self.optimizers().param_groups[0]["lr"]
            rate = rate + 2.0 * self.lr_schedulers().get_last_lr()[0]
            return super().losses(batch) * (1.0 + 1e9 * rate)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-9)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    net = Rated("vector")
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    fit(net, callback, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    spike = callback.spikes[0]
    assert spike.step > 0
    losses = replay(tmp_path / "alrc_batches" / spike.batch_file, net)["loss"]
    assert losses[spike.sample].item() == pytest.approx(spike.loss, rel=1e-6)


def test_a_replay_warns_if_the_optimizer_has_other_parameter_groups(
    fit: Fit, tmp_path: Path
) -> None:
    net = Net("vector")
    path, spike = worst_batch(fit, tmp_path, net)
    net.optimizer = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [{"params": [each]} for each in net.parameters()], lr=0.0
    )
    with pytest.warns(UserWarning, match=r"other learning rates.*\[2\].*training's \[1\]"):
        assert replay(path, net)["loss"][spike.sample].item() == spike.loss


def test_a_replay_warns_of_a_loss_after_an_optimizer_step(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    fit(two_losses(namespace, True), saving(namespace, tmp_path), enable_checkpointing=True)
    (path,) = (tmp_path / "alrc_batches").iterdir()
    with pytest.warns(
        UserWarning, match="replayed loss 'second' and later ones may differ.*optimizer"
    ):
        replay(path, two_losses(namespace, True))


def test_a_replay_with_one_optimizer_does_not_warn(fit: Fit, tmp_path: Path) -> None:
    for net in (Net("vector"), Net("vector", manual=True)):
        path, _ = worst_batch(fit, tmp_path / str(net.manual), net)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*replay.*")
            replay(path, net)


@pytest.mark.parametrize("manual", [True, False])
def test_a_replay_without_a_loss_says_why(fit: Fit, tmp_path: Path, manual: bool) -> None:
    class Silent(Net):
        speaks = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if self.speaks else None

    net = Silent("vector", manual=manual)
    path, _ = worst_batch(fit, tmp_path, net)
    net.speaks = False
    reason = "gave none to self.manual_backward" if manual else "training_step returned no loss"
    with pytest.raises(
        RuntimeError, match=f"replay recorded no loss: training_step.*{reason[14:]}"
    ):
        replay(path, net)


def test_a_replay_that_a_hook_ends_before_the_step_says_so(fit: Fit, tmp_path: Path) -> None:
    class Ending(Net):
        ends = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if self.ends else None

    net = Ending("vector")
    path, _ = worst_batch(fit, tmp_path, net)
    net.ends = True
    with pytest.raises(RuntimeError, match="replay recorded no loss: a hook or a callback ended"):
        replay(path, net)


class Scaled(pl.LightningDataModule):
    """Data with a factor that the module needs. Its hooks must not change a saved batch again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def setup(self, stage: str) -> None:
        self.factor = 3.0

    def train_dataloader(self) -> Any:
        self.calls.append("loader")
        return loader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("transfer")
        x, y = batch
        return x + 1.0, y

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x * 2.0, y

    def on_exception(self, exception: BaseException) -> None:
        self.calls.append("exception")


def test_a_replay_sets_the_datamodule_and_does_not_run_its_batch_hooks(
    make_trainer: Any, tmp_path: Path
) -> None:
    class Scaling(Net):
        def losses(self, batch: Any) -> Tensor:
            return super().losses(batch) * self.trainer.datamodule.factor

    net, data = Scaling("vector"), Scaled()
    net.optimizer = lambda: torch.optim.SGD(net.parameters(), 0.0)  # type: ignore[method-assign]
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    callbacks = [callback, saving("pytorch_lightning", tmp_path)]
    trainer = make_trainer(net, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(net, datamodule=data)
    spike = callback.spikes[0]
    path = tmp_path / "alrc_batches" / spike.batch_file
    for given in (data, Scaled()):
        before = list(given.calls)
        losses = replay(path, net, datamodule=given)["loss"]
        assert losses[spike.sample].item() == spike.loss
        assert given.calls == before
    assert data.trainer is trainer
    assert net.trainer is trainer


def test_a_file_of_an_earlier_release_is_replayed(fit: Fit, tmp_path: Path) -> None:
    net = Net("vector")
    path, spike = worst_batch(fit, tmp_path, net)
    content = torch.load(path, weights_only=True)
    old = {"batch", "batch_idx", "epoch", "global_step", "cpu_generator"}
    torch.save({key: content[key] for key in old} | {"cuda_generator": None}, path)
    assert replay(path, net.eval())["loss"][spike.sample].item() == spike.loss


def test_batches_of_pytorch_geometric_are_replayed(fit: Fit, tmp_path: Path) -> None:
    geometric = pytest.importorskip("torch_geometric")
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    class OfGraphs(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.conv = GCNConv(3, 3)

        def losses(self, batch: Any) -> Tensor:
            x = self.conv(batch.x, batch.edge_index)
            batch.x = None  # many networks change their batch
            return super().losses((global_mean_pool(x, batch.batch), batch.y))

    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [
        geometric.data.Data(x=x.repeat(3, 1), y=y[None], edge_index=edges, id=f"m{index}")
        for index, (x, y) in enumerate(loader().dataset)
    ]
    net = OfGraphs()
    net.optimizer = lambda: torch.optim.SGD(net.parameters(), 0.0)  # type: ignore[method-assign]
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    keeping = saving("pytorch_lightning", tmp_path)
    fit(net, callback, keeping, batches=GraphLoader(graphs, 4), enable_checkpointing=True)
    spike = callback.spikes[0]
    assert spike.id == f"m{4 * spike.batch_idx + spike.sample}"
    losses = replay(tmp_path / "alrc_batches" / spike.batch_file, net)["loss"]
    assert losses[spike.sample].item() == spike.loss


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"datamodule must be a LightningDataModule of .*got \[\]"):
        replay(tmp_path / "it.pt", Net(), datamodule=[])
    with pytest.raises(TypeError, match=r"module must be a LightningModule, got Linear\("):
        replay(tmp_path / "it.pt", nn.Linear(1, 1))
    with pytest.raises(
        FileNotFoundError,
        match=r"there is no .*it\.pt: only the batches with",
    ):
        replay(tmp_path / "it.pt", Net())
    torch.save([], tmp_path / "it.pt")
    with pytest.raises(ValueError, match="path must be a file of save_batches"):
        replay(tmp_path / "it.pt", Net())
    with pytest.raises(TypeError, match=r"path must be the path of .*, got None"):
        replay(None, Net())  # type: ignore[arg-type]
    saved = made_up.spike()
    with pytest.raises(TypeError, match=r"path must .*, got Spike.*: its batch_file is 'epoch=0-"):
        replay(saved, Net())  # type: ignore[arg-type]


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"), reason="torch 2.5 does not compile Lightning's log"
)
def test_a_replay_leaves_a_module_that_was_fitted_compiled_unchanged(
    fit: Fit, tmp_path: Path
) -> None:
    net = fickle_class("pytorch_lightning")()
    callback = ALRCCallback(num_stddev=0.5, save_batches=1)
    compiled = torch.compile(net, backend="eager")
    fit(compiled, callback, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    (path,) = (tmp_path / "alrc_batches").iterdir()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    losses = replay(path, net)["loss"]
    # The state includes BatchNorm's statistics.
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(replay(path, compiled)["loss"], losses)


def test_a_replay_accepts_callbacks_and_refuses_the_length_of_a_training(
    fit: Fit, tmp_path: Path
) -> None:
    net = fickle_class("pytorch_lightning")()
    callback = ALRCCallback(num_stddev=0.5, save_batches=1)
    fit(net, callback, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    (path,) = (tmp_path / "alrc_batches").iterdir()
    losses = replay(path, net)["loss"]
    for callbacks in ([callback], callback, None, Timer()):
        assert torch.equal(replay(path, net, callbacks=callbacks)["loss"], losses)
    for refused in ({"max_steps": 1}, {"fast_dev_run": True}, {"max_epochs": 3}):
        with pytest.raises(TypeError, match=rf"must not have \['{next(iter(refused))}'\]"):
            replay(path, net, **refused)


# ---- after a step


class Slow(Net):
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)  # plain SGD keeps no state


def assert_step_replayed(
    folder: Path, net: Net, spike: Spike, **arguments: Any
) -> tuple[Path, dict[str, Tensor], Tensor]:
    """Assert that a replay takes the same step as the training, which kept each step's checkpoint.

    Returns:
        The batch's file, the weights before the step, and the losses after it.
    """
    path = folder / "alrc_batches" / spike.batch_file
    after, before = (
        torch.load(folder / f"step={step}.ckpt", weights_only=True)["state_dict"]
        for step in (spike.step + 1, spike.step)
    )
    net.load_state_dict(after)
    expected = replay(path, net, **arguments)["loss"]
    net.load_state_dict(before)
    found = replay(path, net, after_step=True, **arguments)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    return path, before, found


@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_the_losses_after_a_step_equal_those_with_the_next_weights(
    fit: Fit, tmp_path: Path, shape: str, manual: bool
) -> None:
    net = Slow(shape, manual=manual)
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    fit(net, callback, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    path, before, found = assert_step_replayed(tmp_path, net, callback.spikes[0])
    assert found.tolist() != replay(path, net)["loss"].tolist()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_a_replay_clips_gradients_and_has_the_precision_as_the_training_did(
    fit: Fit, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    callback = ALRCCallback(**SETTINGS, save_batches=1)
    keeping = saving("pytorch_lightning", tmp_path)
    fit(Slow("vector"), callback, keeping, enable_checkpointing=True, **arguments)
    net, spike = Slow("vector"), callback.spikes[0]
    path, *_ = assert_step_replayed(tmp_path, net, spike)
    # The new module is of float32, so it rounds the weights of a training in float64.
    assert replay(path, net)["loss"][spike.sample].item() == pytest.approx(spike.loss, rel=1e-6)


@pytest.mark.parametrize(
    "growth",
    [{}, {"growth_factor": 2.0**30, "growth_interval": 8}],
    ids=["constant", "grows in the step"],
)
def test_the_losses_after_a_step_with_a_gradient_scaler_have_its_scale(
    fit: Fit, tmp_path: Path, growth: dict[str, Any]
) -> None:
    def fp16(scale: float) -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, **growth)
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}

    net, callback = Slow("vector"), ALRCCallback(**SETTINGS, save_batches=1)
    keeping = saving("pytorch_lightning", tmp_path)
    fit(net, callback, keeping, enable_checkpointing=True, **fp16(1024.0))
    assert_step_replayed(tmp_path, net, callback.spikes[0], **fp16(2.0**40))  # overflows by itself


@pytest.mark.parametrize("mean", [20.0, -20.0])
def test_the_losses_after_a_step_that_clipped_on_both_sides_equal_those_of_the_training(
    fit: Fit, tmp_path: Path, mean: float
) -> None:
    class TwoSided(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            spikes = torch.tensor([40.0, 1.0, 1.0, -30.0]) if batch_idx == 4 else 1.0
            return self.losses(batch) * spikes + mean

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0002)

    net = TwoSided("vector")
    start = {"mu1_start": mean + 5.0, "mu2_start": (mean + 5.0) ** 2 + 25.0}
    callback = ALRCCallback(3.0, num_stddev_below=3.0, **start, save_batches=1)
    fit(net, callback, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    clips = [spike for spike in callback.spikes if spike.batch_idx == 4]
    assert {spike.loss > spike.threshold for spike in clips} == {True, False}
    assert_step_replayed(tmp_path, net, clips[0])


def test_the_losses_after_a_step_use_the_same_random_numbers(fit: Fit, tmp_path: Path) -> None:
    class Drawing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.losses(batch) * 0.0 + torch.rand(4) + 500.0 * (batch_idx == 4)

    path, _ = worst_batch(fit, tmp_path, Drawing("vector"))
    net = Drawing("vector")
    assert replay(path, net, after_step=True)["loss"].equal(replay(path, net)["loss"])


def test_after_step_raises_if_no_optimizer_steps(fit: Fit, tmp_path: Path) -> None:
    path, _ = worst_batch(fit, tmp_path, Net("vector"))
    with pytest.raises(RuntimeError, match="recorded no loss: no optimizer stepped"):
        replay(path, Net("vector"), after_step=True, accumulate_grad_batches=5)
    with pytest.raises(TypeError, match="after_step must be True or False, got 1"):
        replay(path, Net("vector"), after_step=1)  # type: ignore[arg-type]


def counted(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def wrapped_step(net: Any) -> None:
    net.training_step = counted(counted(net.training_step))


def compiled_step(net: Any) -> None:
    net.training_step = torch.compile(net.training_step, backend="eager")


def lambda_step(net: Any) -> None:
    step = net.training_step
    net.training_step = lambda batch, batch_idx: step(batch, batch_idx)


def wrapped_forward_of_a_part(net: Any) -> None:
    net.layer.forward = counted(net.layer.forward)


def hook_of_a_part(net: Any) -> None:
    net.layer.register_forward_hook(lambda *_: net.marks.append(len(net.marks)))


@pytest.mark.parametrize(
    "wrap",
    [wrapped_step, compiled_step, lambda_step, wrapped_forward_of_a_part, hook_of_a_part],
)
def test_methods_that_are_wrapped_on_the_instance_are_those_of_the_copy(
    fit: Fit, tmp_path: Path, wrap: Callable[[Any], None]
) -> None:
    class Marked(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.marks: list[int] = []
            self.twice = torch.nn.functional.relu  # a function that holds no module

        def losses(self, batch: Any) -> Tensor:
            # The copy is trained by the replay's Trainer, the original is in eval mode.
            return super().losses(batch) * (1.0 if self.training and self.layer.training else 9.0)

    net = Marked()
    wrap(net)
    path, spike = worst_batch(fit, tmp_path, net)
    net.zero_grad()
    net.eval()
    seen, marks, weights = len(net.seen), len(net.marks), weights_of(net)
    held = dict(vars(net)), dict(vars(net.layer))
    assert replay(path, net)["loss"][spike.sample].item() == spike.loss
    replay(path, net, after_step=True)
    assert (len(net.seen), len(net.marks)) == (seen, marks)
    assert all(each.grad is None for each in net.parameters())
    assert weights_of(net) == weights
    assert (dict(vars(net)), dict(vars(net.layer))) == held


@pytest.mark.parametrize("given", [True, False], ids=["callback", "its own"])
def test_a_part_with_the_mixin_adds_no_callback_to_a_replay(
    fit: Fit, tmp_path: Path, given: bool
) -> None:
    class Part(ALRCMixin, Net):
        def configure_alrc(self) -> ALRCCallback:
            return ALRCCallback(**SETTINGS, save_batches=1)

    class Whole(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part("vector")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.part.alrc(self.part.losses(batch), "named")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

        def train_dataloader(self) -> Any:
            return loader()

    net = Whole()
    callbacks = [ALRCCallback(**SETTINGS, save_batches=1)] * given
    trainer = fit(net, *callbacks, saving("pytorch_lightning", tmp_path), enable_checkpointing=True)
    spike = callback_of(trainer).spikes[0]
    losses = replay(tmp_path / "alrc_batches" / spike.batch_file, net)
    assert losses["named"][spike.sample].item() == spike.loss
    assert callback_of(trainer).losses["named"].updates.item() == 12


def test_a_step_that_takes_the_iterator_of_batches_gets_the_saved_index(
    fit: Fit, tmp_path: Path
) -> None:
    class Taking(Net):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            batch, batch_idx, dataloader_idx = next(dataloader_iter)
            assert dataloader_idx == 0
            return self.losses(batch) * (1.0 + batch_idx)

    path, spike = worst_batch(fit, tmp_path, net := Taking("vector"))
    assert spike.batch_idx > 0
    assert replay(path, net)["loss"][spike.sample].item() == spike.loss
