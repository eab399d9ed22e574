"""Which samples spiked: a record of the worst clips."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_alrc._moments.sums import Sums, widest_dtype
from lightning_alrc._spikes.ids import (
    Ids,
    SampleIds,
    all_ids,
    as_list,
    dump_sample_ids,
    with_own_storage,
)
from lightning_alrc._spikes.judging import CallKey, Judge

__all__ = ["Origin", "Spike", "SpikeRecord"]

REDUCE_AFTER = 64
"""After this many calls, the losses held on the device are reduced to the worst."""

TRIM_AFTER = 256
"""Gradient norms that no spike needs are dropped after this many steps. Levels (see ``judging``)
that no spike needs are dropped after this many calls."""

MOST_HELD = 2**14
"""When this many losses are held on the device (a few hundred kilobytes), they are reduced to the
worst."""

POSITION_BASE = 2**20
"""The host reads the position of a loss as two numbers: its quotient and its remainder by this
base. Both numbers are exact in float32. A large position is not."""


class Spike(NamedTuple):
    """One loss that was clipped, and where it came from."""

    name: str
    """name of the loss; ``"loss"`` is the one that ``training_step`` returns"""
    step: int
    """number of optimizer steps before the spike, as loggers count"""
    epoch: int
    batch_idx: int
    sample: int | None
    """index of the sample in the vector of losses; ``None`` if one loss covers the whole batch"""
    id: Any
    """the sample's id, a number or string. If the losses are not one per sample: a list of all ids
    of the batch, or ``None`` if these are more than 64. ``None`` if the batch has no ids."""
    loss: float
    """loss before clipping"""
    threshold: float
    """loss after clipping: the threshold, or the lower bound if the loss was below that bound"""
    scale: float
    """factor on the gradient, in [0, 1): the smaller the factor, the worse the spike"""
    rank: int
    call: int = 0
    """number of earlier calls of this loss in the batch"""
    gradient_norm: float | None = None
    """norm of the step's gradients before gradient clipping, even if the step was skipped; ``None``
    if nothing computed it"""
    kind: str | None = None
    """``"divergence"`` if the losses after the spike stay above the losses before it, ``"data"`` if
    they do not; ``None`` until the spike is judged"""

    @property
    def place(self) -> tuple[Any, ...]:
        """A key that identifies a spike in a run.

        Two spikes have the same key only if a fit ends by an exception before the optimizer steps,
        and a further fit trains on the same batch again. The worse spike is then kept.
        """
        return (
            self.name,
            self.step,
            self.epoch,
            self.batch_idx,
            self.call,
            self.sample,
            self.rank,
        )

    @property
    def batch_file(self) -> str:
        """Name of the file for the spike's batch. The file exists only if the batch is kept."""
        return f"epoch={self.epoch}-batch={self.batch_idx}-step={self.step}-rank={self.rank}.pt"


class Origin(NamedTuple):
    """The batch that losses come from, and the ids in it, if any. ``None`` if no ids were read."""

    step: int = 0
    epoch: int = 0
    batch_idx: int = 0
    ids: Ids | None = None


class _Call(NamedTuple):
    """One call of a loss. The host has not read the values of the call yet."""

    origin: Origin
    number_in_batch: int
    """number of earlier calls of this loss in the batch"""
    shape: torch.Size
    """shape of the losses; of a sample with several losses, only the worst counts"""
    number_in_fit: int
    """number of earlier calls of this loss in the fit"""


_NO_CALL = _Call(Origin(), 0, torch.Size(), 0)


class _PendingClips:
    """The worst clips of one loss, on the device of the losses, until the host reads them.

    ``observe`` never waits for the device. At most a few hundred kilobytes are held.
    """

    def __init__(self, size: int, sample_ids: SampleIds) -> None:
        self._size = size
        self._sample_ids = sample_ids
        self._calls: list[_Call] = []
        self._origin: Origin | None = None
        """the origin that the last :meth:`observe` was given"""
        self._last_call = _NO_CALL
        self._count = 0
        """number of losses in all calls; the position of a loss is its index among these losses"""
        self._held: list[Tensor] = []
        self._held_count = 0
        self._worst: tuple[Tensor, Tensor] | None = None

    @property
    def calls(self) -> int:
        """Number of calls since the last read."""
        return len(self._calls)

    def observe(self, origin: Origin, seen: Tensor, number_in_fit: int) -> None:
        """Add a call's losses, of which some may be clipped; ``seen`` is as in ``ALRC.on_clip``."""
        if seen.ndim > 2 and seen.numel():
            seen = _worst_of_each_sample(seen.flatten(2))
        shape = seen.shape[1:]
        if origin is self._origin:
            last = self._last_call
            call = last._replace(
                number_in_batch=last.number_in_batch + 1, shape=shape, number_in_fit=number_in_fit
            )
        else:
            self._origin = origin
            call = _Call(
                origin._replace(ids=with_own_storage(origin.ids or {})), 0, shape, number_in_fit
            )
        self._last_call = call
        self._calls.append(call)
        self._held.append(seen.reshape(3, shape.numel()))
        self._count += shape.numel()
        self._held_count += shape.numel()
        if self._held_count >= MOST_HELD or len(self._held) >= REDUCE_AFTER:
            self._reduce()

    def release_origin(self) -> None:
        """Let go of the last batch's ids. Its spikes stay."""
        self._origin = None
        self._last_call = _NO_CALL

    def _reduce(self) -> tuple[Tensor, Tensor]:
        """Keep only the worst of the losses held.

        Returns:
            The positions of the worst, int64 [k], and their scales, losses and thresholds, [3, k];
            k is at most the size of the record.
        """
        held = self._held if self._worst is None else [self._worst[1], *self._held]
        # If some losses of this name are on the CPU, all are copied there, because MPS has no
        # float64. Such a training waits for the device anyway: its moments move to the CPU, too.
        device = next((each.device for each in held if each.is_cpu), held[-1].device)
        values = torch.cat([each.to(device) for each in held], 1)
        # Made on the device, because a copy from the host would wait for the device.
        positions = torch.arange(self._count - self._held_count, self._count, device=device)
        if self._worst is not None:
            positions = torch.cat([self._worst[0].to(device), positions])
        worst = values[0].topk(min(self._size, len(positions)), largest=False).indices
        self._worst, self._held = (positions[worst], values[:, worst]), []
        self._held_count = 0
        return self._worst

    def read(self, name: str, rank: int) -> list[tuple[int, Spike]]:
        """The worst clips since the last read. Reads the device.

        Returns:
            For each clip, a pair: the number of earlier calls of the loss in the fit, and the
            spike.
        """
        if not self._calls:
            return []
        if self._held or self._worst is None:
            self._worst = self._reduce()
        positions, values = self._worst
        # One transfer for all numbers. Each half of a position is exact even in float32.
        wide = widest_dtype(values.device)
        halves = torch.stack([positions // POSITION_BASE, positions % POSITION_BASE])
        rows = torch.cat([halves.to(wide), values.to(wide)]).T.tolist()
        calls, self._calls, self._count, self._worst = self._calls, [], 0, None
        starts = list(accumulate((call.shape.numel() for call in calls), initial=0))
        ids_of_call: dict[int, tuple[list[Any] | None, list[Any] | None]] = {}
        spikes = []
        for high, low, scale, loss, bound in rows:
            if scale >= 1.0:
                continue
            position = int(high) * POSITION_BASE + int(low)
            index = bisect_right(starts, position) - 1
            origin, number_in_batch, shape, number_in_fit = calls[index]
            if index not in ids_of_call:
                ids_of_call[index] = self._ids_of(origin.ids or {}, shape)
            one_each, of_batch = ids_of_call[index]
            sample = position - starts[index] if shape else None
            spike = Spike(
                name,
                origin.step,
                origin.epoch,
                origin.batch_idx,
                sample,
                of_batch if one_each is None or sample is None else one_each[sample],
                loss,
                bound,
                scale,
                rank,
                number_in_batch,
            )
            spikes.append((number_in_fit, spike))
        return spikes

    def _ids_of(self, ids: Ids, shape: torch.Size) -> tuple[list[Any] | None, list[Any] | None]:
        """A pair: ``(one id for each sample, None)``, or ``(None, all ids of the batch)`` if the
        losses are not one per sample."""
        one_each = self._sample_ids.of(ids, shape[0]) if shape else None
        if one_each is None:
            return None, all_ids(ids)
        return as_list(one_each), None


class SpikeRecord:
    """The ``size`` worst clips of each loss of a run: those with the smallest scales.

    Losses that are NaN or infinite are neither clipped nor recorded. If they were recorded, a
    training whose losses stay NaN would fill the record with them.

    Args:
        size: how many clips of each loss are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.origin = Origin()
        """origin of the losses observed next"""
        self.rank = 0
        self.calls_held = 0
        """The larger of two counts: calls whose clips were not read yet, and calls whose levels are
        kept to judge a spike. With several losses, this is the count of the loss that has most."""
        self.changed = False
        """whether the record differs from its file"""
        self.batch_file: str | None = None
        """name of the file of the batch that was begun last, if a spike of this batch was read"""
        self._pending: dict[str, _PendingClips] = {}
        self._sample_ids: dict[str, SampleIds] = defaultdict(SampleIds)
        self._judges: dict[str, Judge] = defaultdict(Judge)
        self._norms: dict[int, dict[int, Tensor]] = {}
        """by step, the gradient norm of each optimizer, by the optimizer's ``id``"""
        self._unshared: list[Spike] = []
        self._worst: dict[tuple[Any, ...], Spike] = {}
        """by place, the worst first"""
        self._batch_is_unfinished = False
        self._worst_before_batch: dict[tuple[Any, ...], Spike] | None = None
        """``_worst`` as it was before any spike of the unfinished batch was entered; ``None`` until
        one is entered"""
        self._calls_before_batch: dict[str, int] = {}

    @property
    def has_seen(self) -> bool:
        """Whether :meth:`observe` was called since the last :meth:`load`."""
        return bool(self._pending)

    def begin_batch(self, origin: Origin) -> None:
        """Begin a batch: the losses observed next are from ``origin``."""
        self.origin, self.batch_file = origin, None
        self._batch_is_unfinished, self._worst_before_batch = True, None
        self._calls_before_batch = {name: judge.count for name, judge in self._judges.items()}

    def finish_batch(self) -> None:
        """Finish the batch: it was trained on, so its spikes stay in the record."""
        self._batch_is_unfinished, self._worst_before_batch = False, None

    def release_ids(self) -> None:
        """Let go of the last batch's ids. Its spikes stay, read or not."""
        self.origin = self.origin._replace(ids=None)
        for pending in self._pending.values():
            pending.release_origin()

    def note_shape(self, name: str, shape: torch.Size) -> None:
        """Note how many losses a call has, whether or not any is clipped.

        The number decides whether the losses of that name are one per sample.
        """
        # In a compiled step, this would break the graph.
        if shape and self.origin.ids and not torch.compiler.is_compiling():
            self._sample_ids[name].observe(self.origin.ids, shape[0])

    def observe(self, name: str, seen: Tensor) -> None:
        """Add a call's losses, of which some may be clipped. Never waits for the device.

        Args:
            name: name of the loss.
            seen: what :attr:`ALRC.on_clip <lightning_alrc.ALRC>` gets.
        """
        if name not in self._pending:
            self._pending[name] = _PendingClips(self.size, self._sample_ids[name])
        self.note_shape(name, seen.shape[1:])
        self._pending[name].observe(self.origin, seen, self._judges[name].count)
        self.calls_held = max(self.calls_held, self._pending[name].calls)

    def note_sums(self, name: str, sums: Sums) -> None:
        """Note the sums of a call, whether or not any of its losses is clipped.

        Spikes are judged by the calls before and after them. Never waits for the device.
        """
        judge = self._judges[name]
        judge.observe(sums)
        if judge.has_unjudged or (name in self._pending and self._pending[name].calls):
            self.calls_held = max(self.calls_held, judge.levels_kept)
        elif judge.levels_kept > TRIM_AFTER:
            judge.trim()

    def note_norm(self, optimizer: Any, norm: Tensor) -> None:
        """Note the norm of an optimizer's gradients in this step, a 0-d tensor.

        If an optimizer has several norms in a step, the largest is kept: which of them has the
        gradient of a spike is not known. A norm after clipping is not larger than that before.
        """
        if len(self._norms) > TRIM_AFTER and not any(each.calls for each in self._pending.values()):
            self._norms.clear()
        norms, norm = self._norms.setdefault(self.origin.step, {}), norm.detach()
        earlier = norms.get(id(optimizer))
        norms[id(optimizer)] = norm if earlier is None else torch.fmax(earlier, norm)

    def read(self, at_end: bool = False) -> list[Spike]:
        """Enter the spikes observed since the last read, and return them. Reads the device.

        Args:
            at_end: whether the fit has ended; then 10 later calls are enough to judge a spike.
        """
        read = [each for name, of in self._pending.items() for each in of.read(name, self.rank)]
        new = [spike for _, spike in read]
        self.calls_held = 0
        for number, spike in sorted(read, key=lambda each: each[0]):
            self._judges[spike.name].enter(number, _call_key(spike))
        if new:
            self._unshared = _worst_of_each([*self._unshared, *new], self.size)
            of_batch = [spike for spike in new if spike[1:4] == self.origin[:3]]
            self.enter(spike for spike in new if spike[1:4] != self.origin[:3])
            if of_batch:
                self.batch_file = of_batch[0].batch_file
                if self._batch_is_unfinished and self._worst_before_batch is None:
                    self._worst_before_batch = self._worst
                self.enter(of_batch)
        for name, sample_ids in self._sample_ids.items():
            if sample_ids.take_mistake():
                self._amend(partial(_without_id, name))
        self._enter_norms()
        for name, judge in self._judges.items():
            kinds = judge.take_verdicts(at_end)
            if kinds:
                self._amend(partial(_with_kind, name, self.rank, kinds))
            judge.trim()
        return new

    def _enter_norms(self) -> None:
        """Give the spikes of this rank the norms of their steps. Reads the device."""
        waiting = {
            spike.step
            for spike in self._worst.values()
            if spike.rank == self.rank and spike.gradient_norm is None
        }
        norms = {step: norms for step, norms in self._norms.items() if step in waiting}
        now = self.origin.step
        # The norm of the current step may still come. With accumulated gradients, it comes several
        # batches later.
        self._norms = {step: norms for step, norms in self._norms.items() if step >= now}
        if norms:
            # Optimizers may have their parameters on several devices.
            device = next(norm for each in norms.values() for norm in each.values()).device
            wide = widest_dtype(device)
            squares = [
                torch.stack([norm.to(device, wide) for norm in each.values()]).square().sum()
                for each in norms.values()
            ]
            found = dict(zip(norms, torch.stack(squares).sqrt().tolist(), strict=True))
            self._amend(partial(_with_norm, self.rank, found))

    def _amend(self, amended: Callable[[Spike], Spike]) -> None:
        """Replace spikes by amended versions.

        The changed spikes are sent to other ranks again.
        """
        changed = [each for each in self._worst.values() if each != amended(each)]
        self._worst = {place: amended(each) for place, each in self._worst.items()}
        if self._worst_before_batch is not None:
            self._worst_before_batch = {
                k: amended(each) for k, each in self._worst_before_batch.items()
            }
        # Other ranks may already have the old versions.
        unshared = {each.place: amended(each) for each in [*self._unshared, *changed]}
        self._unshared = _worst_of_each(unshared.values(), self.size)
        self.changed = self.changed or bool(changed)

    def take_unshared(self) -> list[Spike]:
        """Spikes that are new or changed since the last call, to be sent to other ranks."""
        unshared, self._unshared = self._unshared, []
        return unshared

    def enter(self, spikes: Iterable[Spike]) -> None:
        """Add spikes and keep the worst.

        Of two spikes with the same place, the worse one is kept. If both are equally bad, the newer
        one is kept, and a kind or gradient norm that it lacks is taken from the older one.
        """
        known = dict(self._worst)
        for spike in spikes:
            older = known.get(spike.place)
            if older is None or spike.scale <= older.scale:
                known[spike.place] = spike if older is None else _completed(spike, older)
        worst = {spike.place: spike for spike in _worst_of_each(known.values(), self.size)}
        self.changed = self.changed or worst != self._worst
        self._worst = worst

    @property
    def worst(self) -> list[Spike]:
        """All spikes kept, the worst first."""
        return list(self._worst.values())

    def state_dict(self, without_current_batch: bool = False) -> list[dict[str, Any]]:
        """All spikes kept, as plain numbers and strings.

        Args:
            without_current_batch: leave out the spikes of an unfinished batch, because that batch
                will be trained on again.
        """
        worst = self._worst
        if without_current_batch and self._worst_before_batch is not None:
            worst = self._worst_before_batch
        return [spike._asdict() for spike in worst.values()]

    def dump_judges(self, without_current_batch: bool = False) -> dict[str, Any]:
        """The state of each loss's judge, by name.

        ``without_current_batch`` is as in :meth:`state_dict`.
        """
        counts: dict[str, int | None] = dict.fromkeys(self._judges)
        if without_current_batch and self._batch_is_unfinished:
            counts = {name: self._calls_before_batch.get(name, 0) for name in self._judges}
        return {name: judge.dump(counts[name]) for name, judge in self._judges.items()}

    def dump_sample_ids(self) -> dict[str, Any]:
        """Where in a batch the ids of each name's losses are, see :class:`SampleIds`."""
        return dump_sample_ids(self._sample_ids)

    def load(
        self,
        spikes: Iterable[Spike],
        judges: Mapping[str, Judge] | None = None,
        sample_ids: Mapping[str, SampleIds] | None = None,
    ) -> None:
        """Drop everything, and continue from these spikes, judges and sample ids."""
        self._pending, self._unshared, self._worst, self.calls_held = {}, [], {}, 0
        self._norms, self._calls_before_batch = {}, {}
        self._judges = defaultdict(Judge, judges or {})
        self._sample_ids = defaultdict(SampleIds, sample_ids or {})
        self.changed = False
        self.finish_batch()
        self.enter(spikes)


def _worst_of_each_sample(seen: Tensor) -> Tensor:
    """Of each sample, the loss with the smallest scale: [3, samples] of [3, samples, losses].

    All losses of a sample would be one spike. Together they could fill the record.
    """
    worst = seen[0].argmin(1)
    return seen.gather(2, worst[None, :, None].expand(3, -1, 1))[..., 0]


def _call_key(spike: Spike) -> CallKey:
    return spike.step, spike.epoch, spike.batch_idx, spike.call


def _without_id(name: str, spike: Spike) -> Spike:
    """The spike without its id, if its loss turned out not to have one value per sample."""
    has_own_id = spike.sample is not None and type(spike.id) is not list
    return spike._replace(id=None) if has_own_id and spike.name == name else spike


def _with_norm(rank: int, norms: Mapping[int, float], spike: Spike) -> Spike:
    norm = norms.get(spike.step, math.inf)
    is_new = spike.rank == rank and spike.gradient_norm is None and math.isfinite(norm)
    return spike._replace(gradient_norm=norm) if is_new else spike


def _with_kind(name: str, rank: int, kinds: Mapping[CallKey, str], spike: Spike) -> Spike:
    kind = kinds.get(_call_key(spike))
    is_judged = kind is not None and (spike.name, spike.rank) == (name, rank)
    return spike._replace(kind=kind) if is_judged else spike


def _completed(spike: Spike, older: Spike) -> Spike:
    """The spike. If both are equally bad, a kind or norm that it lacks is taken from ``older``."""
    if spike.scale < older.scale or (older.kind is None and older.gradient_norm is None):
        return spike
    norm = older.gradient_norm if spike.gradient_norm is None else spike.gradient_norm
    return spike._replace(kind=spike.kind or older.kind, gradient_norm=norm)


def _worst_of_each(spikes: Iterable[Spike], size: int) -> list[Spike]:
    """The ``size`` spikes of each name with the smallest scales, the worst first."""
    worst = sorted(spikes, key=lambda spike: spike.scale)
    left = Counter({spike.name: size for spike in worst})
    kept = []
    for spike in worst:
        if left[spike.name]:
            kept.append(spike)
            left[spike.name] -= 1
    return kept
