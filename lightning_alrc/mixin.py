"""``ALRCMixin``: a LightningModule that adds its own callback to the Trainer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_alrc._trainer.interception import guard_of_step
from lightning_alrc._trainer.lightning import is_running, trainer_is_calling
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc.callback import ALRCCallback

__all__ = ["ALRCMixin"]


class ALRCMixin:
    """Adaptive learning rate clipping for a LightningModule, by a base class.

    >>> class Net(ALRCMixin, LightningModule):    # doctest: +SKIP
    ...     ...

    The mixin adds the callback of :meth:`configure_alrc` to the Trainer, by Lightning's
    ``configure_callbacks``. If the Trainer has an :class:`ALRCCallback` already, that callback is
    used instead. The mixin must come before the base that is a LightningModule.
    """

    # Without an annotation, because TorchScript would try to compile the annotated type.
    _alrc_callback = cast("ALRCCallback | None", None)
    _warned_of_trainer = False

    def configure_alrc(self) -> ALRCCallback:
        """Override to choose the settings, as in ``return ALRCCallback(num_stddev=2)``.

        Called at most once, when the module first needs a callback of its own.
        """
        return ALRCCallback()

    def alrc(self, loss: Tensor, name: str = "loss") -> Tensor:
        """Clip a loss of this module by moments of its own.

        Use this method for several losses, or for a loss that is weighted or logged after it was
        clipped. If a training step has called this method, the loss that the step returns is not
        clipped again. This method works without a Trainer, too. Outside of training, it returns
        losses as they are.

        Args:
            loss: losses of any shape and floating dtype. Each element is clipped separately.
            name: the name of the loss, ``"loss"`` by default. Each name has its own moments, and is
                logged as ``alrc/<name>/...``; ``"loss"`` is logged as ``alrc/...``.

        Returns:
            The clipped losses: same shape, dtype and device.

        Raises:
            TypeError: if ``loss`` is not a tensor of a floating dtype.
            ValueError: if ``loss`` does not require a gradient while training, or ``name`` is not
                among the names that the callback allows.
        """
        guard = guard_of_step()
        if guard is not None:
            return guard.clip(loss, name)
        trainer = getattr(self, "_trainer", None)
        in_other_step = trainer is not None and is_running(trainer)
        if in_other_step or not self.training:  # type: ignore[attr-defined]
            return loss
        callback = self._own_alrc_callback()
        is_in_foreign_trainer = not torch.compiler.is_compiling() and trainer_is_calling()
        # In a Trainer without this callback, it is possible that only some ranks clip this loss.
        # An all-reduce would then hang. So each rank keeps its own moments.
        callback.losses.share(not is_in_foreign_trainer)
        if is_in_foreign_trainer:
            self._warn_of_trainer()
        return callback.clip(loss, name)

    def _warn_of_trainer(self) -> None:
        """Warn once that this submodule clips with a callback that the Trainer does not have."""
        if not self._warned_of_trainer:
            self._warned_of_trainer = True
            rank_zero_warn(
                f"ALRC: {type(self).__name__} is a part of a module that is being trained, and "
                "Lightning gives it no Trainer. Its losses are clipped, but each rank "
                "has moments of its own, which are not saved, and nothing is logged: add "
                "ALRCCallback() to the Trainer's callbacks"
            )

    if not TYPE_CHECKING:  # a type checker sees the property of LightningModule, and its type

        @property
        def trainer(self) -> Any:
            """The Trainer. Setting the Trainer of a submodule may add the submodule's callback."""
            return super().trainer

        @trainer.setter
        def trainer(self, trainer: Any) -> None:
            super(ALRCMixin, type(self)).trainer.fset(self, trainer)
            if trainer is not None:
                self._add_callback_to(trainer)

    def _add_callback_to(self, trainer: Any) -> None:
        """If this is a submodule, add its callback to a Trainer that has none."""
        whole = trainer.lightning_module
        if whole is None or whole is self or isinstance(whole, ALRCMixin):
            return
        _drop_callbacks_of_other_modules(trainer, [self, *whole.modules()])
        if not any(map(_is_from_code, trainer.callbacks)):
            # Checkpoint callbacks must stay last.
            index = len(trainer.callbacks) - len(trainer.checkpoint_callbacks)
            trainer.callbacks.insert(index, self._own_alrc_callback())

    def configure_callbacks(self) -> Sequence[Any] | Any:
        """The other bases' callbacks, and an :class:`ALRCCallback` unless the Trainer has one."""
        return self._with_alrc_callback(super().configure_callbacks())  # type: ignore[misc]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(ALRCMixin)]:
            if "trainer" in vars(base) and not issubclass(base, ALRCMixin):
                mixin = next(each for each in cls.__bases__ if issubclass(each, ALRCMixin))
                other = next(
                    each
                    for each in cls.__bases__
                    if issubclass(each, base) and not issubclass(each, ALRCMixin)
                )
                raise TypeError(
                    f"{mixin.__name__} must come before {other.__name__} among the bases of "
                    f"{cls.__name__}, as in class {cls.__name__}({mixin.__name__}, "
                    f"{other.__name__})"
                )
        # The configure_callbacks of a subclass, or of a base that comes before the mixin, often
        # does not call super(), so it is wrapped.
        owner = next(base for base in cls.__mro__ if "configure_callbacks" in vars(base))
        if owner is cls or not issubclass(owner, ALRCMixin):
            own = vars(owner)["configure_callbacks"]
            adding = _adding_alrc_callback if inspect.isfunction(own) else _AddingALRCCallback
            cls.configure_callbacks = adding(own)  # type: ignore[assignment, method-assign]

    def _with_alrc_callback(self, callbacks: Sequence[Any] | Any) -> Sequence[Any]:
        listed = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        listed = [callback for callback in listed if callback is not None]
        trainer = getattr(self, "_trainer", None)
        if trainer is not None:
            _drop_callbacks_of_other_modules(trainer, [self])
        given = [] if trainer is None else trainer.callbacks
        if not any(map(_is_from_code, [*given, *listed])):
            listed.append(self._own_alrc_callback())
        return listed

    def _own_alrc_callback(self) -> ALRCCallback:
        """The callback of :meth:`configure_alrc`, made on first use."""
        if self._alrc_callback is None:
            callback = self.configure_alrc()
            if not isinstance(callback, ALRCCallback):
                raise TypeError(
                    "configure_alrc must return an ALRCCallback, got "
                    f"{callback!r:.100} of type {type(callback).__name__}"
                )
            callback.is_of_a_module = True
            self._alrc_callback = callback
        return self._alrc_callback


def _is_from_code(callback: Any) -> bool:
    """Whether a callback is an ALRCCallback, and not one that the environment variable made."""
    return isinstance(callback, ALRCCallback) and not callback.is_of_environment


def _drop_callbacks_of_other_modules(trainer: Any, modules: Iterable[Any]) -> None:
    """Drop the callbacks that modules other than these brought to an earlier run of a Trainer.

    They are not the user's choice. So they must not clip the losses of these modules.
    """
    own = [module._alrc_callback for module in modules if isinstance(module, ALRCMixin)]
    trainer.callbacks = [
        callback
        for callback in trainer.callbacks
        if not (_is_from_code(callback) and callback.is_of_a_module and callback not in own)
    ]


def _adding_alrc_callback(configure_callbacks: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a plain method ``configure_callbacks``: its result also has an :class:`ALRCCallback`."""

    @functools.wraps(configure_callbacks)
    def wrapper(self: ALRCMixin) -> Sequence[Any]:
        return self._with_alrc_callback(configure_callbacks(self))

    return wrapper


class _AddingALRCCallback:
    """As :func:`_adding_alrc_callback`, for a static or class method, a partial or the like.

    Args:
        found: what the class defines as ``configure_callbacks``.
    """

    def __init__(self, found: Any) -> None:
        self._found = found

    def __get__(self, module: ALRCMixin | None, kind: type[Any]) -> Any:
        bind = getattr(type(self._found), "__get__", None)
        configure = self._found if bind is None else bind(self._found, module, kind)
        if module is None:  # for example super() in a class method
            return configure
        return lambda: module._with_alrc_callback(configure())
