"""``State``: the moments and counts of one loss, and their update by the sums of a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_alrc._moments.sums import Sums, packed
from lightning_alrc.functional import (
    RECENT,
    at_least,
    at_most,
    catch_up_decay,
    ramped_decay,
    update,
)

__all__ = ["Decays", "Moments", "State"]

Moments = tuple[float, float, float] | Tensor
"""Mean, variance, and number of losses learned from, before a call. The number is infinite if
there were start values. The three are floats, or one tensor [3] on the losses' device."""

VERSION = 1
CPU = torch.device("cpu")

LEARNED = ("mu1", "variance", "updates", "losses", "clipped_recently")
"""Fields that a call updates and a reset restarts: the moments, and what the next call's bounds and
update depend on."""
ROW = (
    "row_losses",
    "row_nonfinite",
    "row_clipped",
    "row_scale",
    "row_loss",
    "row_loss_clipped",
    "row_spikes",
    "row_offending",
)
"""Fields that a call updates and :meth:`State.take_row` sets to zero."""
ADDED_TO_TENSORS = (
    "row_spikes",
    "row_offending",
    "total_spikes",
    "total_scored",
    "total_offending",
    "row_from",
)
"""Fields that are missing in tensors that were saved before there was a spike score."""
ADDED_TO_STATES = ("clipped_recently", *ADDED_TO_TENSORS)
"""Fields that are missing in states of release 0.1."""
SIGNED = ("mu1", "row_from")
"""Fields that may be negative."""
UNBOUNDED = ("row_loss", "row_loss_clipped")
"""Fields that huge losses may make infinite. Only the logged row uses these fields."""

WINDOW = 1000
"""The recent spike score covers at least this number of calls, once there are so many."""
BLOCK = 100
"""Smallest number of calls in a block of :attr:`State.recent`. Only the newest block may have
fewer. A block is dropped as a whole."""
BLOCKS = WINDOW // BLOCK + 1
"""Largest number of blocks in :attr:`State.recent`."""


class Decays(NamedTuple):
    """The settings of the update."""

    decay: float
    mu2_decay: float | None
    """decay of the second moment; ``None`` uses ``decay``"""
    ramp_horizon: float | None
    """horizon of :func:`~lightning_alrc.functional.ramped_decay`; ``None`` for the full decay from
    the first update on"""
    tracks_clipped: bool
    """whether the recent clipped fraction is tracked, for
    :func:`~lightning_alrc.functional.learned_threshold`"""


@dataclass
class State:
    """The moments and counts of one loss.

    The *values* are the fields of :data:`LEARNED` and :data:`ROW`. The path for losses on the CPU
    makes them floats. The other paths make them 0-d tensors on the losses' device. The arithmetic
    is the same. All values are of one kind, so the kind of ``mu1`` is the kind of all. The other
    fields are never tensors.
    """

    mu1: Any = 0.0
    variance: Any = 0.0
    updates: Any = 0.0
    """number of calls that updated the moments since the start or the last reset"""
    losses: Any = 0.0
    """number of losses that the moments learned from in these calls"""
    clipped_recently: Any = 0.0
    """clipped fraction of the recent losses; 0 if it is not tracked"""

    row_losses: Any = 0.0
    """``row_<field>``, except ``row_from``: the sum of that field of :class:`Sums` since the last
    logged row"""
    row_nonfinite: Any = 0.0
    row_clipped: Any = 0.0
    row_scale: Any = 0.0
    row_loss: Any = 0.0
    row_loss_clipped: Any = 0.0

    total_losses: float = 0.0
    """``total_*``: counts from the start to the last logged row"""
    total_nonfinite: float = 0.0
    total_clipped: float = 0.0
    total_resets: float = 0.0

    row_spikes: Any = 0.0
    """as in :class:`Sums`, spikes are losses more than 6 standard deviations above the mean"""
    row_offending: Any = 0.0
    total_spikes: float = 0.0
    total_scored: float = 0.0
    """number of losses that were checked for spikes; release 0.1 did not check losses"""
    total_offending: float = 0.0
    row_from: float = 0.0
    """``updates - row_from`` is the number of updating calls since the last logged row. A reset
    sets ``updates`` to 0 and subtracts the old ``updates`` from ``row_from``, which may then be
    negative."""
    recent: tuple[tuple[float, float, float], ...] = ()
    """calls, losses and spikes of the rows logged last, in blocks of :data:`BLOCK` calls or more"""

    _one_tensor = cast("tuple[Tensor, Tensor] | None", None)  # no annotation: not a field
    """the tensor that :meth:`one_tensor` last returned, and the view of its first element, which
    became ``mu1``. If ``mu1`` is now another object, the values are no longer views of this tensor.
    """
    kernel_settings = cast("tuple[Any, Tensor] | None", None)
    """the settings that :mod:`~lightning_alrc._moments.accelerator` used last, and their tensor"""

    @property
    def values(self) -> tuple[Any, ...]:
        """The fields that every call updates, in the order of ``LEARNED`` and ``ROW``."""
        return tuple(getattr(self, name) for name in (*LEARNED, *ROW))

    @values.setter
    def values(self, numbers: tuple[Any, ...]) -> None:
        for name, number in zip((*LEARNED, *ROW), numbers, strict=True):
            setattr(self, name, number)

    @property
    def has_floats(self) -> bool:
        """Whether the values are floats."""
        return not isinstance(self.mu1, Tensor)

    @property
    def is_one_tensor(self) -> bool:
        """Whether the values are views of the tensor of :meth:`one_tensor`."""
        return self._one_tensor is not None and self.mu1 is self._one_tensor[1]

    def one_tensor(self, device: torch.device) -> Tensor:
        """All values in one tensor on a device. The values are views of this tensor from now on."""
        kept = self._one_tensor
        if kept is None or kept[1] is not self.mu1 or kept[0].device != device:
            whole = packed(self.values, device)
            self.values = whole.unbind()
            kept = self._one_tensor = whole, self.mu1
        return kept[0]

    def __getstate__(self) -> dict[str, Any]:
        # After unpickling, the values are no longer views.
        left_out = ("_one_tensor", "kernel_settings")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def make_floats(self) -> None:
        """Make this state's values floats. Reads the device once."""
        if not self.has_floats:
            self.values = tuple(packed(self.values).tolist())

    def move_to(self, device: torch.device) -> None:
        """Make this state's values tensors on a device."""
        if self.has_floats or self.mu1.device != device:
            self.values = tuple(each.clone() for each in packed(self.values, device).unbind())

    def take_tensors_of(self, other: State) -> None:
        """Copy this state's values into the tensors of another state, and keep them there.

        The tensors then belong to this state.

        A captured CUDA graph reads and writes these tensors in each replay. If the other state has
        floats or tensors of inference mode, this state's values are made tensors on the CPU, and
        the other state is not used.
        """
        if other.has_floats or other.mu1.is_inference():
            self.move_to(CPU)
            return
        torch._foreach_copy_(other.values, packed(self.values, other.mu1.device).unbind())
        self.values, self._one_tensor = other.values, other._one_tensor
        self.kernel_settings = other.kernel_settings

    def moments(self, burns_in: bool) -> Moments:
        """A copy of the moments, as floats or a tensor. Does not wait for the device.

        Args:
            burns_in: whether there are no start values.
        """
        if self.has_floats:
            return self.mu1, self.variance, self.losses if burns_in else math.inf
        losses = self.losses if burns_in else torch.full_like(self.mu1, math.inf)
        return torch.stack((self.mu1, self.variance, losses))

    def learn(self, sums: Sums, decays: Decays) -> None:
        """Update moments and counts by sums, which are floats or tensors, like the moments."""
        losses, nonfinite, clipped, scale, loss, loss_clipped, delta, squared, learned, *_ = sums
        if learned is None:
            learned = losses
        # ``is_update`` is 1 if the call has a loss to learn from, else 0. A call with a single loss
        # has no sum of squared deviations, and its ``learned`` is 0 or 1 already.
        is_update, batch_variance = learned, None
        if squared is not None:
            is_update, count = at_most(learned, 1.0), at_least(learned, 1.0)
            delta = delta / count
            # Two nearly equal numbers may be subtracted here. The rounding error, about 1e-16 *
            # delta**2, does not matter unless decay is 0: the new variance also has the term decay
            # * (1 - decay) * delta**2, which is much larger.
            batch_variance = at_least(squared / count - delta * delta, 0.0)
        decay, mu2_decay, _, tracks_clipped = decays
        mu1, variance = update(
            self.mu1,
            self.variance,
            delta,
            batch_variance,
            self._decay_of_call(decay, decays, is_update),
            None if mu2_decay is None else self._decay_of_call(mu2_decay, decays, is_update),
        )
        if tracks_clipped:
            fraction = clipped / at_least(losses, 1.0)
            change = (1.0 - RECENT) * is_update * (fraction - self.clipped_recently)
        else:
            change = None
        # In a compiled function, PyTorch 2.14 would compute wrong gradients from moments that are
        # updated in place: see docs/surprises.md.
        if self.has_floats or torch.compiler.is_compiling():
            self.mu1, self.variance = mu1, variance
            self.updates = self.updates + is_update
            self.losses = self.losses + learned
            if change is not None:
                self.clipped_recently = self.clipped_recently + change
            self.row_losses = self.row_losses + losses
            self.row_nonfinite = self.row_nonfinite + nonfinite
            self.row_clipped = self.row_clipped + clipped
            self.row_scale = self.row_scale + scale
            self.row_loss = self.row_loss + loss
            self.row_loss_clipped = self.row_loss_clipped + loss_clipped
            self.row_spikes = self.row_spikes + sums.spikes
            self.row_offending = self.row_offending + sums.offending
            return
        # The update is in place, so that each replay of a captured CUDA graph continues from the
        # replay before.
        torch._foreach_copy_((self.mu1, self.variance), (mu1, variance))
        counts = [self.updates, self.losses, *(getattr(self, name) for name in ROW)]
        changes = [is_update, learned, losses, nonfinite, clipped, scale, loss, loss_clipped]
        changes += [sums.spikes, sums.offending]
        if change is not None:
            counts.append(self.clipped_recently)
            changes.append(change)
        torch._foreach_add_(counts, changes)

    def _decay_of_call(self, decay: float, decays: Decays, is_update: Any) -> Any:
        """The decay of one call, with the ramp and the catch-up; 1 if there is no update."""
        effective: Any = decay
        if decays.ramp_horizon is not None:
            effective = ramped_decay(decay, self.updates, decays.ramp_horizon)
        if decays.tracks_clipped:
            if isinstance(is_update, Tensor) and not isinstance(effective, Tensor):
                effective = torch.full_like(is_update, effective)
            effective = catch_up_decay(effective, self.clipped_recently)
        return effective**is_update

    def copied(self) -> State:
        """A copy that later calls do not change, on the same device. Does not read the device."""
        copy = replace(self)
        if not copy.has_floats:
            copy.values = packed(copy.values).unbind()
        return copy

    def copied_as_floats(self) -> State:
        """A copy whose values are floats. Reads the device once."""
        copy = replace(self)
        copy.make_floats()
        return copy

    def after_reset(self, start: State) -> State:
        """A copy as floats, with the moments of ``start``. Counts continue. Reads the device once.

        Args:
            start: a state without updates.
        """
        learned = {name: getattr(start, name) for name in LEARNED}
        before = self.copied_as_floats()
        row_from = before.row_from - before.updates
        return replace(before, **learned, row_from=row_from, total_resets=self.total_resets + 1)

    def take_row(self) -> State:
        """Add the ``row_*`` sums to the totals, and set these sums to zero. Reads the device once.

        Returns:
            A copy, as floats, of the state before the sums were set to zero.
        """
        before = self.copied_as_floats()
        self.total_losses += before.row_losses
        self.total_nonfinite += before.row_nonfinite
        self.total_clipped += before.row_clipped
        self.total_spikes += before.row_spikes
        self.total_scored += before.row_losses
        self.total_offending += before.row_offending
        calls, self.row_from = before.updates - self.row_from, before.updates
        self.recent = _appended(self.recent, (calls, before.row_losses, before.row_spikes))
        if self.has_floats:
            for name in ROW:
                setattr(self, name, 0.0)
        else:
            torch._foreach_zero_([getattr(self, name) for name in ROW])
        return before

    @property
    def scores(self) -> tuple[float | None, float | None]:
        """Share of spikes among recent losses, and among all losses; ``None`` without losses."""
        losses, spikes = (sum(block[index] for block in self.recent) for index in (1, 2))
        return (
            spikes / losses if losses else None,
            self.total_spikes / self.total_scored if self.total_scored else None,
        )

    def dump(self, settings: Mapping[str, float | None]) -> dict[str, Any]:
        """State and settings as plain numbers, for a checkpoint. Reads the device once."""
        state = asdict(self.copied_as_floats()) | {"recent": [list(block) for block in self.recent]}
        return {"version": VERSION, "settings": dict(settings), "state": state}

    def as_tensor(self) -> Tensor:
        """The version and the state in one float64 tensor on the CPU. Reads the device once."""
        state = asdict(self.copied_as_floats())
        blocks = [number for block in state.pop("recent") for number in block]
        blocks += [0.0] * (3 * BLOCKS - len(blocks))  # a fixed size: some loaders copy in place
        numbers = (float(VERSION), *state.values(), *blocks)
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> State:
        """The inverse of :meth:`as_tensor`.

        Raises:
            ValueError: if the tensor is not valid. Says what is wrong and what is allowed.
        """
        names = [field.name for field in fields(cls) if field.name != "recent"]
        size = 1 + len(names) + 3 * BLOCKS
        size_before_scores = 1 + len(names) - len(ADDED_TO_TENSORS)
        if tensor.shape not in ((size,), (size_before_scores,)):
            raise ValueError(
                f"ALRC state must be a tensor of {size} numbers, got one of shape "
                f"{tuple(tensor.shape)}"
            )
        version, *values = tensor.tolist()
        # An average of several models' states may have a version like 0.9999999999999999.
        version = VERSION if math.isclose(version, VERSION, rel_tol=1e-6) else version
        state: dict[str, Any] = dict(zip(names, values, strict=False))
        blocks = zip(*[iter(values[len(names) :])] * 3, strict=True)
        state["recent"] = [block for block in blocks if any(block)]
        try:
            return cls.read({"version": version, "state": state})
        except ValueError as error:
            if tensor.dtype == torch.float64:
                raise
            raise ValueError(
                f"{error}. The state was cast from torch.float64 to {tensor.dtype}, which may be "
                "too narrow for it. Do not cast the keys of a state dict that end in "
                "'_extra_state', or remove them: ALRC then keeps the moments that it has"
            ) from None

    @classmethod
    def read(cls, dumped: Any) -> State:
        """The inverse of :meth:`dump`, without the settings.

        Raises:
            ValueError: if the mapping is not valid. Says what is wrong and what is allowed.
        """
        version = dumped.get("version") if isinstance(dumped, Mapping) else type(dumped).__name__
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"ALRC state must be a mapping of version {VERSION}, got {version!r:.100}: it was "
                "written by something else, or by a later release of lightning-alrc"
            )
        given, names = dumped.get("state"), [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        if isinstance(given, Mapping):
            values = dict.fromkeys(ADDED_TO_STATES, 0.0) | {"recent": ()} | dict(given)
        if set(values) != set(names):
            raise ValueError(f"ALRC state must have {names}, got {given!r:.500}")
        recent = values.pop("recent")
        if not _are_blocks(recent):
            raise ValueError(
                f"ALRC state 'recent' must be at most {BLOCKS} lists of three finite numbers, 0 or "
                f"above, got {recent!r:.100}"
            )
        for name, value in values.items():
            if name in UNBOUNDED:
                allowed, good = "a float", type(value) is float
            else:
                largest, smallest = (1e152, -1e152) if name in SIGNED else (1e302, 0.0)
                allowed = f"a finite number from {smallest:g} to {largest:g}"
                good = type(value) in (int, float) and smallest <= value <= largest
            if not good:
                raise ValueError(f"ALRC state {name!r} must be {allowed}, got {value!r:.100}")
        blocks = tuple((float(a), float(b), float(c)) for a, b, c in recent)
        return cls(**{name: float(value) for name, value in values.items()}, recent=blocks)


Block = tuple[float, float, float]
"""Calls, losses and spikes."""


def _appended(recent: tuple[Block, ...], row: Block) -> tuple[Block, ...]:
    """The blocks with a row appended. Old blocks that :data:`WINDOW` does not need are dropped."""
    *before, last = *recent, row
    if before and before[-1][0] < BLOCK:
        calls, losses, spikes = before.pop()
        last = (calls + row[0], losses + row[1], spikes + row[2])
    blocks = [*before, last]
    while sum(calls for calls, *_ in blocks[1:]) >= WINDOW:
        del blocks[0]
    return tuple(blocks)


def _are_blocks(recent: Any) -> bool:
    return (
        isinstance(recent, (list, tuple))
        and len(recent) <= BLOCKS
        and all(
            isinstance(block, (list, tuple))
            and len(block) == 3
            and all(type(each) in (int, float) and 0 <= each <= 1e302 for each in block)
            for block in recent
        )
    )
