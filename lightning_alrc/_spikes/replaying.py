"""Repeats the training step of a batch that spiked, in a new Trainer."""

from __future__ import annotations

import copy
import functools
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from lightning_alrc import functional
from lightning_alrc._moments.arguments import flag
from lightning_alrc._spikes import generators
from lightning_alrc._spikes.batches import grad_scaler, load_batch
from lightning_alrc._trainer.interception import Interception
from lightning_alrc._trainer.lightning import takes_batches_itself
from lightning_alrc._trainer.named_losses import RETURNED
from lightning_alrc._trainer.namespaces import Callback, join_late_packages, rank_zero_warn

__all__ = ["replayed"]

OWN_ARGUMENTS = {
    "max_epochs",
    "max_steps",
    "limit_train_batches",
    "fast_dev_run",
    "overfit_batches",
    "barebones",
}
"""Arguments of the Trainer that the user of ``replay`` may not set."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which PyTorch's wrappers keep the module that they wrap."""


def replayed(
    path: str | Path,
    module: Any,
    datamodule: Any,
    after_step: bool,
    trainer_arguments: dict[str, Any],
) -> dict[str, Tensor]:
    """See :func:`lightning_alrc.replay`."""
    module = getattr(module, "_orig_mod", module)  # torch.compile may have wrapped it
    package = _package_of(module)
    if not isinstance(datamodule, (package.LightningDataModule, type(None))):
        raise TypeError(
            f"datamodule must be a LightningDataModule of {package.__name__}, got "
            f"{datamodule!r:.100} of type {type(datamodule).__name__}"
        )
    refused = sorted(trainer_arguments.keys() & OWN_ARGUMENTS)
    if refused:
        raise TypeError(
            f"trainer_arguments must not have {refused}: replay's Trainer runs one step"
        )
    after_step = flag("after_step", after_step)
    content = load_batch(path)
    of_trainer = content["of_trainer"]
    loss_scale = of_trainer.pop("loss_scale", None)
    if trainer_arguments.get("plugins"):
        of_trainer.pop("precision", None)  # Lightning refuses a precision beside a plugin with one
    recorder = _LossRecorder(content, module.state_dict(), after_step)
    arguments: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        **of_trainer,
    } | trainer_arguments
    given = arguments.pop("callbacks", None) or []
    callbacks = [
        each
        for each in (given if isinstance(given, Sequence) else [given])
        if each.state_key != "ALRCCallback"
    ]
    trainer = package.Trainer(
        max_epochs=content["epoch"] + 1,
        limit_train_batches=2 if after_step else 1,
        callbacks=[*callbacks, recorder],
        **arguments,
    )
    # LIGHTNING_ALRC may have added an ALRCCallback.
    trainer.callbacks = [each for each in trainer.callbacks if each.state_key != "ALRCCallback"]
    scaler = grad_scaler(trainer)
    if scaler is not None and loss_scale is not None:  # the scale at the start may overflow
        scaler.load_state_dict(scaler.state_dict() | {"scale": loss_scale})
    _set_progress(trainer, content["epoch"], content["global_step"])
    loader = DataLoader(_OneBatch(content["batch"]), batch_size=None, collate_fn=_unchanged)
    device = trainer.strategy.root_device
    with generators.unchanged(device), _attached(datamodule, trainer), suppress(_Replayed):
        trainer.fit(_prepared(module, content["batch_idx"]), loader)
    if not recorder.losses:
        raise RuntimeError(f"the replay recorded no loss: {recorder.why_none(module)}")
    return {name: _joined(losses) for name, losses in recorder.losses.items()}


@contextmanager
def _attached(datamodule: Any, trainer: Any) -> Iterator[None]:
    """Attach a datamodule to a Trainer, which then calls its ``prepare_data`` and ``setup``.

    The datamodule's loaders and transfer hooks are not used.
    """
    if datamodule is None:
        yield
        return
    trainer_before = datamodule.trainer
    trainer.datamodule, datamodule.trainer = datamodule, trainer
    try:
        yield
    finally:
        datamodule.trainer = trainer_before


class _Replayed(Exception):
    """Ends a Trainer's fit once all losses are recorded."""


class _LossRecorder(Callback):
    """Records the losses of one training step, unclipped.

    It is a callback, and the ``Guard`` of an
    :class:`~lightning_alrc._trainer.interception.Interception`.

    With ``after_step`` there are two steps on the batch. In the first step, the losses are clipped
    as in the training. In the second step, the losses are recorded.
    """

    def __init__(self, content: dict[str, Any], weights: dict[str, Any], after_step: bool) -> None:
        join_late_packages()
        super().__init__()
        self.losses: dict[str, list[Tensor]] = {}
        self._content = content
        self._weights = weights
        self._trainer: Any = None
        self._has_named_loss = self._has_begun = self._has_stepped = self._has_warned = False
        self._after_step, self._is_recording = after_step, not after_step
        self._calls: Counter[str] = Counter()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._trainer = weakref.proxy(trainer)
        Interception(trainer, self, may_refuse=False).install()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The weights are loaded again, because the module's setup() may have replaced layers.
        pl_module.load_state_dict(self._weights, strict=False)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def begin_step(self) -> None:
        self._has_named_loss, self._has_begun = False, True
        self._is_recording = not self._after_step or self._has_stepped
        self._calls.clear()
        _set_modes(self._trainer.lightning_module, self._content["eval_modules"])
        _set_learning_rates(self._trainer, self._content["learning_rates"])
        generators.set_states(self._content, self._trainer.strategy.root_device)

    def clip(self, loss: Tensor, name: str) -> Tensor:
        self._has_named_loss = True
        return self._record_or_clip(loss, name)

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        return loss if self._has_named_loss else self._record_or_clip(loss, RETURNED)

    def _record_or_clip(self, loss: Tensor, name: str) -> Tensor:
        call = self._calls[name]
        self._calls[name] += 1
        if self._is_recording:
            self._record(loss, name)
            return loss
        clips = self._content["clips"].get((name, call))
        return loss if clips is None else _clipped(loss, clips)

    def _record(self, loss: Tensor, name: str) -> None:
        self.losses.setdefault(name, []).append(loss.detach().clone())
        if self._has_stepped and not (self._after_step or self._has_warned):
            self._has_warned = True
            rank_zero_warn(
                f"the replayed loss {name!r} and later ones may differ from those of the training: "
                "an optimizer stepped earlier in training_step, and neither the optimizer's state "
                "nor the clipped gradients are kept"
            )

    def end_step(self, trainer: Any) -> None:
        if not self._is_recording:
            return
        trainer.datamodule = None  # so that the datamodule's on_exception is not called
        raise _Replayed

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        return step(closure)

    def holds_back_schedulers(self) -> bool:
        return False

    def note_gradient_norm(self, optimizer: Any, norm: Tensor) -> None:
        """Ignore the norm: a replay does not record it."""

    def why_none(self, module: Any) -> str:
        """Why no loss was recorded."""
        if not self._has_begun:
            return "a hook or a callback ended the training before training_step"
        if not self._is_recording:
            return (
                "no optimizer stepped after training_step; a GradScaler skips a step whose "
                "gradients overflow"
            )
        if module.automatic_optimization:
            return "training_step returned no loss (None skips a step)"
        return (
            "training_step gave none to self.manual_backward, nor to self.alrc of ALRCMixin; "
            "loss.backward() passes by ALRC"
        )


def _clipped(loss: Tensor, clips: list[tuple[float, float, float]]) -> Tensor:
    """A loss clipped as in the training.

    Args:
        loss: the loss of one call.
        clips: value, bound and scale of each of the call's spikes. If the value lies above the
            bound, the bound is the threshold; otherwise it is the lower bound.
    """
    upper, lower, mu1 = math.inf, None, math.ulp(0.0)
    for value, bound, scale in clips:
        if value > bound:
            upper = bound
        else:
            lower = bound
        # ``functional.clip`` multiplies the gradient of a loss above the threshold by bound / value
        # if the mean is positive. In all other cases, the factor is
        # (bound - mean) / (value - mean). The mean was not saved, so a mean is used that gives the
        # saved scale. For bound / value this is the smallest positive number, with which mu1
        # begins. Otherwise the second factor is solved for the mean.
        if not math.isclose(scale * value, bound, rel_tol=1e-6):
            mu1 = (bound - scale * value) / (1.0 - scale)
    return functional.clip(loss, mu1, upper, lower).loss


def _set_modes(module: Any, in_eval: list[str] | None) -> None:
    """Set each submodule to its mode in the training. ``None`` (unknown modes) changes nothing."""
    if in_eval is None:
        return
    names = {_without_wrappers(name) for name in in_eval}
    for name, part in module.named_modules():
        part.training = _without_wrappers(name) not in names


def _without_wrappers(name: str) -> str:
    """The name that a submodule has before it is compiled or sharded."""
    return ".".join(each for each in name.split(".") if each not in WRAPPERS)


def _set_learning_rates(trainer: Any, rates: list[list[float]] | None) -> None:
    """Set each group's learning rate to the training's. ``None`` (unknown rates) sets none."""
    if rates is None:
        return
    groups = [optimizer.param_groups for optimizer in trainer.optimizers]
    if list(map(len, groups)) != list(map(len, rates)):
        rank_zero_warn(
            f"the replay has other learning rates than the training: its optimizers have "
            f"{list(map(len, groups))} groups of parameters, the training's {list(map(len, rates))}"
        )
        return
    for of_optimizer, rates_of_optimizer in zip(groups, rates, strict=True):
        for group, rate in zip(of_optimizer, rates_of_optimizer, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
    for config in trainer.lr_scheduler_configs:
        if getattr(config.scheduler, "optimizer", None) in trainer.optimizers:
            groups_of = config.scheduler.optimizer.param_groups
            config.scheduler._last_lr = [group["lr"] for group in groups_of]  # for get_last_lr


class _OneBatch(Dataset[Any]):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2  # with after_step, the batch is used twice: first for a step, then for the losses

    def __getitem__(self, index: int) -> Any:
        return copy.deepcopy(self.batch)


def _unchanged(batch: Any, *args: Any) -> Any:
    return batch


def _with_leaves(batch: Any, *args: Any) -> Any:
    """The batch with leaves. A tensor that requires gradients is none after it was transferred."""
    return tree_map_only(Tensor, _as_leaf, batch)


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()


def _as_no_leaf(tensor: Tensor) -> Tensor:
    """PyTorch allows changes in place of a tensor that requires gradients only if it is no leaf."""
    return tensor.clone() if tensor.requires_grad else tensor


class _WithoutGraphs(TorchFunctionMode):
    """Within it, ``copy.deepcopy`` copies tensors that have a graph, and leaves out the graph.

    PyTorch raises an error otherwise. The old ``weight_norm`` and ``spectral_norm`` keep such
    tensors in a module. A module may also keep a loss.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


def _prepared(module: Any, batch_idx: int) -> Any:
    """A copy of a module. Its ``training_step`` gets the saved batch, and the saved batch_idx.

    In the training, the hook ``on_train_batch_start`` may have changed the batch, which was saved
    after that. In the replay, the hook gets a copy, so that it does not change the batch twice.
    """
    copies: dict[int, Any] = {}
    trainer, module._trainer = module._trainer, None  # the Trainer is not copied
    try:
        with _WithoutGraphs():
            copied = copy.deepcopy(module, copies)
    finally:
        module._trainer = trainer
    _rebind(copied, copies)
    copied._compiler_ctx = None
    for part in copied.modules():
        # A part with ALRCMixin would add its callback to the replay's Trainer.
        if "_add_callback_to" in dir(type(part)):
            part._add_callback_to = _unchanged
    if not copied.training:
        copied.train()
    step, hook = copied.training_step, copied.on_train_batch_start

    @functools.wraps(step)
    def training_step(batch: Any, *args: Any) -> Any:
        if takes_batches_itself(copied.trainer):
            batch = ((each, batch_idx, loader_idx) for each, _, loader_idx in batch)
        return step(batch, *(batch_idx for _ in args[:1]), *args[1:])

    @functools.wraps(hook)
    def on_train_batch_start(batch: Any, *args: Any) -> Any:
        with _WithoutGraphs():
            copied = copy.deepcopy(batch)
        return hook(tree_map_only(Tensor, _as_no_leaf, copied), *args)

    copied.training_step, copied.on_train_batch_start = training_step, on_train_batch_start
    copied.configure_callbacks = list
    copied.on_before_batch_transfer = _unchanged
    copied.on_after_batch_transfer = _with_leaves
    return copied


def _rebind(copied: Any, copies: dict[int, Any]) -> None:
    """Let the functions that a copied module and its parts hold use the copies.

    ``copy.deepcopy`` does not copy functions. A decorator that was applied to a method of a module,
    as in ``self.training_step = torch.compile(self.training_step)``, gives a function that calls
    the original module. So may a hook.

    Args:
        copied: the copy.
        copies: the copied objects, by the ``id`` of their originals.
    """
    for part in copied.modules():
        held = vars(part)
        for values in (held, *(each for each in held.values() if isinstance(each, dict))):
            values.update(
                {
                    key: found
                    for key, value in values.items()
                    if (found := _rebound(value, copies)) is not value
                }
            )


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A value, or its copy, or a function with the copies of what its closure holds."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, MethodType):
        found = _rebound(value.__self__, copies)
        return value if found is value.__self__ else MethodType(value.__func__, found)
    if not isinstance(value, FunctionType):
        return value
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        found = _rebound(compiled, copies)
        return value if found is compiled else found
    copies[id(value)] = value  # its closure may hold the function itself
    cells = value.__closure__ or ()
    found = tuple(_rebound_cell(cell, copies) for cell in cells)
    if any(new is not cell for new, cell in zip(found, cells, strict=True)):
        arguments = value.__name__, value.__defaults__, found
        new = FunctionType(value.__code__, value.__globals__, *arguments)
        new.__kwdefaults__ = value.__kwdefaults__
        copies[id(value)] = functools.update_wrapper(new, value)
    return copies[id(value)]


def _rebound_cell(cell: CellType, copies: dict[int, Any]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # the cell is empty
        return cell
    found = _rebound(content, copies)
    return cell if found is content else CellType(found)


def _set_progress(trainer: Any, epoch: int, global_step: int) -> None:
    """Set a Trainer's progress to a given epoch and optimizer step."""
    trainer.fit_loop.epoch_progress.current.processed = epoch
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = global_step
    loop.manual_optimization.optim_step_progress.total.completed = global_step


def _package_of(module: Any) -> Any:
    """The Lightning package that a module's class is from.

    Raises:
        TypeError: if the module is not a LightningModule of either package.
    """
    for base in type(module).__mro__:
        package = base.__module__.removesuffix(".core.module")
        if base.__name__ == "LightningModule" and package in (
            "lightning.pytorch",
            "pytorch_lightning",
        ):
            return sys.modules[package]
    raise TypeError(
        f"module must be a LightningModule, got {module!r:.100} of type {type(module).__name__}"
    )


def _joined(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.cat([each.flatten() for each in losses])
