"""What the ranks of a Trainer tell each other in a step: one message for all its losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_alrc._moments.distributed import PendingSums
from lightning_alrc._moments.sums import Sums, zero_sums
from lightning_alrc._trainer.named_losses import NamedLosses

__all__ = ["Exchange"]

CATCH_UP_EVERY = 1000
"""Steps after which late names are taken up even where Lightning does not log."""


class Exchange:
    """The sums of all named losses of a step, sent together.

    The ranks must agree on the names, or their messages would not be of one shape and the run would
    hang. They do so after the first step. A name that turns up later waits, its losses with it,
    until the next call of :meth:`agree_on_late_names` or :meth:`catch_up`; each message tells
    whether there is one.

    Args:
        losses: those of this rank; grows as names are met, here or on another rank.
        prompt: take up late names at once. Every step then waits for its message.
    """

    def __init__(self, losses: NamedLosses, prompt: bool = False) -> None:
        self._losses = losses
        self._prompt = prompt
        self._index: dict[str, int] | None = None
        """of each agreed name's row in the message"""
        self._rows: Tensor | None = None
        """the message of this step; its last row tells whether a name waits"""
        self._waiting: dict[str, Tensor] = {}
        """rows of names that are not agreed on"""
        self._latest: PendingSums | None = None
        self._sent = 0

    def clip(self, name: str, loss: Tensor) -> Tensor:
        """Clip one loss; what it teaches is sent at the end of the step."""
        return self._losses[name].clip(loss, self._row(name, loss.device))

    def _row(self, name: str, device: torch.device) -> Tensor:
        """The row that this step's losses of a name are added to."""
        if self._index is not None and name in self._index:
            if self._rows is None:
                self._rows = self._new_rows(device)
            return self._rows[self._index[name]]
        if name not in self._waiting:
            self._waiting[name] = zero_sums(device)
        return self._waiting[name]

    def _new_rows(self, device: torch.device) -> Tensor:
        return zero_sums(device, len(self._index or ()) + 1)

    def count_only(self, name: str) -> None:
        """Do not learn what a loss taught in this step: its moments are reset. Counts go on.

        Every rank must call it.
        """
        learned = [Sums._fields.index(f) for f in ("deviation", "squared_deviation", "learned")]
        if name in self._waiting:
            self._waiting[name][learned] = 0.0
        elif self._rows is not None and self._index is not None and name in self._index:
            self._rows[self._index[name], learned] = 0.0

    def send(self, device: torch.device) -> None:
        """Send what this step taught. Every rank must call it once a step."""
        if self._index is None:
            self._agree_on_names()
        rows, self._rows = self._rows, None
        rows = self._new_rows(device) if rows is None else rows.to(device)
        index = self._index or {}
        for name in self._waiting.keys() & index.keys():
            rows[index[name]] += self._waiting.pop(name).to(device)
        if self._waiting:
            rows[-1].fill_(1.0)
        self._latest = PendingSums(rows)
        for name, row in index.items():
            self._losses[name].learn_when_reduced(self._latest, row)
        self._sent += 1
        if self._prompt or self._sent % CATCH_UP_EVERY == 0:
            self.catch_up(device)

    def catch_up(self, device: torch.device) -> None:
        """Learn from names met since the first step, too. Reads the device.

        Every rank must call it.
        """
        if self.agree_on_late_names():
            self.send(device)

    def agree_on_late_names(self) -> bool:
        """Take up names met since the first step, and tell if there were any.

        Reads the device; every rank must call it.
        """
        late = self._latest is not None and self._latest[-1][0].item() > 0
        if late:
            self._agree_on_names()
        self._latest = None
        return late

    def _agree_on_names(self) -> None:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(self._losses))
        names = sorted({name for of_rank in gathered for name in of_rank})
        for name in names:
            if name not in self._losses:
                self._losses.get_or_add(name)
        self._index = {name: row for row, name in enumerate(names)}
