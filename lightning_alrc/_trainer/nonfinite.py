"""What happens to a step whose loss is not finite, or spikes.

The moments never learn from a loss that is NaN or infinite. A policy decides what happens to the
step of such a loss:

``propagate``
    The step is not changed. This costs nothing.
``skip``
    Parameters and optimizer state stay as they were, and so do schedulers that Lightning advances.
    Buffers that the step changed are restored. If one rank's loss is not finite, every rank skips.
    Gradients are set to zero. The host waits for the losses once a step. With a fused optimizer the
    host waits only if the host must know of the skip (see :meth:`Skipping.step`). Otherwise the
    device skips the step.
``raise``
    Every rank raises an error before the optimizer steps. Buffers that the step changed are
    restored. The host waits for the losses once a step.

With ``on_spike="skip"`` a step whose loss spikes is skipped as well. Losses that are not finite and
calls that spike are *offending*: :attr:`ALRC.offending_total <lightning_alrc.ALRC>` counts them.
The moments still learn from the clipped loss of a skipped step. So if losses rise for good, the
threshold follows, and steps are taken again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_alrc._moments import distributed
from lightning_alrc._trainer.exchange import has_other_ranks
from lightning_alrc._trainer.gradient_norms import gradient_norm
from lightning_alrc._trainer.lightning import is_empty, steps
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc._trainer.undo import Buffers, EarlyUpdates
from lightning_alrc.alrc import ALRC

__all__ = ["OnSpike", "Policy", "Raising", "Skipping", "checked_on_spike", "checked_policy"]

Policy = Literal["propagate", "skip", "raise"]
OnSpike = Literal["clip", "skip"]


def checked_policy(policy: Any) -> Policy:
    """Check the argument ``nonfinite``.

    Raises:
        ValueError: if it is not a policy.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"nonfinite must be one of {list(get_args(Policy))}, got {policy!r}")
    return policy  # type: ignore[no-any-return]


def checked_on_spike(on_spike: Any) -> OnSpike:
    """Check the argument ``on_spike``.

    Raises:
        ValueError: if it is neither ``"clip"`` nor ``"skip"``.
    """
    if on_spike not in get_args(OnSpike):
        raise ValueError(f"on_spike must be one of {list(get_args(OnSpike))}, got {on_spike!r}")
    return on_spike  # type: ignore[no-any-return]


class _Skip(Exception):
    """Raised at the end of an optimizer's closure, so that the optimizer does not step."""


class Skipping:
    """The policy ``skip``: an optimizer skips its step if a loss was offending.

    An offending loss of an earlier batch skips the step, too, if the optimizer has neither stepped
    nor skipped since that loss.

    Args:
        losses: each loss's ALRC by name; grows as names are met.
        trainer: the Trainer of the fit.
        note_norm: called with the optimizer and the gradient norm of a step that the host skips;
            ``None`` for no call.
    """

    def __init__(
        self,
        losses: Mapping[str, ALRC],
        trainer: Any,
        note_norm: Callable[[Any, Tensor], None] | None = None,
    ) -> None:
        self._note_norm = note_norm
        self._alrcs = losses
        self._count_at_start = self._count_offending()
        self._counts_before: dict[Any, Tensor] = {}
        """by optimizer, the number of offending losses when the first batch after the optimizer's
        last step or skip began; if it has risen since, the optimizer's next step is skipped"""
        self._stepped_or_skipped: set[Any] = set()
        """optimizers that have stepped or skipped since ``_counts_before`` was last updated"""
        self._stateless: dict[Any, tuple[Any, tuple[int, ...], list[Tensor]]] = {}
        """by optimizer, its parameters without a state, and what they were found from: the states,
        their number and the number of parameters"""
        self._early_updates = EarlyUpdates()
        self._trainer = trainer
        self._buffers = Buffers(trainer.lightning_module)
        self._has_begun = self._host_skipped_in_step = self._warned = False
        self.host_skipped = False
        """whether the host skipped the last optimizer step"""

    def begin_batch(self) -> None:
        """The first training step of a batch is about to run.

        With gradient accumulation a skip drops all accumulated batches. If a batch has steps of
        several optimizers, all steps after an offending loss are skipped, because it is not known
        which optimizer uses which loss.
        """
        if self._stepped_or_skipped or not self._has_begun:
            self._counts_before |= dict.fromkeys(self._stepped_or_skipped, self._count_offending())
            self._stepped_or_skipped.clear()
            self._buffers.save()
        self._has_begun, self._host_skipped_in_step = True, False

    def end_step(self) -> None:
        """A training step has run.

        If the host skipped an optimizer's step, the buffers were restored then. The rest of the
        training step may have changed them again. So they are restored once more.
        """
        if self._host_skipped_in_step:
            self._restore_and_warn()

    def step(self, optimizer: Any, closure: Any, step: Callable[[Any], Any]) -> Any:
        """Call ``step(closure)``, but skip the optimizer's step if a loss was offending.

        A fused optimizer skips on the device, and the host does not wait. With other optimizers,
        the host waits and decides. It also does so in these cases: a parameter's first step,
        which creates its momentum; a scheduler with interval ``"step"``; a GradScaler; a callback
        or hook that sees the gradients before the step; weight averaging; buffers that training
        steps change.
        """
        self.host_skipped = False
        if closure is None:
            if self._note_and_check(optimizer):
                return self._skip(optimizer, None)
            return step(None)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            if self._can_skip_on_device(optimizer):  # the closure has shown which buffers change
                optimizer.found_inf = self._note_and_check(optimizer).to(torch.float32)
            elif self._note_and_check(optimizer):
                raise _Skip(result)
            return result

        try:
            return self._early_updates.step(optimizer, guarded, step, _Skip)
        except _Skip as skip:
            return self._skip(optimizer, skip.args[0])
        finally:
            vars(optimizer).pop("found_inf", None)

    @functools.cached_property
    def _host_must_know(self) -> bool:
        """Whether the host must know of a skip, even with a fused optimizer.

        Computed in the first step: callbacks may be added until the fit starts.
        """
        trainer = self._trainer
        module = trainer.lightning_module
        return (
            any(config.interval == "step" for config in trainer.lr_scheduler_configs)
            or getattr(trainer.strategy.precision_plugin, "scaler", None) is not None
            or _overrides(module, "on_before_optimizer_step", "ModelHooks")
            or _overrides(module, "configure_gradient_clipping", "LightningModule")
            or any(
                _overrides(each, "on_before_optimizer_step", "Callback")
                or type(each).__name__ == "StochasticWeightAveraging"
                for each in trainer.callbacks
            )
        )

    def _can_skip_on_device(self, optimizer: Any) -> bool:
        return (
            getattr(optimizer, "_step_supports_amp_scaling", False)
            and not self._host_must_know
            and not self._buffers.may_change
            and self._steps_with_state(optimizer)
        )

    def _steps_with_state(self, optimizer: Any) -> bool:
        """Whether each parameter that the optimizer would step now has a state.

        For a parameter without one, fused SGD makes a momentum of uninitialised memory, and leaves
        it so if the device skips the step. Only parameters without a state are looked at in each
        step, and these are usually few or none.
        """
        state = optimizer.state
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known, lengths, stateless = self._stateless.get(optimizer, (None, (), []))
        if known is not state or lengths != (len(state), count):
            every = (each for group in optimizer.param_groups for each in group["params"])
            stateless = [each for each in every if not state.get(each)]
            self._stateless[optimizer] = state, (len(state), count), stateless
        return all(each.grad is None for each in stateless)

    def _note_and_check(self, optimizer: Any) -> Tensor:
        """Whether a loss that counts for this optimizer's step was offending.

        Notes that the optimizer steps or skips now.
        """
        self._stepped_or_skipped.add(optimizer)
        return self._count_offending() > self._counts_before.get(optimizer, self._count_at_start)

    def _skip(self, optimizer: Any, result: Any) -> Any:
        self.host_skipped = self._host_skipped_in_step = True
        self._restore_and_warn()
        norm = None if self._note_norm is None else gradient_norm(self._trainer, optimizer)
        if self._note_norm is not None and norm is not None:
            self._note_norm(optimizer, norm)
        optimizer.zero_grad(set_to_none=False)
        return result

    def _restore_and_warn(self) -> None:
        self._buffers.restore()
        if self._warned:
            return
        finite = []
        for parameter in self._trainer.lightning_module.parameters():
            # Frozen parameters may have a layout or a dtype for which PyTorch has no ``isfinite``.
            if not is_lazy(parameter):
                with suppress(RuntimeError, TypeError):
                    finite.append(parameter.detach().isfinite().all())
        if not all(map(bool, finite)):
            self._warned = True
            rank_zero_warn(
                "ALRC: parameters are not finite after a step that was skipped. They were changed "
                "outside of an optimizer's step, by another method of the optimizer or by hand"
            )

    def _count_offending(self) -> Tensor:
        """Number of offending losses of all names and ranks so far, int64."""
        counts = [alrc.offending_total for alrc in self._alrcs.values()]
        first, *others = counts or [torch.tensor(0, device="cpu")]
        # Losses of one module may be on several devices.
        return sum((each.to(first.device) for each in others), first)


def _overrides(owner: Any, hook: str, base: str) -> bool:
    method = getattr(type(owner), hook)
    return hook in vars(owner) or getattr(method, "__qualname__", "") != f"{base}.{hook}"


class Raising:
    """The policy ``raise``: every rank raises an error that names the loss.

    Args:
        losses: each loss's ALRC by name; grows as names are met.
        module: the module of the fit.
    """

    def __init__(self, losses: Mapping[str, ALRC], module: nn.Module) -> None:
        self._alrcs = losses
        self._counts_before = self._counts()
        self._losses_since_check: dict[str, list[Tensor]] = {}
        self._early_updates = EarlyUpdates()
        self._buffers = Buffers(module)

    def begin_batch(self) -> None:
        """The first training step of a batch is about to run."""
        self._buffers.save()

    def remember(self, name: str, loss: Tensor) -> None:
        """Keep a loss for the error of the next :meth:`check`."""
        self._losses_since_check.setdefault(name, []).append(loss.detach())

    def step(self, optimizer: Any, closure: Any, step: Callable[[Any], Any]) -> Any:
        """Call ``step(closure)``. If :meth:`check` raises in the closure, undo the update.

        An optimizer that calls the closure several times, such as LBFGS, may have updated
        parameters before the call that raises.

        Args:
            optimizer: the optimizer that steps.
            closure: the optimizer's closure, or ``None``.
            step: takes the closure.
        """
        if closure is None or is_empty(closure):
            return step(closure)
        return self._early_updates.step(optimizer, closure, step, FloatingPointError)

    def check(self, trainer: Any) -> None:
        """Raise if a loss was not finite since the last check. Waits for the device.

        Raises:
            FloatingPointError: names the loss, its value, the step and the batch, on every rank.
        """
        counts, before = self._counts(), self._counts_before
        seen, self._losses_since_check = self._losses_since_check, {}
        self._counts_before = counts
        found = sorted(name for name, count in counts.items() if count > before.get(name, 0))
        if not found:
            return
        self._buffers.restore()
        name = found[0]
        losses = [distributed.full(loss) for loss in seen.get(name, [])]
        bad = [value for loss in losses for value in loss[~loss.isfinite()].tolist()]
        is_shared = has_other_ranks(trainer)
        # All ranks have the same counts, so all of them get here.
        of_ranks = distributed.gathered(bad[:1]) if is_shared else [bad]
        found_on = ((rank, bad[0]) for rank, bad in enumerate(of_ranks) if bad)
        # No value is found if the step has changed the loss in place.
        rank, value = next(found_on, (trainer.global_rank, "not finite"))
        where = f" on rank {rank}" if is_shared else ""
        raise FloatingPointError(
            f"loss {name!r} is {value}{where} at step {steps(trainer)}, batch_idx "
            f"{trainer.fit_loop.batch_idx}: ALRCCallback(nonfinite='raise') allows finite losses "
            "only"
        )

    def _counts(self) -> dict[str, float]:
        return {name: alrc.nonfinite_total.item() for name, alrc in self._alrcs.items()}
