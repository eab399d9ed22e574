"""Warnings of losses that a fit's steps leave unprotected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_alrc._trainer.namespaces import rank_zero_warn

__all__ = ["UnseenLosses"]


class UnseenLosses:
    """Notices, in each training step of a fit, which losses pass ALRC by.

    Two things are told once a fit. Some steps name losses by ``self.alrc`` and others do not: what
    the former return is not clipped. A manually optimized step calls ``loss.backward()``.

    Args:
        trainer: that of the fit.
        differentiates: whether ``strategy.backward`` runs now.
    """

    def __init__(self, trainer: Any, differentiates: Callable[[], bool]) -> None:
        self._differentiates = differentiates
        self._named = 0
        self._plain: Counter[int] = Counter()
        self._through: Counter[int] = Counter()
        """backward passes that reach each optimizer: by themselves, and through the strategy"""
        self._names_some = self._names_none = False
        self._told_of_names = self.told_of_backward = False
        self._hooks: list[Any] = []
        if not trainer.lightning_module.automatic_optimization:
            for index, optimizer in enumerate(trainer.optimizers):
                self._listen(index, optimizer)

    def _listen(self, index: int, optimizer: Any) -> None:
        """Count the backward passes that reach an optimizer, by its first parameter."""
        for group in getattr(optimizer, "param_groups", []):
            for parameter in group["params"]:
                if parameter.requires_grad:

                    def count(_: Tensor) -> None:
                        kind = self._through if self._differentiates() else self._plain
                        kind[index] += 1

                    with suppress(RuntimeError):  # of a parameter that is no leaf
                        self._hooks.append(parameter.register_post_accumulate_grad_hook(count))
                    return

    def stop(self) -> None:
        """The fit has ended."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin_step(self) -> None:
        """A training step is about to run."""
        self._named = 0
        self._plain.clear()
        self._through.clear()

    def name(self) -> None:
        """The step has named a loss."""
        self._named += 1

    def end_step(self, returned: bool) -> None:
        """It has run.

        Args:
            returned: whether a loss was clipped that it returned and did not name.
        """
        self._names_some |= self._named > 0
        self._names_none |= returned
        if self._names_some and self._names_none and not self._told_of_names:
            self._told_of_names = True
            rank_zero_warn(
                "ALRC: some training steps call self.alrc and others do not. The loss that a step "
                "returns is clipped only where the step has not called self.alrc. To protect it "
                "always, give it to self.alrc, too, under a name of its own"
            )
        # A named loss is clipped already, and may be differentiated in any way, but once.
        passes_by = any(
            count > max(self._named - self._through[index], 0)
            for index, count in self._plain.items()
        )
        if passes_by and not self.told_of_backward:
            self.told_of_backward = True
            rank_zero_warn(
                "ALRC: loss.backward() passes by ALRC, so that loss is not clipped. Use "
                "self.manual_backward(loss), or clip it by name with self.alrc(loss, name) of "
                "ALRCMixin"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": []}  # a copy has no parameters to listen to
