"""``Interception``: passes the losses of a Trainer through a guard.

Every loss of a fit passes one of two methods of the Trainer's strategy. Under automatic
optimization, ``strategy.training_step`` returns the loss. Under manual optimization,
``strategy.backward`` takes the loss that the module differentiates. During a fit a *shadow*
replaces each of these two methods on the strategy object. In these methods the loss may still be a
vector, and its value and gradient can be changed, at any precision. No public hook allows this.

If ``nonfinite`` or ``on_spike`` may refuse steps, further shadows replace the methods that step
optimizers and schedulers. One more shadow gets the gradient norms that Lightning computes to clip
gradients.
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

from lightning_alrc._trainer.gradient_norms import norms_watched
from lightning_alrc._trainer.lightning import is_running, skips_backward

__all__ = ["Guard", "Interception", "StepShadows", "guard_of_step"]


class Guard(Protocol):
    """Clips the losses of a fit, and may refuse steps. See ``guard.LossGuard``."""

    def begin_step(self) -> None:
        """A training step is about to run."""

    def end_step(self, trainer: Any) -> None:
        """A training step has run, and the loss that it returned has been clipped."""

    def clip(self, loss: Tensor, name: str) -> Tensor:
        """Clip a loss that the step named."""

    def clip_unnamed(self, loss: Tensor) -> Tensor:
        """Clip a loss without a name. Return it as it is if the step clipped a loss by name."""

    def step_optimizer(
        self, trainer: Any, optimizer: Any, closure: Any, step: Callable[[Any], Any]
    ) -> Any:
        """Call ``step(closure)``, which steps the optimizer, unless the step is refused."""

    def holds_back_schedulers(self) -> bool:
        """Whether learning rate schedulers must not step now."""

    def note_gradient_norm(self, optimizer: Any, norm: Tensor) -> None:
        """Lightning has computed this norm of the optimizer's gradients, to clip them."""


class _Current(threading.local):
    """The guard of the training step that runs in this thread."""

    guard: Guard | None = None


_current = _Current()


def guard_of_step() -> Guard | None:
    """The guard of the training step that runs in this thread, if any."""
    return _current.guard


@contextmanager
def _set_guard_of_step(guard: Guard) -> Iterator[None]:
    outer, _current.guard = _current.guard, guard
    try:
        yield
    finally:
        _current.guard = outer


class Shadow:
    """Replaces a method of one of the Trainer's objects, and has the method's attributes."""

    def __init__(self, interception: Interception, name: str) -> None:
        self.interception = interception
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.interception, self.name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "interception" not in vars(self):  # while being copied
            raise AttributeError(name)
        return getattr(self.interception.original(self.name), name)


class Interception:
    """The shadows of one Trainer's methods, from :meth:`install` to :meth:`remove`.

    A Trainer can be deep-copied and pickled during a fit. So this object has no closures. At each
    call, a shadow looks up the method that it replaces, the *original*.

    Other code may replace the same methods, before or after :meth:`install`. A shadow that other
    code has wrapped cannot be removed. After :meth:`remove` such a shadow only calls the original
    method.

    Args:
        trainer: the Trainer of the fit.
        guard: clips the losses.
        may_refuse: whether the guard may refuse the optimizer's step.
        notes_norms: whether the guard is notified of gradient norms.
    """

    def __init__(
        self, trainer: Any, guard: Guard, may_refuse: bool, notes_norms: bool = False
    ) -> None:
        self.guard = guard
        self.trainer = trainer
        self.is_active = True
        self.is_in_backward = False
        """whether ``strategy.backward`` runs now"""
        self.shadowed = {"training_step": trainer.strategy, "backward": trainer.strategy}
        if may_refuse:
            self.shadowed["optimizer_step"] = trainer.strategy
            self.shadowed["update_lr_schedulers"] = trainer.fit_loop.epoch_loop
        if notes_norms:
            self.shadowed["clip_grad_by_norm"] = trainer.strategy.precision_plugin
        self.displaced: dict[str, Any] = {}
        """by name of the method, what a shadow replaced in ``vars`` of the object that it sits on
        (its *owner*). There is no entry if the method came from the owner's class: deleting the
        shadow then brings the method back"""
        self.proxied: dict[str, Any] = {}
        """by name of the method, what the owner's ``__getattr__`` returned. There is an entry only
        if the owner's class does not have the method"""

    def install(self) -> None:
        """Install the shadows."""
        for name, owner in self.shadowed.items():
            # The attribute may be the shadow of an earlier fit. That fit could not remove the
            # shadow if other code had wrapped it at the time and has unwrapped it since.
            while (earlier := _interception_of(owner, name)) is not None:
                is_of_other = earlier.is_active and earlier.trainer is not self.trainer
                if is_of_other and is_running(earlier.trainer):
                    break  # this fit runs within the other one; both have this precision plugin
                earlier.remove()
            if name in vars(owner):
                self.displaced[name] = vars(owner)[name]
            elif not hasattr(type(owner), name):
                self.proxied[name] = getattr(owner, name)
            setattr(owner, name, Shadow(self, name))

    def remove(self) -> None:
        """Remove the shadows, except those that other code has wrapped."""
        self.is_active = False
        for name, owner in self.shadowed.items():
            if _interception_of(owner, name) is not self:
                continue
            if name in self.displaced:
                setattr(owner, name, self.displaced[name])
                earlier = _interception_of(owner, name)
                if earlier is not None and not earlier.is_active:  # its fit ended during this fit
                    earlier.remove()
                continue
            delattr(owner, name)
            # Deleting the shadow may not bring the attribute back. A mock, for example, does not
            # create an attribute again that was deleted.
            if name in self.proxied and not hasattr(owner, name):
                setattr(owner, name, self.proxied[name])

    def original(self, name: str) -> Any:
        """The method that a shadow replaces.

        If that is the shadow of another Trainer, the method that the other shadow replaces.
        """
        if name in self.displaced:
            found = self.displaced[name]
            # The guard of another Trainer takes no part in this Trainer's fit.
            return found.interception.original(name) if isinstance(found, Shadow) else found
        if name in self.proxied:
            return self.proxied[name]
        owner = self.shadowed[name]
        # What attribute access finds without the shadow. It may be a static method or a partial.
        found = inspect.getattr_static(type(owner), name)
        bind = getattr(type(found), "__get__", None)
        return found if bind is None else bind(found, owner, type(owner))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original("training_step")
        if not self.is_active or skips_backward(self.trainer):
            return original(*args, **kwargs)
        with _set_guard_of_step(self.guard):
            self.guard.begin_step()
            output = original(*args, **kwargs)
            if self.trainer.lightning_module.automatic_optimization:
                if isinstance(output, Tensor):
                    output = _averaged(self.guard.clip_unnamed(output))
                elif isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
                    loss = _averaged(self.guard.clip_unnamed(output["loss"]))
                    output = {**output, "loss": loss}
                # Lightning handles other outputs: None skips the step, anything else is an error.
            self.guard.end_step(self.trainer)
        return output

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.original("backward")
        is_manual = not self.trainer.lightning_module.automatic_optimization
        if self.is_active and is_manual and guard_of_step() is self.guard:
            closure_loss = self.guard.clip_unnamed(closure_loss)
            # If a ``gradient`` is passed, it weights the elements, so they are not averaged.
            if not args and kwargs.get("gradient") is None:
                closure_loss = _averaged(closure_loss)
        outer, self.is_in_backward = self.is_in_backward, True
        try:
            return original(closure_loss, optimizer, *args, **kwargs)
        finally:
            self.is_in_backward = outer

    def optimizer_step(self, optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.original("optimizer_step")
        if not self.is_active:
            return original(optimizer, closure, *args, **kwargs)

        def step(closure: Any) -> Any:
            return original(optimizer, closure, *args, **kwargs)

        return self.guard.step_optimizer(self.trainer, optimizer, closure, step)

    def clip_grad_by_norm(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.original("clip_grad_by_norm")
        if not self.is_active:
            return original(optimizer, *args, **kwargs)
        with norms_watched(functools.partial(self.guard.note_gradient_norm, optimizer)):
            return original(optimizer, *args, **kwargs)

    def update_lr_schedulers(self, interval: str, *args: Any, **kwargs: Any) -> None:
        if not (self.is_active and interval == "step" and self.guard.holds_back_schedulers()):
            self.original("update_lr_schedulers")(interval, *args, **kwargs)


def _interception_of(owner: Any, name: str) -> Interception | None:
    """The interception whose shadow replaces this method of an object now, if any."""
    found = vars(owner).get(name)
    return found.interception if isinstance(found, Shadow) else None


class StepShadows:
    """The shadows of the optimizers' own ``step``, from :meth:`install` to :meth:`remove`.

    Under manual optimization a module may call an optimizer's ``step`` without Lightning's wrapper.
    Such a call does not reach ``strategy.optimizer_step``.

    Args:
        optimizers: their steps are intercepted. So are the steps of optimizers that they wrap.
        intercept: called with three arguments: an optimizer; its closure, or ``None``; and the
            function ``step``, which takes the closure.
    """

    def __init__(
        self,
        optimizers: Iterable[Any],
        intercept: Callable[[Any, Any, Callable[[Any], Any]], Any],
    ) -> None:
        self.is_active = True
        self.optimizers = _with_wrapped(optimizers)
        self._intercept = intercept
        self._replaced: list[Any] = []
        self._shadows: list[Any] = []

    def install(self) -> None:
        """Install the shadows."""
        for optimizer in self.optimizers:
            self._replaced.append(vars(optimizer).get("step"))
            # A scheduler that is made later reads ``optimizer.step.__func__``. Only a bound method
            # has this attribute.
            self._shadows.append(MethodType(self._shadow_of(optimizer.step), optimizer))
            optimizer.step = self._shadows[-1]

    def remove(self) -> None:
        """Remove the shadows, except those that other code has wrapped."""
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


def _with_wrapped(optimizers: Iterable[Any]) -> list[Any]:
    """Optimizers, and the optimizers that these wrap. SAM and Lookahead wrap one, for example.

    Each is in the list once, also if an optimizer refers to the one that wraps it.
    """
    found: list[Any] = []
    candidates = list(optimizers)
    for each in candidates:  # grows
        if isinstance(each, Optimizer) and each not in found:
            found.append(each)
            candidates += vars(each).values()
    return found


def _averaged(loss: Tensor) -> Tensor:
    if not loss.numel():
        return loss.sum()  # 0; the mean would be NaN
    return loss.mean() if loss.ndim else loss
