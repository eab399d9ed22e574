"""What the ranks of a Trainer tell each other in a step: one message for all its losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_alrc._moments.distributed import Reduction
from lightning_alrc._moments.sums import Sums
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
        self._names: list[str] | None = None
        self._waiting: dict[str, Tensor] = {}
        self._latest: Reduction | None = None
        self._sent = 0

    def clip(self, name: str, loss: Tensor) -> Tensor:
        """Clip one loss; what it teaches is sent at the end of the step."""
        clipped, sums = self._losses[name].clip(loss)
        message = sums.packed(loss.device)
        self._waiting[name] = self._waiting.get(name, 0) + message
        return clipped

    def count_only(self, name: str) -> None:
        """Do not learn what a loss taught in this step: its moments are reset. Counts go on.

        Every rank must call it.
        """
        if name in self._waiting:
            learned = [Sums._fields.index(f) for f in ("deviation", "squared_deviation", "learned")]
            self._waiting[name][learned] = 0.0

    def send(self, device: torch.device) -> None:
        """Send what this step taught. Every rank must call it once a step."""
        if self._names is None:
            self._names = self._agreed_names()
        shape = len(self._names) + 1, len(Sums._fields)
        rows = torch.zeros(shape, dtype=torch.float64, device=device)
        for index, name in enumerate(self._names):
            if name in self._waiting:
                rows[index] = self._waiting.pop(name)
        if self._waiting:
            rows[-1].fill_(1.0)
        self._latest = Reduction(rows)
        for index, name in enumerate(self._names):
            self._losses[name].learn_later(self._latest, index)
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
            self._names = self._agreed_names()
        self._latest = None
        return late

    def _agreed_names(self) -> list[str]:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(self._losses))
        names = sorted({name for of_rank in gathered for name in of_rank})
        for name in names:
            if name not in self._losses:
                self._losses.meet(name)
        return names
