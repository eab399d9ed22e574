"""What happens to a step whose loss is NaN or infinite.

ALRC keeps its moments from such a loss in any case. What becomes of the step is a policy:

``propagate``
    nothing is done: gradients are as they come. Costs nothing.
``skip``
    parameters, optimizer state and the schedulers that Lightning steps are left as they were, on
    every rank if it is one rank's loss. A fused optimizer skips on the device; for any other, under
    a GradScaler, and if a scheduler steps with it, the host waits for the losses once a step.
``raise``
    an error on every rank, before the optimizer steps. The host waits for the losses once a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_alrc._moments.distributed import whole
from lightning_alrc.alrc import ALRC

__all__ = ["Policy", "Raising", "Skipping", "checked_policy"]

Policy = Literal["propagate", "skip", "raise"]


def checked_policy(policy: Any) -> Policy:
    """The policy, if it is one.

    Raises:
        ValueError: if not.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"nonfinite must be one of {list(get_args(Policy))}, got {policy!r}")
    return policy  # type: ignore[no-any-return]


class _Skip(Exception):
    """Leaves an optimizer's ``step`` after its closure and before it changes anything."""


class Skipping:
    """The policy ``skip``: steps an optimizer unless a loss it learns from was not finite.

    Args:
        losses: each loss's ALRC by name; grows as names are met.
    """

    def __init__(self, losses: Mapping[str, ALRC]) -> None:
        self._losses = losses
        self._at_start = self._count()
        self._before: dict[Any, Tensor | float] = {}
        self._stepped: set[Any] = set()
        self.skipped = False
        """Whether the host skipped the last step."""

    def begin_step(self) -> None:
        """A training step is about to run: what was found before an optimizer's last is past.

        Until then it counts, for every batch of an accumulation and for every optimizer of a step:
        nobody knows which of them learns from which loss.
        """
        if self._stepped:
            self._before |= dict.fromkeys(self._stepped, self._count())
            self._stepped.clear()

    def step(self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]) -> Any:
        """Call ``step(closure)``, and have the optimizer leave everything as it is if need be."""
        self.skipped = False
        # A scheduler that steps with the optimizer must be told on the host, a fused optimizer that
        # skips its first step leaves its momentum unset, and a GradScaler tells it when to skip.
        scheduled = any(config.interval == "step" for config in trainer.lr_scheduler_configs)
        scaled = getattr(trainer.strategy.precision_plugin, "scaler", None) is not None
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        on_device = fused and not scheduled and not scaled and len(optimizer.state) > 0
        # It calls its closure again and again, and moves the parameters in between.
        undo = _undo(optimizer) if isinstance(optimizer, torch.optim.LBFGS) else None

        def guarded() -> Any:
            result = closure()
            before = self._before.get(optimizer, self._at_start)
            found = torch.as_tensor(self._count() > before)
            self._stepped.add(optimizer)
            if on_device:
                optimizer.found_inf = found.to(torch.float32)
            elif found:
                raise _Skip(result)
            return result

        try:
            return step(guarded)
        except _Skip as skip:
            self.skipped = True
            if undo is not None:
                undo()
            return skip.args[0]
        finally:
            if on_device:
                vars(optimizer).pop("found_inf", None)

    def _count(self) -> Tensor | float:
        """Non-finite losses of all names and ranks so far."""
        return sum((alrc.nonfinite_total for alrc in self._losses.values()), 0.0)


def _undo(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What brings an optimizer's parameters and state back to where they are now."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    values = [each.detach().clone() for each in parameters]
    state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}

    def undo() -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)
        optimizer.state.clear()
        optimizer.state.update(state)

    return undo


class Raising:
    """The policy ``raise``: an error that names the loss, on every rank.

    Args:
        losses: each loss's ALRC by name; grows as names are met.
    """

    def __init__(self, losses: Mapping[str, ALRC]) -> None:
        self._losses = losses
        self._before = self._counts()
        self._seen: dict[str, list[Tensor]] = {}

    def see(self, name: str, loss: Tensor) -> None:
        """Remember a loss until the next :meth:`check`."""
        self._seen.setdefault(name, []).append(loss.detach())

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
        name = found[0]
        losses = [whole(loss) for loss in seen.get(name, [])]
        bad = [value for loss in losses for value in loss[~loss.isfinite()].tolist()]
        of_ranks = [bad]
        if trainer.world_size > 1:  # the counts are of all ranks, so each of them is here
            of_ranks *= trainer.world_size
            dist.all_gather_object(of_ranks, bad[:1])
        found_on = ((rank, bad[0]) for rank, bad in enumerate(of_ranks) if bad)
        # The step may have changed the loss in place since it was seen.
        rank, value = next(found_on, (trainer.global_rank, "not finite"))
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped  # as of a spike
        where = f" on rank {rank}" if trainer.world_size > 1 else ""
        raise FloatingPointError(
            f"loss {name!r} is {value}{where} at step {steps}, batch_idx "
            f"{trainer.fit_loop.batch_idx}: ALRCCallback(nonfinite='raise') allows finite losses "
            "only"
        )

    def _counts(self) -> dict[str, float]:
        return {name: alrc.nonfinite_total.item() for name, alrc in self._losses.items()}
