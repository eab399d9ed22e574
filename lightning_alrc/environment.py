"""ALRC for a program that cannot be edited: ``LIGHTNING_ALRC=1 some-program train ...``.

:func:`callbacks` is an entry point of this package. Lightning calls it whenever a Trainer is made.
"""

from __future__ import annotations

import inspect
import json
import os
from typing import Any

__all__ = ["VARIABLE", "callbacks"]

VARIABLE = "LIGHTNING_ALRC"
FUNCTIONS = {"sample_ids", "render"}
"""Settings that cannot be written as JSON."""


def callbacks() -> list[Any]:
    """The callback that the environment asks for, if any.

    ``LIGHTNING_ALRC=1`` adds ``ALRCCallback()``. ``LIGHTNING_ALRC='{"num_stddev": 2}'`` adds
    ``ALRCCallback(num_stddev=2)``. Without the variable, or with ``0``, nothing is added. If the
    Trainer has another :class:`ALRCCallback`, or the module has :class:`ALRCMixin`, the added
    callback does nothing.

    Returns:
        A list with one callback, or an empty list.

    Raises:
        TypeError, ValueError: if the variable has another value. The error says what is allowed.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value in ("", "0"):
        return []
    settings = {} if value == "1" else _settings(value)
    from lightning_alrc.callback import ALRCCallback  # the import is slow

    known = set(inspect.signature(ALRCCallback).parameters) - FUNCTIONS
    for name in settings:
        if name not in known:
            raise ValueError(f"{VARIABLE} must have settings among {sorted(known)}, got {name!r}")
    try:
        callback = ALRCCallback(**settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{VARIABLE}: {error}") from None
    callback.is_of_environment = True
    return [callback]


def _settings(value: str) -> dict[str, Any]:
    try:
        settings = json.loads(value)
    except json.JSONDecodeError as error:
        settings = error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{VARIABLE} must be 1, 0 or settings as JSON, like "
            f"{VARIABLE}='{{\"num_stddev\": 2}}', got {value!r:.200}"
        ) from (settings if isinstance(settings, Exception) else None)
    return settings
