"""How a batch that spiked is run again, in a Trainer of its own."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_alrc._spikes.batches import load_batch
from lightning_alrc._trainer.interception import Interception
from lightning_alrc._trainer.named_losses import RETURNED
from lightning_alrc._trainer.namespaces import Callback, join_late_packages

__all__ = ["replayed"]

OWN_ARGUMENTS = {
    "max_epochs",
    "max_steps",
    "limit_train_batches",
    "fast_dev_run",
    "overfit_batches",
    "barebones",
}
"""Of the Trainer, that are not the user's."""

STEPS = ("training", "validation", "test", "predict")


def replayed(path: str | Path, module: Any, trainer_arguments: dict[str, Any]) -> dict[str, Tensor]:
    """See :func:`lightning_alrc.replay`."""
    module = getattr(module, "_orig_mod", module)  # as torch.compile returned it
    trainer_class = _trainer_class(module)
    refused = sorted(trainer_arguments.keys() & OWN_ARGUMENTS)
    if refused:
        raise TypeError(
            f"trainer_arguments must not have {refused}: replay's Trainer runs one step"
        )
    content = load_batch(path)
    listener = _Listener(content, module.state_dict())
    arguments: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    } | trainer_arguments
    given = arguments.pop("callbacks", None) or []
    callbacks = [
        each
        for each in (given if isinstance(given, Sequence) else [given])
        if each.state_key != "ALRCCallback"
    ]
    trainer = trainer_class(
        max_epochs=content["epoch"] + 1,
        limit_train_batches=1,
        callbacks=[*callbacks, listener],
        **arguments,
    )
    _set_progress(trainer, content["epoch"], content["global_step"])
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    loader = DataLoader(_OneBatch(content["batch"]), batch_size=None, collate_fn=_unchanged)
    with torch.random.fork_rng(devices), suppress(_Replayed):
        trainer.fit(_prepared(module, content["batch_idx"]), loader)
    return {name: _joined(losses) for name, losses in listener.heard.items()}


class _Replayed(Exception):
    """Ends a Trainer's fit: there is nothing more to hear."""


class _Listener(Callback):
    """Hears the losses of one training step, and clips none: a guard that is a callback, too."""

    def __init__(self, content: dict[str, Any], weights: dict[str, Any]) -> None:
        join_late_packages()
        super().__init__()
        self.heard: dict[str, list[Tensor]] = {}
        self._content = content
        self._weights = weights
        self._named = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        Interception(trainer, self, may_refuse=False).install()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Layers that are made in setup() have been made anew.
        pl_module.load_state_dict(self._weights, strict=False)

    def begin_step(self) -> None:
        self._named = False
        torch.set_rng_state(self._content["cpu_generator"])
        if self._content["cuda_generator"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._content["cuda_generator"])

    def clip(self, loss: Tensor, name: str) -> Tensor:
        self.heard.setdefault(name, []).append(loss.detach().clone())
        self._named = True
        return loss

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        if not self._named:
            self.heard.setdefault(RETURNED, []).append(loss.detach().clone())
        return loss

    def end_step(self, trainer: Any) -> None:
        raise _Replayed

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        return step(closure)

    def holds_schedulers(self) -> bool:
        return False


class _OneBatch(Dataset[Any]):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.batch


def _unchanged(batch: Any, *args: Any) -> Any:
    return batch


def _prepared(module: Any, batch_idx: int) -> Any:
    """A copy of a module, whose step gets a batch as it was given to a step before."""
    trainer, module._trainer = module._trainer, None  # which is not to be copied
    try:
        copied = copy.deepcopy(module)
    finally:
        module._trainer = trainer
    if getattr(copied, "_compiler_ctx", None) is not None:
        copied._compiler_ctx = None
        for name in ("forward", *(f"{kind}_step" for kind in STEPS)):
            vars(copied).pop(name, None)  # what Lightning compiled is bound to the original
    if not copied.training:
        copied.train()
    step = copied.training_step

    @functools.wraps(step)
    def training_step(batch: Any, *args: Any) -> Any:
        return step(batch, *(batch_idx for _ in args[:1]), *args[1:])

    copied.training_step = training_step
    copied.configure_callbacks = list
    copied.on_before_batch_transfer = copied.on_after_batch_transfer = _unchanged
    return copied


def _set_progress(trainer: Any, epoch: int, global_step: int) -> None:
    """Let a Trainer be where another was."""
    trainer.fit_loop.epoch_progress.current.processed = epoch
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = global_step
    loop.manual_optimization.optim_step_progress.total.completed = global_step


def _trainer_class(module: Any) -> Any:
    """The Trainer of the package that a module's class is from.

    Raises:
        TypeError: if it is from neither.
    """
    for base in type(module).__mro__:
        package = base.__module__.removesuffix(".core.module")
        if base.__name__ == "LightningModule" and package in (
            "lightning.pytorch",
            "pytorch_lightning",
        ):
            return sys.modules[package].Trainer
    raise TypeError(
        f"module must be a LightningModule, got {module!r:.100} of type {type(module).__name__}"
    )


def _joined(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.cat([each.flatten() for each in losses])
