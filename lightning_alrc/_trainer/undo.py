"""What is restored after a refused step: parameters, optimizer state, and a module's buffers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_alrc._trainer.namespaces import rank_zero_warn

__all__ = ["Buffers", "EarlyUpdates", "Snapshot"]

Key = tuple[nn.Module, str]
"""A module, and the name of one of its buffers."""

STATISTICS = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0.0}
"""By name, the first value of each buffer of a batch normalization."""


class Snapshot:
    """A snapshot of an optimizer's parameters, state and settings."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # A lazy parameter has no value yet.
        self._parameters = [each for each in _parameters(optimizer) if not is_lazy(each)]
        self._values = [each.detach().clone() for each in self._parameters]
        # The state may refer to parameters. The parameters are not copied.
        not_copied: dict[int, Any] = {id(each): each for each in self._parameters}
        self._state = copy.deepcopy(dict(optimizer.state), not_copied)
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    def parameters_have_changed(self) -> bool:
        """Whether the value of a parameter has changed. Reads the device."""
        pairs = zip(self._parameters, self._values, strict=True)
        return any(_differ(each, value) for each, value in pairs)

    def restore(self) -> None:
        """Restore the parameters, state and settings."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                _write(parameter, value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            for key in group.keys() - settings.keys() - {"params"}:  # added by the step
                del group[key]
            group.update(settings)


class EarlyUpdates:
    """Undoes a refused step.

    A step is refused by an error that its closure raises. Usually, no parameter has been updated by
    then. But an optimizer may update parameters before it calls its closure. This *early* update
    must be undone.

    Among PyTorch's own optimizers, only LBFGS updates early: it calls its closure again after an
    update. Optimizers from elsewhere are observed. In the first steps, their parameters are
    compared with a snapshot. In later steps, only the version numbers of the parameters are
    compared.
    """

    STEPS_WITH_SNAPSHOT = 10
    """number of first steps of each optimizer in which its parameters are compared with a
    snapshot"""

    def __init__(self) -> None:
        self._is_early: dict[Optimizer, bool] = {}
        """whether an optimizer updates parameters before it calls its closure"""
        self._steps: Counter[Optimizer] = Counter()

    def step(
        self,
        optimizer: Any,
        closure: Callable[..., Any],
        step: Callable[[Any], Any],
        refusal: type[BaseException],
    ) -> Any:
        """Call ``step(closure)``. If the closure raises ``refusal``, undo the update."""
        if not isinstance(optimizer, Optimizer):
            return step(closure)
        is_early = self._is_early.setdefault(optimizer, isinstance(optimizer, torch.optim.LBFGS))
        if not is_early and type(optimizer).__module__.startswith("torch.optim."):
            return step(closure)
        self._steps[optimizer] += 1
        has_snapshot = is_early or self._steps[optimizer] <= self.STEPS_WITH_SNAPSHOT
        snapshot = Snapshot(optimizer) if has_snapshot else None
        versions = _versions(optimizer)

        def observed(*args: Any, **kwargs: Any) -> Any:
            if not self._is_early[optimizer]:
                self._is_early[optimizer] = (
                    versions != _versions(optimizer)
                    if snapshot is None
                    else snapshot.parameters_have_changed()
                )
            return closure(*args, **kwargs)

        try:
            return step(observed)
        except refusal:
            if snapshot is not None:
                snapshot.restore()
            elif self._is_early[optimizer]:
                rank_zero_warn(
                    f"ALRC: in a refused step, {type(optimizer).__name__} for the first time "
                    "updated parameters before it called its closure. This update stays. Later "
                    "ones are undone"
                )
            raise


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _versions(optimizer: Optimizer) -> list[int]:
    return [_version(each) for each in _parameters(optimizer)]


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return 0


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ; ``False`` if PyTorch cannot compare them (sparse ones)."""
    with suppress(NotImplementedError, TypeError):
        return not torch.equal(one, other)
    return False


def _write(tensor: Tensor, value: Tensor) -> None:
    """Copy a value of the same shape into a tensor."""
    if tensor.layout == torch.strided:
        # Without a new version: a graph whose backward is still to come may have saved the tensor.
        tensor = tensor.data
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size > 1 and stride == 0:  # made by expand(): PyTorch does not write repeated memory
                tensor, value = tensor.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    # A tensor made in inference mode can be changed only in that mode.
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(value)


class Buffers:
    """Restores buffers that training steps change, such as BatchNorm's statistics.

    Without this, a NaN in one batch would stay in the buffers for good.

    Args:
        module: the module with the buffers; its submodules' buffers are included.
    """

    STEPS_WITH_VALUES = 3
    """number of first steps in which values of buffers are compared, which reads the device"""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: dict[Key, tuple[Tensor, int]] = {}
        """each buffer and its version at the last :meth:`save`"""
        self._saved: dict[Key, Tensor] = {}
        """the values to restore"""
        self._changing: set[Key] = set()
        """the buffers that training steps change"""
        self._lazy: set[nn.Module] = set()
        """the modules that had buffers without a value at the last :meth:`save`"""
        self._saves = 0
        self._warned_of_lost = False

    @property
    def may_change(self) -> bool:
        """Whether training steps change a buffer. Also true while this is not known yet."""
        is_unknown = self._saves <= self.STEPS_WITH_VALUES and len(self._seen) > 0
        return is_unknown or len(self._changing) > 0 or len(self._lazy) > 0

    def save(self) -> None:
        """Save the values of all buffers at first, later only of new and of changing buffers."""
        self._lazy.clear()
        for key, buffer in self._named():
            if is_lazy(buffer):
                self._lazy.add(key[0])
            else:
                self._save_one(key, buffer)
        self._saves += 1

    def _named(self) -> Iterator[tuple[Key, Tensor]]:
        for module in self._module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    yield (module, name), buffer

    def _save_one(self, key: Key, buffer: Tensor) -> None:
        before, saved = self._seen.get(key), self._saved.get(key)
        # Batch normalization changes its statistics without giving them a new version.
        is_norm = isinstance(key[0], _NormBase) and key[0].training
        has_new_version = self._has_new_version(key, buffer)
        if (
            is_norm
            or has_new_version
            or (saved is not None and self._differs_from_saved(buffer, saved))
        ):
            self._changing.add(key)
        if key in self._changing or self._saves == 0 or before is None:
            self._saved[key] = buffer.detach().clone()
        elif self._saves >= self.STEPS_WITH_VALUES:
            self._saved.pop(key, None)
        self._seen[key] = buffer, _version(buffer)

    def _has_new_version(self, key: Key, buffer: Tensor) -> bool:
        before, version = self._seen.get(key, (buffer, _version(buffer)))
        return before is not buffer or version != _version(buffer)

    def _differs_from_saved(self, buffer: Tensor, saved: Tensor) -> bool:
        """Whether a buffer's value differs from the saved one; ``False`` after the first steps."""
        is_compared = 0 < self._saves <= self.STEPS_WITH_VALUES
        return is_compared and (buffer.device != saved.device or _differ(buffer, saved))

    def restore(self) -> None:
        """Restore the saved values. Warn once of changed buffers whose values are not saved."""
        now = dict(self._named())
        changed = {key for key, buffer in now.items() if self._has_new_version(key, buffer)}
        self._changing |= changed
        lost = sorted(
            f"{type(module).__name__}.{name}" for module, name in changed - self._saved.keys()
        )
        if lost and not self._warned_of_lost:
            self._warned_of_lost = True
            rank_zero_warn(
                f"ALRC: the buffers {lost} changed for the first time in a step that was refused. "
                "This change stays. Later ones are undone"
            )
        with torch.no_grad():
            for key, value in self._saved.items():
                (module, name), (buffer, _) = key, self._seen[key]
                current = now.get(key, buffer)
                if (current.device, current.dtype) != (buffer.device, buffer.dtype):
                    buffer = current  # the step has moved or cast the module
                if buffer.shape == value.shape:
                    _write(buffer, value)
                else:
                    buffer = value.clone()
                module._buffers[name] = buffer
                # The restore itself is no change.
                self._seen[key] = buffer, _version(buffer)
        for module in self._lazy:  # its buffers got their first values in the refused step
            if isinstance(module, _NormBase) and not any(map(is_lazy, module.buffers())):
                for name, buffer in module.named_buffers(recurse=False):
                    if name in STATISTICS:  # a subclass may have other buffers
                        _write(buffer, torch.full_like(buffer, STATISTICS[name]))
