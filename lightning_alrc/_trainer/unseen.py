"""``UnseenLosses``: warns of losses that are not clipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_alrc._trainer.namespaces import rank_zero_warn

__all__ = ["UnseenLosses"]


class UnseenLosses:
    """Warns of losses that training steps do not clip.

    There are two warnings. Each is given at most once a fit:

    - Some steps call ``self.alrc`` and others do not. If a step calls ``self.alrc``, the loss that
      the step returns is not clipped.
    - A manually optimized step calls ``loss.backward()``, so this loss is not clipped.

    Args:
        trainer: the Trainer of the fit.
        is_in_backward: returns whether ``strategy.backward`` runs now.
    """

    def __init__(self, trainer: Any, is_in_backward: Callable[[], bool]) -> None:
        self._is_in_backward = is_in_backward
        self._named = 0
        """number of losses that the current step has clipped by name"""
        self._direct: Counter[int] = Counter()
        """by optimizer, the number of backward passes outside of ``strategy.backward``"""
        self._through: Counter[int] = Counter()
        """by optimizer, the number of backward passes in ``strategy.backward``"""
        self._some_clip_by_name = self._some_only_return = False
        self._warned_of_names = self.warned_of_backward = False
        self._hooks: list[Any] = []
        if not trainer.lightning_module.automatic_optimization:
            for index, optimizer in enumerate(trainer.optimizers):
                self._listen(index, optimizer)

    def _listen(self, index: int, optimizer: Any) -> None:
        """Count the backward passes that reach an optimizer's first trainable parameter."""
        for group in getattr(optimizer, "param_groups", []):
            for parameter in group["params"]:
                if parameter.requires_grad:

                    def count(_: Tensor) -> None:
                        kind = self._through if self._is_in_backward() else self._direct
                        kind[index] += 1

                    with suppress(RuntimeError):  # the parameter is not a leaf
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
        self._direct.clear()
        self._through.clear()

    def note_named(self) -> None:
        """The step has clipped a loss by name."""
        self._named += 1

    def end_step(self, has_unnamed: bool) -> None:
        """A training step has run.

        Args:
            has_unnamed: whether a loss without a name was clipped: the loss that the step returned,
                or one that it gave to ``manual_backward``.
        """
        self._some_clip_by_name |= self._named > 0
        self._some_only_return |= has_unnamed
        if self._some_clip_by_name and self._some_only_return and not self._warned_of_names:
            self._warned_of_names = True
            rank_zero_warn(
                "ALRC: some training steps call self.alrc and others do not. The loss that a step "
                "returns is clipped only where the step has not called self.alrc. To protect it "
                "always, give it to self.alrc, too, under a name of its own"
            )
        # Named losses are clipped already, so each of them may have one backward pass, by
        # loss.backward() or through the strategy. Any further loss.backward() is of a loss that was
        # not clipped.
        passes_by = any(
            count > max(self._named - self._through[index], 0)
            for index, count in self._direct.items()
        )
        if passes_by and not self.warned_of_backward:
            self.warned_of_backward = True
            rank_zero_warn(
                "ALRC: loss.backward() passes by ALRC, so that loss is not clipped. Use "
                "self.manual_backward(loss), or clip it by name with self.alrc(loss, name) of "
                "ALRCMixin"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": []}  # a copy does not listen
