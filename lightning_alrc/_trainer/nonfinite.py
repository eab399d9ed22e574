"""What happens to a step whose loss is NaN or infinite, or spikes.

ALRC keeps its moments from a loss that is not finite in any case. What becomes of its step is a
policy:

``propagate``
    Nothing is done: gradients are as they come. It costs nothing.
``skip``
    Parameters, optimizer state, buffers that the step changed, and the schedulers that Lightning
    steps are left as they were, on every rank if one rank's loss is not finite. Gradients are
    zeroed. The host waits for the losses once a step. Exception: a fused optimizer skips on the
    device, where nothing else needs to know on the host (see :meth:`Skipping.step`).
``raise``
    An error on every rank, before the optimizer steps. Buffers that the step changed are put back.
    The host waits for the losses once a step.

A step whose loss spikes may be skipped as well, by ``on_spike="skip"``: then both are *offending*,
and :attr:`ALRC.offending_total <lightning_alrc.ALRC>` counts them. The moments learn from a spike
as they always do, from what it is clipped to. So they follow losses that have risen for good, and
steps are taken again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_alrc._moments import distributed
from lightning_alrc._trainer.gradient_norms import gradient_norm
from lightning_alrc._trainer.lightning import is_empty, steps
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc._trainer.undo import Buffers, Movers
from lightning_alrc.alrc import ALRC

__all__ = ["OnSpike", "Policy", "Raising", "Skipping", "checked_on_spike", "checked_policy"]

Policy = Literal["propagate", "skip", "raise"]
OnSpike = Literal["clip", "skip"]


def checked_policy(policy: Any) -> Policy:
    """The policy, if it is one.

    Raises:
        ValueError: if not.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"nonfinite must be one of {list(get_args(Policy))}, got {policy!r}")
    return policy  # type: ignore[no-any-return]


def checked_on_spike(on_spike: Any) -> OnSpike:
    """What becomes of a step that spikes, if it is one of those.

    Raises:
        ValueError: if not.
    """
    if on_spike not in get_args(OnSpike):
        raise ValueError(f"on_spike must be one of {list(get_args(OnSpike))}, got {on_spike!r}")
    return on_spike  # type: ignore[no-any-return]


class _Skip(Exception):
    """Leaves an optimizer's ``step`` after its closure and before it changes anything."""


class Skipping:
    """The policy ``skip``: steps an optimizer unless a loss it learns from was offending.

    Args:
        losses: each loss's ALRC by name; grows as names are met.
        trainer: that of the fit.
        note_norm: is told of the norm of the gradients of a step that the host skips; ``None`` for
            nobody.
    """

    def __init__(
        self,
        losses: Mapping[str, ALRC],
        trainer: Any,
        note_norm: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._note_norm = note_norm
        self._losses = losses
        self._at_start = self._count()
        self._before: dict[Any, Tensor | float] = {}
        self._stepped: set[Any] = set()
        self._movers = Movers()
        self._trainer = trainer
        self._buffers = Buffers(trainer.lightning_module)
        self._has_begun = self._skipped_in_step = self._warned = False
        self.skipped = False
        """Whether the host skipped the last step."""

    def begin_step(self) -> None:
        """A training step is about to run.

        An offending loss counts until the optimizer has stepped: for every batch of an
        accumulation, and for every optimizer of a step. Nobody knows which of them learns from
        which loss.
        """
        if self._stepped or not self._has_begun:
            self._before |= dict.fromkeys(self._stepped, self._count())
            self._stepped.clear()
            self._buffers.save()
        self._has_begun, self._skipped_in_step = True, False

    def end_step(self) -> None:
        """A training step has run. Under manual optimization it may have gone on after a skip."""
        if self._skipped_in_step:
            self._put_back()

    def step(self, optimizer: Any, closure: Any, step: Callable[[Any], Any]) -> Any:
        """Call ``step(closure)``, and have the optimizer leave everything as it is if need be.

        A fused optimizer skips on the device. Exceptions, for which the host waits: its first step,
        which would leave its momentum unset; a scheduler that steps with it; a GradScaler; a
        callback or hook that sees the gradients before it steps; weight averaging; buffers that
        training steps change.
        """
        self.skipped = False
        if closure is None:
            if self._is_to_skip(optimizer):
                return self._skip(optimizer, None)
            return step(None)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            if self._can_skip_on_device(optimizer):  # buffers are known only now
                optimizer.found_inf = self._found(optimizer).to(torch.float32)
            elif self._is_to_skip(optimizer):
                raise _Skip(result)
            return result

        try:
            return self._movers.step(optimizer, guarded, step, _Skip)
        except _Skip as skip:
            return self._skip(optimizer, skip.args[0])
        finally:
            vars(optimizer).pop("found_inf", None)

    @functools.cached_property
    def _needs_host(self) -> bool:
        """Whether the host is to know of a skip, whatever the optimizer.

        Asked for in the first step: others may add callbacks as the fit starts.
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
            and not self._needs_host
            and not self._buffers.may_change
            and len(optimizer.state) > 0
        )

    def _is_to_skip(self, optimizer: Any) -> bool:
        return bool(self._found(optimizer))

    def _found(self, optimizer: Any) -> Tensor:
        """Whether a loss was offending since the optimizer's step before."""
        self._stepped.add(optimizer)
        return torch.as_tensor(self._count() > self._before.get(optimizer, self._at_start))

    def _skip(self, optimizer: Any, result: Any) -> Any:
        self.skipped = self._skipped_in_step = True
        self._put_back()
        norm = None if self._note_norm is None else gradient_norm(self._trainer, optimizer)
        if self._note_norm is not None and norm is not None:
            self._note_norm(norm)
        optimizer.zero_grad(set_to_none=False)
        return result

    def _put_back(self) -> None:
        self._buffers.restore()
        if self._warned:
            return
        parameters = self._trainer.lightning_module.parameters()
        finite = [each.detach().isfinite().all() for each in parameters]
        if finite and not all(map(bool, finite)):
            self._warned = True
            rank_zero_warn(
                "ALRC: parameters are not finite after a step that was skipped. "
                "Something has changed them that is no step of an optimizer, as an optimizer's "
                "own method, or an update by hand"
            )

    def _count(self) -> Tensor | float:
        """Offending losses of all names and ranks so far."""
        return sum((alrc.offending_total for alrc in self._losses.values()), 0.0)


def _overrides(owner: Any, hook: str, base: str) -> bool:
    method = getattr(type(owner), hook)
    return hook in vars(owner) or getattr(method, "__qualname__", "") != f"{base}.{hook}"


class Raising:
    """The policy ``raise``: an error that names the loss, on every rank.

    Args:
        losses: each loss's ALRC by name; grows as names are met.
        module: that of the fit.
    """

    def __init__(self, losses: Mapping[str, ALRC], module: nn.Module) -> None:
        self._losses = losses
        self._before = self._counts()
        self._seen: dict[str, list[Tensor]] = {}
        self._movers = Movers()
        self._buffers = Buffers(module)

    def begin_step(self) -> None:
        """A training step is about to run."""
        self._buffers.save()

    def remember(self, name: str, loss: Tensor) -> None:
        """Remember a loss until the next :meth:`check`."""
        self._seen.setdefault(name, []).append(loss.detach())

    def step(self, optimizer: Any, closure: Any, step: Callable[[Any], Any]) -> Any:
        """Call ``step(closure)``, in which :meth:`check` may raise. Parameters are as before then.

        Args:
            optimizer: that is to step.
            closure: what it may call several times, or ``None``.
            step: takes the closure.
        """
        if closure is None or is_empty(closure):
            return step(closure)
        return self._movers.step(optimizer, closure, step, FloatingPointError)

    def check(self, trainer: Any) -> None:
        """Raise if a loss was not finite since the last call. Waits for the device.

        Raises:
            FloatingPointError: names the loss, its value, the step and the batch, on every rank.
        """
        counts, before = self._counts(), self._before
        seen, self._seen = self._seen, {}
        self._before = counts
        found = sorted(name for name, count in counts.items() if count > before.get(name, 0))
        if not found:
            return
        self._buffers.restore()
        name = found[0]
        losses = [distributed.full(loss) for loss in seen.get(name, [])]
        bad = [value for loss in losses for value in loss[~loss.isfinite()].tolist()]
        of_ranks = [bad]
        is_shared = distributed.is_active()
        if is_shared:  # the counts are of all ranks, so each of them is here
            of_ranks *= dist.get_world_size()
            dist.all_gather_object(of_ranks, bad[:1])
        found_on = ((rank, bad[0]) for rank, bad in enumerate(of_ranks) if bad)
        # The step may have changed the loss in place since it was seen.
        rank, value = next(found_on, (trainer.global_rank, "not finite"))
        where = f" on rank {rank}" if is_shared else ""
        raise FloatingPointError(
            f"loss {name!r} is {value}{where} at step {steps(trainer)}, batch_idx "
            f"{trainer.fit_loop.batch_idx}: ALRCCallback(nonfinite='raise') allows finite losses "
            "only"
        )

    def _counts(self) -> dict[str, float]:
        return {name: alrc.nonfinite_total.item() for name, alrc in self._losses.items()}
