"""How a loss is clipped: one decision, by where it is and what is installed.

Each path is a module that has :func:`clip` and :func:`learn`. The same comes of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_alrc._moments import accelerator, cpu, tensors
from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import Sums

__all__ = ["Path", "path_of", "path_of_message"]


class Path(Protocol):
    """What each of the modules has."""

    def clip(
        self,
        loss: Tensor,
        state: State,
        rules: Rules,
        watcher: Callable[[Tensor], None] | None,
        sums_watcher: Callable[[Sums], None] | None = None,
        skips_spikes: bool = False,
        message: Tensor | None = None,
        row: Tensor | None = None,
    ) -> Tensor:
        """Clip losses by the moments, and move the moments by the clipped losses.

        Args:
            loss: losses of any shape and floating dtype.
            state: the moments; brought to where the path keeps them, and changed.
            rules: the settings.
            watcher: that of :class:`~lightning_alrc.ALRC`, as the next two.
            sums_watcher: is told of the sums of this call.
            skips_spikes: whether a call that spikes counts as offending.
            message: the row of all ranks' sums that the moments learn before; ``None`` for none.
            row: of the next message, to which the sums are added; the moments stay then. ``None``
                for no message.

        Returns:
            The clipped losses; the loss itself may be returned where nothing is clipped.
        """

    def learn(self, state: State, rules: Rules, message: Tensor) -> None:
        """Move the moments by the row of all ranks' sums."""


def path_of(loss: Tensor) -> Path:
    """The path of a loss."""
    if torch.compiler.is_compiling():
        return tensors  # Inductor makes its own kernels of them
    if loss.is_cpu:
        return cpu  # reading it waits for nothing
    return accelerator if accelerator.takes(loss) else tensors


def path_of_message(state: State) -> Path:
    """The path by which moments that no loss is with learn from a message."""
    if state.is_on_host:
        return cpu
    return accelerator if state.is_together and not torch.compiler.is_compiling() else tensors
