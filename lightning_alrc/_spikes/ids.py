"""Finds the ids in a batch, and decides which of them belong to a vector of losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from torch import Tensor

from lightning_alrc._moments.arguments import is_name

__all__ = [
    "GIVEN",
    "MOST_IDS",
    "Ids",
    "SampleIds",
    "all_ids",
    "checked_sample_ids",
    "dump_sample_ids",
    "encodable",
    "ids_in",
    "is_list_of_ids",
    "number_of_samples",
    "with_own_storage",
]

Ids = Mapping[str, Any]
"""Lists of ids. The key is the path to a list in the batch, as in ``"1.id"``, or :data:`GIVEN`."""

GIVEN = "given"
"""Key of the ids that the user's function returned. For these ids, :class:`SampleIds`
ignores earlier calls."""

MOST_IDS = 64
"""Largest number of ids that one spike lists. A longer list may be of token ids, and would fill the
record."""

KEYS = ("id", "ids")
DEPTH = 3
"""Levels of a nested batch that are searched."""
DATASETS = 4
"""Levels of nested datasets that are searched for a length."""
MOST_PARTS = 16
"""Longest list that is searched. A longer list has samples, not parts of a batch."""

PLAIN = (str, int, float, bool, type(None))
"""Types that an id may have in a record."""


def ids_in(batch: Any) -> Ids:
    """All lists of ids in a batch: those under a key or attribute ``id`` or ``ids``.

    >>> ids_in({"x": [0.5, 0.25], "id": ["a", "b"]})
    {'id': ['a', 'b']}
    >>> ids_in([[0.5, 0.25], {"id": ["a", "b"]}])
    {'1.id': ['a', 'b']}

    A batch may be a dict, a named tuple, a dataclass or any other object with attributes. The parts
    of a dict, list, tuple or dataclass are searched, too. A list of ids is a list, a tuple, or a
    1-d tensor or array. It has strings or numbers.
    """
    found: dict[str, Any] = {}
    _search(batch, "", DEPTH, found)
    return found


def _search(batch: Any, where: str, depth: int, found: dict[str, Any]) -> None:
    if isinstance(batch, (Tensor, str)):
        return
    for key in KEYS:
        ids = None
        with suppress(Exception):  # the attribute may be a property that raises
            ids = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
        if _are_ids(ids):
            found[where + key] = ids
            return
    if depth > 1:
        for key, part in _parts(batch):
            _search(part, f"{where}{key}.", depth - 1, found)


def _parts(batch: Any) -> Iterator[tuple[Any, Any]]:
    """The key and value of each part of a batch, if the batch is a collection."""
    if isinstance(batch, Mapping):
        yield from batch.items()
    elif isinstance(batch, (list, tuple)):
        yield from enumerate(batch) if len(batch) <= MOST_PARTS else ()
    elif is_dataclass(batch):
        yield from ((each.name, getattr(batch, each.name, None)) for each in fields(batch))


def number_of_samples(loaders: Any) -> int | None:
    """Length of the largest dataset of a Trainer's loaders; ``None`` if none has a length.

    For a ``Subset`` it is the length of the whole dataset, because ids are usually indices of the
    whole dataset.

    >>> from torch.utils.data import DataLoader, Subset
    >>> number_of_samples({"a": DataLoader(Subset(range(100), [3, 97])), "b": DataLoader([1, 2])})
    100
    """
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        lengths = [number_of_samples(each) for each in loaders]
        return max((each for each in lengths if each is not None), default=None)
    length, dataset = None, getattr(loaders, "dataset", None)
    for _ in range(DATASETS):
        with suppress(TypeError, NotImplementedError):  # an iterable dataset has no length
            length = max(length or 0, len(dataset))  # type: ignore[arg-type]
        dataset = getattr(dataset, "dataset", None)
    return length


def is_list_of_ids(ids: Any) -> bool:
    """Whether the user's function may return this: a list, a tuple, or a 1-d tensor or array."""
    return getattr(ids, "ndim", 0) == 1 or isinstance(ids, (list, tuple))


def _are_ids(ids: Any) -> bool:
    """Whether this looks like ids. An array of more dimensions does not: it may have token ids."""
    if not isinstance(ids, (list, tuple)):
        return getattr(ids, "ndim", 0) == 1
    nested = (list, tuple, set, Mapping)
    return len(ids) > 0 and not isinstance(ids[0], nested) and not getattr(ids[0], "ndim", 0)


def encodable(key: Any) -> str:
    """An id as the ledger's file has it: a string, with escapes for what UTF-8 cannot encode."""
    return str(key).encode("utf-8", "backslashreplace").decode()


def with_own_storage(ids: Ids) -> Ids:
    """The same ids. Views are copied, so that the tensors that they are views of can be freed."""
    return {where: _with_own_storage(each) for where, each in ids.items()}


def _with_own_storage(ids: Any) -> Any:
    if isinstance(ids, Tensor) and ids.untyped_storage().nbytes() > ids.nbytes:
        return ids.clone()
    return ids


class SampleIds:
    """Decides which ids, if any, belong to the losses of one name, one id per loss.

    The losses of a vector may belong to samples, but also to tasks or tokens. The shape does not
    tell which: in a batch with four ids, four losses may be of four tasks. The rule:

    - Ids from the user's function belong to the losses if there are as many ids as losses.
    - Ids found in the batch belong to the losses only if there were as many ids as losses in every
      call so far. After one call with another number of losses, they never belong to the losses.
    - If this rule allows more than one list of ids, no list is used.

    The rule can be wrong: if all batches so far had four samples, the losses of four tasks get ids.
    """

    def __init__(self) -> None:
        self._agreeing: set[str] | None = None
        """paths of the lists that had as many ids as losses in every call; ``None`` at first"""
        self._used: str | None = None
        """path of the list that ``of`` last returned"""

    def state_dict(self) -> dict[str, Any] | None:
        """What earlier calls have shown, as plain strings; ``None`` if they have shown nothing."""
        if self._agreeing is None:
            return None
        return {"agreeing": sorted(self._agreeing), "used": self._used}

    @classmethod
    def read(cls, state: Any) -> SampleIds:
        """A :class:`SampleIds` from what :meth:`state_dict` returned, if it was not ``None``.

        Raises:
            ValueError: if the state is invalid. The error says what is allowed.
        """
        is_valid = isinstance(state, Mapping) and set(state) == {"agreeing", "used"}
        agreeing, used = (state["agreeing"], state["used"]) if is_valid else (None, None)
        if not isinstance(agreeing, list) or not all(
            isinstance(each, str) for each in [*agreeing, "" if used is None else used]
        ):
            raise ValueError(
                "the ids of a loss must have 'agreeing', a list of strings, and 'used', a string "
                f"or None, got {state!r:.100}"
            )
        sample_ids = cls()
        sample_ids._agreeing, sample_ids._used = set(agreeing), used
        return sample_ids

    def observe(self, ids: Ids, count: int) -> None:
        """Note the ids and the number of losses of a call."""
        if ids and GIVEN not in ids:
            agreeing = {where for where, each in ids.items() if len(each) == count}
            self._agreeing = agreeing & (agreeing if self._agreeing is None else self._agreeing)

    def of(self, ids: Ids, count: int) -> Any:
        """The list with one id for each of ``count`` losses; ``None`` if there is none."""
        where: str | None = GIVEN
        if GIVEN not in ids:
            agreeing = list(self._agreeing or ())
            where = agreeing[0] if len(agreeing) == 1 else None
            self._used = where or self._used
        each = None if where is None else ids.get(where)
        return each if each is not None and len(each) == count else None

    def take_mistake(self) -> bool:
        """Whether ``of`` returned a list that turned out to be wrong.

        Returns ``True`` only once for each mistake.
        """
        mistaken = self._used is not None and self._used not in (self._agreeing or ())
        if mistaken:
            self._used = None
        return mistaken


def dump_sample_ids(sample_ids: Mapping[str, SampleIds]) -> dict[str, Any]:
    """The states of all names for which calls have shown anything."""
    states = {name: each.state_dict() for name, each in sample_ids.items()}
    return {name: state for name, state in states.items() if state is not None}


def checked_sample_ids(state: Any) -> dict[str, SampleIds]:
    """The :class:`SampleIds` of each name, from what :func:`dump_sample_ids` returned.

    Raises:
        ValueError: if the state is invalid. The error says what is allowed.
    """
    if not isinstance(state, Mapping) or not all(map(is_name, state)):
        raise ValueError(f"ids must be under the names of losses, got {state!r:.100}")
    return {name: SampleIds.read(each) for name, each in state.items()}


def all_ids(ids: Ids) -> list[Any] | None:
    """All ids of a batch as plain numbers and strings; ``None`` if there are none, or over 64."""
    if not 0 < sum(len(each) for each in ids.values()) <= MOST_IDS:
        return None
    return [plain for each in ids.values() for plain in as_list(each)]


def as_list(ids: Any) -> list[Any]:
    """Ids as plain numbers and strings. Reads the device."""
    if hasattr(ids, "tolist"):  # a tensor or an array
        ids = ids.tolist()
    return [_plain(each) for each in ids]


def _plain(value: Any) -> Any:
    """The value in one of the types :data:`PLAIN`. ``weights_only`` allows no NumPy numbers.

    A value of any other type becomes a string, cut to 200 characters. Only a path is not cut,
    because long paths may differ only at the end.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if type(value) in PLAIN:
        return value
    return str(value) if isinstance(value, PurePath) else str(value)[:200]
