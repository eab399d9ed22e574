"""``LossGuard``: clips the losses of a fit, and refuses optimizer steps if a policy says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Size, Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_alrc._moments import distributed
from lightning_alrc._moments.state import Moments
from lightning_alrc._moments.sums import Sums
from lightning_alrc._trainer.exchange import Exchange, has_other_ranks
from lightning_alrc._trainer.interception import Interception, StepShadows, guard_of_step
from lightning_alrc._trainer.lightning import is_compiled, is_empty, steps
from lightning_alrc._trainer.named_losses import RETURNED, NamedLosses
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc._trainer.nonfinite import OnSpike, Policy, Raising, Skipping
from lightning_alrc._trainer.unseen import UnseenLosses

__all__ = ["LossGuard", "Record"]

OnCall = Callable[[str, Tensor, Tensor, Moments], None]


class Record(Protocol):
    """Is notified of the losses of a fit."""

    def observe(self, name: str, seen: Tensor) -> None:
        """A call of ALRC may have clipped losses. ``seen`` is what :attr:`ALRC.on_clip` gets."""

    def note_shape(self, name: str, shape: Size) -> None:
        """The next loss of this name has this shape."""

    def note_sums(self, name: str, sums: Sums) -> None:
        """A call of ALRC had these sums."""

    def note_norm(self, optimizer: Any, norm: Tensor) -> None:
        """The gradients of an optimizer had this norm."""


class LossGuard:
    """Clips the losses of training steps, and refuses optimizer steps if a policy says so.

    Args:
        losses: each loss's ALRC, by name; grows as names are met.
        policy: what happens to a step whose loss is NaN or infinite.
        on_spike: what happens to a step whose loss spikes.
    """

    def __init__(self, losses: NamedLosses, policy: Policy, on_spike: OnSpike = "clip") -> None:
        self.losses = losses
        self._policy, self._on_spike = policy, on_spike
        self.skips_spikes = on_spike == "skip"
        self.raises = policy == "raise"
        self.skips = policy == "skip" or self.skips_spikes
        self.may_refuse = self.raises or self.skips
        self.record: Record | None = None
        self._on_call: OnCall | None = None
        self._before_training_step: Callable[[], None] | None = None
        self.batch_is_open = False
        """whether a training step of the current batch has begun and the batch has not ended"""
        self._batch = -1
        """the Trainer's number of the last batch that had a training step"""
        self.last_step = 0
        """the step of the last losses, as loggers count"""
        self.has_seen_loss = False
        """whether any loss of the fit was compared with its threshold"""
        self.warned_of_no_loss = False
        """whether a warning said that no loss of the fit was compared with its threshold"""
        self.steps = 0
        """number of training steps of the fit"""
        self._has_named_losses = self._has_unnamed_loss = False
        self._in_optimizer = False
        self._compiled = self._warns_of_opacus = False
        self._interception: Interception | None = None
        self._shadows: StepShadows | None = None
        self._hook: RemovableHandle | None = None
        self._warned_of_unknown = False
        self._exchange: Exchange | None = None
        self._skipping: Skipping | None = None
        self._raising: Raising | None = None
        self._unseen: UnseenLosses | None = None

    # ---- from setup to the end of a fit

    def intercept(self, trainer: Any) -> None:
        """Pass the losses of a Trainer through this guard until :meth:`stop`."""
        self._uninstall()
        self._interception = Interception(trainer, self, self.may_refuse, notes_norms=True)
        self._interception.install()
        # A search for a learning rate or a batch size runs steps without start(). Each loss would
        # start an all-reduce of its own, but a rank may have a loss that the other ranks do not
        # have, or may search alone. The search restores the moments, so no rank needs the sums.
        self.losses.share(False)

    @property
    def trainer(self) -> Any:
        """The Trainer whose losses pass through this guard, if any."""
        return None if self._interception is None else self._interception.trainer

    def start(
        self,
        trainer: Any,
        record: Record | None,
        before_step: Callable[[], None] | None = None,
        on_call: OnCall | None = None,
    ) -> None:
        """Start a fit whose optimizers are set up. Every rank must call it.

        Args:
            trainer: the Trainer of the fit.
            record: notified of the losses; ``None`` for no record.
            before_step: called right before each training step.
            on_call: called with the name of the loss, and the arguments of :attr:`ALRC.on_call`.
        """
        self.record, self._before_training_step, self._on_call = record, before_step, on_call
        self.losses.share(trainer.world_size > 1)
        for name in self.losses:
            self._set_hooks(name)
        self.has_seen_loss = self.warned_of_no_loss = False
        self.steps, self.last_step = 0, max(steps(trainer) - 1, 0)
        self._compiled = is_compiled(trainer.lightning_module)
        self._warns_of_opacus = any(is_of_opacus(optimizer) for optimizer in trainer.optimizers)
        if trainer.world_size > 1 and not has_other_ranks(trainer):
            rank_zero_warn(
                "ALRC keeps moments of its own in each process: this strategy does not use "
                "torch.distributed"
            )
        self._begin(trainer)
        if self.may_refuse:
            self._shadows = StepShadows(trainer.optimizers, partial(self.step_optimizer, trainer))
            self._shadows.install()
            self._hook = register_optimizer_step_pre_hook(
                partial(self._before_optimizer_step, trainer)
            )
        self._unseen = UnseenLosses(trainer, self._is_in_backward)

    def _begin(self, trainer: Any) -> None:
        """Begin with no knowledge of earlier steps, except for the moments."""
        if has_other_ranks(trainer):
            self._exchange = Exchange(self.losses, agrees_each_step=self.may_refuse)
        if self.skips:
            note_norm = None if self.record is None else self.note_gradient_norm
            self._skipping = Skipping(self.losses, trainer, note_norm)
        if self.raises:
            self._raising = Raising(self.losses, trainer.lightning_module)
        self.batch_is_open = False

    def restart(self) -> None:
        """Forget the earlier steps of the fit, because a state was loaded during the fit.

        A search for a learning rate or a batch size that runs in a callback's hook loads the state
        from before its steps. Every rank must call this.
        """
        if self._unseen is not None:  # a fit is running
            self._begin(self.trainer)

    def stop(self) -> None:
        """The fit has ended, normally or by an exception."""
        self._uninstall()
        if self._exchange is not None:
            distributed.wait_for_gloo()
        if self._unseen is not None:
            self._unseen.stop()
        self._exchange = self._skipping = self._raising = self._unseen = None
        self.record = self._before_training_step = self._on_call = None
        for alrc in self.losses.values():
            alrc.on_clip = alrc.on_sums = alrc.on_call = None
            alrc.spiked_calls_offend = False

    @property
    def must_warn_of_no_loss(self) -> bool:
        """Whether this guard got no loss in this fit, and no warning said so."""
        warned_of_backward = self._unseen is not None and self._unseen.warned_of_backward
        return not (self.has_seen_loss or self.warned_of_no_loss or warned_of_backward)

    def _uninstall(self) -> None:
        if self._interception is not None:
            self._interception.remove()
        if self._shadows is not None:
            self._shadows.remove()
        if self._hook is not None:
            self._hook.remove()
        self._interception = self._shadows = self._hook = None

    def _is_in_backward(self) -> bool:
        """Whether Lightning differentiates a loss right now."""
        return self._interception is not None and self._interception.is_in_backward

    # ---- the losses of a step

    def begin_step(self) -> None:
        """A training step is about to run."""
        self._has_named_losses = self._has_unnamed_loss = False
        self.steps += 1
        # A search for a learning rate or a batch size within a fit has batches that do not end: it
        # takes the callbacks out of the Trainer, so there is no on_train_batch_end.
        batch, trainer = self._batch, self.trainer
        if trainer is not None:
            batch, self.last_step = trainer.fit_loop.total_batch_idx, steps(trainer)
        is_new_batch = not self.batch_is_open or batch != self._batch
        self.batch_is_open, self._batch = True, batch
        if is_new_batch:
            for alrc in self.losses.values():
                alrc.take_snapshot()
        if self._compiled:  # waiting inside the compiled step would break its graph
            for alrc in self.losses.values():
                alrc.flush()
        # A closure may run several training steps of a batch, for example with LBFGS. A refused
        # optimizer step undoes all of them, so only the first of them begins the batch.
        if is_new_batch and self._skipping is not None:
            self._skipping.begin_batch()
        if is_new_batch and self._raising is not None:
            self._raising.begin_batch()
        if self._unseen is not None:
            self._unseen.begin_step()
        if self._before_training_step is not None:
            self._before_training_step()

    def clip(self, loss: Tensor, name: str = RETURNED) -> Tensor:
        """Clip a loss by the moments of its name.

        Under ``torch.no_grad()`` the loss itself is returned. Otherwise the result shares no memory
        with the loss.
        """
        clipped = self._clip(loss, name)
        if not torch.is_grad_enabled():
            return clipped
        if self._unseen is not None:
            self._unseen.note_named()
        return clipped.clone() if clipped is loss else clipped

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        """Clip a loss without a name. Return it as it is if the step clipped a loss by name."""
        if self._has_named_losses:
            return loss
        clipped = self._clip(loss, RETURNED, is_named=False)
        self._has_unnamed_loss = True
        return clipped

    def _clip(self, loss: Tensor, name: str, is_named: bool = True) -> Tensor:
        alrc = self.losses.get_or_add(name)
        if not alrc.applies_to(loss):
            return loss
        self.has_seen_loss = True
        self._has_named_losses = self._has_named_losses or is_named
        if self._warns_of_opacus and loss.numel() == 1:
            self._warns_of_opacus = False  # warn once
            rank_zero_warn(
                f"ALRC: the loss {name!r} is one number for a batch, and Opacus trains. Scaling it "
                "lets one sample change the gradients of all others, which breaks the bound on a "
                "sample's influence. Clip one loss for each sample: return them as a vector"
            )
        needs_hooks = self.record is not None and alrc.on_clip is None
        if needs_hooks or alrc.spiked_calls_offend is not self.skips_spikes:
            self._set_hooks(name)
        if self.record is not None:
            self.record.note_shape(name, loss.shape)
        if self._raising is not None:
            self._raising.remember(name, loss)
        if self._exchange is not None:
            return self._exchange.clip(name, loss)
        return alrc.clip_and_learn(loss)

    def _set_hooks(self, name: str) -> None:
        alrc = self.losses[name]
        alrc.spiked_calls_offend = self.skips_spikes
        if self.record is not None:
            alrc.on_clip = partial(self.record.observe, name)
            alrc.on_sums = partial(self.record.note_sums, name)
        if self._on_call is not None:
            alrc.on_call = partial(self._on_call, name)

    def reset(self, name: str) -> None:
        """Restart the moments of a loss. Every rank must call it."""
        if self._exchange is not None:
            self._exchange.discard_learning(name)
        self.losses[name].reset()

    def end_step(self, trainer: Any) -> None:
        """A training step has run: start its all-reduce, and check its losses."""
        self._send_and_check(trainer)
        if self._skipping is not None:
            self._skipping.end_step()
        if self._unseen is not None:
            self._unseen.end_step(self._has_unnamed_loss)

    def _send_and_check(self, trainer: Any) -> None:
        if self._exchange is not None:
            self._exchange.send(trainer.strategy.root_device)
        if self._raising is not None:
            self._raising.check(trainer)

    def end_batch(self) -> None:
        """A batch has ended.

        If a checkpoint is saved after this, a run that resumes from it starts with the next batch.
        """
        self.batch_is_open = False

    def agree_and_send_late_names(self, trainer: Any) -> bool:
        """See :meth:`Exchange.agree_and_send_late_names`. Every rank must call it."""
        return self._exchange is not None and self._exchange.agree_and_send_late_names(
            trainer.strategy.root_device
        )

    # ---- the steps of optimizers

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        """Call ``step(closure)``, unless a policy refuses the step."""
        if self._in_optimizer:  # an optimizer that wraps this optimizer is stepping
            return step(closure)
        self._in_optimizer = True
        try:
            if not trainer.lightning_module.automatic_optimization:
                self._send_and_check(trainer)  # losses computed before the optimizer's step
                if closure is not None and not is_empty(closure):  # losses computed in the closure
                    closure = partial(self._closure_then_send, trainer, closure)
            if self._raising is not None:
                step = partial(self._raising.step, optimizer, step=step)
            if self._skipping is not None:
                return self._skipping.step(optimizer, closure, step)
            return step(closure)
        finally:
            self._in_optimizer = False

    def _before_optimizer_step(self, trainer: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Called before each optimizer's step, even if the Trainer does not know the optimizer."""
        if self._in_optimizer or guard_of_step() is not self:
            return
        if self.raises:
            self._send_and_check(trainer)
        elif not self._warned_of_unknown:
            self._warned_of_unknown = True
            rank_zero_warn(
                f"ALRC: {self._skip_setting} cannot skip the step of {type(optimizer).__name__}: "
                "configure_optimizers did not return the optimizer that training_step steps"
            )

    def _closure_then_send(self, trainer: Any, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._send_and_check(trainer)
        return result

    @property
    def _skip_setting(self) -> str:
        return "on_spike='skip'" if self.skips_spikes else "nonfinite='skip'"

    def note_gradient_norm(self, optimizer: Any, norm: Tensor) -> None:
        """Pass on a gradient norm: of Lightning's gradient clipping, or of a skipped step."""
        if self.record is not None:
            # Under manual optimization, self.clip_gradients may be given a LightningOptimizer.
            self.record.note_norm(getattr(optimizer, "optimizer", optimizer), norm)

    def holds_back_schedulers(self) -> bool:
        """Whether schedulers must not step now, because the last optimizer step was skipped."""
        return self._skipping is not None and self._skipping.host_skipped

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy takes no part in this fit. The fit's objects lead to the Trainer and its loaders,
        # which are large and often cannot be pickled.
        return _guard_outside_a_fit, (self.losses, self._policy, self._on_spike)


def _guard_outside_a_fit(losses: NamedLosses, policy: Policy, on_spike: OnSpike) -> LossGuard:
    guard = LossGuard(losses, policy, on_spike)
    guard.stop()  # removes the hooks that were copied with the losses
    return guard


def is_of_opacus(optimizer: Any) -> bool:
    """Whether an optimizer is of Opacus, which bounds each sample's influence on the gradients."""
    return any(base.__module__.startswith("opacus.") for base in type(optimizer).__mro__)
