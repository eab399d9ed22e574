"""What ALRC costs on a GPU: ``python -m tests.benchmarks.cuda``.

Steps of ALRC by itself, of a network with it and without, timed by CUDA events in turn; their
kernels, as the profiler counts them; that no step waits for the device, which would raise; and the
whole of a step, with ALRC in it, captured in a graph and replayed. It needs a CUDA device, and ends
with status 2 where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_alrc import ALRC
from tests.benchmarks.timing import in_order

WIDTH, BATCH = 1024, 256
CALLS, ROUNDS = 50, 20
WARM_UP = 20
CLIPPING = {"num_stddev": 1.0, "decay": 1 - 1e-12, "mu1_start": 1e-3, "mu2_start": 2e-6}
"""Moments that hardly move, far below the losses: each step clips."""


class Measured(NamedTuple):
    """What one way costs a step."""

    microseconds: float
    """of the device, the least of all rounds"""
    kernels: float
    copies: float
    """between host and device, either way"""


def timed_in_turn(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of a step by CUDA events, the least of all rounds."""
    least = dict.fromkeys(steps, float("inf"))
    for index in range(ROUNDS):
        for name in in_order(list(steps), index):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(CALLS):
                steps[name]()
            end.record()
            torch.cuda.synchronize()
            least[name] = min(least[name], 1000 * start.elapsed_time(end) / CALLS)
    return least


def counted(step: Callable[[], object]) -> tuple[float, float]:
    """Kernels and copies of a step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    copies = sum(name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for name in on_device)
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
    return kernels / CALLS, copies / CALLS


def never_waits(step: Callable[[], object]) -> None:
    """Run a step in which every wait for the device raises.

    Raises:
        RuntimeError: names the operation that waits.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training_step(alrc: nn.Module | None, per_sample: bool = True) -> Callable[[], Tensor]:
    """A step of a small network, forwards, backwards and of its optimizer."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, device="cuda") for _ in range(4)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(network.parameters(), 1e-6)
    x = torch.randn(BATCH, WIDTH, device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses = network(x).square().mean(1)
        if not per_sample:
            losses = losses.mean()
        if alrc is not None:
            losses = alrc(losses)
        loss = losses.mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def call(alrc: nn.Module, *shape: int) -> Callable[[], object]:
    """Of ALRC by itself, forwards and backwards."""
    loss = (torch.rand(shape, device="cuda") + 2.0).requires_grad_()
    gradient = torch.ones_like(loss)
    return lambda: torch.autograd.backward(alrc(loss), gradient, inputs=[loss])


def captured(step: Callable[[], Tensor]) -> Callable[[], object]:
    """A step as a CUDA graph, warmed up on a stream of its own as PyTorch asks for.

    Raises:
        RuntimeError: if something in the step cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def replays_move_moments() -> tuple[float, float]:
    """Losses that ALRC has counted after 10 replays of a graph, and those that it should have."""
    alrc = ALRC()
    replay = captured(training_step(alrc))
    before = alrc.losses_total.item()
    for _ in range(10):
        replay()
    return alrc.losses_total.item() - before, 10 * BATCH


def ways() -> dict[str, Callable[[], object]]:
    loss = torch.tensor(2.0, device="cuda", requires_grad=True)
    gradient = torch.ones_like(loss)
    return {
        "floor: an empty autograd node and its backward": lambda: torch.autograd.backward(
            loss.view_as(loss), gradient, inputs=[loss]
        ),
        "ALRC, a scalar loss": call(ALRC()),
        "ALRC, a scalar loss, clipped": call(ALRC(**CLIPPING)),
        "ALRC, 256 losses": call(ALRC(), 256),
        "ALRC, a million losses": call(ALRC(), 10**6),
        "ALRC, a scalar loss, compiled": call(torch.compile(ALRC())),
        "ALRC, 256 losses, compiled": call(torch.compile(ALRC()), 256),
        "floor: a step of a network": training_step(None),
        "a step with ALRC, sample by sample": training_step(ALRC()),
        "a step with ALRC, their mean": training_step(ALRC(), per_sample=False),
        "floor: a step of a network, as a graph": captured(training_step(None)),
    }


def main() -> int:
    console = Console()
    if not torch.cuda.is_available():
        message = (
            "This benchmark needs a CUDA device and a PyTorch built for CUDA; "
            f"torch {torch.__version__} finds none. Nothing was measured."
        )
        Console(stderr=True, soft_wrap=True).print(message)
        return 2
    steps = ways()
    failures = {}
    try:
        steps["a step with ALRC, as a graph"] = captured(training_step(ALRC()))
        found, expected = replays_move_moments()
        if found != expected:
            failures["a replayed graph"] = f"counted {found:,.0f} of {expected:,.0f} losses"
    except RuntimeError as error:
        failures["the capture of a step"] = str(error).splitlines()[0]
    for name, step in steps.items():
        for _ in range(WARM_UP):
            step()
        try:
            never_waits(step)
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
    times = timed_in_turn(steps)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    table = Table("a step", "us", "kernels", "copies", title=title, box=box.MARKDOWN)
    for name, step in steps.items():
        measured = Measured(times[name], *counted(step))
        table.add_row(name, *(f"{value:.1f}" for value in measured))
    console.print(table)
    for name, failure in failures.items():
        console.print(f"FAILED: {name}: {failure}", soft_wrap=True)
    console.print("No step waits for the device." if not failures else f"{len(failures)} failed.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
