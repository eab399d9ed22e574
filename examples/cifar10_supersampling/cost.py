"""Estimates the time and price of the paper's trainings on a GPU. None of them was run.

    python -m examples.cifar10_supersampling.cost

A step takes as long as the slower of host and GPU. The host makes the images of the batch, and
launches some hundred kernels, whatever the batch size. The GPU runs the kernels at a part of its
peak. The floating-point operations are counted; all else is assumed, by constants below or by
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from .cifar10 import SIDE
from .module import image_error
from .network import SupersamplingNetwork

PROGRAM = "python -m examples.cifar10_supersampling.cost"

STEPS = 100_000
BATCH_SIZES = (1, 4, 16, 64)
# Two powers of the errors, four methods (ALRC at three thresholds, and none), ten repeats.
TRAININGS_OF_A_BATCH_SIZE = 2 * 4 * 10


@dataclass(frozen=True)
class GPU:
    """A GPU that can be rented.

    Attributes:
        peak: operations a second in dense bfloat16, by its data sheet.
        price: dollars for an hour; assumed, because prices differ.
    """

    peak: float
    price: float


GPUS = {"A100": GPU(peak=312e12, price=2.0), "L4": GPU(peak=121e12, price=0.8)}


def operations_per_image(width: float = 1.0) -> int:
    """Floating-point operations of one image in one step: convolutions, forward and backward.

    A multiplication and the addition after it count as two. Operations outside of convolutions are
    a thousandth as many, but take much more than a thousandth of the time.

    Args:
        width: factor on the network's number of channels; 1 is the paper's network.
    """
    with torch.device("meta"):
        network = SupersamplingNetwork(width)
        image = torch.empty(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter:
        image_error(network(image), image, power=4).sum().backward()
    return counter.get_total_flops()


def seconds_per_step(
    batch_size: int, operations: int, peak: float, utilisation: float, host_seconds: float
) -> float:
    """The longer of the host's time and the GPU's.

    Args:
        batch_size: images in a step.
        operations: number of operations for one image.
        peak: peak of the GPU, in operations a second.
        utilisation: part of the peak that the GPU reaches while it is busy.
        host_seconds: seconds in which the host makes the batch and starts a step's operations.
    """
    return max(host_seconds, batch_size * operations / (peak * utilisation))


def cost(
    utilisation: float = 0.25, host_seconds: float = 0.004, image_seconds: float = 30e-6
) -> None:
    """Print how long the paper's trainings take on one GPU in bf16-mixed, and what they cost.

    Args:
        utilisation: part of the peak that a GPU reaches while it is busy. Convolutions of 128
            channels reach about half of it. The operations between convolutions are
            limited by memory, and take as long as the convolutions.
        host_seconds: seconds in which the host starts a step's operations. On one core of a
            server's CPU, a step of this example with a tiny network takes 3.5 ms:
            `throughput --widths [0.02] --batch_sizes [1]`. The moving average of the weights adds
            to this time.
        image_seconds: seconds in which the host makes one image; a batch of 64 takes 1.8 ms.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {utilisation!r}")
    for name, number in {"host_seconds": host_seconds, "image_seconds": image_seconds}.items():
        if not number > 0:
            raise ValueError(f"{name} must be above 0, got {number!r}")
    operations = operations_per_image()
    table = Table(
        title=f"{STEPS:,} steps of {operations / 1e9:.2f} GFLOP an image: on paper, not run",
        box=box.SIMPLE_HEAD,
    )
    for head in ("", "batch", "ms a step", "of the peak", "time", "dollars"):
        table.add_column(head, justify="right")
    for name, gpu in GPUS.items():
        hours = 0.0
        for batch_size in BATCH_SIZES:
            of_host = host_seconds + batch_size * image_seconds
            seconds = seconds_per_step(batch_size, operations, gpu.peak, utilisation, of_host)
            reached = batch_size * operations / seconds / gpu.peak
            of_training = seconds * STEPS / 3600
            hours += of_training * TRAININGS_OF_A_BATCH_SIZE
            table.add_row(
                name,
                str(batch_size),
                f"{1000 * seconds:.1f}",
                f"{reached:.1%}",
                f"{60 * of_training:.0f} min",
                f"{of_training * gpu.price:.2f}",
            )
        trainings = TRAININGS_OF_A_BATCH_SIZE * len(BATCH_SIZES)
        table.add_row(
            name, f"all {trainings}", "", "", f"{hours:.0f} h", f"{hours * gpu.price:.0f}"
        )
        table.add_section()
    console = Console()
    console.print(table)
    prices = ", ".join(f"{name} ${gpu.price:g}" for name, gpu in GPUS.items())
    console.print(f"One training after another; dollars at an assumed price of an hour: {prices}.")


if __name__ == "__main__":
    auto_cli(cost, as_positional=False, prog=PROGRAM)
