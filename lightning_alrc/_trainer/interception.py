"""Where a Trainer's losses pass through.

Every loss of a fit goes through two methods of the Trainer's strategy. What ``training_step``
returns comes out of ``strategy.training_step``. What a manually optimized module differentiates
goes into ``strategy.backward``. Both are shadowed on the strategy object while a fit lasts. No
public hook sees a loss while it may still be a vector and while a change reaches both its gradient
and its value, in automatic and manual optimization, under any precision.

Further shadows let a step be refused whose loss is not finite or spikes, if that is asked for, and
tell of the norms of gradients that Lightning clips.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_alrc._trainer.gradient_norms import told_of_norms
from lightning_alrc._trainer.lightning import skips_backward

__all__ = ["Guard", "Interception", "StepShadows", "guard_of_step"]


class Guard(Protocol):
    """What stands between a Trainer's losses and its optimizers."""

    def begin_step(self) -> None:
        """A training step is about to run."""

    def end_step(self, trainer: Any) -> None:
        """It has run, and what it returned is clipped."""

    def clip(self, loss: Tensor, name: str) -> Tensor:
        """Clip a loss that the step named."""

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        """Clip a loss that the step returned or differentiates, unless the step named its own."""

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        """Call ``step(closure)``, which steps the optimizer, or do not."""

    def holds_schedulers(self) -> bool:
        """Whether learning rate schedulers are not to step now."""

    def note_gradient_norm(self, norm: Tensor) -> None:
        """Lightning has clipped gradients by their norm, which was this."""


class _Step(threading.local):
    """The training step that runs in this thread."""

    guard: Guard | None = None


_step = _Step()


def guard_of_step() -> Guard | None:
    """The guard of the Trainer whose training step runs in this thread, if there is one."""
    return _step.guard


@contextmanager
def _running(guard: Guard) -> Iterator[None]:
    outer, _step.guard = _step.guard, guard
    try:
        yield
    finally:
        _step.guard = outer


class Shadow:
    """Stands in for a method of a Trainer's strategy. Its other attributes are the method's."""

    def __init__(self, interception: Interception, name: str) -> None:
        self.interception = interception
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.interception, self.name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "interception" not in vars(self):  # in the middle of a copy
            raise AttributeError(name)
        return getattr(self.interception.original(self.name), name)


class Interception:
    """The shadows of one Trainer's methods, from :meth:`install` to :meth:`remove`.

    An object, and not closures: a Trainer can be deep-copied and pickled during a fit. What a
    shadow stands in for is looked up at each call for the same reason.

    Others may shadow the same methods, before or after. A shadow that somebody else has wrapped
    cannot be taken off: it lets everything pass from then on.

    Args:
        trainer: that of the fit.
        guard: what the losses pass through.
        may_refuse: whether the guard may refuse the optimizer's step as well.
        notes_norms: whether the guard is to be told of the norms of gradients.
    """

    def __init__(
        self, trainer: Any, guard: Guard, may_refuse: bool, notes_norms: bool = False
    ) -> None:
        self.guard = guard
        self.trainer = trainer
        self.is_active = True
        self.differentiates = False
        """whether ``strategy.backward`` runs"""
        self.shadowed = {"training_step": trainer.strategy, "backward": trainer.strategy}
        if may_refuse:
            self.shadowed["optimizer_step"] = trainer.strategy
            self.shadowed["update_lr_schedulers"] = trainer.fit_loop.epoch_loop
        if notes_norms:
            self.shadowed["clip_grad_by_norm"] = trainer.strategy.precision_plugin
        self.replaced: dict[str, Any] = {}
        """what others had put on the owner itself"""
        self.proxied: dict[str, Any] = {}
        """what the owner's class does not have"""

    def install(self) -> None:
        """Put the shadows on."""
        for name, owner in self.shadowed.items():
            # Of an earlier fit, which somebody else had wrapped and has put back since.
            while (stale := _interception_of(owner, name)) is not None:
                stale.remove()
            if name in vars(owner):
                self.replaced[name] = vars(owner)[name]
            elif not hasattr(type(owner), name):
                self.proxied[name] = getattr(owner, name)
            setattr(owner, name, Shadow(self, name))

    def remove(self) -> None:
        """Take them off, but for those that somebody else has wrapped."""
        self.is_active = False
        for name, owner in self.shadowed.items():
            if _interception_of(owner, name) is not self:
                continue
            if name in self.replaced:
                setattr(owner, name, self.replaced[name])
                continue
            delattr(owner, name)
            if name in self.proxied and not hasattr(owner, name):  # as of a mock
                setattr(owner, name, self.proxied[name])

    def original(self, name: str) -> Any:
        """What the shadow of a method stands in for."""
        if name in self.replaced:
            return self.replaced[name]
        if name in self.proxied:
            return self.proxied[name]
        owner = self.shadowed[name]
        # As attribute access would find it without the shadow: a static method, a partial, ...
        found = inspect.getattr_static(type(owner), name)
        bind = getattr(type(found), "__get__", None)
        return found if bind is None else bind(found, owner, type(owner))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original("training_step")
        if not self.is_active or skips_backward(self.trainer):
            return original(*args, **kwargs)
        with _running(self.guard):
            self.guard.begin_step()
            output = original(*args, **kwargs)
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
        original = self.original("backward")
        is_manual = not self.trainer.lightning_module.automatic_optimization
        if self.is_active and is_manual and guard_of_step() is self.guard:
            closure_loss = self.guard.clip_unnamed(closure_loss)
            if not args and kwargs.get("gradient") is None:  # else it has weights of its own
                closure_loss = _averaged(closure_loss)
        outer, self.differentiates = self.differentiates, True
        try:
            return original(closure_loss, optimizer, *args, **kwargs)
        finally:
            self.differentiates = outer

    def optimizer_step(self, optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.original("optimizer_step")
        if not self.is_active:
            return original(optimizer, closure, *args, **kwargs)

        def step(closure: Any) -> Any:
            return original(optimizer, closure, *args, **kwargs)

        return self.guard.step_optimizer(self.trainer, optimizer, closure, step)

    def clip_grad_by_norm(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original("clip_grad_by_norm")
        if not self.is_active:
            return original(*args, **kwargs)
        with told_of_norms(self.guard.note_gradient_norm):
            return original(*args, **kwargs)

    def update_lr_schedulers(self, interval: str, *args: Any, **kwargs: Any) -> None:
        if not (self.is_active and interval == "step" and self.guard.holds_schedulers()):
            self.original("update_lr_schedulers")(interval, *args, **kwargs)


def _interception_of(owner: Any, name: str) -> Interception | None:
    """The interception whose shadow an object has for a method, if that is on top."""
    found = vars(owner).get(name)
    return found.interception if isinstance(found, Shadow) else None


class StepShadows:
    """The shadows of the optimizers' own ``step``, from :meth:`install` to :meth:`remove`.

    Manual optimization may step an optimizer that is not wrapped by Lightning. It does not pass
    through the strategy.

    Args:
        optimizers: whose steps pass through the guard; those that they wrap are found.
        intercept: is called with an optimizer, a closure or ``None``, and ``step``, which takes the
            closure.
    """

    def __init__(
        self,
        optimizers: Iterable[Any],
        intercept: Callable[[Any, Any, Callable[[Any], Any]], Any],
    ) -> None:
        self.is_active = True
        self.optimizers = list(_with_wrapped(optimizers))
        self._intercept = intercept
        self._replaced: list[Any] = []
        self._shadows: list[Any] = []

    def install(self) -> None:
        """Put the shadows on."""
        for optimizer in self.optimizers:
            self._replaced.append(vars(optimizer).get("step"))
            # A scheduler that is made later wraps this once more, and needs a bound method for it.
            self._shadows.append(MethodType(self._shadow_of(optimizer.step), optimizer))
            optimizer.step = self._shadows[-1]

    def remove(self) -> None:
        """Take them off, but for those that somebody else has wrapped."""
        self.is_active = False
        for optimizer, shadow, replaced in zip(
            self.optimizers, self._shadows, self._replaced, strict=True
        ):
            if vars(optimizer).get("step") is shadow:
                if replaced is None:
                    del optimizer.step
                else:
                    optimizer.step = replaced

    def _shadow_of(self, original: Any) -> Callable[..., Any]:
        @functools.wraps(getattr(original, "__func__", original))
        def step(optimizer: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            def call(closure: Any) -> Any:
                if closure is None:
                    return original(*args, **kwargs)
                return original(closure, *args, **kwargs)

            return self._intercept(optimizer, closure, call) if self.is_active else call(closure)

        return step


def _with_wrapped(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Optimizers, and those that they wrap, as SAM and Lookahead do."""
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer):
            yield optimizer
            yield from _with_wrapped(vars(optimizer).values())


def _averaged(loss: Tensor) -> Tensor:
    return loss.mean() if loss.ndim else loss
