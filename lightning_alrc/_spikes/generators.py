"""States of the random generators of PyTorch, NumPy and Python."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lightning_alrc._trainer.namespaces import rank_zero_warn

__all__ = ["checked_states", "plain_states", "set_states", "states", "unchanged"]


def states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators and of the generator of ``device``.

    Never waits for a device.
    """
    numpy = sys.modules.get("numpy")
    return {
        "cpu_generator": torch.get_rng_state(),
        "device": device.type,
        "device_generator": _device_state(device),
        "python_generator": random.getstate(),
        "numpy_generator": None if numpy is None else numpy.random.get_state(),
    }


def _device_state(device: torch.device) -> Tensor | None:
    """The state of a device's own generator; ``None`` for the CPU and devices without one."""
    if device.type == "cpu":
        return None
    state: Tensor | None = None
    with suppress(AttributeError, RuntimeError):  # PyTorch has no such function for some devices
        get = torch.get_device_module(device).get_rng_state
        state = get() if device.type == "mps" else get(device)
    return state


def plain_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """The same states, as tensors, numbers and strings only.

    NumPy's state is ``None`` if NumPy uses another kind of generator than its default.
    """
    version, numbers, gauss = states["python_generator"]
    plain = {**states, "python_generator": [version, torch.tensor(numbers, device="cpu"), gauss]}
    of_numpy = states["numpy_generator"]
    if isinstance(of_numpy, tuple):
        name, numbers, *rest = of_numpy
        plain["numpy_generator"] = [name, torch.tensor(numbers.tolist(), device="cpu"), *rest]
    else:  # NumPy is not loaded, or the user chose another kind of generator
        plain["numpy_generator"] = None
    return plain


def checked_states(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The states from :func:`plain_states` in a file; ``None`` if they are invalid.

    Files of earlier releases have only PyTorch's states. If such a file has none of a GPU, the
    device is ``None``: it is unknown.
    """
    of_cuda = content.get("cuda_generator")
    found = {
        "cpu_generator": content.get("cpu_generator"),
        "device": content.get("device", None if of_cuda is None else "cuda"),
        "device_generator": content.get("device_generator", of_cuda),
        "python_generator": content.get("python_generator"),
        "numpy_generator": content.get("numpy_generator"),
    }
    number, tensor = (int, float), Tensor
    kinds: dict[str, Any] = {
        "python_generator": [int, tensor, (float, type(None))],
        "numpy_generator": [str, tensor, int, int, number],
    }
    are_sound = isinstance(found["cpu_generator"], Tensor)
    are_sound &= isinstance(found["device"], (str, type(None)))
    are_sound &= isinstance(found["device_generator"], (Tensor, type(None)))
    for key, kind in kinds.items():
        state = found[key]
        if state is not None and not (
            isinstance(state, list)
            and len(state) == len(kind)
            and all(map(isinstance, state, kind))
        ):
            are_sound = False
    return found if are_sound else None


def set_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the states of all generators.

    Warns if the states come from another type of device.

    Args:
        states: states from :func:`checked_states`.
        device: device of the module.
    """
    torch.set_rng_state(states["cpu_generator"])
    on_device = states["device_generator"]
    if on_device is not None and states["device"] == device.type:
        _set_device_state(on_device, device)
    elif states["device"] not in (None, device.type):
        rank_zero_warn(
            f"on the module's device, the replay draws other random numbers than the training: the "
            f"device's type was {states['device']!r}, now it is {device.type!r}"
        )
    if states["python_generator"] is not None:
        version, numbers, gauss = states["python_generator"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
    if states["numpy_generator"] is not None:
        import numpy

        name, numbers, *rest = states["numpy_generator"]
        numpy.random.set_state((name, numpy.array(numbers.tolist(), "uint32"), *rest))


def _set_device_state(state: Tensor, device: torch.device) -> None:
    set_state = torch.get_device_module(device).set_rng_state
    if device.type == "mps":
        set_state(state)
    else:
        set_state(state, device)


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """Restore the states of all generators at the end."""
    before = states(device)
    try:
        yield
    finally:
        set_states(plain_states(before), device)
