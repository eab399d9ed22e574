"""The choice of the module that clips a loss: ``cpu``, ``accelerator`` or ``tensors``.

Each of these modules is a path: it has the functions ``clip`` and ``learn``. All paths compute the
same.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_alrc._moments import accelerator, cpu, tensors
from lightning_alrc._moments.call import Call
from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State

__all__ = ["Path", "path_of", "path_of_state"]


class Path(Protocol):
    """The functions of each path."""

    def clip(self, loss: Tensor, call: Call) -> Tensor:
        """Clip losses by the moments, and update the moments by the clipped losses.

        Args:
            loss: losses of any shape and floating dtype.
            call: the moments and settings, and where sums go.

        Returns:
            The clipped losses. If nothing is clipped, this may be ``loss`` itself.
        """

    def learn(self, state: State, rules: Rules, reduced: Tensor) -> None:
        """Update the moments by all ranks' sums, in the order of ``Sums``."""


def path_of(loss: Tensor) -> Path:
    """The path of a loss."""
    if torch.compiler.is_compiling():
        return tensors  # Inductor compiles tensor operations to kernels
    if loss.is_cpu:
        return cpu  # reading the loss does not wait for a device
    return accelerator if accelerator.takes(loss) else tensors


def path_of_state(state: State) -> Path:
    """The path by which moments learn from all ranks' sums when there is no loss to clip."""
    if state.has_floats:
        return cpu
    return accelerator if state.is_one_tensor and not torch.compiler.is_compiling() else tensors
