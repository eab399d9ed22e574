"""Which samples a batch has: its ids, and which of them are those of a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = [
    "GIVEN",
    "MOST_IDS",
    "Ids",
    "SampleIds",
    "all_ids",
    "apart",
    "ids_in",
    "is_list_of_ids",
    "number_of_samples",
]

Ids = Mapping[str, Any]
"""Lists of ids: by where in the batch each was found, or under :data:`GIVEN`."""

GIVEN = "given"
"""Where ids are that a function of the user returned. They are believed."""

MOST_IDS = 64
"""More ids than this are not listed for one loss: they may be token ids, and fill the record."""

KEYS = ("id", "ids")
DEPTH = 3
"""Levels of a nested batch that are searched."""
DATASETS = 4
"""Datasets, each in the one before it, that are looked at."""
MOST_PARTS = 16
"""A longer list is not one of batches."""

PLAIN = (str, int, float, bool, type(None))
"""What an id may be in a record."""


def ids_in(batch: Any) -> Ids:
    """All lists of ids in a batch: under the key, or in the attribute, ``id`` or ``ids``.

    >>> ids_in({"x": [0.5, 0.25], "id": ["a", "b"]})
    {'id': ['a', 'b']}
    >>> ids_in([[0.5, 0.25], {"id": ["a", "b"]}])
    {'1.id': ['a', 'b']}

    A batch may be a dict, a named tuple, a dataclass or any object with attributes, or a dict, list
    or tuple of those. A list of ids is a list, tuple, tensor or array of one dimension, of strings
    or numbers.
    """
    found: dict[str, Any] = {}
    _search(batch, "", DEPTH, found)
    return found


def _search(batch: Any, where: str, depth: int, found: dict[str, Any]) -> None:
    if isinstance(batch, (Tensor, str)):
        return
    for key in KEYS:
        ids = None
        with suppress(Exception):  # an attribute may be computed
            ids = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
        if _are_ids(ids):
            found[where + key] = ids
            return
    if depth > 1:
        for key, part in _parts(batch):
            _search(part, f"{where}{key}.", depth - 1, found)


def _parts(batch: Any) -> Iterator[tuple[Any, Any]]:
    """What a batch is made of, if it is a collection of batches."""
    if isinstance(batch, Mapping):
        yield from batch.items()
    elif isinstance(batch, (list, tuple)):
        yield from enumerate(batch) if len(batch) <= MOST_PARTS else ()
    elif is_dataclass(batch):
        yield from ((each.name, getattr(batch, each.name, None)) for each in fields(batch))


def number_of_samples(loaders: Any) -> int | None:
    """How many samples a Trainer's loaders choose from, if they tell.

    A ``Subset`` chooses from the dataset that it is of, whose numbers are the ids.

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
        with suppress(TypeError, NotImplementedError):  # it is a stream
            length = max(length or 0, len(dataset))  # type: ignore[arg-type]
        dataset = getattr(dataset, "dataset", None)
    return length


def is_list_of_ids(ids: Any) -> bool:
    """Whether a function may return this as ids: a list, a tuple, or what has one dimension."""
    return getattr(ids, "ndim", 0) == 1 or isinstance(ids, (list, tuple))


def _are_ids(ids: Any) -> bool:
    """Whether what was found looks like ids. What has more dimensions are token ids, say."""
    if not isinstance(ids, (list, tuple)):
        return getattr(ids, "ndim", 0) == 1
    nested = (list, tuple, set, Mapping)
    return len(ids) > 0 and not isinstance(ids[0], nested) and not getattr(ids[0], "ndim", 0)


def apart(ids: Ids) -> Ids:
    """The same ids, of which no tensor holds a whole batch in memory."""
    return {where: _apart(each) for where, each in ids.items()}


def _apart(ids: Any) -> Any:
    if isinstance(ids, Tensor) and ids.untyped_storage().nbytes() > ids.nbytes:
        return ids.clone()
    return ids


class SampleIds:
    """Decides which ids, if any, belong to the losses of one name, one id to each loss.

    A vector of losses may be of samples, but also of tasks or of tokens. Its shape alone does not
    tell: four losses beside four ids may be of four tasks. The rule:

    - Ids that the user's function returned belong to the losses wherever the numbers agree.
    - Ids that were found in the batch belong to them only if the numbers have agreed in every call
      so far, while batch sizes varied or not. One call in which they differ ends it for good.
    - Where several lists of ids were found, and more than one has always agreed, none is taken.

    So losses of four tasks beside batches of four have ids until a batch of another size comes.
    """

    def __init__(self) -> None:
        self._agreeing: set[str] | None = None
        """places of the lists whose number of ids has always been that of the losses"""
        self._used: str | None = None

    def observe(self, ids: Ids, count: int) -> None:
        """Learn from a call.

        Args:
            ids: of the batch.
            count: of losses; those of one number for the whole batch are not told of.
        """
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
        """Whether ids were taken from a list that has been found not to belong; told once."""
        mistaken = self._used is not None and self._used not in (self._agreeing or ())
        if mistaken:
            self._used = None
        return mistaken


def all_ids(ids: Ids) -> list[Any] | None:
    """All ids of a batch as plain numbers and strings; ``None`` if there are none, or too many."""
    if not 0 < sum(len(each) for each in ids.values()) <= MOST_IDS:
        return None
    return [plain for each in ids.values() for plain in as_list(each)]


def as_list(ids: Any) -> list[Any]:
    """Ids as plain numbers and strings. Waits for the device."""
    if hasattr(ids, "tolist"):  # a tensor or an array
        ids = ids.tolist()
    return [_plain(each) for each in ids]


def _plain(value: Any) -> Any:
    """What torch.load takes with weights_only, which a number of NumPy's is not."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value if type(value) in PLAIN else str(value)[:200]
