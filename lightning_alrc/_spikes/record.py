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
from lightning_alrc._spikes.ids import Ids, SampleIds, all_ids, apart, as_list
from lightning_alrc._spikes.judging import Judge

__all__ = ["Origin", "Spike", "SpikeRecord"]

FOLD_AFTER = 64
"""Calls whose losses are held on the device before only the worst of them are."""

TRIM_AFTER = 256
"""Calls after which those that no spike needs are forgotten."""

MOST_HELD = 2**14
"""Losses held until then, and those of the last call: some hundred kilobytes."""

HALF = 2**20
"""Positions are read from the device as multiples of it and what remains."""


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
    each sample, a list of all the batch's, up to 64; ``None`` where there are none or more"""
    loss: float
    """before it was clipped"""
    threshold: float
    """what it was clipped to"""
    scale: float
    """the factor on its gradient, in [0, 1): the smaller, the worse"""
    rank: int
    call: int = 0
    """which call of that name in the batch: 0 for the first"""
    gradient_norm: float | None = None
    """norm of the gradients of that step before they were clipped by it, or the step was skipped;
    ``None`` where nobody computed it"""
    kind: str | None = None
    """``"data"`` where the losses after it are as those before, ``"divergence"`` where they stay
    above those; ``None`` as long as that is not known"""

    @property
    def place(self) -> tuple[Any, ...]:
        """What no two spikes of a run have in common.

        A batch that is trained on again, after an exception and a further fit, has another step. If
        its step had not come before the exception, the place is the same, and the worse spike
        stays.
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
        """Name of the file that its batch is in, if batches are kept."""
        return f"epoch={self.epoch}-batch={self.batch_idx}-step={self.step}-rank={self.rank}.pt"


class Origin(NamedTuple):
    """The batch that losses come from, and the ids in it, if any."""

    step: int = 0
    epoch: int = 0
    batch_idx: int = 0
    ids: Ids | None = None


class _Call(NamedTuple):
    """One call of a loss that has not been read yet."""

    origin: Origin
    number: int
    """of calls before it in its batch"""
    shape: torch.Size
    position: int
    """of calls of that name before it in the fit"""


class _Seen:
    """The worst clips of one loss that have not been read yet, on its device.

    Seeing waits for nothing, and holds no more than some hundred kilobytes.
    """

    def __init__(self, size: int, sample_ids: SampleIds) -> None:
        self._size = size
        self._sample_ids = sample_ids
        self._calls: list[_Call] = []
        self._origin: Origin | None = None
        """of the last call, as the record had it"""
        self._last = _Call(Origin(), 0, torch.Size(), 0)
        self._count = 0
        """Number of losses in the calls; a loss's position is counted through all."""
        self._held: list[Tensor] = []
        self._held_count = 0
        self._worst: tuple[Tensor, Tensor] | None = None

    @property
    def calls(self) -> int:
        """Number of calls since the last was read."""
        return len(self._calls)

    def observe(self, origin: Origin, seen: Tensor, position: int) -> None:
        """Take note of losses that have just been clipped, as a watcher is told of them."""
        shape = seen.shape[1:]
        if origin is self._origin:
            last = self._last
            call = last._replace(number=last.number + 1, shape=shape, position=position)
        else:
            self._origin = origin
            call = _Call(origin._replace(ids=apart(origin.ids or {})), 0, shape, position)
        self._last = call
        self._calls.append(call)
        self._held.append(seen.reshape(3, shape.numel()))
        self._count += shape.numel()
        self._held_count += shape.numel()
        if self._held_count >= MOST_HELD or len(self._held) >= FOLD_AFTER:
            self._fold()

    def forget_batch(self) -> None:
        """Hold on to nothing of the last batch but its spikes."""
        self._origin = None

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
        self._held_count = 0
        return self._worst

    def read(self, name: str, rank: int) -> list[tuple[int, Spike]]:
        """The worst clips since this was last called, with the positions of their calls.

        Waits for the device.
        """
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
        first = list(accumulate((call.shape.numel() for call in calls), initial=0))
        of_call: dict[int, tuple[list[Any] | None, list[Any] | None]] = {}
        spikes = []
        for high, low, scale, loss, bound in rows:
            if scale >= 1.0:
                continue
            position = int(high) * HALF + int(low)
            index = bisect_right(first, position) - 1
            origin, number, shape, call_position = calls[index]
            if index not in of_call:
                of_call[index] = self._ids_of(origin.ids or {}, shape)
            one_each, together = of_call[index]
            sample = (position - first[index]) // math.prod(shape[1:]) if shape else None
            spike = Spike(
                name,
                origin.step,
                origin.epoch,
                origin.batch_idx,
                sample,
                together if one_each is None or sample is None else one_each[sample],
                loss,
                bound,
                scale,
                rank,
                number,
            )
            spikes.append((call_position, spike))
        return spikes

    def _ids_of(self, ids: Ids, shape: torch.Size) -> tuple[list[Any] | None, list[Any] | None]:
        """One id for each loss of a call, if they have ids; and else all ids of the batch."""
        one_each = self._sample_ids.of(ids, shape[0]) if shape else None
        if one_each is None:
            return None, all_ids(ids)
        return as_list(one_each), None


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
        self.batch_file: str | None = None
        """name of the file of the last batch, if any of its spikes have been read"""
        self._seen: dict[str, _Seen] = {}
        self._sample_ids: dict[str, SampleIds] = defaultdict(SampleIds)
        self._judges: dict[str, Judge] = defaultdict(Judge)
        self._norms: dict[int, list[Tensor]] = {}
        """by step, of all optimizers"""
        self._unshared: list[Spike] = []
        self._worst: dict[tuple[Any, ...], Spike] = {}
        """by place, the worst first"""
        self._batch_is_unfinished = False
        self._before_batch: dict[tuple[Any, ...], Spike] | None = None
        """the worst without those of the unfinished batch, if any of it have been read"""
        self._calls_before_batch: dict[str, int] = {}

    @property
    def has_seen(self) -> bool:
        """Whether any loss was."""
        return bool(self._seen)

    def begin_batch(self, origin: Origin) -> None:
        """The losses that are seen next are those of a new batch."""
        self.origin, self.batch_file = origin, None
        self._batch_is_unfinished, self._before_batch = True, None
        self._calls_before_batch = {name: judge.count for name, judge in self._judges.items()}

    def finish_batch(self) -> None:
        """The batch has been learned from: its spikes belong to the run for good."""
        self._batch_is_unfinished, self._before_batch = False, None

    def forget_batch(self) -> None:
        """Hold on to nothing of the last batch."""
        self.origin = self.origin._replace(ids=None)
        for seen in self._seen.values():
            seen.forget_batch()

    def note_shape(self, name: str, shape: torch.Size) -> None:
        """Take note of how many losses a call has, whether or not any is clipped.

        It tells whether the losses of that name are of samples.
        """
        # Inside a compiled step it would break the graph.
        if shape and self.origin.ids and not torch.compiler.is_compiling():
            self._sample_ids[name].observe(self.origin.ids, shape[0])

    def observe(self, name: str, seen: Tensor) -> None:
        """Take note of losses that have just been clipped, without waiting for the device.

        Args:
            name: of the loss.
            seen: as :attr:`ALRC.watcher <lightning_alrc.ALRC>` is told of them.
        """
        if name not in self._seen:
            self._seen[name] = _Seen(self.size, self._sample_ids[name])
        self.note_shape(name, seen.shape[1:])
        self._seen[name].observe(self.origin, seen, self._judges[name].count)
        self.unread = max(self.unread, self._seen[name].calls)

    def note_sums(self, name: str, sums: Sums) -> None:
        """Take note of a call, whether or not any of its losses is clipped, by their sums.

        It tells what the losses beside a spike are like. Waits for nothing.
        """
        judge = self._judges[name]
        judge.observe(sums)
        if judge.waits or (name in self._seen and self._seen[name].calls):
            self.unread = max(self.unread, judge.kept)
        elif judge.kept > TRIM_AFTER:
            judge.trim()

    def note_norm(self, norm: Tensor) -> None:
        """Take note of the norm of an optimizer's gradients in this step, a 0-d tensor."""
        if len(self._norms) > TRIM_AFTER and not any(seen.calls for seen in self._seen.values()):
            self._norms.clear()
        self._norms.setdefault(self.origin.step, []).append(norm.detach())

    def read(self, at_end: bool = False) -> list[Spike]:
        """Enter what was seen since this was last called, and return it. Waits for the device.

        Args:
            at_end: of a fit: what is not known by now is not known later.
        """
        seen = [each for name, of in self._seen.items() for each in of.read(name, self.rank)]
        new = [spike for _, spike in seen]
        self.unread = 0
        for position, spike in sorted(seen, key=lambda each: each[0]):
            self._judges[spike.name].enter(position, _call_of(spike))
        if new:
            self._unshared = _worst_of_each([*self._unshared, *new], self.size)
            of_batch = [spike for spike in new if spike[1:4] == self.origin[:3]]
            self.enter(spike for spike in new if spike[1:4] != self.origin[:3])
            if of_batch:
                self.batch_file = of_batch[0].batch_file
                if self._batch_is_unfinished and self._before_batch is None:
                    self._before_batch = self._worst
                self.enter(of_batch)
        for name, sample_ids in self._sample_ids.items():
            if sample_ids.take_mistake():
                self._correct(partial(_without_id, name))
        self._enter_norms()
        for name, judge in self._judges.items():
            kinds = judge.verdicts(at_end)
            if kinds:
                self._correct(partial(_with_kind, name, self.rank, kinds))
            judge.trim()
        return new

    def _enter_norms(self) -> None:
        """Give the spikes of this rank the norms of their steps. Waits for the device."""
        waiting = {
            spike.step
            for spike in self._worst.values()
            if spike.rank == self.rank and spike.gradient_norm is None
        }
        norms = {step: norms for step, norms in self._norms.items() if step in waiting}
        now = self.origin.step
        # A batch that accumulates gradients, or whose step is on its way, waits for its norm.
        self._norms = {step: norms for step, norms in self._norms.items() if step >= now}
        if norms:
            wide = widest_dtype(next(iter(norms.values()))[0].device)
            squares = [torch.stack(each).to(wide).square().sum() for each in norms.values()]
            found = dict(zip(norms, torch.stack(squares).sqrt().tolist(), strict=True))
            self._correct(partial(_with_norm, self.rank, found))

    def _correct(self, corrected: Callable[[Spike], Spike]) -> None:
        """Change what is told of spikes."""
        wrong = [each for each in self._worst.values() if each != corrected(each)]
        self._worst = {place: corrected(each) for place, each in self._worst.items()}
        if self._before_batch is not None:
            self._before_batch = {k: corrected(each) for k, each in self._before_batch.items()}
        # Other ranks may have been told of them.
        unshared = {each.place: corrected(each) for each in [*self._unshared, *wrong]}
        self._unshared = _worst_of_each(unshared.values(), self.size)
        self.changed = self.changed or bool(wrong)

    def take_unshared(self) -> list[Spike]:
        """This rank's spikes that other ranks have not been told of."""
        unshared, self._unshared = self._unshared, []
        return unshared

    def enter(self, spikes: Iterable[Spike]) -> None:
        """Keep the worst of what there is and of these; one of each place, the last of equals."""
        known = dict(self._worst)
        for spike in spikes:
            twin = known.get(spike.place)
            if twin is None or spike.scale <= twin.scale:
                known[spike.place] = spike if twin is None else _completed(spike, twin)
        worst = {spike.place: spike for spike in _worst_of_each(known.values(), self.size)}
        self.changed = self.changed or worst != self._worst
        self._worst = worst

    @property
    def worst(self) -> list[Spike]:
        """All that is kept, the worst first."""
        return list(self._worst.values())

    def state_dict(self, without_current_batch: bool = False) -> list[dict[str, Any]]:
        """All that is kept, as plain numbers and strings.

        Args:
            without_current_batch: leave out the spikes of a batch that is not finished, as it will
                be trained on again.
        """
        worst = self._worst
        if without_current_batch and self._before_batch is not None:
            worst = self._before_batch
        return [spike._asdict() for spike in worst.values()]

    def dump_judges(self, without_current_batch: bool = False) -> dict[str, Any]:
        """By name, what spikes are still to be judged by; the arguments are as above."""
        counts: dict[str, int | None] = dict.fromkeys(self._judges)
        if without_current_batch and self._batch_is_unfinished:
            counts = {name: self._calls_before_batch.get(name, 0) for name in self._judges}
        return {name: judge.dump(counts[name]) for name, judge in self._judges.items()}

    def load(self, spikes: Iterable[Spike], judges: Mapping[str, Judge] | None = None) -> None:
        """Forget what there is, and keep these."""
        self._seen, self._unshared, self._worst, self.unread = {}, [], {}, 0
        self._norms, self._calls_before_batch = {}, {}
        self._judges = defaultdict(Judge, judges or {})
        self._sample_ids.clear()
        self.changed = False
        self.finish_batch()
        self.enter(spikes)


def _call_of(spike: Spike) -> tuple[int, int, int, int]:
    return spike.step, spike.epoch, spike.batch_idx, spike.call


def _without_id(name: str, spike: Spike) -> Spike:
    """A spike whose losses are not of samples after all: it has no sample's id."""
    is_of_one = spike.sample is not None and type(spike.id) is not list
    return spike._replace(id=None) if is_of_one and spike.name == name else spike


def _with_norm(rank: int, norms: Mapping[int, float], spike: Spike) -> Spike:
    norm = norms.get(spike.step, math.inf)
    is_new = spike.rank == rank and spike.gradient_norm is None and math.isfinite(norm)
    return spike._replace(gradient_norm=norm) if is_new else spike


def _with_kind(
    name: str, rank: int, kinds: Mapping[tuple[int, int, int, int], str], spike: Spike
) -> Spike:
    kind = kinds.get(_call_of(spike))
    is_of_it = kind is not None and (spike.name, spike.rank) == (name, rank)
    return spike._replace(kind=kind) if is_of_it else spike


def _completed(spike: Spike, twin: Spike) -> Spike:
    """A spike with what is known of it already."""
    if spike.scale < twin.scale or (twin.kind is None and twin.gradient_norm is None):
        return spike
    norm = twin.gradient_norm if spike.gradient_norm is None else spike.gradient_norm
    return spike._replace(kind=spike.kind or twin.kind, gradient_norm=norm)


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
