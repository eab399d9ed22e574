"""``Exchange``: one all-reduce per step, with the sums of all losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_alrc._moments.distributed import PendingSums
from lightning_alrc._moments.sums import Sums, zero_sums
from lightning_alrc._trainer.named_losses import NamedLosses

__all__ = ["Exchange"]

AGREE_EVERY = 1000
"""Number of steps after which late names are agreed on, even if Lightning does not log."""


class Exchange:
    """One all-reduce per step, with one row of sums for each named loss.

    The ranks must agree on the names: if the shapes of their rows differed, the run would hang.
    They agree after the first step. A name that is first met later is late: its sums are kept until
    the next call of :meth:`agree_on_late_names` or :meth:`learn_late_names`. One more row tells
    whether any rank has a late name.

    Args:
        losses: the losses of this rank, by name; grows as names are met on any rank.
        prompt: whether to agree on late names at once. Every step then waits for its all-reduce.
    """

    def __init__(self, losses: NamedLosses, prompt: bool = False) -> None:
        self._losses = losses
        self._prompt = prompt
        self._index: dict[str, int] | None = None
        """the row of each agreed name"""
        self._rows: Tensor | None = None
        """the rows of this step; the last tells whether there is a late name"""
        self._late: dict[str, Tensor] = {}
        """the sums of late names"""
        self._latest: PendingSums | None = None
        self._sent = 0

    def clip(self, name: str, loss: Tensor) -> Tensor:
        """Clip one loss. Its sums are sent at the end of the step."""
        return self._losses[name].clip(loss, self._row(name, loss.device))

    def _row(self, name: str, device: torch.device) -> Tensor:
        """The row to which the sums of a name are added in this step."""
        if self._index is not None and name in self._index:
            if self._rows is None:
                self._rows = self._new_rows(device)
            return self._rows[self._index[name]]
        if name not in self._late:
            self._late[name] = zero_sums(device)
        return self._late[name]

    def _new_rows(self, device: torch.device) -> Tensor:
        return zero_sums(device, len(self._index or ()) + 1)

    def count_only(self, name: str) -> None:
        """Do not learn from this step's losses of a name, but count them. Called at a reset.

        Every rank must call it.
        """
        learned = [Sums._fields.index(f) for f in ("deviation", "squared_deviation", "learned")]
        if name in self._late:
            self._late[name][learned] = 0.0
        elif self._rows is not None and self._index is not None and name in self._index:
            self._rows[self._index[name], learned] = 0.0

    def send(self, device: torch.device) -> None:
        """Start the all-reduce of this step. Every rank must call it once a step."""
        if self._index is None:
            self._agree_on_names()
        rows, self._rows = self._rows, None
        rows = self._new_rows(device) if rows is None else rows.to(device)
        index = self._index or {}
        for name in self._late.keys() & index.keys():
            rows[index[name]] += self._late.pop(name).to(device)
        if self._late:
            rows[-1].fill_(1.0)
        self._latest = PendingSums(rows)
        for name, row in index.items():
            self._losses[name].learn_when_reduced(self._latest, row)
        self._sent += 1
        if self._prompt or self._sent % AGREE_EVERY == 0:
            self.learn_late_names(device)

    def learn_late_names(self, device: torch.device) -> None:
        """Agree on late names and send their sums. Reads the device.

        Every rank must call it.
        """
        if self.agree_on_late_names():
            self.send(device)

    def agree_on_late_names(self) -> bool:
        """Agree on late names. Reads the device. Every rank must call it.

        Returns:
            Whether any rank had one.
        """
        any_late = self._latest is not None and self._latest[-1][0].item() > 0
        if any_late:
            self._agree_on_names()
        self._latest = None
        return any_late

    def _agree_on_names(self) -> None:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(self._losses))
        names = sorted({name for of_rank in gathered for name in of_rank})
        for name in names:
            if name not in self._losses:
                self._losses.get_or_add(name)
        self._index = {name: row for row, name in enumerate(names)}
