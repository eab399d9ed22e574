"""``NamedLosses``: the ALRC of each named loss, and their state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_alrc._moments.arguments import is_name
from lightning_alrc._moments.state import State
from lightning_alrc._trainer.rank_zero import rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["RETURNED", "NamedLosses", "metric_name"]

RETURNED = "loss"
"""The name of the loss that training_step returns."""

STATE_VERSION = 1


def metric_name(loss: str, metric: str) -> str:
    """The name under which a metric of a loss is logged.

    >>> metric_name("loss", "threshold"), metric_name("generator", "threshold")
    ('alrc/threshold', 'alrc/generator/threshold')
    """
    return f"alrc/{metric}" if loss == RETURNED else f"alrc/{loss}/{metric}"


class NamedLosses(dict[str, ALRC]):
    """Maps each loss's name to its ALRC. Unless names are declared, a name is added when first met.

    Args:
        settings: arguments of every :class:`ALRC`.
        declared: by name, the arguments of that loss which replace those in ``settings``. If given,
            no other name is allowed.

    Raises:
        TypeError: if a setting is not a number, or ``declared`` is not a mapping of mappings.
        ValueError: if a setting is out of its range, or a name is not valid.
    """

    def __init__(
        self, settings: dict[str, Any], declared: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {**ALRC(**settings).settings}
        self.declared = declared is not None
        self._is_shared = True
        self._resumed = False
        self._unused_since_resumed: set[str] = set()
        for name, own in _checked_declaration(declared).items():
            try:
                self[name] = ALRC(**(settings | own))
            except (TypeError, ValueError) as error:
                raise type(error)(f"losses[{name!r}]: {error}") from None

    def get_or_add(self, name: str) -> ALRC:
        """The ALRC of a loss that is about to be clipped, added if it is missing.

        Raises:
            ValueError: if ``name`` is not valid, or not among the declared names.
        """
        alrc = self.get(name) if isinstance(name, str) else None
        if alrc is None:
            return self._added(name)
        if self._unused_since_resumed:
            self._unused_since_resumed.discard(name)
        return alrc

    def _added(self, name: str) -> ALRC:
        _check_name(name)
        if self.declared:
            what = ", the name of what training_step returns" if name == RETURNED else ""
            raise ValueError(
                "name must be one of the losses this ALRCCallback was made for, "
                f"{sorted(self)}, got {name!r}{what}"
            )
        if self._resumed:
            rank_zero_warn(f"the checkpoint has no ALRC moments of {name!r}: it starts afresh")
        self[name] = self._new()
        return self[name]

    def _new(self) -> ALRC:
        return ALRC(**self.settings, synchronize=self._is_shared)

    def share(self, is_shared: bool) -> None:
        """Set :attr:`ALRC.synchronize` for every loss; ``True`` at first.

        If ``True``, every rank must clip every loss. An ``Exchange`` ignores this setting.
        """
        if is_shared != self._is_shared:
            self._is_shared = is_shared
            for alrc in self.values():
                alrc.synchronize = is_shared

    def forget(self) -> None:
        """Restart the moments and counts if names are declared. Otherwise remove all names."""
        for name in list(self):
            self._forget(name)
        self._resumed = False
        self._unused_since_resumed = set()

    def _forget(self, name: str) -> None:
        if self.declared:
            self[name].forget()
        else:
            del self[name]

    def warn_of_unused(self) -> None:
        """Warn once of losses in the checkpoint that were not clipped after it was loaded."""
        if self._unused_since_resumed:
            rank_zero_warn(
                f"the checkpoint has ALRC moments of {sorted(self._unused_since_resumed)}, which "
                "no step has clipped since: they are kept as they are"
            )
            self._unused_since_resumed = set()

    def state_dict(
        self, of_snapshot: bool = False, logs_row: bool = False, waits: bool = True
    ) -> dict[str, Any]:
        """Settings, moments and counts of each loss, as plain numbers and strings.

        For the arguments see :meth:`~lightning_alrc.ALRC.dump`.
        """
        dumped = {n: alrc.dump(of_snapshot, logs_row, waits) for n, alrc in self.items()}
        return {
            "version": STATE_VERSION,
            "losses": {name: state for name, state in dumped.items() if state is not None},
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Continue from what :meth:`state_dict` returned, with the settings of this object.

        Warns if settings or names differ, and says what happens.

        Raises:
            ValueError: if the state is not valid. Nothing is changed then.
        """
        saved = _checked_state(state_dict)
        for name in self.keys() - saved.keys():
            if self.declared:
                rank_zero_warn(f"the checkpoint has no ALRC moments of {name!r}: it starts afresh")
            self._forget(name)
        for name, state in saved.items():
            if name not in self and self.declared:
                rank_zero_warn(
                    f"the checkpoint's ALRC moments of {name!r} are dropped: this ALRCCallback was "
                    f"made for {sorted(self)}"
                )
                continue
            alrc = self.setdefault(name, self._new())
            _warn_of_differences(name, state.get("settings"), alrc.settings)
            alrc.load(State.read(state))
        # A learning rate search restores a state without losses. Then nothing is resumed.
        self._resumed = bool(saved)
        self._unused_since_resumed = set(self) & saved.keys()


def _check_name(name: Any) -> None:
    if not is_name(name):
        raise ValueError(
            "a loss's name must be a string of 1 to 100 letters, digits, '_', '-' or '.', "
            f"got {name!r:.120}"
        )


def _checked_declaration(declared: Any) -> dict[str, dict[str, Any]]:
    if declared is None:
        return {}
    if not isinstance(declared, Mapping) or not declared:
        raise TypeError(
            "losses must map each loss's name to a dict of its settings, as in "
            f"{{'generator': {{'num_stddev': 2}}}}, got {declared!r:.200}"
        )
    allowed = ALRC().settings.keys()
    for name, own in declared.items():
        _check_name(name)
        if not isinstance(own, Mapping) or not own.keys() <= allowed:
            raise TypeError(
                f"losses[{name!r}] must be a dict of settings among {sorted(allowed)}, "
                f"got {own!r:.200}"
            )
    return {name: dict(own) for name, own in declared.items()}


def _checked_state(state_dict: Any) -> dict[str, Any]:
    """The losses' states, by name.

    Raises:
        ValueError: if any part is not valid.
    """
    is_mapping = isinstance(state_dict, Mapping)
    version = state_dict.get("version") if is_mapping else type(state_dict).__name__
    if type(version) is not int or version != STATE_VERSION:
        raise ValueError(
            f"ALRCCallback state must be of version {STATE_VERSION}, got {version!r:.100}: it was "
            "written by something else, or by a later release of lightning-alrc"
        )
    losses = state_dict.get("losses")
    if not isinstance(losses, Mapping):
        raise ValueError(f"ALRCCallback state 'losses' must be a mapping, got {losses!r:.100}")
    for name, state in losses.items():
        _check_name(name)
        try:
            State.read(state)
        except ValueError as error:
            raise ValueError(f"ALRCCallback state of loss {name!r}: {error}") from error
    return dict(losses)


def _warn_of_differences(name: str, saved: Any, settings: dict[str, Any]) -> None:
    saved = saved if isinstance(saved, Mapping) else {}
    differing = [
        f"{key} is {saved.get(key)!r:.50} there and {value!r} here"
        for key, value in settings.items()
        if type(saved.get(key)) is not type(value) or saved.get(key) != value
    ]
    if differing:
        rank_zero_warn(
            f"the checkpoint's ALRC settings of {name!r} differ: {', '.join(differing)}. Its "
            "moments are continued, with the settings given here"
        )
