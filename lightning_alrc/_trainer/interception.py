"""Where a Trainer's losses pass through.

Every loss of a fit goes through two methods of the Trainer's strategy: what ``training_step``
returns comes out of ``strategy.training_step``, and what a manually optimized module differentiates
goes into ``strategy.backward``. While a fit lasts both are shadowed on the strategy object. No
public hook sees a loss at a point where it may still be a vector, and where changing it changes the
gradient and the value alike, in automatic as in manual optimization, under any precision. Two more
shadows let a step be refused whose loss is not finite, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Guard", "intercept", "release"]


class Guard(Protocol):
    """What stands between a Trainer's losses and its optimizers."""

    def begin_step(self) -> None:
        """A training step is about to run."""

    def end_step(self, trainer: Any) -> None:
        """It has run; what it returned is clipped."""

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        """Clip a loss that a step returned or differentiates, unless the step did it itself."""

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        """Call ``step(closure)``, which steps the optimizer, or do not."""

    def holds_schedulers(self) -> bool:
        """Whether learning rate schedulers are to sit this step out."""


class Interception:
    """The shadows of one Trainer's methods.

    An object with bound methods, rather than closures, so that a Trainer can be deep-copied and
    pickled in the middle of a fit. What the shadows stand in for is looked up at each call for the
    same reason.
    """

    def __init__(self, trainer: Any, guard: Guard, may_refuse: bool) -> None:
        self.guard = guard
        self.trainer = trainer
        self.shadowed = {"training_step": trainer.strategy, "backward": trainer.strategy}
        if may_refuse:
            self.shadowed["optimizer_step"] = trainer.strategy
            self.shadowed["update_lr_schedulers"] = trainer.fit_loop.epoch_loop
        self.outer = {
            name: vars(owner)[name] for name, owner in self.shadowed.items() if name in vars(owner)
        }

    def _original(self, name: str) -> Any:
        owner = self.shadowed[name]
        return self.outer.get(name) or MethodType(getattr(type(owner), name), owner)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.guard.begin_step()
        output = self._original("training_step")(*args, **kwargs)
        if self.trainer.lightning_module.automatic_optimization:
            if isinstance(output, Tensor):
                output = _averaged(self.guard.clip_unnamed(output))
            elif isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
                loss = _averaged(self.guard.clip_unnamed(output["loss"]))
                output = {**output, "loss": loss}
            # None skips the step; anything else is Lightning's to refuse
        self.guard.end_step(self.trainer)
        return output

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.trainer.lightning_module.automatic_optimization:
            closure_loss = self.guard.clip_unnamed(closure_loss)
            if not args and kwargs.get("gradient") is None:  # else it has weights of its own
                closure_loss = _averaged(closure_loss)
        return self._original("backward")(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        original = self._original("optimizer_step")

        def step(closure: Any) -> Any:
            return original(optimizer, closure, *args, **kwargs)

        return self.guard.step_optimizer(self.trainer, optimizer, closure, step)

    def update_lr_schedulers(self, interval: str, *args: Any, **kwargs: Any) -> None:
        if interval != "step" or not self.guard.holds_schedulers():
            self._original("update_lr_schedulers")(interval, *args, **kwargs)


def _averaged(loss: Tensor) -> Tensor:
    return loss.mean() if loss.ndim else loss


def intercept(trainer: Any, guard: Guard, may_refuse: bool) -> None:
    """Let a Trainer's losses pass through ``guard`` until :func:`release`.

    Args:
        trainer: that of the fit.
        guard: what they pass through.
        may_refuse: whether it may refuse the optimizer's step as well.
    """
    release(trainer)
    interception = Interception(trainer, guard, may_refuse)
    for name, owner in interception.shadowed.items():
        setattr(owner, name, getattr(interception, name))


def release(trainer: Any) -> None:
    """Undo :func:`intercept`; nothing happens to a Trainer that is not intercepted."""
    interception = getattr(vars(trainer.strategy).get("training_step"), "__self__", None)
    if not isinstance(interception, Interception):
        return
    for name, owner in interception.shadowed.items():
        delattr(owner, name)
        if name in interception.outer:
            setattr(owner, name, interception.outer[name])
