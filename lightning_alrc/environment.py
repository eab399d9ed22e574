"""ALRC for a training that cannot be edited: ``LIGHTNING_ALRC=1 some-program train ...``.

Lightning calls :func:`callbacks` whenever a Trainer is made, as an entry point of this package.
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
    """The callback that the environment asks for, if it does.

    ``LIGHTNING_ALRC=1`` is ``ALRCCallback()``. ``LIGHTNING_ALRC='{"num_stddev": 2}'`` is
    ``ALRCCallback(num_stddev=2)``. Without the variable, or with ``0``, there is none. Beside an
    :class:`ALRCCallback` or a module with :class:`ALRCMixin` it does nothing.

    Returns:
        One callback, or none.

    Raises:
        TypeError, ValueError: names the variable, what is wrong with it, and what is allowed.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value in ("", "0"):
        return []
    settings = {} if value == "1" else _settings(value)
    from lightning_alrc.callback import ALRCCallback  # takes time

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
