"""Estimates how long trainings take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

import torch

from .module import Supersampling, image_error
from .training import Run


def expected_seconds(runs: Sequence[Run]) -> float:
    """The seconds of all trainings on one core, one after the other; see `seconds_a_step`."""
    return sum(run.steps * seconds_a_step(run.width, run.batch_size) for run in runs)


@lru_cache
def seconds_a_step(width: float, batch_size: int, timed_steps: int = 3) -> float:
    """Time training steps of the network on one core of this machine.

    Only a part of a large batch is timed, because the time grows in proportion to its images.
    """
    timed_images = min(batch_size, 4)
    module = Supersampling(width=width)
    optimizer = torch.optim.Adam(module.parameters())
    images = torch.rand(timed_images, 3, 32, 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(1 + timed_steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        image_error(module(images), images, 4).mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    # The first step chooses the algorithms of the convolutions.
    return median(seconds[1:]) * batch_size / timed_images
