"""The settings of a loss, and the limits and decays that are derived from the settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, overload

from lightning_alrc._moments.bounds import BURN_IN, Limits, tracks_clipped
from lightning_alrc._moments.state import Decays

__all__ = ["Rules", "Setting", "Settings", "rules_of"]

RAMP_HORIZON = float(BURN_IN - 1)
"""The horizon of :func:`~lightning_alrc.functional.ramped_decay`. At the end of the burn-in the
moments are plain means over the burn-in."""


class Settings(NamedTuple):
    """The arguments of :class:`~lightning_alrc.ALRC`."""

    num_stddev: float
    decay: float
    mu1_start: float | None
    mu2_start: float | None
    num_stddev_below: float | None
    mu2_decay: float | None


class Rules(NamedTuple):
    """Settings, and the limits and decays derived from them."""

    settings: Settings
    limits: Limits
    decays: Decays


@functools.lru_cache(maxsize=256)
def rules_of(settings: Settings) -> Rules:
    """The rules of settings. Equal settings give the same object."""
    above, below = settings.num_stddev, settings.num_stddev_below
    burns_in, tracks = settings.mu1_start is None, tracks_clipped(above, below)
    ramp = RAMP_HORIZON if burns_in else None
    return Rules(
        settings,
        Limits(above, below, burns_in, tracks),
        Decays(settings.decay, settings.mu2_decay, ramp, tracks),
    )


Value = TypeVar("Value")


class Setting(Generic[Value]):
    """An attribute that reads and sets one setting of the object's ``_rules``.

    Args:
        check: takes the attribute's name and the value given. Returns the value to keep, or raises.
            ``None`` for an attribute that cannot be set.
    """

    def __init__(self, check: Callable[[str, Any], Value] | None = None) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[Value]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> Value: ...
    def __get__(self, instance: Any, owner: type) -> Setting[Value] | Value:
        if instance is None:
            return self
        value: Value = getattr(instance._rules.settings, self._name)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        if self._check is None:
            raise AttributeError(
                f"{self._name} cannot be set to {value!r:.100}: it has had its effect. Make a new "
                f"{type(instance).__name__}"
            )
        checked = self._check(self._name, value)
        instance._rules = rules_of(instance._rules.settings._replace(**{self._name: checked}))
