"""Compares images a second of this example's training steps with loops written by hand.

    python -m examples.cifar10_supersampling.throughput

All trainings exist at once and take turns of a few steps, round after round. So other load of the
machine affects all of them equally. Seconds are CPU time of one thread, which is wall time on an
idle machine.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from pytorch_lightning.loggers import CSVLogger
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_alrc import ALRCCallback

from .datamodule import CIFAR10Supersampling, TrainingBatches
from .module import Supersampling, guarded, image_error
from .network import SupersamplingNetwork
from .transformation import Batch

LEARNING_RATE = 0.1 / 128

# Number of images in a turn. The input pipeline makes this many at once: one batch of 64 images, or
# a group that it splits into smaller batches.
IMAGES_IN_A_TURN = 64

# Least width of the table, in characters.
WIDTH = 110

# Batches in memory that a hand-written loop cycles through.
BATCHES_AT_HAND = 8


class Contestant(Protocol):
    """A training that runs in turns."""

    def turn(self, steps: int) -> float:
        """Make that many steps, and return the seconds they took."""


class Loop:
    """A hand-written training loop, without Lightning and ALRC, with its batches in memory.

    Args:
        width: factor on the network's number of channels.
        batch_size: images in a batch.
        fused: whether Adam is fused, as in this example; if not, it has the default of
            `torch.optim.Adam(parameters, lr)`.
        bf16: whether the forward pass is autocast to bfloat16.
    """

    def __init__(
        self, width: float, batch_size: int, fused: bool = False, bf16: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.network = SupersamplingNetwork(width)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=LEARNING_RATE, fused=fused or None
        )
        self.bf16 = bf16
        batches = CIFAR10Supersampling(batch_size=batch_size).train_dataloader()
        self.batches = [batch for batch, _ in zip(batches, range(BATCHES_AT_HAND), strict=False)]
        self.steps = 0

    def turn(self, steps: int) -> float:
        """Make that many steps, and return the seconds they took."""
        start = time.process_time()
        for _ in range(steps):
            self.step(self.batches[self.steps % len(self.batches)])
            self.steps += 1
        return time.process_time() - start

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = self.losses(batch)
        losses.mean().backward()
        self.optimizer.step()

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each image, [batch]."""
        return guarded(image_error(self.network(batch.input), batch.target, power=4))


class TimedBatches:
    """Batches, and the time that making them took."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        while True:
            start = time.process_time()
            batch = next(batches, None)
            self.seconds += time.process_time() - start
            if batch is None:
                return
            yield batch


class Training(pl.Callback):
    """This example's training with ALRC and a logger, in a Trainer that can be paused.

    Args:
        width: factor on the network's number of channels.
        batch_size: images in a batch.
        precision: precision of the Trainer.
        directory: directory of its logs.
    """

    def __init__(
        self,
        width: float,
        batch_size: int,
        precision: Literal["32-true", "bf16-mixed"],
        directory: str,
    ) -> None:
        torch.manual_seed(0)
        self.module = Supersampling(width, per_sample=True, learning_rate=LEARNING_RATE)
        self.batches = TimedBatches(CIFAR10Supersampling(batch_size=batch_size).train_dataloader())
        self.trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            precision=precision,
            callbacks=[ALRCCallback(), self],
            logger=CSVLogger(directory),
            log_every_n_steps=50,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.requests: SimpleQueue[int] = SimpleQueue()
        self.answers: SimpleQueue[float | None] = SimpleQueue()
        self.steps_left = 0
        self.started: float | None = None
        self.thread = ThreadPoolExecutor(1)
        self.fit = self.thread.submit(self.trainer.fit, self.module, self.batches)
        self.fit.add_done_callback(lambda fit: self.answers.put(None))

    def turn(self, steps: int) -> float:
        """Make that many steps, and return the seconds they took."""
        self.requests.put(steps)
        seconds = self.answers.get()
        if seconds is None:
            self.fit.result()
            raise RuntimeError("the training has ended")
        return seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Wait for the next turn. Between two of these calls there is one whole step."""
        if self.steps_left == 0:
            if self.started is not None:
                self.answers.put(time.process_time() - self.started)
            self.steps_left = self.requests.get()
            self.started = time.process_time()
            trainer.should_stop = self.steps_left == 0
        self.steps_left -= 1

    def end(self) -> None:
        self.requests.put(0)
        self.thread.shutdown()


@dataclass(frozen=True)
class Measurement:
    """The times of all contestants for one size of network and batch.

    Attributes:
        width: factor on the network's number of channels.
        batch_size: images in a batch.
        seconds: seconds for one image in each turn, by contestant.
        input_share: share of the seconds that the input pipeline took, by contestant.
    """

    width: float
    batch_size: int
    seconds: dict[str, list[float]]
    input_share: dict[str, float]

    def images_per_second(self, name: str) -> float:
        """The median over the turns."""
        return 1 / median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """One contestant's images a second divided by another's, the median over rounds."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return median(theirs / ours for theirs, ours in pairs)


def measure(width: float, batch_size: int, rounds: int) -> Measurement:
    """Let all contestants take turns.

    Args:
        width: factor on the network's number of channels.
        batch_size: images in a batch.
        rounds: rounds that are timed; one more round comes before them.
    """
    steps = max(1, IMAGES_IN_A_TURN // batch_size)
    with TemporaryDirectory() as directory, ExitStack() as ending:
        trainings = {
            "ours": Training(width, batch_size, "32-true", directory),
            "ours, bf16": Training(width, batch_size, "bf16-mixed", directory),
        }
        for training in trainings.values():
            ending.callback(training.end)
        contestants: dict[str, Contestant] = {
            "loop": Loop(width, batch_size),
            "loop, fused": Loop(width, batch_size, fused=True),
            "loop, bf16": Loop(width, batch_size, bf16=True),
            **trainings,
        }
        for contestant in contestants.values():
            contestant.turn(steps)
        for training in trainings.values():
            training.batches.seconds = 0.0
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, contestant in contestants.items():
                seconds[name].append(contestant.turn(steps) / (steps * batch_size))
        images = rounds * steps * batch_size
        input_share = {
            name: training.batches.seconds / images * rounds / sum(seconds[name])
            for name, training in trainings.items()
        }
    return Measurement(width, batch_size, seconds, input_share)


def throughput(
    widths: Sequence[float] = (1.0, 0.25),
    batch_sizes: Sequence[int] = (1, 4, 16, 64),
    rounds: int = 5,
) -> None:
    """Measure images a second of this example's training, and of hand-written loops.

    A hand-written loop has the same network and losses and its batches in memory, without Lightning
    and ALRC. There are three: with PyTorch's default Adam, with this example's fused Adam, and with
    the default Adam and the forward pass autocast to bfloat16. "Ours" is this example under a
    Trainer, with ALRC of each image's loss, a logger and the input pipeline. The measurement takes
    about ten minutes on one core.

    Args:
        widths: factors on the network's number of channels; 1 is the paper's network.
        batch_sizes: images in a batch.
        rounds: number of timed turns of each contestant.
    """
    for name, numbers in {"widths": widths, "batch_sizes": batch_sizes, "rounds": [rounds]}.items():
        if not numbers or not all(number > 0 for number in numbers):
            raise ValueError(f"{name} must be above 0, got {numbers!r}")
    torch.set_num_threads(1)
    # Otherwise every training would repeat Lightning's advice.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console()
    sizes = [(width, batch_size) for width in widths for batch_size in batch_sizes]
    measurements = [
        measure(width, batch_size, rounds)
        for width, batch_size in track(sizes, "Taking turns", console=console, transient=True)
    ]
    console.width = max(WIDTH, console.width)
    console.print(table(measurements, rounds), crop=False)


def table(measurements: Sequence[Measurement], rounds: int) -> Table:
    """The table printed at the end, one row for each measurement."""
    shown = Table(
        title=f"Images a second, and ratios: medians of {rounds} rounds",
        caption=f"One thread, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__},"
        f" Lightning {pl.__version__}.\nInput: the input pipeline's share of the step's time, "
        "for ours and ours in bf16.",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    names = list(measurements[0].seconds)
    ratios = [
        ("ours", "loop"),
        ("ours", "loop, fused"),
        ("ours, bf16", "loop"),
        ("ours, bf16", "loop, bf16"),
    ]
    heads = [name.replace(", ", "\n") for name in names]
    heads += [f"{name.replace(', ', ' ')}\n÷ {base.replace(', ', ' ')}" for name, base in ratios]
    for head in ("width", "batch", *heads, "input"):
        shown.add_column(head, justify="right", no_wrap=True)
    for each in measurements:
        shown.add_row(
            f"{each.width:g}",
            str(each.batch_size),
            *(f"{each.images_per_second(name):.0f}" for name in names),
            *(f"{each.ratio(name, base):.2f}" for name, base in ratios),
            " ".join(f"{share:.1%}" for share in each.input_share.values()),
        )
    return shown


if __name__ == "__main__":
    auto_cli(
        throughput, as_positional=False, prog="python -m examples.cifar10_supersampling.throughput"
    )
