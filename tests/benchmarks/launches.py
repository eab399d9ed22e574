"""What a step of ALRC launches on an accelerator: ``python -m tests.benchmarks.launches``.

Launches are counted, not timed, so no accelerator is needed. The losses are on the CPU, but take
the path of a device. Triton's interpreter runs the kernel. Each launch costs the host some
microseconds. Inside a Trainer, the numbers are what ALRC adds to steps that do not log, with the
record of spikes on.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, at the import of Triton

import itertools
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._moments.sums import zero_sums
from lightning_alrc._spikes.record import REDUCE_AFTER
from tests.conftest import on_device
from tests.counting import Operations

PATHS = {"device": "tensor operations", "kernel": "one kernel"}
WARM_UP = 20


class Counted(NamedTuple):
    """Launches of a step: forwards and backwards, or the median and mean of both together."""

    first: float
    second: float


def counted(call: Callable[[Tensor], Tensor], loss: Tensor) -> Counted:
    """Launches of a call and of its backward pass, once the moments have settled."""
    loss.requires_grad_()
    for _ in range(WARM_UP):
        call(loss)
    with Operations() as forwards:
        clipped = call(loss)
    gradient = torch.ones_like(clipped)
    with Operations() as backwards:
        torch.autograd.grad(clipped, loss, gradient)
    return Counted(len(forwards.launches), len(backwards.launches))


def clipping() -> ALRC:
    """ALRC that clips every loss: its moments are nearly constant and far below the losses."""
    return ALRC(decay=1 - 1e-12, mu1_start=1e-3, mu2_start=2e-6)


def recorded() -> ALRC:
    alrc = ALRC()
    alrc.on_clip = lambda seen: None
    alrc.on_sums = lambda sums: None
    return alrc


def shared() -> Callable[[Tensor], Tensor]:
    """A loss of several ranks: a call learns the last step's message and writes its own message."""
    alrc, row = ALRC(), zero_sums(torch.device("cpu"))

    class Arrived:
        def __getitem__(self, index: int) -> Tensor:
            return row

    def call(loss: Tensor) -> Tensor:
        clipped = alrc.clip(loss, row)
        alrc.learn_when_reduced(Arrived(), 0)  # type: ignore[arg-type]
        return clipped

    return call


def losses(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 2.0).to(dtype)


ROWS: dict[str, Callable[[], Counted]] = {
    "a scalar loss": lambda: counted(ALRC(), losses()),
    "a scalar loss, clipped": lambda: counted(clipping(), losses()),
    "256 losses": lambda: counted(ALRC(), losses(256)),
    "256 losses, clipped": lambda: counted(clipping(), losses(256)),
    "256 losses, two-sided": lambda: counted(ALRC(num_stddev_below=3.0), losses(256)),
    "256 losses, two decays": lambda: counted(ALRC(mu2_decay=0.99), losses(256)),
    "256 losses in bfloat16": lambda: counted(ALRC(), losses(256, dtype=torch.bfloat16)),
    "256 losses, seen by the record": lambda: counted(recorded(), losses(256)),
    "100,000 losses": lambda: counted(ALRC(), losses(100_000)),
    "256 losses, sums of several ranks": lambda: counted(shared(), losses(256)),
}


class Net(pl.LightningModule):
    """The smallest module with a loss for each sample of a batch."""

    def __init__(self, averages: bool) -> None:
        super().__init__()
        self.averages = averages
        self.weight = nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = (self.weight * batch).square()
        return losses.mean() if self.averages else losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


class Steps(pl.Callback):
    """Notes the number of launches at the end of each step."""

    def __init__(self, counted: Operations) -> None:
        self.counted, self.launches = counted, [0]

    def on_train_batch_end(self, *_: Any) -> None:
        self.launches.append(len(self.counted.launches))


def added_in_a_trainer(size: int, averages: bool) -> Counted:
    """Launches that the callback adds to a step, forwards and backwards: median and mean.

    The mean is over `REDUCE_AFTER` steps, because the record drops clips once in so many steps.
    """

    def launches(*callbacks: pl.Callback) -> list[int]:
        with Operations() as counted:
            steps = Steps(counted)
            trainer = pl.Trainer(
                callbacks=[*callbacks, steps],
                accelerator="cpu",
                devices=1,
                max_steps=REDUCE_AFTER + WARM_UP,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data: Any = losses((REDUCE_AFTER + WARM_UP) * size)
            # Without ALRC, Lightning requires one number.
            trainer.fit(Net(averages or not callbacks), DataLoader(data, batch_size=size))
        each = [after - before for before, after in itertools.pairwise(steps.launches)]
        return each[WARM_UP:]

    with_alrc, without = launches(ALRCCallback()), launches()
    median = statistics.median(with_alrc) - statistics.median(without)
    return Counted(median, (sum(with_alrc) - sum(without)) / REDUCE_AFTER)


ROWS |= {
    "a step in a Trainer, a scalar loss": lambda: added_in_a_trainer(8, averages=True),
    "a step in a Trainer, 256 losses": lambda: added_in_a_trainer(256, averages=False),
}


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    console = Console(width=120)
    table = Table(box=box.MARKDOWN)
    table.add_column("launches, forwards + backwards")
    for name in PATHS.values():
        table.add_column(name, justify="right")
    for what, row in ROWS.items():
        cells = []
        for path in PATHS:
            if path == "kernel" and find_spec("triton") is None:
                cells.append("no Triton")
                continue
            with pytest.MonkeyPatch.context() as patch:
                on_device(patch, path)
                first, second = row()
            both = "{:.3g}, on average {:.3g}" if "Trainer" in what else "{} + {}"
            cells.append(both.format(first, second))
        table.add_row(what, *cells)
    console.print(table)
    console.print(f"torch {torch.__version__}; counted on a CPU, not timed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
