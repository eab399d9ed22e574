"""``ALRCCallback``: clips, checkpoints and logs the losses of any LightningModule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_alrc._moments import arguments
from lightning_alrc._moments.distributed import let_go
from lightning_alrc._spikes.record import Spike
from lightning_alrc._spikes.recording import Recording, checked_recording
from lightning_alrc._telemetry.alerts import checked_alerts
from lightning_alrc._telemetry.rows import Telemetry
from lightning_alrc._telemetry.warning_signs import LearningRateDrop, checked_rates, learning_rates
from lightning_alrc._trainer.exchange import Exchange
from lightning_alrc._trainer.interception import intercept, release
from lightning_alrc._trainer.named_losses import RETURNED, NamedLosses
from lightning_alrc._trainer.namespaces import Callback, join_late_packages, rank_zero_warn
from lightning_alrc._trainer.nonfinite import Policy, Raising, Skipping, checked_policy

__all__ = ["ALRCCallback"]

BATCHES = 10
"""kept where ``save_batches`` is ``True``"""


class ALRCCallback(Callback):
    """Adaptive learning rate clipping of every training loss, for any LightningModule.

    >>> from pytorch_lightning import Trainer
    >>> trainer = Trainer(callbacks=[ALRCCallback()], logger=False, enable_checkpointing=False)

    The loss that ``training_step`` returns is clipped before it is differentiated: a tensor, or the
    ``"loss"`` of a dict; under manual optimization, each loss given to ``manual_backward``. It may
    be a tensor of any shape, one loss for each sample say: each element is clipped by itself, then
    they are averaged. A module with :class:`ALRCMixin` may clip losses by name instead.

    Moments and counts are saved in the Trainer's checkpoints, and logged through all its loggers
    whenever Lightning logs: ``alrc/loss``, ``alrc/loss_clipped``, ``alrc/scale`` and
    ``alrc/clipped_fraction`` are means over the losses since the last row; ``alrc/mu1``,
    ``alrc/stddev``, ``alrc/threshold``, ``alrc/clipped_total``, ``alrc/nonfinite_total`` and
    ``alrc/resets`` are as they stand. A named loss has ``alrc/<name>/loss`` and so on. No other
    step reads the device, but for every 1,000th where Lightning logs more seldom, and of several
    ranks the last of an epoch: the record of clips would grow without a bound, and a name that some
    ranks met late would be learned from by none. A further fit of a module goes on with its
    moments; one of another module, without a checkpoint, starts afresh.

    Args:
        num_stddev: as for :class:`ALRC`, and so are the next five.
        decay: see there.
        mu1_start: see there.
        mu2_start: see there.
        num_stddev_below: see there.
        mu2_decay: see there.
        nonfinite: what becomes of a step whose loss is NaN or infinite: ``"propagate"`` leaves the
            gradients as they come, ``"skip"`` leaves parameters, optimizers and schedulers as they
            are, ``"raise"`` raises a ``FloatingPointError``.
            :mod:`lightning_alrc._trainer.nonfinite` tells what each costs.
        losses: settings by loss name, where they differ from the above. If given, no other names
            are allowed.
        record: how many of each loss's worst clips are kept, with step, batch and sample, in
            :attr:`spikes` and in ``alrc_spikes.jsonl`` beside the checkpoints; 0 for none.
        reset_on_lr_drop: reset the moments, as :meth:`reset` does, when a learning rate falls
            within a step to this fraction of what it was, or lower, as 0.5: losses fall with it,
            and the threshold would be far above them for long. ``None`` never does. A rate that is
            a tensor on a device is not looked at.
        sample_ids: returns the ids of a batch's samples, a tensor or a sequence of numbers or
            strings, for that record. ``None`` takes the datamodule's ``sample_ids(batch)``, or else
            what a batch has under ``"id"`` or ``"ids"``.
        save_batches: keep the batches with the worst 10 spikes, or another number of them, that the
            record has of each rank, in ``alrc_batches`` beside the record, for
            :func:`~lightning_alrc.replay`. Reads the device after every step.
        alerts: send alerts through Weights & Biases, of each kind and loss at most one an hour: of
            losses that are not finite, of more than 20 % clipped, and of the first clip after 1,000
            steps without one. Other numbers as
            ``{"hours": 1, "clipped_fraction": 0.2, "calm": 1000}``.
        render: returns a spike's picture for the table of them in Weights & Biases, as
            ``lambda spike: dataset[spike.id][0]``: a tensor [channels, height, width] or an array
            [height, width, channels], of uint8 or of floats in [0, 1], or a PIL image.

    Raises:
        TypeError: if a setting is not a number, or ``losses`` is not a mapping of mappings, or
            ``record`` or ``save_batches`` is not an integer, ``alerts`` neither a bool nor a
            mapping, or ``sample_ids`` or ``render`` cannot be called.
        ValueError: if a setting is out of its range, or a name is no name, or ``nonfinite`` is no
            policy, ``record`` or ``save_batches`` is negative, batches are to be kept without a
            record, or ``reset_on_lr_drop`` is not in (0, 1).
    """

    losses: NamedLosses
    """Each loss's name and its :class:`ALRC`; the one training_step returns is named ``"loss"``.
    Names that were not declared are entered when first met."""

    def __init__(
        self,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        mu1_start: float | None = None,
        mu2_start: float | None = None,
        *,
        num_stddev_below: float | None = None,
        mu2_decay: float | None = None,
        nonfinite: Policy = "propagate",
        losses: dict[str, dict[str, float | None]] | None = None,
        reset_on_lr_drop: float | None = None,
        record: int = 100,
        sample_ids: Callable[[Any], Any] | None = None,
        save_batches: bool | int = False,
        alerts: bool | dict[str, float] = False,
        render: Callable[[Spike], Any] | None = None,
    ) -> None:
        join_late_packages()
        super().__init__()
        settings = {
            "num_stddev": num_stddev,
            "decay": decay,
            "mu1_start": mu1_start,
            "mu2_start": mu2_start,
            "num_stddev_below": num_stddev_below,
            "mu2_decay": mu2_decay,
        }
        self.is_of_a_module = False
        """whether a module with ALRCMixin brought it"""
        self.losses = NamedLosses(settings, losses)
        self.nonfinite = checked_policy(nonfinite)
        self._drop = None
        if reset_on_lr_drop is not None:
            self._drop = LearningRateDrop(arguments.fraction("reset_on_lr_drop", reset_on_lr_drop))
        size = arguments.count("record", record)
        arguments.check_is_callable("sample_ids", sample_ids)
        arguments.check_is_callable("render", render)
        batches = BATCHES if save_batches is True else save_batches
        batches = 0 if batches is False else arguments.count("save_batches", batches)
        if batches and not size:
            raise ValueError(
                f"save_batches must be False where record is 0, got {save_batches!r}: batches are "
                "kept of the spikes in the record"
            )
        self._recording = Recording(size, sample_ids, batches) if size else None
        all_settings = self.losses.settings | {
            "nonfinite": nonfinite,
            "reset_on_lr_drop": reset_on_lr_drop,
            "record": size,
            "save_batches": batches,
            "alerts": alerts,
        }
        self._telemetry = Telemetry(checked_alerts(alerts), render, all_settings)
        self._watches = self._compiled = self._told_of_record = False
        self._clipped_in_step = self._has_clipped = False
        self._exchange: Exchange | None = None
        self._skipping: Skipping | None = None
        self._raising: Raising | None = None
        self._fitted: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fitted": None}  # no pickle takes it, and a copy goes on

    def clip(self, loss: Tensor, name: str = RETURNED) -> Tensor:
        """Clip one loss by the moments of its name; :meth:`ALRCMixin.alrc` has the details."""
        alrc = self.losses.meet(name)
        if not alrc.applies_to(loss):
            return loss
        self._clipped_in_step = self._has_clipped = True
        if self._watches and alrc.watcher is None:
            self._watch(name)
        if self._raising is not None:
            self._raising.see(name, loss)
        if self._exchange is not None:
            return self._exchange.clip(name, loss)
        return alrc.clip_and_learn(loss)

    def _watch(self, name: str) -> None:
        if self._recording is not None:
            self.losses[name].watcher = partial(self._recording.record.see, name)

    def reset(self, name: str | None = None) -> None:
        """Start the moments afresh, after the losses have changed for good; counts go on.

        Every rank must call it. It is logged as ``alrc/resets``.

        Args:
            name: of the loss; ``None`` for all.

        Raises:
            KeyError: if no loss of that name has been met.
        """
        if name is not None and name not in self.losses:
            raise KeyError(f"name must be one of the losses {sorted(self.losses)}, got {name!r}")
        for each in list(self.losses) if name is None else [name]:
            if self._exchange is not None:
                self._exchange.forget(each)
            self.losses[each].restart()

    def begin_step(self) -> None:
        """Called before each training step."""
        self._clipped_in_step = False
        if self._compiled:  # to wait for other ranks would break the step's graph
            for alrc in self.losses.values():
                alrc.settle()
        if self._skipping is not None:
            self._skipping.begin_step()
        if self._recording is not None and self._recording.batches is not None:
            self._recording.batches.note_generators()

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        """Clip the loss of a step that did not clip any itself."""
        if self._clipped_in_step:
            return loss
        clipped = self.clip(loss, RETURNED)
        self._clipped_in_step = False  # a step may differentiate several
        return clipped

    def end_step(self, trainer: Any) -> None:
        """Called after each training step: what it taught is sent, and may be refused."""
        if self._exchange is not None:
            self._exchange.send(trainer.strategy.root_device)
        if self._raising is not None:
            self._raising.check(trainer)

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        """Call ``step(closure)``, or do not, by the policy for losses that are not finite."""
        if not trainer.lightning_module.automatic_optimization:
            self.end_step(trainer)  # here the losses come before the optimizer's step
            if getattr(closure, "__name__", "") != "do_nothing_closure":  # or in it
                closure = partial(self._ending_step, trainer, closure)
        if self._skipping is None:
            return step(closure)
        return self._skipping.step(trainer, optimizer, closure, step)

    def _ending_step(self, trainer: Any, closure: Callable[[], Any]) -> Any:
        result = closure()
        self.end_step(trainer)
        return result

    def holds_schedulers(self) -> bool:
        """Whether the last step was skipped."""
        return self._skipping is not None and self._skipping.skipped

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        count = sum(isinstance(callback, ALRCCallback) for callback in trainer.callbacks)
        if count > 1:
            raise ValueError(
                f"a Trainer takes one ALRCCallback, got {count}: keep one, and give it "
                "losses={name: settings} where losses need settings of their own"
            )
        if any(getattr(cb, "save_weights_only", False) for cb in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "ModelCheckpoint(save_weights_only=True) leaves callbacks out of its checkpoints: "
                "a run resumed from one starts its ALRC moments afresh"
            )
        if self._fitted is not None and self._fitted() is not pl_module:
            # Its losses may be far above a threshold that another's have left.
            self.losses.start_afresh()
            if self._drop is not None:
                self._drop.rates = []
        intercept(trainer, self, may_refuse=self.nonfinite != "propagate")

    @property
    def spikes(self) -> list[Spike]:
        """The worst clips of all losses, the worst first. Reads the device.

        Between logging boundaries a rank does not know those of the others.
        """
        if self._recording is None:
            return []
        self._recording.record.read()
        return self._recording.record.worst

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._fitted = weakref.ref(pl_module)
        self._has_clipped = self._told_of_record = False
        if self._recording is not None:
            self._recording.start(trainer)
            self._watches = True
            for name in self.losses:
                self._watch(name)
        self._compiled = getattr(pl_module, "_compiler_ctx", None) is not None
        self._telemetry.start(trainer, self.losses, _steps(trainer))
        if trainer.world_size > 1:
            self._exchange = Exchange(self.losses, prompt=self.nonfinite != "propagate")
        if self.nonfinite == "skip":
            self._skipping = Skipping(self.losses)
        if self.nonfinite == "raise":
            self._raising = Raising(self.losses)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._drop is not None and self._drop.happened(learning_rates(trainer.optimizers)):
            self.reset()
        if self._recording is not None:
            self._recording.begin_step(trainer, batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._recording is not None:
            self._recording.share(trainer, self.losses, at_end=True)
        for alrc in self.losses.values():
            alrc.settle()  # all ranks are here
        # At the step that Lightning logs its metrics of an epoch at.
        self._finish(trainer, self.spikes, max(_steps(trainer) - 1, 0))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._release(trainer)
        for alrc in self.losses.values():
            alrc.settle()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        spikes = [] if self._recording is None else self._recording.rescue()
        self._release(trainer)
        self._finish(trainer, spikes, _steps(trainer))

    def _finish(self, trainer: Any, spikes: list[Spike], last_step: int) -> None:
        path, step = self._record_path(), _steps(trainer)
        self._telemetry.finish(trainer, self.losses, spikes, path, last_step, step)

    def _release(self, trainer: Any) -> None:
        release(trainer)
        if self._exchange is not None:
            let_go()
        self._exchange = self._skipping = self._raising = None
        self._watches = False
        if self._recording is not None:
            self._recording.release()
        for alrc in self.losses.values():
            alrc.watcher = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recording is not None:
            self._recording.end_step(batch)
        if not trainer._logger_connector.should_update_logs:
            return
        if self._exchange is not None:
            self._exchange.catch_up(trainer.strategy.root_device)
        if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
            return
        if self._recording is not None:
            self._recording.share(trainer, self.losses)
        if trainer.loggers:
            self._telemetry.log(trainer, self.losses, self._record_path(), _steps(trainer))

    def _record_path(self) -> Path | None:
        return None if self._recording is None else self._recording.path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._exchange is not None:
            self._exchange.catch_up(trainer.strategy.root_device)
        self.losses.warn_of_unmet()
        if not (self._has_clipped or pl_module.automatic_optimization):
            rank_zero_warn(
                "ALRC has seen no loss in this epoch: under manual optimization it clips what is "
                "given to self.manual_backward(loss), or by name to self.alrc(loss, name) of "
                "ALRCMixin; loss.backward() passes it by"
            )
            self._has_clipped = True  # told once
        if self._compiled and self._recording is not None and not self._told_of_record:
            clipped = any(alrc.clipped_total for alrc in self.losses.values())
            if clipped and not self._recording.record.has_seen:
                self._told_of_record = True
                rank_zero_warn(
                    "no spike is recorded of losses that are clipped inside a compiled "
                    "training_step: return them, or compile what it calls"
                )

    @property
    def state_key(self) -> str:
        return "ALRCCallback"

    def state_dict(self) -> dict[str, Any]:
        """Settings, moments and counts of each loss, and the record, as plain numbers and strings.

        The record lacks what other ranks have clipped since Lightning last logged.
        """
        recorded = None if self._recording is None else self._recording.state_dict()
        rates = None if self._drop is None else list(self._drop.rates)
        return self.losses.state_dict() | {"recording": recorded, "learning_rates": rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, with the settings of this callback.

        Warns where the checkpoint's settings or names differ, and says what happens.

        Raises:
            ValueError: if the state is not what :meth:`state_dict` returns; nothing is changed
                then.
        """
        others = state_dict if isinstance(state_dict, Mapping) else {}
        recorded, rates = others.get("recording"), others.get("learning_rates")
        if recorded is not None:
            recorded = checked_recording(recorded)
        if rates is not None:
            rates = checked_rates(rates)
        self.losses.load_state_dict(state_dict)
        self._fitted = None
        if rates is not None and self._drop is not None:
            self._drop.rates = rates
        if recorded is not None and self._recording is not None:
            self._recording.load(*recorded)


def _steps(trainer: Any) -> int:
    """Optimizer steps so far, as loggers count them."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps
