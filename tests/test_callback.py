"""The callback: what it clips, saves in checkpoints, and logs."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_alrc import ALRC, ALRCCallback
from tests import nets
from tests.conftest import paths_with
from tests.counting import Watch
from tests.nets import (
    BATCHES_IN_EPOCH,
    MIXIN_NETS,
    NAMED_NETS,
    NETS,
    SETTINGS,
    callback_of,
    state_of,
    train_by_hand,
    weights_of,
)

DATA = Path(__file__).parent / "data"

Fit = Callable[..., Any]

SHAPES = ["scalar", "vector", "matrix", "4-d"]
WAYS = ["mixin", "callback", "both"]


def set_up(way: str, namespace: str, *args: Any, **kwargs: Any) -> tuple[Any, list[ALRCCallback]]:
    """A network and its Trainer's callbacks, for each of the three ways to use the library."""
    net = (NETS if way == "callback" else MIXIN_NETS)[namespace](*args, **kwargs)
    return net, [] if way == "mixin" else [ALRCCallback(**SETTINGS)]


def assert_equals_loop(
    fit: Fit, way: str, namespace: str, *network: Any, trainer: Any = None, **by_hand: Any
) -> None:
    core, alrc = nets.Core(*network), ALRC(**SETTINGS)
    train_by_hand(core, alrc, **by_hand)
    net, callbacks = set_up(way, namespace, *network)
    found = callback_of(fit(net, *callbacks, **(trainer or {}))).losses["loss"]
    assert weights_of(net) == weights_of(core)
    assert state_of(found) == state_of(alrc)
    assert 0 < found.clipped_total.item() < found.losses_total.item()


# ---- weights and moments equal those of a loop by hand, to the last bit


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("returns", ["tensor", "dict", "none"])
def test_a_fit_equals_a_loop_by_hand(
    fit: Fit, namespace: str, way: str, shape: str, returns: str
) -> None:
    assert_equals_loop(fit, way, namespace, shape, returns)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("each_path", "way", "shape", "accumulate"),
    paths_with(WAYS, ["scalar", "vector"], [3, 4]),
    indirect=["each_path"],
)
def test_a_fit_with_accumulation_equals_a_loop_by_hand(
    fit: Fit, way: str, shape: str, accumulate: int
) -> None:
    assert_equals_loop(
        fit,
        way,
        "pytorch_lightning",
        shape,
        trainer={"accumulate_grad_batches": accumulate},
        accumulate=accumulate,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fit_with_manual_optimization_equals_a_loop_by_hand(
    fit: Fit, namespace: str, way: str, shape: str
) -> None:
    assert_equals_loop(fit, way, namespace, shape, "tensor", True)


@pytest.mark.parametrize("way", WAYS)
def test_a_fit_with_gradient_clipping_equals_a_loop_by_hand(
    fit: Fit, namespace: str, way: str
) -> None:
    assert_equals_loop(
        fit, way, namespace, "vector", trainer={"gradient_clip_val": 0.5}, gradient_clip_val=0.5
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["scalar", "vector"])
def test_a_fit_in_bf16_mixed_equals_a_loop_by_hand(
    fit: Fit, namespace: str, way: str, shape: str
) -> None:
    assert_equals_loop(
        fit, way, namespace, shape, trainer={"precision": "bf16-mixed"}, autocast=True
    )


def test_bf16_true_keeps_moments_in_float64(fit: Fit, namespace: str) -> None:
    trainer = fit(
        NETS[namespace]("vector"), ALRCCallback(**SETTINGS), precision="bf16-true", max_epochs=1
    )
    alrc = callback_of(trainer).losses["loss"]
    assert alrc.mu1.dtype == torch.float64
    assert alrc.losses_total.item() == 24


def test_the_callback_clips_every_loss_that_a_manual_step_differentiates(
    fit: Fit, namespace: str
) -> None:
    class Twice(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.losses(batch))
                optimizer.step()

    net, core, alrc = Twice("vector", "tensor", True), nets.Core("vector"), ALRC(**SETTINGS)
    callback = callback_of(fit(net, ALRCCallback(**SETTINGS), max_epochs=1))
    train_by_hand(core, alrc, epochs=1, batches=[b for b in nets.loader() for _ in range(2)])
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)


def test_a_fit_warns_once_of_manual_steps_whose_losses_alrc_does_not_see(
    fit: Fit, namespace: str
) -> None:
    class Direct(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.losses(batch).backward()
            optimizer.step()

    callback = ALRCCallback()

    def warnings_of(net: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(net, callback, max_epochs=3)
        return [str(each.message) for each in caught if "ALRC" in str(each.message)]

    assert not warnings_of(NETS[namespace]("scalar", "tensor", True))
    for _ in range(2):  # once in each fit
        (message,) = warnings_of(Direct("scalar", "tensor", True))
        assert "loss.backward() passes by ALRC" in message
        assert "self.manual_backward(loss)" in message


def test_a_manual_step_may_weight_its_losses_by_a_gradient(fit: Fit, namespace: str) -> None:
    class Weighting(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            losses = self.losses(batch)
            self.manual_backward(losses, gradient=torch.full_like(losses, 0.25))
            optimizer.step()

    net, core, alrc = Weighting("vector", "tensor", True), nets.Core("vector"), ALRC(**SETTINGS)
    callback = callback_of(fit(net, ALRCCallback(**SETTINGS)))
    train_by_hand(core, alrc)
    assert weights_of(net) == pytest.approx(weights_of(core))
    assert callback.losses["loss"].updates.item() == alrc.updates.item()


def test_a_returned_dict_keeps_its_other_entries(fit: Fit, namespace: str) -> None:
    outputs: list[Any] = []

    class Watching(NETS[namespace]):  # type: ignore[misc]
        def on_train_batch_end(self, output: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(output)

    fit(Watching("vector", "dict"), ALRCCallback(**SETTINGS), max_epochs=1)
    assert [output["batch"] for output in outputs] == list(range(BATCHES_IN_EPOCH))
    assert all(output["loss"].ndim == 0 for output in outputs)


def test_a_vector_that_is_not_clipped_is_averaged_too(fit: Fit, namespace: str) -> None:
    core, net = nets.Core("vector"), NETS[namespace]("vector")
    train_by_hand(core, None)
    fit(net, ALRCCallback(num_stddev=math.inf))
    assert weights_of(net) == weights_of(core)


def test_validation_updates_no_moment(fit: Fit, namespace: str) -> None:
    class Validating(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.losses(batch)
            assert self.alrc(loss) is loss

        def val_dataloader(self) -> Any:
            return nets.loader()

    alrc = ALRC(**SETTINGS)
    train_by_hand(nets.Core("vector"), alrc)
    trainer = fit(Validating("vector"), val_check_interval=2)
    assert state_of(callback_of(trainer).losses["loss"]) == state_of(alrc)


def test_every_call_of_an_optimizers_closure_updates_the_moments(fit: Fit, namespace: str) -> None:
    class Net(NETS[namespace]):  # type: ignore[misc]
        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    net = Net()
    callback = callback_of(fit(net, ALRCCallback(**SETTINGS), max_epochs=1))
    assert callback.losses["loss"].updates.item() == len(net.seen) > BATCHES_IN_EPOCH


# ---- other Trainers within a fit


class Evaluated:
    """A base of a module. It adds a step for each kind of evaluation, and calls ``within`` with the
    module and the fit's Trainer at the end of each epoch."""

    within: Callable[[Any, Any], None]
    fails = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fails:
            raise KeyError("stop")

    test_step = predict_step = validation_step

    def on_train_epoch_end(self) -> None:
        fitting = self.trainer
        self.within(self, fitting)
        self.trainer = fitting


def assert_fit_is_left_alone(
    make_trainer: Fit, way: str, namespace: str, shape: str, within: Any, **settings: Any
) -> None:
    """Assert that a fit equals a loop by hand.

    ``within(net, trainer, callbacks)`` is called at the end of each epoch of the fit.
    """
    kind = (NETS if way == "callback" else MIXIN_NETS)[namespace]
    callbacks = [] if way == "mixin" else [ALRCCallback(**SETTINGS, **settings)]
    calls = []

    def call(net: Any, trainer: Any) -> None:
        within(net, trainer, callbacks)
        loss = torch.full((2,), 1e6, requires_grad=True)
        assert callback_of(trainer).clip(loss) is loss  # no training step is running
        calls.append(net)

    net = type("Net", (Evaluated, kind), {"within": staticmethod(call)})(shape)
    core, alrc = nets.Core(shape), ALRC(**SETTINGS)
    train_by_hand(core, alrc)
    trainer = make_trainer(net, callbacks=callbacks)
    trainer.fit(net)
    assert len(calls) == 2
    assert weights_of(net) == weights_of(core)
    assert state_of(callback_of(trainer).losses["loss"]) == state_of(alrc)


@pytest.mark.parametrize("evaluate", ["validate", "test", "predict"])
@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_an_evaluation_by_another_trainer_leaves_the_fit_alone(
    make_trainer: Fit, namespace: str, way: str, shape: str, evaluate: str
) -> None:
    def within(net: Any, _: Any, callbacks: list[Any]) -> None:
        getattr(make_trainer(net, callbacks=callbacks), evaluate)(net, nets.loader())

    assert_fit_is_left_alone(make_trainer, way, namespace, shape, within)


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_an_evaluation_of_a_checkpoint_by_another_trainer_leaves_the_fit_alone(
    make_trainer: Fit, namespace: str, way: str, tmp_path: Path
) -> None:
    def within(net: Any, trainer: Any, callbacks: list[Any]) -> None:
        trainer.save_checkpoint(path := tmp_path / "spoiled.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"]["ALRCCallback"]["losses"] = {}
        torch.save(checkpoint, path)
        make_trainer(net, callbacks=callbacks).test(net, nets.loader(), ckpt_path=path)

    assert_fit_is_left_alone(make_trainer, way, namespace, "vector", within)


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_a_failed_evaluation_by_another_trainer_leaves_the_fit_alone(
    make_trainer: Fit, namespace: str, way: str
) -> None:
    def within(net: Any, _: Any, callbacks: list[Any]) -> None:
        net.fails = True
        with pytest.raises(KeyError, match="stop"):
            make_trainer(net, callbacks=callbacks).test(net, nets.loader())

    assert_fit_is_left_alone(make_trainer, way, namespace, "vector", within)


@pytest.mark.parametrize("joins", ["at first", "in setup", "in on_fit_start"])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_a_fit_by_another_trainer_with_the_callback_of_a_running_fit_raises(
    make_trainer: Fit, namespace: str, policy: Any, joins: str
) -> None:
    def within(_: Any, trainer: Any, callbacks: list[Any]) -> None:
        inner = NETS[namespace]("vector")
        is_first = joins == "at first"
        if not is_first:
            hook = joins.removeprefix("in ")
            setattr(inner, hook, lambda **_: inner.trainer.callbacks.append(callbacks[0]))
        with pytest.raises(RuntimeError, match=r"another Trainer.*ALRCCallback of its own"):
            make_trainer(inner, callbacks=callbacks if is_first else []).fit(inner)

    assert_fit_is_left_alone(
        make_trainer, "callback", namespace, "vector", within, nonfinite=policy
    )


def test_a_callback_whose_fit_was_abandoned_clips_in_another_trainer(
    make_trainer: Fit, namespace: str
) -> None:
    """An error in another callback's on_exception hides the exception from this callback."""

    class Failing(nets.NAMESPACES[namespace].Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("stop")

        def on_exception(self, *_: Any) -> None:
            raise KeyError("and stop")

    net, callback = NETS[namespace]("vector"), ALRCCallback(**SETTINGS)
    with pytest.raises(KeyError, match="and stop"):
        make_trainer(net, callbacks=[Failing(), callback]).fit(net)
    net, core, alrc = NETS[namespace]("vector"), nets.Core("vector"), ALRC(**SETTINGS)
    train_by_hand(core, alrc)
    make_trainer(net, callbacks=[callback]).fit(net)
    assert weights_of(net) == weights_of(core)
    assert state_of(callback.losses["loss"]) == state_of(alrc)


# ---- checkpoints


def resumable(way: str, namespace: str) -> tuple[Any, list[ALRCCallback]]:
    net, callbacks = set_up(way, namespace, "vector")
    net.train_dataloader = nets.ResumableLoader
    return net, callbacks


def checkpointing(namespace: str, folder: Path, **arguments: Any) -> Any:
    package = nets.NAMESPACES[namespace]
    return package.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, **arguments)


@pytest.fixture
def saved(fit: Fit, tmp_path: Path, namespace: str) -> Path:
    """The checkpoint of a fit with the callback, saved after six steps."""
    fit(
        NETS[namespace]("vector"),
        ALRCCallback(**SETTINGS),
        checkpointing(namespace, tmp_path, every_n_train_steps=6),
        enable_checkpointing=True,
        max_epochs=1,
    )
    return tmp_path / "step=6.ckpt"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [4, 6, 8, 12], ids="step {}".format)
def test_a_resumed_fit_continues_to_the_last_bit(
    fit: Fit, tmp_path: Path, namespace: str, way: str, step: int
) -> None:
    net, callbacks = resumable(way, namespace)
    every = 6 if step % 6 == 0 else 4
    saving = checkpointing(namespace, tmp_path, every_n_train_steps=every)
    undisturbed = fit(net, *callbacks, saving, max_epochs=3, enable_checkpointing=True)
    again, callbacks = resumable(way, namespace)
    with torch.no_grad():
        again.layer.weight.zero_()
    resumed = fit(again, *callbacks, max_epochs=3, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert len(again.seen) == 3 * BATCHES_IN_EPOCH - step
    assert weights_of(again) == weights_of(net)
    found, expected = (callback_of(each).losses["loss"] for each in (resumed, undisturbed))
    assert state_of(found) == state_of(expected)
    assert found.take_row() == expected.take_row()


def test_a_resumed_fit_continues_its_named_losses(fit: Fit, tmp_path: Path, namespace: str) -> None:
    saving = checkpointing(namespace, tmp_path, every_n_train_steps=6)
    net, again = NAMED_NETS[namespace]("matrix"), NAMED_NETS[namespace]("matrix")
    # With any other loader, Lightning 2.4 counts batches wrongly after a checkpoint at the loader's
    # end.
    net.train_dataloader = again.train_dataloader = nets.ResumableLoader
    first = callback_of(fit(net, saving, max_epochs=2, enable_checkpointing=True))
    second = callback_of(fit(again, max_epochs=2, ckpt_path=tmp_path / "step=6.ckpt"))
    assert weights_of(again) == weights_of(net)
    assert {name: state_of(alrc) for name, alrc in second.losses.items()} == {
        name: state_of(alrc) for name, alrc in first.losses.items()
    }
    assert set(second.losses) == {"first", "second"}


def test_a_checkpoint_loads_with_weights_only(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    state = content["callbacks"]["ALRCCallback"]["losses"]["loss"]["state"]
    assert state["updates"] == 6
    assert state["losses"] == 24
    assert state["row_clipped"] > 0


def test_a_checkpoint_before_the_first_step_has_a_state(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    trainer = fit(NETS[namespace](), ALRCCallback(), max_epochs=0)
    trainer.save_checkpoint(tmp_path / "empty.ckpt")
    assert torch.load(tmp_path / "empty.ckpt", weights_only=True)["callbacks"]["ALRCCallback"]


def test_a_checkpoint_has_the_weight_names_of_a_module_without_alrc(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    net = MIXIN_NETS[namespace]("vector")
    trainer = fit(net, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    found = torch.load(tmp_path / "with.ckpt", weights_only=True)["state_dict"]
    assert list(found) == list(nets.Core().state_dict())


@pytest.mark.parametrize("before", ["with", "without"])
def test_a_checkpoint_loads_if_alrc_was_added_or_removed(
    fit: Fit, tmp_path: Path, namespace: str, before: str
) -> None:
    plain, mixed = NETS[namespace], MIXIN_NETS[namespace]
    writer, reader = (mixed, plain) if before == "with" else (plain, mixed)
    net = writer()
    fit(net, max_epochs=1).save_checkpoint(tmp_path / "before.ckpt")
    loaded = reader.load_from_checkpoint(tmp_path / "before.ckpt", strict=True)
    assert weights_of(loaded) == weights_of(net)
    trainer = fit(reader(), max_epochs=2, ckpt_path=tmp_path / "before.ckpt")
    assert trainer.global_step == 2 * BATCHES_IN_EPOCH
    if before == "without":
        assert callback_of(trainer).losses["loss"].updates.item() == BATCHES_IN_EPOCH


def test_a_fit_from_a_checkpoint_without_alrc_starts_its_moments(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    fit(NETS[namespace](), max_epochs=1).save_checkpoint(tmp_path / "before.ckpt")
    callback = ALRCCallback(**SETTINGS)
    fit(NETS[namespace](), callback, max_epochs=2, ckpt_path=tmp_path / "before.ckpt")
    assert callback.losses["loss"].updates.item() == BATCHES_IN_EPOCH


def trained(**arguments: Any) -> ALRCCallback:
    """A callback that has clipped a generator's and a discriminator's losses."""
    callback = ALRCCallback(**arguments)
    for step in range(30):
        for name in ("generator", "discriminator"):
            callback.clip(torch.tensor(1.0 + step % 3, requires_grad=True), name)
    return callback


def test_equal_names_and_settings_load_without_a_warning() -> None:
    state = trained(**SETTINGS).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback = ALRCCallback(**SETTINGS)
        callback.load_state_dict(state)
    assert callback.state_dict() == state


def test_other_settings_give_a_warning_and_the_moments_continue() -> None:
    saved = trained(num_stddev=2, decay=0.9)
    callback = ALRCCallback(num_stddev=4, decay=0.9)
    with pytest.warns(
        UserWarning, match=r"'generator' differ: num_stddev .*2.* 4.*continued"
    ) as log:
        callback.load_state_dict(saved.state_dict())
    assert not any("decay" in str(each.message) for each in log)
    assert callback.losses["generator"].num_stddev == 4
    assert callback.losses["generator"].mu1 == saved.losses["generator"].mu1


def test_a_name_that_was_not_declared_gives_a_warning_and_is_dropped() -> None:
    callback = ALRCCallback(losses={"generator": {}})
    with pytest.warns(UserWarning, match=r"'discriminator' are dropped.*\['generator'\]"):
        callback.load_state_dict(trained().state_dict())
    assert set(callback.losses) == {"generator"}
    assert callback.losses["generator"].updates.item() == 30
    callback.clip(torch.tensor(1.0, requires_grad=True), "generator")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.losses.warn_of_unused()


@pytest.mark.parametrize("clipped", [0, 3])
def test_a_name_missing_from_the_checkpoint_gives_a_warning_and_starts_afresh(clipped: int) -> None:
    names: dict[str, dict[str, float | None]] = {"generator": {}, "discriminator": {}, "critic": {}}
    callback = ALRCCallback(losses=names)
    for _ in range(clipped):
        callback.clip(torch.tensor(3.0, requires_grad=True), "critic")
    with pytest.warns(UserWarning, match="no ALRC moments of 'critic'.*afresh"):
        callback.load_state_dict(trained().state_dict())
    assert callback.losses["critic"].updates.item() == 0


def test_a_checkpoint_of_release_0_1_is_resumed(fit: Fit, tmp_path: Path, namespace: str) -> None:
    """Release 0.1 saved the file after two epochs of NamedNet("matrix") with a layer ``ALRC``."""

    class WithLayer(NAMED_NETS[namespace]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("matrix")
            self.clip = ALRC(**SETTINGS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            clipped = self.clip(self.losses(batch).mean(1))
            return super().training_step(batch, batch_idx) + 0 * clipped.mean()  # type: ignore[no-any-return]

    path = tmp_path / "release_0_1.ckpt"
    path.write_bytes((DATA / path.name).read_bytes())
    saved = torch.load(path, weights_only=True)["callbacks"]["ALRCCallback"]
    trainer = fit(WithLayer(), max_epochs=2, ckpt_path=path)  # all epochs are done
    loaded = callback_of(trainer)
    for name, alrc in loaded.losses.items():
        before = saved["losses"][name]["state"]
        assert alrc.mu1.item() == before["mu1"]
        assert (alrc.updates, alrc.losses_total) == (12, before["losses"])
        assert alrc.clipped_total == before["row_clipped"]
    assert set(loaded.losses) == {"first", "second"}
    before = saved["recording"]["worst"]
    added = {"call": 0, "gradient_norm": None, "kind": None}
    assert [spike._asdict() for spike in loaded.spikes] == [each | added for each in before]
    net = WithLayer()
    further = callback_of(fit(net, max_epochs=3, ckpt_path=path))
    assert further.losses["first"].updates == net.clip.updates == 18


def test_a_name_first_used_after_resuming_gives_a_warning() -> None:
    callback = ALRCCallback()
    callback.load_state_dict(trained().state_dict())
    with pytest.warns(UserWarning, match="no ALRC moments of 'critic'.*afresh"):
        callback.clip(torch.tensor(1.0, requires_grad=True), "critic")


def test_names_not_used_after_resuming_give_one_warning(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    trainer = fit(NAMED_NETS[namespace]("matrix"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "named.ckpt")
    with pytest.warns(UserWarning, match=r"\['first', 'second'\].*kept") as caught:
        fit(MIXIN_NETS[namespace](), max_epochs=4, ckpt_path=tmp_path / "named.ckpt")
    assert sum("no step has clipped since" in str(each.message) for each in caught) == 1


def test_names_used_after_resuming_give_no_warning(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    trainer = fit(NAMED_NETS[namespace]("matrix"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "named.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no step has clipped since")
        fit(NAMED_NETS[namespace]("matrix"), max_epochs=2, ckpt_path=tmp_path / "named.ckpt")


def test_a_learning_rate_search_leaves_no_moments_and_no_warning(
    make_trainer: Fit, namespace: str
) -> None:
    class Net(NETS[namespace]):  # type: ignore[misc]
        lr = 0.01

        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    net, callback = Net("vector"), ALRCCallback(**SETTINGS)
    trainer = make_trainer(net, callbacks=[callback])
    tuner = nets.NAMESPACES[namespace].tuner.Tuner(trainer)
    tuner.lr_find(net, num_training=12, min_lr=1e-6, max_lr=1e-3, update_attr=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ALRC.*")
        trainer.fit(net)
    assert callback.losses["loss"].updates.item() == 2 * BATCHES_IN_EPOCH


def broken(state: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 99, "version 1.*99.*later release"),
        (("losses",), [], r"'losses'.*mapping.*\[\]"),
        (("losses", "../x"), {}, "name.*letters.*'../x'"),
        (("losses", "generator"), None, "'generator'.*mapping.*None"),
        (("losses", "discriminator", "version"), 7, "'discriminator'.*version 1.*7"),
        (("losses", "discriminator", "state", "mu1"), math.nan, "'discriminator'.*'mu1'.*nan"),
        (("losses", "generator", "state", "variance"), -1.0, "'variance'.*from 0 .*-1.0"),
        (("losses", "generator", "state"), {"mu1": 1.0}, "'generator'.*must have.*variance"),
        pytest.param(
            ("losses", "generator", "state", "mu1"),
            10**400,
            "'generator'.*'mu1'.*number",
            id="beyond floats",
        ),
    ],
)
def test_a_hostile_state_is_refused_and_changes_nothing(
    path: tuple[str, ...], value: Any, message: str
) -> None:
    callback = trained(decay=0.9)
    before = callback.state_dict()
    with pytest.raises(ValueError, match=message):
        callback.load_state_dict(broken(trained(decay=0.5).state_dict(), *path, value=value))
    assert callback.state_dict() == before


def test_save_weights_only_gives_a_warning(fit: Fit, tmp_path: Path, namespace: str) -> None:
    saving = checkpointing(namespace, tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only.*moments afresh"):
        fit(NETS[namespace](), ALRCCallback(), saving, enable_checkpointing=True, max_epochs=1)


# ---- logs


@pytest.mark.parametrize("way", WAYS)
def test_a_fit_works_without_a_logger(fit: Fit, namespace: str, way: str) -> None:
    net, callbacks = set_up(way, namespace)
    assert fit(net, *callbacks, logger=False, log_every_n_steps=1).global_step == 12


def test_a_fit_without_a_logger_takes_rows_for_callbacks_that_monitor_metrics(fit: Fit) -> None:
    callback = ALRCCallback(**SETTINGS)
    trainer = fit(nets.Net("vector"), callback, log_every_n_steps=4, max_epochs=1)
    assert callback.losses["loss"].dump()["state"]["row_losses"] == 0
    assert trainer.callback_metrics["alrc/clipped_total"] == callback.losses["loss"].clipped_total


def test_a_loss_has_no_hooks_after_a_fit(fit: Fit) -> None:
    callback = callback_of(fit(nets.Net("vector"), ALRCCallback(**SETTINGS), max_epochs=1))
    callback.clip(torch.tensor(1.0, requires_grad=True))
    assert callback.losses["loss"].on_clip is None


# ---- reads of the device


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: bool(t.sum() > 0),
        lambda t: float(t.sum()),
        lambda t: t[t > 1],
        lambda t: f"{t.sum():.3f}",
        lambda t: torch.equal(t, t),
        lambda t: t.cpu(),
    ],
    ids=["item", "tolist", "bool", "float", "mask", "format", "equal", "cpu"],
)
def test_watch_sees_every_kind_of_read(read: Callable[[Tensor], Any]) -> None:
    with Watch() as watch:
        read(torch.tensor([1.0, 2.0]))
    assert watch.reads


def reads_by_step(
    fit: Fit, tmp_path: Path, namespace: str, net: Any, *callbacks: Any, **arguments: Any
) -> list[list[str]]:
    """The reads of the device in each training step of a Trainer."""
    steps: list[list[str]] = []
    watch = Watch()

    class Recorder(nets.NAMESPACES[namespace].Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_start(self, *args: Any) -> None:
            watch.reads = []

        def on_train_batch_end(self, *args: Any) -> None:
            steps.append(list(watch.reads))

    with watch:
        fit(
            net,
            *callbacks,
            Recorder(),
            logger=nets.NAMESPACES[namespace].loggers.CSVLogger(tmp_path),
            log_every_n_steps=4,
            **arguments,
        )
    return steps


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("record", [0, 100])
def test_the_device_is_read_once_for_each_row_and_once_for_the_record(
    fit: Fit, tmp_path: Path, namespace: str, shape: str, arguments: dict[str, Any], record: int
) -> None:
    callback = ALRCCallback(**SETTINGS, record=record)
    without = reads_by_step(fit, tmp_path, namespace, NETS[namespace](), **arguments)
    with_alrc = reads_by_step(
        fit, tmp_path, namespace, NETS[namespace](shape), callback, **arguments
    )
    more = [len(a) - len(b) for a, b in zip(with_alrc, without, strict=True)]
    period = 4 * arguments.get("accumulate_grad_batches", 1)
    reads = 2 if record else 1
    assert more == [reads * ((step + 1) % period == 0) for step in range(2 * BATCHES_IN_EPOCH)]


# ---- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_stddev": "3"}, TypeError, "num_stddev.*positive number.*'3'"),
        ({"decay": 1.0}, ValueError, r"decay.*\[0, 1\).*1.0"),
        ({"mu2_decay": -1}, ValueError, r"mu2_decay.*\[0, 1\).*-1"),
        ({"mu1_start": 3.0, "mu2_start": 9.0}, ValueError, "mu2_start.*more than.*9.0.*9.0"),
        ({"mu1_start": 3.0}, ValueError, "mu1_start.*mu2_start.*both.*3.0.*None"),
        ({"record": -1}, ValueError, "record.*whole number, 0 or above.*-1"),
        ({"record": True}, TypeError, "record.*whole number, 0 or above.*True"),
        ({"sample_ids": "id"}, TypeError, "sample_ids.*function or None.*'id'"),
        ({"losses": []}, TypeError, r"losses.*dict of its settings.*\[\]"),
        ({"losses": {}}, TypeError, r"losses.*dict of its settings.*\{\}"),
        ({"losses": ["generator"]}, TypeError, "losses.*dict of its settings.*generator"),
        ({"losses": {"a": 2}}, TypeError, r"losses\['a'\].*dict of settings among.*got 2"),
        ({"losses": {"a": {"stddevs": 2}}}, TypeError, r"losses\['a'\].*num_stddev.*stddevs"),
        ({"losses": {"a": {"decay": 2}}}, ValueError, r"decay.*\[0, 1\).*2"),
        ({"losses": {"a/b": {}}}, ValueError, "name.*letters.*'a/b'"),
        ({"losses": {"": {}}}, ValueError, "name.*letters.*''"),
        ({"losses": {3: {}}}, ValueError, "name.*string.*3"),
    ],
)
def test_a_wrong_argument_raises_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ALRCCallback(**arguments)


def test_each_declared_loss_may_have_its_own_settings() -> None:
    callback = ALRCCallback(num_stddev=4, decay=0.9, losses={"a": {"num_stddev": 2}, "b": {}})
    assert [callback.losses[name].num_stddev for name in "ab"] == [2, 4]
    assert callback.losses["a"].decay == 0.9


@pytest.mark.parametrize("name", ["critic", "", "a/b", 3, None, ["generator"]])
def test_an_unknown_name_raises(name: Any) -> None:
    callback = ALRCCallback(losses={"generator": {}})
    with pytest.raises((TypeError, ValueError), match=re.escape(f"got {name!r}")):
        callback.clip(torch.tensor(1.0, requires_grad=True), name)
    assert set(callback.losses) == {"generator"}


def test_the_error_of_an_unknown_name_lists_the_known_names() -> None:
    callback = ALRCCallback(losses={"generator": {}, "discriminator": {}})
    with pytest.raises(ValueError, match=r"\['discriminator', 'generator'\], got 'critic'"):
        callback.clip(torch.tensor(1.0, requires_grad=True), "critic")


def test_a_returned_loss_raises_if_loss_is_not_a_declared_name(fit: Fit, namespace: str) -> None:
    with pytest.raises(ValueError, match=r"\['generator'\], got 'loss'"):
        fit(NETS[namespace](), ALRCCallback(losses={"generator": {}}))


def test_two_callbacks_in_a_trainer_raise(make_trainer: Fit, namespace: str) -> None:
    with pytest.raises(ValueError, match=r"takes one ALRCCallback, got 2.*losses="):
        make_trainer(NETS[namespace](), callbacks=[ALRCCallback(), ALRCCallback()])


def test_two_callbacks_of_a_module_raise(fit: Fit, namespace: str) -> None:
    net = NETS[namespace]()
    net.configure_callbacks = lambda: [ALRCCallback(), ALRCCallback()]
    with pytest.raises(ValueError, match="one ALRCCallback, got 2"):
        fit(net)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda loss: loss.long(), TypeError, "loss.*floating.*int64"),
        (lambda loss: loss.to(torch.complex64), TypeError, "loss.*floating.*complex64"),
        (lambda loss: loss.detach(), ValueError, "loss.*require a gradient.*requires_grad=False"),
    ],
    ids=["integer", "complex", "detached"],
)
def test_a_returned_loss_that_cannot_be_differentiated_raises(
    fit: Fit, namespace: str, spoil: Any, error: type[Exception], message: str
) -> None:
    class Spoiled(NETS[namespace]):  # type: ignore[misc]
        def losses(self, batch: Any) -> Tensor:
            return spoil(super().losses(batch))  # type: ignore[no-any-return]

    with pytest.raises(error, match=message):
        fit(Spoiled(), ALRCCallback())


# ---- the command line


def test_lightning_cli_makes_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  logger: false
  callbacks:
    - class_path: lightning_alrc.ALRCCallback
      init_args:
        num_stddev: 2
        losses:
          generator: {decay: 0.9, mu1_start: 1, mu2_start: 2}
          discriminator: {num_stddev: 4.5}
"""
    )
    cli = LightningCLI(
        nets.Net, args=["--config", str(config)], run=False, save_config_callback=None
    )
    callback = callback_of(cli.trainer)
    assert callback.losses["generator"].settings["mu2_start"] == 2
    assert callback.losses["generator"].num_stddev == 2
    assert callback.losses["discriminator"].num_stddev == 4.5
