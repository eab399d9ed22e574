"""What a skipped step puts back: parameters and optimizer state, and a module's buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

__all__ = ["Buffers", "Movers", "Snapshot"]


class Snapshot:
    """An optimizer's parameters, state and settings as they are now."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self._values = [each.detach().clone() for each in self._parameters]
        self._state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    def is_changed(self) -> bool:
        """Whether a parameter has another value. Reads the device."""
        pairs = zip(self._parameters, self._values, strict=True)
        return not all(torch.equal(each, value) for each, value in pairs)

    def restore(self) -> None:
        """Put all of it back."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                parameter.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(settings)


class Movers:
    """Finds the optimizers that move parameters before they have called their closure.

    PyTorch's own do not, but for LBFGS. Of any other this is observed in its first steps, which
    takes a copy of its parameters and state in each.
    """

    OBSERVED = 10
    """first steps of each optimizer that are observed"""

    def __init__(self) -> None:
        self._moves: dict[Optimizer, bool] = {}
        self._steps: dict[Optimizer, int] = {}

    def snapshot(self, optimizer: Any) -> Snapshot | None:
        """What a step is to be undone by, if it may need that."""
        if not isinstance(optimizer, Optimizer):
            return None
        if optimizer not in self._moves:
            self._moves[optimizer] = isinstance(optimizer, torch.optim.LBFGS)
            is_known = type(optimizer).__module__.startswith("torch.optim.")
            self._steps[optimizer] = self.OBSERVED if is_known else 0
        is_observed = self._steps[optimizer] < self.OBSERVED
        self._steps[optimizer] += 1
        return Snapshot(optimizer) if self._moves[optimizer] or is_observed else None

    def observe(self, optimizer: Any, snapshot: Snapshot) -> None:
        """A closure is called: see whether parameters have moved since the step began."""
        if not self._moves[optimizer]:
            self._moves[optimizer] = snapshot.is_changed()


class Buffers:
    """The buffers that a module's training steps change, as BatchNorm's statistics.

    A batch with a NaN would leave them NaN for good.

    Args:
        module: whose floating buffers, its parts' too, are saved.
    """

    OBSERVED = 3
    """first steps in which the values are compared, on the host"""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: dict[tuple[nn.Module, str], tuple[int, int]] = {}
        """identity and version of each when it was last looked at"""
        self._saved: dict[tuple[nn.Module, str], Tensor] = {}
        self._changing: set[tuple[nn.Module, str]] = set()
        self._saves = 0

    @property
    def may_change(self) -> bool:
        """Whether any has changed so far. Unknown, and so ``True``, in the first steps."""
        is_unknown = self._saves <= self.OBSERVED and len(self._seen) > 0
        return is_unknown or len(self._changing) > 0

    def save(self) -> None:
        """Keep the values of now, of those that have ever changed."""
        for module in self._module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                    self._look_at((module, name), buffer)
        self._saves += 1

    def _look_at(self, key: tuple[nn.Module, str], buffer: Tensor) -> None:
        now, before = (id(buffer), buffer._version), self._seen.get(key)
        saved = self._saved.get(key)
        # Batch normalization changes its statistics without a new version.
        is_norm = isinstance(key[0], _NormBase) and key[0].training
        has_new_version = before is not None and before != now
        if is_norm or has_new_version or (saved is not None and self._differs(buffer, saved)):
            self._changing.add(key)
        if key in self._changing or self._saves == 0 or before is None:
            self._saved[key] = buffer.detach().clone()
        elif self._saves >= self.OBSERVED:
            self._saved.pop(key, None)
        self._seen[key] = now

    def _differs(self, buffer: Tensor, saved: Tensor) -> bool:
        """Whether a buffer has changed without a new version; looked at in the first steps."""
        is_looked_at = 0 < self._saves <= self.OBSERVED
        return is_looked_at and not (buffer.device == saved.device and torch.equal(buffer, saved))

    def restore(self) -> None:
        """Put the kept values back."""
        with torch.no_grad():
            for (module, name), value in self._saved.items():
                buffer = module._buffers.get(name)
                if buffer is not None and buffer.shape == value.shape:
                    buffer.copy_(value)
                else:
                    module._buffers[name] = value.clone()
