"""``Exchange``: one all-reduce per step, with the sums of all losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_alrc._moments.distributed import PendingSums, gathered, is_active
from lightning_alrc._moments.sums import Sums, zero_sums
from lightning_alrc._trainer.named_losses import NamedLosses

__all__ = ["Exchange", "has_other_ranks"]

AGREE_EVERY = 1000
"""After this many steps the ranks agree on late names (see :class:`Exchange`), even if Lightning
does not log."""


def has_other_ranks(trainer: Any) -> bool:
    """Whether other ranks train with this Trainer.

    A process group alone does not mean that: each of its ranks may have a Trainer of its own.
    """
    return is_active() and bool(trainer.world_size > 1)


class Exchange:
    """One all-reduce per step, with one row of sums for each named loss.

    All ranks must send the same rows, or the run hangs. So the ranks agree on the names at the end
    of the first step. A name that a rank first meets after the first step is a *late* name. The
    rank accumulates the sums of its late names until the ranks agree again. The last row of
    each all-reduce belongs to no loss. It tells whether any rank has a late name.

    Args:
        losses: each loss's ALRC on this rank, by name; grows as names are met on any rank.
        agrees_each_step: whether the ranks agree on late names in each step. The host then waits
            for the all-reduce of each step.
    """

    def __init__(self, losses: NamedLosses, agrees_each_step: bool = False) -> None:
        self._losses = losses
        self._agrees_each_step = agrees_each_step
        self._index: dict[str, int] | None = None
        """by name, the index of its row; ``None`` until the ranks first agree on names"""
        self._rows: Tensor | None = None
        """the sums of this step so far, one row for each agreed name, and the last row"""
        self._accumulated: dict[str, Tensor] = {}
        """the accumulated sums of each name that has no row: all names until the first agreement,
        and only late names after it"""
        self._unread: PendingSums | None = None
        """the newest all-reduce, until the host reads its last row"""
        self._sent = 0

    def clip(self, name: str, loss: Tensor) -> Tensor:
        """Clip one loss. Its sums are sent at the end of the step."""
        return self._losses[name].clip(loss, self._sums_of(name, loss.device))

    def _sums_of(self, name: str, device: torch.device) -> Tensor:
        """The sums to which the losses of a name are added: the name's row or accumulated sums."""
        if self._index is not None and name in self._index:
            if self._rows is None:
                self._rows = self._new_rows(device)
            return self._rows[self._index[name]]
        if name not in self._accumulated:
            self._accumulated[name] = zero_sums(device)
        return self._accumulated[name]

    def _new_rows(self, device: torch.device) -> Tensor:
        return zero_sums(device, len(self._index or ()) + 1)

    def discard_learning(self, name: str) -> None:
        """Discard what the moments of a name would learn from losses not yet sent. Counts stay.

        Called at a reset. Every rank must call it.
        """
        fields = ("deviation", "squared_deviation", "learned")
        indices = [Sums._fields.index(field) for field in fields]
        if name in self._accumulated:
            self._accumulated[name][indices] = 0.0
        elif self._rows is not None and self._index is not None and name in self._index:
            self._rows[self._index[name], indices] = 0.0

    def send(self, device: torch.device) -> None:
        """Start the all-reduce of the sums not yet sent. All ranks must call this equally often."""
        if self._index is None:
            self._agree_on_names()
        rows, self._rows = self._rows, None
        rows = self._new_rows(device) if rows is None else rows.to(device)
        index = self._index or {}
        for name in self._accumulated.keys() & index.keys():
            rows[index[name]] += self._accumulated.pop(name).to(device)
        if self._accumulated:
            rows[-1].fill_(1.0)
        self._unread = PendingSums(rows)
        for name, row in index.items():
            self._losses[name].learn_when_reduced(self._unread, row)
        self._sent += 1
        if self._agrees_each_step or self._sent % AGREE_EVERY == 0:
            self.agree_and_send_late_names(device)

    def agree_and_send_late_names(self, device: torch.device) -> bool:
        """Agree on late names. If any rank has one, start the all-reduce of the sums not yet sent.

        Reads the device. Every rank must call it.

        Returns:
            Whether any rank had a late name.
        """
        any_late = self.agree_on_late_names()
        if any_late:
            self.send(device)
        return any_late

    def agree_on_late_names(self) -> bool:
        """Agree on late names. Reads the device. Every rank must call it.

        Returns:
            Whether any rank had a late name.
        """
        any_late = self._unread is not None and self._unread[-1][0].item() > 0
        if any_late:
            self._agree_on_names()
        self._unread = None
        return any_late

    def _agree_on_names(self) -> None:
        names = sorted({name for of_rank in gathered(list(self._losses)) for name in of_rank})
        for name in names:
            if name not in self._losses:
                self._losses.get_or_add(name)
        self._index = {name: row for row, name in enumerate(names)}
