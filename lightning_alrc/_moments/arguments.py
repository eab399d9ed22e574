"""Checks of what users pass.

Most functions return the checked value. The ``check_*`` functions return nothing. If a value is not
allowed, all of these raise TypeError or ValueError. The error names the argument, the value, and
what is allowed. Only :func:`is_name` returns a bool and raises no error.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

LARGEST_START = 1e150
"""Largest start of the mean. Its square is finite."""


def number(name: str, value: Any, allowed: str) -> float:
    """A real number, or a tensor of no dimension with one, as a float."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {allowed}, got {value!r:.20}...") from None


def _plain(value: Any) -> Any:
    """A tensor or an array of no dimension, or a NumPy scalar, as Python's; others as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def flag(name: str, value: Any) -> bool:
    """``True`` or ``False``."""
    value = _plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def count(
    name: str, value: Any, allowed: str = "a whole number, 0 or above", least: int = 0
) -> int:
    """A whole number, ``least`` or above."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def flag_or_count(name: str, value: Any) -> bool | int:
    """``True``, ``False``, or a whole number, 0 or above."""
    value = _plain(value)
    if isinstance(value, bool):
        return value
    return count(name, value, "True, False or a whole number, 0 or above")


def check_is_callable(name: str, value: Any) -> None:
    """Raise unless ``value`` can be called, or is ``None``."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {value!r:.100}")


def positive(name: str, value: Any) -> float:
    """A number above 0, which may be infinite."""
    return _inside(name, value, "a positive number (math.inf: no clipping)", lambda x: x > 0)


def not_negative(name: str, value: Any) -> float:
    """A finite number, 0 or above."""
    return _inside(name, value, "a finite number, not negative", lambda x: 0 <= x < math.inf)


def decay(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    return _inside(name, value, "a number in [0, 1)", lambda x: 0 <= x < 1)


def _inside(name: str, value: Any, allowed: str, is_inside: Callable[[float], bool]) -> float:
    checked = number(name, value, allowed)
    if not is_inside(checked):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return checked


def positive_or_none(name: str, value: Any) -> float | None:
    """A number above 0, which may be infinite, or ``None``."""
    return None if value is None else positive(name, value)


def decay_or_none(name: str, value: Any) -> float | None:
    """A number in [0, 1), or ``None``."""
    return None if value is None else decay(name, value)


def fraction(name: str, value: Any) -> float:
    """A number above 0 and below 1."""
    return _inside(name, value, "a number above 0 and below 1", lambda x: 0 < x < 1)


def starts(mu1_start: Any, mu2_start: Any) -> tuple[float | None, float | None]:
    """Start values of both moments, or of none; ``mu2_start`` above ``mu1_start**2``."""
    if mu1_start is None and mu2_start is None:
        return None, None
    if mu1_start is None or mu2_start is None:
        raise ValueError(
            "mu1_start and mu2_start must be given both or neither (None: found from the first "
            f"losses), got mu1_start={mu1_start!r} and mu2_start={mu2_start!r}"
        )
    mu1 = number("mu1_start", mu1_start, "a finite number")
    mu2 = number("mu2_start", mu2_start, "a finite number more than mu1_start**2")
    if not abs(mu1) <= LARGEST_START:
        raise ValueError(f"mu1_start must lie within +-{LARGEST_START:g}, got {mu1_start!r}")
    if not mu1 * mu1 < mu2 <= LARGEST_START**2:
        raise ValueError(
            f"mu2_start must be finite and more than mu1_start**2 = {mu1 * mu1!r}, "
            f"got {mu2_start!r}"
        )
    return mu1, mu2


def is_name(value: Any) -> bool:
    """Whether a loss may have this name: 1 to 100 letters, digits, '_', '-' or '.'."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,100}", value) is not None


def check_is_loss(loss: Any) -> None:
    """Raise unless ``loss`` is a tensor of a floating dtype."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {loss!r:.100} of type {type(loss).__name__}")
    if not loss.is_floating_point():
        raise TypeError(
            f"loss must be of a floating dtype, got {loss.dtype} in a {tuple(loss.shape)} tensor"
        )
