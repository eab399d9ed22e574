"""Which samples spiked: a record of the worst clips."""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc._moments.arguments import is_name
from lightning_alrc._moments.sums import widest_dtype
from lightning_alrc._spikes.files import written_whole

__all__ = ["Origin", "Spike", "SpikeRecord", "checked_spikes", "read_spikes", "write_spikes"]

FOLD_AFTER = 64
"""Calls whose losses are held on the device before all but the worst of them are let go."""

HALF = 2**20
"""Positions are read from the device as multiples of it and what remains."""

PLAIN = (str, int, float, bool, type(None))
"""What an id may be."""


class Spike(NamedTuple):
    """One loss that was clipped, and where it came from."""

    name: str
    """of the loss; ``"loss"`` is the one training_step returns"""
    step: int
    """as loggers count: optimizer steps before it"""
    epoch: int
    batch_idx: int
    sample: int | None
    """its index among the losses; ``None`` where the loss is one number for the whole batch"""
    id: Any
    """of the sample, a number or string, where batches have ids; where the losses are not one for
    each sample, a list of all the batch's; ``None`` where there are none"""
    loss: float
    """before it was clipped"""
    threshold: float
    """what it was clipped to"""
    scale: float
    """the factor on its gradient, in [0, 1): the smaller, the worse"""
    rank: int

    @property
    def place(self) -> tuple[Any, ...]:
        """What no two spikes of a run have in common."""
        return self.name, self.epoch, self.batch_idx, self.sample, self.rank

    @property
    def batch_file(self) -> str:
        """Name of the file that its batch is in, if batches are kept."""
        return f"epoch={self.epoch}-batch={self.batch_idx}-rank={self.rank}.pt"


class Origin(NamedTuple):
    """Where the losses of a step come from; ``ids`` are those of the batch's samples, if any."""

    step: int = 0
    epoch: int = 0
    batch_idx: int = 0
    ids: Any = None

    def apart(self) -> Origin:
        """The same, of which no tensor holds a whole batch in memory."""
        ids = self.ids
        if isinstance(ids, Tensor) and ids.untyped_storage().nbytes() > ids.nbytes:
            return self._replace(ids=ids.clone())
        return self


class _Seen:
    """The worst clips of one loss that have not been read yet, on its device.

    Seeing waits for nothing, and holds no more than some hundred kilobytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: list[tuple[Origin, torch.Size]] = []
        self._count = 0
        """Number of losses in them; a loss's position is counted through all."""
        self._held: list[Tensor] = []
        self._worst: tuple[Tensor, Tensor] | None = None

    @property
    def calls(self) -> int:
        """Number of calls since the last was read."""
        return len(self._calls)

    def see(self, origin: Origin, seen: Tensor) -> None:
        """Take note of losses that have just been clipped, as a watcher is told of them."""
        shape = seen.shape[1:]
        self._calls.append((origin.apart(), shape))
        self._held.append(seen.reshape(3, shape.numel()))
        self._count += shape.numel()
        if shape.numel() > self._size or len(self._held) >= FOLD_AFTER:
            self._fold()

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Keep the worst only: positions, int64 [k], and values, [3, k], k at most the size."""
        values = torch.cat(self._held, 1)
        # Made where they are: a copy to an accelerator would wait for it.
        positions = torch.arange(self._count - values.shape[1], self._count, device=values.device)
        if self._worst is not None:
            positions = torch.cat([self._worst[0], positions])
            values = torch.cat([self._worst[1], values], 1)
        worst = values[0].topk(min(self._size, len(positions)), largest=False).indices
        self._worst, self._held = (positions[worst], values[:, worst]), []
        return self._worst

    def read(self, name: str, rank: int) -> list[Spike]:
        """The worst clips since this was last called. Waits for the device."""
        if not self._calls:
            return []
        if self._held or self._worst is None:
            self._worst = self._fold()
        positions, values = self._worst
        # In one read, and exact where a device has no floats wider than float32.
        wide = widest_dtype(values.device)
        halves = torch.stack([positions // HALF, positions % HALF])
        rows = torch.cat([halves.to(wide), values.to(wide)]).T.tolist()
        calls, self._calls, self._count, self._worst = self._calls, [], 0, None
        first = list(accumulate((shape.numel() for _, shape in calls), initial=0))
        listed: dict[int, Any] = {}
        spikes = []
        for high, low, scale, loss, bound in rows:
            if scale >= 1.0:
                continue
            position = int(high) * HALF + int(low)
            call = bisect_right(first, position) - 1
            origin, shape = calls[call]
            if call not in listed:
                listed[call] = _as_list(origin.ids)
            ids = listed[call]
            sample = (position - first[call]) // math.prod(shape[1:]) if shape else None
            # Losses of another number than the ids may be of tokens, or of tasks.
            of_samples = sample is not None and ids is not None and len(ids) == shape[0]
            spikes.append(
                Spike(
                    name,
                    origin.step,
                    origin.epoch,
                    origin.batch_idx,
                    sample,
                    ids[sample] if of_samples else ids,
                    loss,
                    bound,
                    scale,
                    rank,
                )
            )
        return spikes


def _as_list(ids: Any) -> list[Any] | None:
    """Ids as plain numbers and strings."""
    if ids is None:
        return None
    if hasattr(ids, "tolist"):  # a tensor or an array
        ids = ids.tolist()
    return [_plain(each) for each in ids]


def _plain(value: Any) -> Any:
    """What torch.load takes with weights_only, which a number of NumPy's is not."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value if type(value) in PLAIN else str(value)[:200]


class SpikeRecord:
    """The ``size`` worst clips of each loss of a run, by the factor on their gradients.

    Losses that are NaN or infinite are not clipped and have no place in it: a training that is lost
    would fill it with them.

    Args:
        size: how many of each loss are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.origin = Origin()
        """of the losses that are seen next"""
        self.rank = 0
        self.unread = 0
        """Number of calls of one loss, the most of any, that are still to be read."""
        self.changed = False
        """Whether what is kept is not yet in the file."""
        self._seen: dict[str, _Seen] = {}
        self._unshared: list[Spike] = []
        self._worst: dict[tuple[Any, ...], Spike] = {}
        """by place, the worst first"""

    @property
    def has_seen(self) -> bool:
        """Whether any loss was."""
        return bool(self._seen)

    def see(self, name: str, seen: Tensor) -> None:
        """Take note of losses that have just been clipped, without waiting for the device.

        Args:
            name: of the loss.
            seen: as :attr:`ALRC.watcher <lightning_alrc.ALRC>` is told of them.
        """
        if name not in self._seen:
            self._seen[name] = _Seen(self.size)
        self._seen[name].see(self.origin, seen)
        self.unread = max(self.unread, self._seen[name].calls)

    def read(self) -> list[Spike]:
        """Enter what was seen since this was last called, and return it. Waits for the device."""
        new = [spike for name, seen in self._seen.items() for spike in seen.read(name, self.rank)]
        self.unread = 0
        if new:
            self._unshared = _worst_of_each([*self._unshared, *new], self.size)
            self.enter(new)
        return new

    def take_unshared(self) -> list[Spike]:
        """This rank's spikes that other ranks have not been told of."""
        unshared, self._unshared = self._unshared, []
        return unshared

    def enter(self, spikes: Iterable[Spike]) -> None:
        """Keep the worst of what there is and of these; one of each place."""
        known = dict(self._worst)
        for spike in spikes:
            twin = known.get(spike.place)
            if twin is None or spike.scale < twin.scale:
                known[spike.place] = spike
        worst = {spike.place: spike for spike in _worst_of_each(known.values(), self.size)}
        self.changed = self.changed or worst != self._worst
        self._worst = worst

    @property
    def worst(self) -> list[Spike]:
        """All that is kept, the worst first."""
        return list(self._worst.values())

    def state_dict(self) -> list[dict[str, Any]]:
        """All that is kept, as plain numbers and strings."""
        return [spike._asdict() for spike in self.worst]

    def load(self, spikes: Iterable[Spike]) -> None:
        """Forget what there is, and keep these."""
        self._seen, self._unshared, self._worst, self.unread = {}, [], {}, 0
        self.enter(spikes)


def _worst_of_each(spikes: Iterable[Spike], size: int) -> list[Spike]:
    """Those with the smallest scales of each name, the worst first."""
    worst = sorted(spikes, key=lambda spike: spike.scale)
    left = Counter({spike.name: size for spike in worst})
    kept = []
    for spike in worst:
        if left[spike.name]:
            kept.append(spike)
            left[spike.name] -= 1
    return kept


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_id(value: Any) -> bool:
    return type(value) in PLAIN


WHOLE = "a whole number, 0 or above", _is_whole
FINITE = "a finite number", _is_finite
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("the name of a loss", is_name),
    "step": WHOLE,
    "epoch": WHOLE,
    "batch_idx": WHOLE,
    "sample": (f"{WHOLE[0]}, or None", lambda value: value is None or _is_whole(value)),
    "id": (
        "a string, a number or None, or a list of them",
        lambda value: all(map(_is_id, value)) if type(value) is list else _is_id(value),
    ),
    "loss": FINITE,
    "threshold": FINITE,
    "scale": ("a number in [0, 1)", lambda value: _is_finite(value) and 0 <= value < 1),
    "rank": WHOLE,
}


def checked_spikes(rows: Any) -> list[Spike]:
    """Spikes from rows of plain numbers and strings.

    Raises:
        ValueError: if one is not a spike's; names it and what is allowed.
    """
    if not isinstance(rows, list):
        raise ValueError(f"a record of spikes must be a list, got {rows!r:.100}")
    for row in rows:
        if not isinstance(row, Mapping) or set(row) != set(ALLOWED):
            raise ValueError(f"a spike must have {list(ALLOWED)}, got {row!r:.300}")
        for key, (allowed, is_allowed) in ALLOWED.items():
            if not is_allowed(row[key]):
                raise ValueError(f"a spike's {key!r} must be {allowed}, got {row[key]!r:.100}")
    return [Spike(**row) for row in rows]


def write_spikes(path: Path, spikes: Iterable[Spike]) -> None:
    """Write one JSON object a line. At no moment is there half a file under ``path``.

    Raises:
        OSError: if it cannot be written; what was there before still is.
    """
    with written_whole(path) as file:
        file.writelines(json.dumps(spike._asdict()).encode() + b"\n" for spike in spikes)


def read_spikes(path: str | Path) -> list[Spike]:
    """The spikes in a file that :class:`~lightning_alrc.ALRCCallback` wrote, the worst first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not one of those.
    """
    lines = Path(path).read_text().splitlines()
    return checked_spikes([json.loads(line) for line in lines])
