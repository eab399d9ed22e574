"""Every sample's history: statistics of its losses, and how often they were clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc._moments.arguments import is_name
from lightning_alrc._moments.bounds import BURN_IN
from lightning_alrc._moments.state import Moments
from lightning_alrc._moments.sums import widest_dtype
from lightning_alrc._spikes.history import Numbers, by_sample, merged, padded
from lightning_alrc._spikes.ids import (
    PLAIN,
    Ids,
    SampleIds,
    as_list,
    dump_sample_ids,
    with_own_storage,
)
from lightning_alrc.functional import stddev

__all__ = ["History", "Ledger", "checked_histories", "is_whole"]

ADD_AFTER = 64
"""After this many calls, the losses held on the device are added to the table."""
MOST_HELD = 2**16
"""When more losses than this are held on the device, they are added to the table."""
MOST_KEYS = 10_000_000
"""Largest number of ids in the dict of :class:`Ledger`, unless the user gives a size."""

WIDTH = len(Numbers._fields)


class History:
    """Statistics of the samples of one loss, on the host."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        """whole numbers or strings, in the order of their first losses"""
        self.table = torch.zeros(WIDTH, 0, dtype=torch.float64, device="cpu")
        """:class:`Numbers` of each id, [numbers, columns]; the last columns may have no id yet"""
        self._columns: dict[Any, int] = {}

    def enter(self, ids: list[Any], table: Tensor) -> None:
        """Merge in a table of later losses, with one column for each id. All ids must differ."""
        columns = torch.tensor(
            [self._column(each) for each in ids], dtype=torch.int64, device="cpu"
        )
        if len(self.ids) > self.table.shape[1]:
            self.table = padded(self.table, max(len(self.ids), 2 * self.table.shape[1]))
        before = Numbers(*self.table[:, columns])
        self.table[:, columns] = torch.stack(merged(before, Numbers(*table)))

    def _column(self, key: Any) -> int:
        column = self._columns.setdefault(key, len(self._columns))
        if column == len(self.ids):
            self.ids.append(key)
        return column

    def in_order(self) -> tuple[list[Any], Numbers]:
        """The ids and their statistics. Ids that are whole numbers come first, sorted."""
        ids, columns = self.ids, range(len(self.ids))
        order = sorted(columns, key=lambda at: (0, ids[at]) if is_whole(ids[at]) else (1, 0))
        numbers = self.table[:, torch.tensor(order, dtype=torch.int64, device="cpu")]
        return [ids[at] for at in order], Numbers(*numbers)

    def state_dict(self) -> dict[str, Any]:
        """The ids, as a tensor if all are whole numbers, and the table."""
        ids: Any = list(self.ids)
        if all(map(is_whole, ids)):
            ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
        return {"ids": ids, "table": self.table[:, : len(self.ids)].clone()}

    @classmethod
    def read(cls, state: Any) -> History:
        """A history from what :meth:`state_dict` returned.

        Raises:
            ValueError: if the state is invalid. The error says what is allowed.
        """
        if not isinstance(state, Mapping) or set(state) != {"ids", "table"}:
            raise ValueError(f"a history must have 'ids' and 'table', got {state!r:.100}")
        ids, table = state["ids"], state["table"]
        if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim == 1:
            ids = ids.tolist()
        if not isinstance(ids, list) or not all(type(each) in PLAIN for each in ids):
            raise ValueError(f"a history's 'ids' must be strings or numbers, got {ids!r:.100}")
        if len(set(ids)) != len(ids):
            raise ValueError(f"a history's 'ids' must differ, got {ids!r:.100}")
        shape = WIDTH, len(ids)
        if not isinstance(table, Tensor) or table.shape != shape or table.dtype != torch.float64:
            raise ValueError(
                f"a history's 'table' must be float64 of shape {shape}, got {table!r:.100}"
            )
        history = cls()
        history.enter(ids, table.cpu())
        return history


class _Call(NamedTuple):
    """The losses of one call, on their device."""

    columns: Any
    """the table's column for each loss: a list of whole numbers, or an integer tensor on any
    device"""
    losses: Tensor
    """losses before and after clipping, [2, losses]; they differ where a loss was clipped"""
    moments: Moments


class _Table:
    """Statistics of one loss, on the device of the losses, until the host takes them.

    Column 0 is for the losses whose ids have no column of their own, and for the padding that
    :func:`by_sample` returns if several losses belong to one sample. ``take`` leaves column 0 out.
    """

    def __init__(self) -> None:
        self._batch_calls: list[_Call] = []
        self._held: list[_Call] = []
        self._count = 0
        self._table: Tensor | None = None
        self._outside: Tensor | None = None
        """0-d, number of losses whose ids have no column"""

    def observe(self, call: _Call) -> None:
        self._batch_calls.append(call)

    def finish_batch(self, size: int) -> None:
        """Finish the batch: it was trained on, so its losses stay.

        ``size`` is the number of columns for ids.
        """
        self._held += self._batch_calls
        self._count += sum(call.losses.shape[1] for call in self._batch_calls)
        self._batch_calls = []
        if len(self._held) >= ADD_AFTER or self._count > MOST_HELD:
            self._add_held(size)

    def forget_batch(self) -> None:
        self._batch_calls = []

    def _add_held(self, size: int) -> None:
        """Add all losses held to the table."""
        held, self._held, self._count = self._held, [], 0
        device = held[-1].losses.device
        dtype = widest_dtype(device)
        losses = [call.losses.to(device) for call in held]
        before, after = torch.cat(losses, 1).to(dtype).unbind()
        moments = [
            _to_device(call.moments, device, dtype)[:, None].expand(-1, call.losses.shape[1])
            for call in held
        ]
        mu1, variance, seen = torch.cat(moments, 1)
        stddevs = torch.where(seen < BURN_IN, 0.0, (before - mu1) / stddev(variance))
        columns = torch.cat([_to_device(call.columns, device, torch.int64) for call in held])
        has_column = (columns >= 0) & (columns < size)
        columns = torch.where(has_column, columns + 1, 0)
        columns, numbers = by_sample(columns, before, stddevs, after != before)
        if self._table is None or self._outside is None:
            self._table = torch.zeros(WIDTH, 1 + size, dtype=dtype, device=device)
            self._outside = torch.zeros((), dtype=torch.int64, device=device)
        table = self._table = padded(self._table.to(device, dtype), 1 + size)
        table.index_copy_(1, columns, torch.stack(merged(Numbers(*table[:, columns]), numbers)))
        self._outside = self._outside.to(device) + (~has_column).sum()

    def take(self, size: int) -> tuple[Tensor, Tensor, int]:
        """Empty the table. Reads the device.

        Returns:
            Columns with a loss, int64 [columns]; their statistics on the host, [numbers, columns];
            and the number of losses whose ids have no column.
        """
        if self._held:
            self._add_held(size)
        if self._table is None or self._outside is None:
            table = torch.zeros(WIDTH, 0, dtype=torch.float64, device="cpu")
            return table[0].long(), table, 0
        # A table on the CPU must be copied, too, because it is set to 0 below.
        table = self._table[:, 1:].to("cpu", torch.float64, copy=True)
        outside = int(self._outside)
        self._table.zero_()
        self._outside.zero_()
        counts = Numbers(*table)
        columns = (counts.finite + counts.nonfinite).nonzero()[:, 0]
        return columns, table[:, columns], outside


def _one_each(loss: Tensor, clipped: Tensor, count: int) -> Tensor:
    """Losses before and after clipping, [2, count]. A row of a matrix gives its mean.

    The two means of a row with a clipped loss may be equal once they are rounded. So the mean after
    clipping is NaN if any loss of the row was clipped.
    """
    if loss.numel() == count:
        # torch.stack copies the losses. The copy is needed: training_step may later change the
        # losses in place.
        return torch.stack((loss.reshape(count), clipped.reshape(count)))
    mean = loss.flatten(1).mean(1, dtype=torch.promote_types(loss.dtype, torch.float32))
    is_clipped = (loss != clipped).flatten(1).any(1)
    return torch.stack((mean, mean.masked_fill(is_clipped, math.nan)))


def _to_device(numbers: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers on a device. Does not wait for the device, unless the numbers go to the CPU."""
    if not isinstance(numbers, Tensor):
        numbers = torch.tensor(numbers, dtype=dtype, device="cpu")
    # A copy to the CPU that does not wait could be read before it has arrived.
    on_device: Tensor = numbers.to(device, dtype, non_blocking=device.type != "cpu")
    return on_device


class Ledger:
    """The histories of all samples that have an id, for each loss.

    :class:`~lightning_alrc._spikes.ids.SampleIds` decides which sample a loss belongs to. In a
    vector, each loss belongs to one id. In a matrix, each row belongs to one id, and the mean of
    the row is entered. One loss for a whole batch is entered only if the batch has one sample.

    A table on the device of the losses has a column for each id. If the ids are whole numbers in a
    tensor, they are the column indices. Other ids have a second table, and a dict on the host gives
    their columns. No step reads the device.

    Args:
        size: limit of each table. Whole numbers must be below it. Of the other ids, the first
            ``size`` have a column. ``None`` takes the length of the dataset for whole numbers, and
            10,000,000 for other ids.
    """

    def __init__(self, size: int | None = None) -> None:
        self.histories: dict[str, History] = {}
        """by name of the loss, with all losses that :meth:`enter` was given"""
        self.changed = False
        """whether the histories differ from their file"""
        self.outside = 0
        """number of losses whose ids have no column"""
        self._has_observed = False
        self._size = size
        self._length: int | None = None
        self._numbered: dict[str, _Table] = {}
        self._keyed: dict[str, _Table] = {}
        self._keys: dict[Any, int] = {}
        self._sample_ids: dict[str, SampleIds] = {}
        self._not_of_samples: set[str] = set()
        """names of losses that turned out not to have one value per sample"""

    @property
    def size(self) -> int | None:
        """One more than the largest whole number that has a column on the device."""
        return self._length if self._size is None else self._size

    @property
    def lacks_samples(self) -> bool:
        """Whether losses were observed, but none of a sample with an id."""
        has_samples = any(history.ids for history in self.histories.values())
        return self._has_observed and not has_samples and not self.outside

    def start(self, length: int | None) -> None:
        """Start a fit.

        Args:
            length: length of the dataset; ``None`` if the length is not known.
        """
        self._length = length if self._length is None else max(self._length, length or 0)

    def observe(self, name: str, ids: Ids, loss: Tensor, clipped: Tensor, moments: Moments) -> None:
        """Add losses. Never waits for the device.

        Args:
            name: name of the loss.
            ids: ids of the batch.
            loss: losses before clipping.
            clipped: losses after clipping.
            moments: moments that gave the threshold.
        """
        self._has_observed = True
        if not ids:
            return
        count = loss.shape[0] if loss.ndim else 1
        sample_ids = self._sample_ids.setdefault(name, SampleIds())
        sample_ids.observe(ids, count)
        one_each = sample_ids.of(ids, count)
        if sample_ids.take_mistake():
            self._forget_loss(name)
        if one_each is None or loss.numel() == 0:
            return
        losses = _one_each(loss.detach(), clipped.detach(), count)
        if _is_integral(one_each) and self.size is not None:
            (one_each,) = with_own_storage({"": one_each}).values()
            self._numbered.setdefault(name, _Table()).observe(_Call(one_each, losses, moments))
        elif isinstance(one_each, Tensor) and not one_each.is_cpu:
            self.outside += count  # to look the ids up, the host would wait for the device
        else:
            keys = [self._column_of(each) for each in as_list(one_each)]
            self._keyed.setdefault(name, _Table()).observe(_Call(keys, losses, moments))

    def _column_of(self, key: Any) -> int:
        most = MOST_KEYS if self._size is None else self._size
        if len(self._keys) >= most:
            return self._keys.get(key, -1)
        return self._keys.setdefault(key, len(self._keys))

    def _forget_loss(self, name: str) -> None:
        self._not_of_samples.add(name)
        self._numbered.pop(name, None)
        self._keyed.pop(name, None)
        self.changed = self.histories.pop(name, None) is not None or self.changed

    def finish_batch(self) -> None:
        """Finish the batch: it was trained on, so its losses stay in the ledger."""
        for table in self._numbered.values():
            table.finish_batch(self.size or 0)
        for table in self._keyed.values():
            table.finish_batch(len(self._keys))

    def forget_batch(self) -> None:
        """Drop the batch: it was not trained on, or will be trained on again."""
        for table in (*self._numbered.values(), *self._keyed.values()):
            table.forget_batch()

    def take_unshared(self) -> dict[str, Any]:
        """This rank's statistics since the last call, for :meth:`enter`. Reads the device."""
        news: dict[str, list[tuple[list[Any], Tensor]]] = {}
        outside, keys = 0, list(self._keys)
        for name, table in self._numbered.items():
            columns, numbers, missed = table.take(self.size or 0)
            news.setdefault(name, []).append((columns.tolist(), numbers))
            outside += missed
        for name, table in self._keyed.items():
            columns, numbers, missed = table.take(len(keys))
            news.setdefault(name, []).append(([keys[each] for each in columns.tolist()], numbers))
            outside += missed
        return {"news": news, "outside": outside, "not_of_samples": self._not_of_samples}

    def enter(self, gathered: Iterable[dict[str, Any]]) -> None:
        """Merge the statistics of all ranks, in the order of ranks.

        All ranks get the same result.
        """
        gathered = list(gathered)
        for name in set().union(*(of_rank["not_of_samples"] for of_rank in gathered)):
            if name not in self._not_of_samples:
                self._forget_loss(name)
        for of_rank in gathered:
            self.outside += of_rank["outside"]
            for name, parts in of_rank["news"].items():
                for ids, table in parts:
                    if ids and name not in self._not_of_samples:
                        self.histories.setdefault(name, History()).enter(ids, table)
                        self.changed = True

    def state_dict(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self.histories.items()}

    def dump_sample_ids(self) -> dict[str, Any]:
        """Which ids belong to the losses of each name, as plain strings."""
        nowhere = SampleIds.read({"agreeing": [], "used": None})
        return dump_sample_ids(self._sample_ids | dict.fromkeys(self._not_of_samples, nowhere))

    def load(
        self, histories: dict[str, History], sample_ids: Mapping[str, SampleIds] | None = None
    ) -> None:
        """Drop everything, and continue from these histories."""
        self.histories, self.outside, self.changed = histories, 0, bool(histories)
        self._numbered, self._keyed, self._keys = {}, {}, {}
        self._sample_ids, self._not_of_samples = dict(sample_ids or {}), set()


def _is_integral(ids: Any) -> bool:
    if not isinstance(ids, Tensor):
        return False
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def is_whole(key: Any) -> bool:
    """Whether an id is a whole number that fits in 64 bits."""
    return type(key) is int and -(2**63) <= key < 2**63


def checked_histories(state: Any) -> dict[str, History]:
    """The history of each loss, from what :meth:`Ledger.state_dict` returned.

    Raises:
        ValueError: if the state is invalid. The error says what is allowed.
    """
    if not isinstance(state, Mapping) or not all(map(is_name, state)):
        raise ValueError(f"a ledger must have the names of losses, got {state!r:.100}")
    return {name: History.read(each) for name, each in state.items()}
