"""``ALRCCallback``: clips, checkpoints and logs the losses of any LightningModule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments import arguments
from lightning_alrc._spikes.ledger import Ledger
from lightning_alrc._spikes.record import Spike
from lightning_alrc._spikes.recording import Recording, checked_recording
from lightning_alrc._telemetry.alerts import checked_alerts
from lightning_alrc._telemetry.telemetry import Telemetry, checked_last_row_step
from lightning_alrc._trainer.exchange import has_other_ranks
from lightning_alrc._trainer.guard import LossGuard
from lightning_alrc._trainer.interception import guard_of_step
from lightning_alrc._trainer.learning_rates import LearningRateDrop, checked_rates, learning_rates
from lightning_alrc._trainer.lightning import (
    accumulates,
    batch_has_ended,
    callbacks_being_checked,
    is_running,
    is_searching,
    logs_now,
    plateau_scheduler_reads,
    steps,
)
from lightning_alrc._trainer.named_losses import RETURNED, NamedLosses
from lightning_alrc._trainer.namespaces import Callback, join_late_packages, rank_zero_warn
from lightning_alrc._trainer.nonfinite import OnSpike, Policy, checked_on_spike, checked_policy
from lightning_alrc._trainer.weights import fingerprint, have_changed

__all__ = ["ALRCCallback"]

BATCHES = 10
"""Number of batches that ``save_batches=True`` keeps."""


class ALRCCallback(Callback):
    """Adaptive learning rate clipping of every training loss, for any LightningModule.

    >>> from pytorch_lightning import Trainer
    >>> trainer = Trainer(callbacks=[ALRCCallback()], logger=False, enable_checkpointing=False)

    **Which losses.** The loss that ``training_step`` returns, as a tensor or as the ``"loss"`` of a
    dict, is clipped before the backward pass. Under manual optimization, each loss given to
    ``manual_backward`` is clipped. A loss may be a tensor of any shape, such as one loss for each
    sample. Then each element is clipped separately, and the mean of the clipped elements is
    differentiated. A module with :class:`ALRCMixin` may clip losses by name instead. Losses of
    validation and test steps are not clipped.

    **Checkpoints and logs.** Moments and counts are saved in the Trainer's checkpoints. Whenever
    Lightning logs, a *row* of values is logged to all of the Trainer's loggers. ``alrc/loss``,
    ``alrc/loss_clipped``, ``alrc/scale`` and ``alrc/clipped_fraction`` are means over the losses
    since the last row. ``alrc/mu1``, ``alrc/stddev``, ``alrc/threshold``, ``alrc/clipped_total``,
    ``alrc/nonfinite_total`` and ``alrc/resets`` are the values at the logged step.
    Of the losses of the last 1,000 steps, ``alrc/spike_score`` is the share that was more than 6
    standard deviations above the running mean. ``alrc/spike_score_total`` is this share of the
    losses of all steps. A named loss has ``alrc/<name>/loss`` and so on. The last row is also in
    ``trainer.callback_metrics``, with or without a logger, for callbacks that monitor a metric.
    When a validation starts or an epoch ends, callbacks may read metrics. So may a
    ``ReduceLROnPlateau`` with interval ``"step"``. If no row was logged since the last such read,
    ``trainer.callback_metrics`` gets a row that is not logged: that of the losses since the last
    logged row.

    **Cost.** The device is read in the steps in which Lightning logs, at the end of each epoch, and
    before a ``ReduceLROnPlateau`` with interval ``"step"`` reads a metric of ALRC. It is also read
    after 1,000 calls of one loss in which Lightning did not log; usually a step has one call. It is
    also read at the start of a validation, unless a row was logged since the previous validation or
    the previous epoch's end.

    **Further fits.** A further fit of the same module continues with the moments if the weights
    have not changed since the end of the last fit. Otherwise the moments restart. For another
    module they always restart. A new record and ledger begin for another module, and for another
    Trainer that does not resume a checkpoint.

    Args:
        num_stddev: number of standard deviations above the running mean at which a loss is clipped;
            positive, 3 by default. 2 protects more. ``math.inf`` clips nothing and only logs.
        decay: decay of the running moments, in [0, 1), 0.999 by default, which averages over about
            1,000 steps.
        mu1_start: start of the running mean of the losses, for example 25.0. ``None``, the default,
            finds both starts from the first 10 losses, which are not clipped.
        mu2_start: start of the running mean of the squared losses, above ``mu1_start**2``, for
            example 900.0. Give both starts or neither.
        num_stddev_below: number of standard deviations below the mean at which losses are clipped
            as well, for example 3. ``None``, the default, for no lower bound.
        mu2_decay: decay of the second moment, in [0, 1), for example 0.9999. ``None``, the default,
            uses ``decay``.
        nonfinite: what happens to a step whose loss is NaN or infinite. ``"propagate"``, the
            default, does not change the step. ``"skip"`` leaves parameters, optimizers, BatchNorm's
            statistics, and schedulers with interval ``"step"`` as they were. ``"raise"`` raises a
            ``FloatingPointError`` before the optimizer steps, and leaves all of these as they were,
            too. Under manual optimization, steps that optimizers took before the loss was computed
            stay, and ``"skip"`` skips all later steps of the batch. ``"skip"`` and ``"raise"``
            apply to the optimizers that ``configure_optimizers`` returns. ``"raise"`` reads the
            device in every step, and so does ``"skip"`` with an optimizer that is not fused. With a
            fused optimizer, ``"skip"`` reads the device only if something else, like a scheduler,
            must know of the skip.
        on_spike: what happens to a step whose loss spikes. ``"clip"``, the default, clips the loss
            and takes the step. ``"skip"`` skips the step on every rank as ``nonfinite="skip"``
            does, at the same cost. It also skips steps whose loss is not finite, unless
            ``nonfinite="raise"``. The loss of a whole batch spikes if it is clipped. Losses of
            samples spike if more than half of them are clipped. For losses of samples ``"clip"`` is
            enough: it scales down the outlier and leaves the other samples as they are. The moments
            always learn from the clipped loss. Use ``"skip"`` with ``num_stddev=6`` or so:
            ``num_stddev=3`` skips up to 4 % of ordinary steps, and ``num_stddev=1`` up to 38 %.
        losses: settings by loss name, if some differ from the settings above, for example
            ``{"generator": {"num_stddev": 2}, "discriminator": {}}``. A loss of any other name is
            an error then. ``None``, the default, allows all names.
        reset_on_lr_drop: reset the moments when, in one step, a learning rate drops to this
            fraction of its value or less, for example 0.5. Losses often fall with the learning
            rate. The threshold would then stay far above the losses for long. ``None``, the
            default, never resets. Learning rates that are tensors on a device are not checked.
        record: how many of each loss's worst clips are kept in :attr:`spikes`, in checkpoints and
            in the file ``alrc_spikes.jsonl``, with step, batch and sample; 100 by default, 0 for
            none.
        sample_ids: a function from a batch to the ids of its samples, for the record, for example
            ``lambda batch: batch["path"]``. The ids are a tensor, or a list of numbers or strings.
            ``None``, the default, uses the datamodule's ``sample_ids(batch)``, or else the batch's
            ``"id"`` or ``"ids"``.
        save_batches: how many batches with the worst spikes are kept on each rank, for
            :func:`~lightning_alrc.replay`, for example 20. ``True`` for 10; ``False``, the default,
            for none. Reads the device in every step.
        ledger: whether the history of every sample is kept, by the ids of ``sample_ids``: how often
            it was seen and how often clipped, the mean, variance, last and largest of its losses,
            and how many standard deviations above the running mean these losses were. The history
            is kept in checkpoints and in the file ``alrc_ledger.parquet`` or ``.csv`` beside the
            record. :func:`~lightning_alrc.read_ledger` reads this file. Ids in a tensor must be
            whole numbers below the length of the dataset. Give a number, for example 50_000, for
            another limit of the ids. ``False``, the default, keeps no history.
        alerts: whether alerts are sent by Weights & Biases; ``False`` by default. For each loss,
            each kind of alert is sent at most once an hour. The kinds: losses that are not finite,
            many losses clipped, the first clip after 1,000 steps without one, a second alert if
            that clip is large and comes from the data, divergences. A mapping changes the numbers,
            for example ``{"hours": 1, "clipped_fraction": 0.2, "calm": 1000}``. By default the
            clipped fraction is 0.2, and higher if ``num_stddev`` is below 2. The level is ERROR for
            losses that are not finite and for divergences, WARN for many losses clipped, and INFO
            for spikes.
        render: a function from a spike to its picture for the table in Weights & Biases, for
            example ``lambda spike: dataset[spike.id][0]``. The picture is a PIL image, or a tensor
            [channels, height, width] or array [height, width, channels], of uint8 or of floats in
            [0, 1]. The function is called for each table, while the training goes on and at its
            end. ``None``, the default, for no pictures.
        charts: whether figures of the losses are drawn for the dashboards of the loggers. ``True``,
            the default, draws them after 5, 10, 20 minutes and so on, and at the end. A fit of less
            than a minute draws none. To draw the figure of one loss takes half a second or so.
            ``False`` draws none.

    Raises:
        TypeError: if a setting is not a number, ``losses`` is not a mapping of mappings,
            ``record``, ``save_batches`` or ``ledger`` is not an integer, ``alerts`` is neither a
            bool nor a mapping, ``charts`` is not a bool, or ``sample_ids`` or
            ``render`` cannot be called.
        ValueError: if a setting is out of its range, a loss's name is not valid, ``nonfinite`` or
            ``on_spike`` is not one of its values, ``record``, ``save_batches`` or ``ledger`` is
            negative, batches or a ledger are kept without a record, or ``reset_on_lr_drop`` is not
            between 0 and 1. A Trainer that is given two of these callbacks raises this error,
            too.
        RuntimeError: if a fit with this callback starts while a fit of another Trainer with this
            callback is running.
    """

    losses: NamedLosses
    """Maps each loss's name to its :class:`ALRC`. The loss that ``training_step`` returns is named
    ``"loss"``. If no names were declared, a name is added when it is first met."""

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
        on_spike: OnSpike = "clip",
        losses: Mapping[str, Mapping[str, float | None]] | None = None,
        reset_on_lr_drop: float | None = None,
        record: int = 100,
        sample_ids: Callable[[Any], Any] | None = None,
        save_batches: bool | int = False,
        ledger: bool | int = False,
        alerts: bool | Mapping[str, float] = False,
        render: Callable[[Spike], Any] | None = None,
        charts: bool = True,
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
        """whether a module with ALRCMixin made this callback"""
        self.is_of_environment = False
        """whether the environment variable made this callback; see :meth:`_is_superseded_in`"""
        self.losses = NamedLosses(settings, losses)
        self.nonfinite = checked_policy(nonfinite)
        self.on_spike = checked_on_spike(on_spike)
        self._drop = None
        if reset_on_lr_drop is not None:
            self._drop = LearningRateDrop(arguments.fraction("reset_on_lr_drop", reset_on_lr_drop))
        size = arguments.count("record", record)
        arguments.check_is_callable("sample_ids", sample_ids)
        arguments.check_is_callable("render", render)
        batches = arguments.flag_or_count("save_batches", save_batches)
        batches = BATCHES if batches is True else int(batches)
        if batches and not size:
            raise ValueError(
                f"save_batches must be False where record is 0, got {save_batches!r}: batches are "
                "kept of the spikes in the record"
            )
        samples = arguments.flag_or_count("ledger", ledger)
        if samples and not size:
            raise ValueError(
                f"ledger must be False where record is 0, got {ledger!r}: it is kept beside the "
                "record"
            )
        kept = Ledger(None if samples is True else int(samples)) if samples else None
        self._recording = Recording(size, sample_ids, batches, kept) if size else None
        all_settings = self.losses.settings | {
            "nonfinite": nonfinite,
            "on_spike": on_spike,
            "reset_on_lr_drop": reset_on_lr_drop,
            "record": size,
            "save_batches": batches,
            "ledger": samples,
            "alerts": dict(alerts) if isinstance(alerts, Mapping) else alerts,
            "charts": arguments.flag("charts", charts),
        }
        self._telemetry = Telemetry(checked_alerts(alerts), render, charts, all_settings)
        self._guard = LossGuard(self.losses, self.nonfinite, self.on_spike)
        self._warned_of_record = False
        self._clipped_before = 0
        self._trainer: weakref.ref[Any] | None = None
        """the Trainer of the last setup"""
        self._stage: str | None = None
        self._last_module: weakref.ref[Any] | None = None
        """the module of the last fit"""
        self._fingerprint: Tensor | None = None
        """fingerprint of the module at the end of the last fit"""
        self._was_loaded = False
        """whether a state was loaded in this fit"""

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled. A copy takes no part in a running fit.
        state = self.__dict__ | {"_last_module": None, "_trainer": None, "_stage": None}
        # In each run, Lightning sets these methods of the module, which hold the module.
        return {key: value for key, value in state.items() if key not in ("log", "log_dict")}

    def clip(self, loss: Tensor, name: str = RETURNED) -> Tensor:
        """Clip one loss by the moments of its name. See :meth:`ALRCMixin.alrc`.

        While a Trainer runs, a loss outside of its training steps is returned as it is.
        """
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None and is_running(trainer) and guard_of_step() is not self._guard:
            return loss
        return self._guard.clip(loss, name)

    def reset(self, name: str | None = None) -> None:
        """Restart the moments. Call this when the losses have changed for good. Counts continue.

        Every rank must call this method. ``alrc/resets`` counts the resets.

        Args:
            name: the name of the loss. ``None``, the default, for all losses.

        Raises:
            KeyError: if there is no loss of that name.
        """
        if name is not None and name not in self.losses:
            raise KeyError(f"name must be one of the losses {sorted(self.losses)}, got {name!r}")
        for each in list(self.losses) if name is None else [name]:
            self._guard.reset(each)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._is_superseded_in(trainer.callbacks) or self._is_of_another(pl_module):
            # A new list: Lightning is iterating over the old one.
            trainer.callbacks = [each for each in trainer.callbacks if each is not self]
            return
        if stage == "fit" and self._outer_fit(trainer) is not None:
            raise RuntimeError(
                "this ALRCCallback clips the losses of a fit of another Trainer, which has not "
                "ended: give each Trainer an ALRCCallback of its own"
            )
        self._stage, self._trainer = stage, weakref.ref(trainer)
        if stage != "fit":
            return
        _check_is_one(trainer.callbacks)
        if any(getattr(cb, "save_weights_only", False) for cb in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "ModelCheckpoint(save_weights_only=True) leaves callbacks out of its checkpoints: "
                "a run resumed from one starts its ALRC moments afresh"
            )
        self._was_loaded = False
        if self._last_module is not None and self._last_module() is not pl_module:
            self._forget()  # this module's losses may be far above the old threshold
        self._guard.intercept(trainer)

    def _is_superseded_in(self, callbacks: Sequence[Any]) -> bool:
        """Whether another callback clips instead of this callback."""
        all_of_them = [each for each in callbacks if isinstance(each, ALRCCallback)]
        # If the user gives one list of callbacks to several Trainers, each Trainer appends its own
        # callback of the environment variable to this list. The first of these callbacks stays.
        all_of_them.sort(key=lambda each: each.is_of_environment)
        return self.is_of_environment and all_of_them[0] is not self

    def _is_of_another(self, pl_module: Any) -> bool:
        """Whether this callback is left from a run of another module, with ALRCMixin, that made it.

        It is then not the user's choice for the given module, of which the other is no part.
        """
        return self.is_of_a_module and all(
            getattr(part, "_alrc_callback", None) is not self for part in pl_module.modules()
        )

    def _forget(self) -> None:
        """Restart the moments and counts of all losses, and begin another record and ledger."""
        self.losses.forget()
        if self._recording is not None:
            self._recording.forget()
        self._fingerprint = None
        if self._drop is not None:
            self._drop.rates = []

    @property
    def spikes(self) -> list[Spike]:
        """The worst clips of all losses, the worst first. Reads the device.

        The clips of other ranks are known only after Lightning has logged.
        """
        if self._recording is None:
            return []
        self._recording.record.read()
        return self._recording.record.worst

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._guard.trainer is not trainer:  # this callback joined the Trainer after setup()
            was_loaded = self._was_loaded
            self.setup(trainer, pl_module, "fit")
            self._was_loaded = was_loaded
        self._last_module = weakref.ref(pl_module)
        self._restart_if_weights_differ(trainer, pl_module)
        self._warned_of_record = False
        self._clipped_before = sum(int(alrc.clipped_total) for alrc in self.losses.values())
        record = before_step = on_call = None
        if self._recording is not None:
            self._recording.start(trainer)
            record, before_step = self._recording.record, self._recording.note_start
            if self._recording.ledger is not None:
                on_call = self._recording.observe_all
        known = [] if self._recording is None else self._recording.record.worst
        self._telemetry.start(trainer, self.losses, steps(trainer), known, self._was_loaded)
        self._guard.start(trainer, record, before_step, on_call)

    def _restart_if_weights_differ(self, trainer: Any, pl_module: Any) -> None:
        """Restart the moments if they do not belong to the weights that are trained now."""
        is_resumed = trainer.ckpt_path is not None and not is_searching(trainer)
        if is_resumed and not self._was_loaded:
            self._forget()  # the checkpoint is of a training without ALRC
        if have_changed(self._fingerprint, pl_module, trainer.strategy):
            rank_zero_warn(
                "ALRC's moments start afresh: the module's weights are not those at the end of its "
                "last fit"
            )
            self.reset()
        self._fingerprint = None

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
            self._recording.share_ledger()
        for alrc in self.losses.values():
            alrc.flush()  # every rank gets here, so the all-reduce finishes
        self._finish(trainer, self.spikes)

    def _outer_fit(self, trainer: Any) -> Any:
        """The other Trainer whose fit has this callback and is running, if any.

        The given Trainer then runs in a hook of this fit, for example to test the module.
        """
        outer = self._guard.trainer
        return outer if outer is not None and outer is not trainer and is_running(outer) else None

    def _returns_to_outer_fit(self, trainer: Any) -> bool:
        """If a run of this Trainer ends within a fit of another Trainer, go on with that fit.

        Returns:
            Whether there is such a fit.
        """
        outer = self._outer_fit(trainer)
        if outer is not None:
            self._stage, self._trainer = "fit", weakref.ref(outer)
        return outer is not None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._returns_to_outer_fit(trainer):
            return
        if stage == "fit":  # here, because weight averaging replaces the weights in on_train_end
            self._take_fingerprint(pl_module)
        self._stop()
        self._stage = None
        for alrc in self.losses.values():
            alrc.flush()

    def _take_fingerprint(self, pl_module: Any) -> None:
        # If this fit has trained nothing, the fingerprint of the last fit is still there. The
        # weights may have changed since.
        if self._fingerprint is None:
            with suppress(RuntimeError):  # the device may have no memory left, or be lost
                self._fingerprint = fingerprint(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._returns_to_outer_fit(trainer):
            return
        if self._stage == "fit":
            self._take_fingerprint(pl_module)
        spikes = []
        if self._recording is not None:
            spikes = self._recording.rescue(self._is_in_batch(trainer))
        self._stop()
        self._finish(trainer, spikes)
        # A fit keeps its stage, because its checkpoint may still be saved.
        if self._stage != "fit":
            self._stage = None

    def _stop(self) -> None:
        self._guard.stop()
        if self._recording is not None:
            self._recording.release()

    def _finish(self, trainer: Any, spikes: list[Spike]) -> None:
        files = dict if self._recording is None else self._recording.files
        last_step = self._guard.last_step
        self._telemetry.finish(trainer, self.losses, spikes, files, last_step, steps(trainer))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._guard.end_batch()
        if self._recording is not None:
            self._recording.end_step(batch)
        is_read = plateau_scheduler_reads(trainer, "alrc/")
        if not (is_read or logs_now(trainer)):
            return
        self._guard.agree_and_send_late_names(trainer)
        if self._row_is_due(trainer):
            self._log_row(trainer)
        if is_read:  # Lightning updates the scheduler after this hook
            self._telemetry.publish_early(trainer, self.losses)

    def _log_row(self, trainer: Any) -> None:
        spikes = []
        if self._recording is not None:
            self._recording.share(trainer, self.losses)
            spikes = self._recording.record.worst
        self._telemetry.log(trainer, self.losses, steps(trainer), spikes)

    def _is_in_batch(self, trainer: Any) -> bool:
        """Whether a run that is resumed from here would train on the current batch again."""
        return self._guard.batch_is_open and not batch_has_ended(trainer)

    def _row_is_due(self, trainer: Any) -> bool:
        is_partial = trainer.lightning_module.automatic_optimization and accumulates(trainer)
        return logs_now(trainer) and not is_partial

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._stage == "fit" and not trainer.sanity_checking:
            self._telemetry.publish_early(trainer, self.losses)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._guard.agree_and_send_late_names(trainer)
        self._telemetry.publish_early(trainer, self.losses)
        if self._recording is not None:
            self._recording.share_ledger()
        if self._guard.steps == 0:  # resumed at the end of an epoch
            return
        self.losses.warn_of_unused()
        if self._guard.must_warn_of_no_loss and not pl_module.automatic_optimization:
            rank_zero_warn(
                "ALRC has seen no loss in this epoch: under manual optimization it clips what is "
                "given to self.manual_backward(loss), or by name to self.alrc(loss, name) of "
                "ALRCMixin; loss.backward() passes by ALRC"
            )
            self._guard.warned_of_no_loss = True
        # With several ranks the counts include the clips of all ranks, but the record has only this
        # rank's clips. So the counts and the record are compared only if there is one rank.
        is_alone = not has_other_ranks(trainer)
        if self._recording is not None and not self._warned_of_record and is_alone:
            clipped = sum(int(alrc.clipped_total) for alrc in self.losses.values())
            if clipped > self._clipped_before and not self._recording.record.has_seen:
                self._warned_of_record = True
                rank_zero_warn(
                    "ALRC: no spike is recorded of losses that are clipped inside a compiled "
                    "training_step. Return the losses from training_step, or compile the "
                    "functions that it calls instead"
                )

    @property
    def state_key(self) -> str:
        # Lightning raises an error if two callbacks have the same key. Our own check raises a
        # clearer error first. This check finds the callbacks through the call stack. A compiled
        # step reads the key, too, and has no call stack to look at.
        given = None if torch.compiler.is_compiling() else callbacks_being_checked()
        if given is not None:
            _check_is_one(given)
            if self._is_superseded_in(given):
                return f"ALRCCallback of the environment, {id(self)}"
        return "ALRCCallback"

    def state_dict(self) -> dict[str, Any]:
        """Settings, moments and counts of each loss, and the record, as plain numbers and strings.

        The current batch is left out if a resumed run would repeat it. The record lacks the clips
        of other ranks since Lightning last logged. After an exception, no rank waits for another.
        """
        trainer = None if self._trainer is None else self._trainer()
        in_batch = is_due = was_interrupted = False
        if trainer is not None and self._stage == "fit":
            was_interrupted = trainer.interrupted
            in_batch = self._is_in_batch(trainer)
            # Another callback may save a checkpoint in a step that logs, before this callback logs.
            # The row of this step then counts as logged.
            is_due = self._guard.batch_is_open and not in_batch and self._row_is_due(trainer)
            is_due = is_due and self._telemetry.may_take_row(steps(trainer))
        logs_row = was_interrupted or is_due
        state = self.losses.state_dict(in_batch, logs_row, waits=not was_interrupted)
        state["last_row"] = steps(trainer) if is_due else self._telemetry.last_row_step
        with suppress(RuntimeError) if was_interrupted else nullcontext():
            state["recording"] = None
            if self._recording is not None:
                state["recording"] = self._recording.state_dict(in_batch, was_interrupted)
        state["learning_rates"] = None if self._drop is None else list(self._drop.rates)
        return state

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put late names and all ranks' judges and samples into the checkpoint.

        All ranks call this.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        is_shared = self._stage == "fit" and has_other_ranks(trainer) and not trainer.interrupted
        if not (is_shared and isinstance(state, dict)):
            return
        # In the middle of a batch, the sums not yet sent include this batch, which a resumed run
        # repeats. So late names are left out then.
        if not self._is_in_batch(trainer) and self._guard.agree_and_send_late_names(trainer):
            state |= self.state_dict()
        if self._recording is not None:
            state["recording"] |= self._recording.shared_state(state["recording"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, with the settings of this callback.

        Warns if the checkpoint's settings or names differ, and says what happens.

        Raises:
            ValueError: if the state is not valid. Nothing is changed then.
        """
        if self._stage not in (None, "fit"):
            return  # testing a checkpoint does not change the moments
        entries = state_dict if isinstance(state_dict, Mapping) else {}
        recorded, rates = entries.get("recording"), entries.get("learning_rates")
        last_row = checked_last_row_step(entries.get("last_row"))
        if recorded is not None:
            recorded = checked_recording(recorded)
        if rates is not None:
            rates = checked_rates(rates)
        self.losses.load_state_dict(state_dict)
        self._guard.restart()
        self._telemetry.last_row_step = last_row
        trainer = None if self._trainer is None else self._trainer()
        if self._stage is None or trainer is None or not is_searching(trainer):
            self._last_module = self._fingerprint = None
            self._was_loaded = True
        if rates is not None and self._drop is not None:
            self._drop.rates = rates
        if recorded is not None and self._recording is not None:
            rank = 0 if trainer is None else trainer.global_rank
            self._recording.load(rank, *recorded)


def _check_is_one(callbacks: Sequence[Any]) -> None:
    ours = [callback for callback in callbacks if isinstance(callback, ALRCCallback)]
    count = sum(not callback.is_of_environment for callback in ours)
    if count > 1:
        raise ValueError(
            f"a Trainer takes one ALRCCallback, got {count}: keep one, and give it "
            "losses={name: settings} where losses need settings of their own"
        )
