"""What ALRC costs on a GPU: ``python -m tests.benchmarks.cuda --json gpu.json``.

It measures host time and device time. The ways are timed in turn, round by round: ALRC by its
kernel and by tensor operations; gradient clippers at 1, 25 and 250 million parameters; steps of a
network, plain, compiled, and captured in a graph; and steps inside a Trainer. Then it compares the
times with the targets. It also checks that calls and steps with ALRC do not wait for the device,
except inside a Trainer. A step that waits or raises is reported as a failure.

It takes less than six minutes. Without a CUDA device it ends with status 2. ``--device cpu`` checks
the script on a CPU, with small sizes and without device times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.callbacks.spike import SpikeDetection
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._moments import paths, tensors
from tests.benchmarks.stopwatch import Stopwatch
from tests.benchmarks.timing import in_order

WIDTH, BATCH = 1024, 256
CALLS, ROUNDS = 50, 12
WARM_UP = 20
MILLIONS = (1, 25, 250)
TRAINER_STEPS, FITS = 300, 3
CLIPPING = {"num_stddev": 1.0, "decay": 1 - 1e-12, "mu1_start": 1e-3, "mu2_start": 2e-6}
"""Nearly constant moments, far below the losses, so that each step clips."""

Ways = dict[str, Callable[[], object]]


class Measured(NamedTuple):
    """The cost of one step of a way."""

    host: float
    """microseconds until the host has launched all kernels, the least of all rounds"""
    device: float
    """microseconds of kernels and copies, without the gaps between them; NaN without a device"""
    kernels: float
    copies: float
    """copies between host and device, in both directions"""


NOT_MEASURED = Measured(*[float("nan")] * 4)


class Measuring:
    """Measures ways on one device.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_gpu = device == "cuda"
        self.found: dict[str, Measured] = {}
        self.failures: dict[str, str] = {}
        self.calls, self.rounds = (CALLS, ROUNDS) if self.is_gpu else (3, 2)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def measure(self, ways: Ways, waits: set[str] | None = None) -> None:
        """Measure ways in turn, and record their costs. A way that raises is left out.

        Args:
            ways: ways by name.
            waits: names of ways that may wait for the device.
        """
        ways = dict(ways)
        for name, way in list(ways.items()):
            try:  # torch.compile compiles in the first call, and may raise anything
                for _ in range(WARM_UP if self.is_gpu else 2):
                    way()
            except Exception as error:
                self.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                del ways[name]
                continue
            if self.is_gpu and name not in (waits or set()):
                self._check_that_it_never_waits(name, way)
        least = dict.fromkeys(ways, float("inf"))
        for index in range(self.rounds):
            for name in in_order(list(ways), index):
                self.synchronize()
                start = time.perf_counter()
                for _ in range(self.calls):
                    ways[name]()
                least[name] = min(least[name], 1e6 * (time.perf_counter() - start) / self.calls)
        for name, way in ways.items():
            self.found[name] = Measured(least[name], *self._on_device(way))

    def _check_that_it_never_waits(self, name: str, way: Callable[[], object]) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            way()
        except RuntimeError as error:
            self.failures[name] = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _on_device(self, way: Callable[[], object]) -> tuple[float, float, float]:
        """Microseconds, kernels and copies of a call, from the profiler."""
        if not self.is_gpu:
            return NOT_MEASURED[1:]
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(self.calls):
                way()
            self.synchronize()
        events = [
            event
            for event in profiler.events() or []
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        microseconds = sum(event.time_range.elapsed_us() for event in events)
        copies = sum(event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for event in events)
        kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
        return microseconds / self.calls, kernels / self.calls, copies / self.calls


# ---- ALRC by itself


@contextmanager
def by_tensor_operations() -> Iterator[None]:
    """Use the path of a device without Triton."""
    chosen = paths.path_of
    paths.path_of = lambda loss: tensors  # type: ignore[assignment]
    try:
        yield
    finally:
        paths.path_of = chosen


def call(alrc: nn.Module, device: str, *shape: int) -> Callable[[], object]:
    """A call of ALRC, forwards and backwards."""
    loss = (torch.rand(shape, device=device) + 2.0).requires_grad_()
    gradient = torch.ones_like(loss)
    return lambda: torch.autograd.backward(alrc(loss), gradient, inputs=[loss])


def without_the_kernel(way: Callable[[], object]) -> Callable[[], object]:
    def step() -> object:
        with by_tensor_operations():
            return way()

    return step


def calls(device: str) -> Ways:
    loss = torch.tensor(2.0, device=device, requires_grad=True)
    gradient = torch.ones_like(loss)
    many = torch.rand(10**6, device=device)
    return {
        "floor: an empty autograd node": lambda: torch.autograd.backward(
            loss.view_as(loss), gradient, inputs=[loss]
        ),
        "floor: a read of a million losses": lambda: many.sum(),
        "ALRC, a scalar loss": call(ALRC(), device),
        "ALRC, a scalar loss, clipped": call(ALRC(**CLIPPING), device),
        "ALRC, 256 losses": call(ALRC(), device, 256),
        "ALRC, a million losses": call(ALRC(), device, 10**6),
        "tensor operations, a scalar loss": without_the_kernel(call(ALRC(), device)),
        "tensor operations, 256 losses": without_the_kernel(call(ALRC(), device, 256)),
        "tensor operations, a million losses": without_the_kernel(call(ALRC(), device, 10**6)),
    }


# ---- gradient clippers


def model(millions: int, device: str) -> nn.Module:
    """Square layers of a million parameters each, with gradients."""
    layers = nn.Sequential(
        *(nn.Linear(1000, 1000, bias=False, device=device) for _ in range(millions))
    )
    for each in layers.parameters():
        each.grad = torch.full_like(each, 1e-3)
    return layers


def clippers(millions: int, device: str) -> Ways:
    network = model(millions, device)
    parameters = list(network.parameters())
    size = f"{millions} M parameters"
    found: Ways = {
        f"clip_grad_norm_, {size}": lambda: nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True),
        f"ALRC beside {size}": call(ALRC(), device),
    }
    if find_spec("zclip") is not None:
        from zclip import ZClip

        zclip = ZClip(warmup_steps=1)
        found[f"ZClip, {size}"] = lambda: zclip.step(network)
    if find_spec("autoclip") is not None:
        from autoclip.torch import QuantileClip

        autoclip = QuantileClip(parameters, global_threshold=True)
        autoclip.state["global_history"] = torch.rand(1000, device=device)
        found[f"AutoClip, {size}"] = autoclip.step
    return found


# ---- a step of a network


def training_step(
    alrc: nn.Module | None, device: str, compiles: bool = False
) -> Callable[[], Tensor]:
    """A step of a small network: forward pass, backward pass and optimizer."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device=device) for _ in range(4)))
    optimizer = torch.optim.SGD(network.parameters(), 1e-6)
    x = torch.randn(BATCH, WIDTH, device=device)

    def losses_of(x: Tensor) -> Tensor:
        losses = network(x).square().mean(1)
        return (losses if alrc is None else alrc(losses)).mean()

    losses = torch.compile(losses_of) if compiles else losses_of

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = losses(x)
        loss.backward()
        optimizer.step()
        return loss

    return step


def captured(step: Callable[[], Tensor]) -> Callable[[], object]:
    """A step as a CUDA graph, warmed up on its own stream, as PyTorch requires.

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

    def replay() -> Callable[[], Tensor]:
        graph.replay()
        return step  # keeps the step's tensors, whose memory the graph uses but does not own

    return replay


def replays_move_moments() -> tuple[float, float]:
    """Number of losses that ALRC counted in 10 replays of a graph, and the right number."""
    alrc = ALRC()
    replay = captured(training_step(alrc, "cuda"))
    before = alrc.losses_total.item()
    for _ in range(10):
        replay()
    return alrc.losses_total.item() - before, 10 * BATCH


def steps(measuring: Measuring) -> Ways:
    device = measuring.device
    found: Ways = {
        "floor: a step of a network": training_step(None, device),
        "a step with ALRC": training_step(ALRC(), device),
    }
    if not measuring.is_gpu:
        return found
    found |= {
        "floor: a compiled step": training_step(None, device, compiles=True),
        "a compiled step with ALRC": training_step(ALRC(), device, compiles=True),
    }
    try:
        found |= {
            "floor: a step as a graph": captured(training_step(None, device)),
            "a step with ALRC as a graph": captured(training_step(ALRC(), device)),
        }
        counted, expected = replays_move_moments()
        if counted != expected:
            measuring.failures["a replayed graph"] = f"counted {counted:,.0f} of {expected:,.0f}"
    except RuntimeError as error:
        measuring.failures["the capture of a step"] = str(error).splitlines()[0]
    return found


# ---- inside a Trainer


class Tiny(pl.LightningModule):
    """A module so small that the cost of a step is that of Lightning and its callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


TRAINERS: dict[str, Callable[[], dict[str, Any]]] = {
    "floor: a Trainer's step, an empty callback": lambda: {"callbacks": [Callback()]},
    "a Trainer's step, ALRC": lambda: {"callbacks": [ALRCCallback()]},
    "a Trainer's step, ALRC, skip": lambda: {"callbacks": [ALRCCallback(nonfinite="skip")]},
    "a Trainer's step, gradient_clip_val": lambda: {"gradient_clip_val": 1.0},
    "a Trainer's step, SpikeDetection": lambda: {"callbacks": [SpikeDetection(rtol=1e9)]},
}


def trainers(measuring: Measuring) -> None:
    """Record the time of a step inside a Trainer, by the host's clock."""
    count = TRAINER_STEPS if measuring.is_gpu else 30
    least = dict.fromkeys(TRAINERS, float("inf"))
    for index in range(FITS if measuring.is_gpu else 1):
        for name in in_order(list(TRAINERS), index):
            arguments = TRAINERS[name]()
            watch = Stopwatch(period=count // 5, warm_up=count // 10, clock=time.perf_counter)
            with tempfile.TemporaryDirectory() as folder:
                trainer = pl.Trainer(
                    **(arguments | {"callbacks": [*arguments.get("callbacks", []), watch]}),
                    accelerator="gpu" if measuring.is_gpu else "cpu",
                    devices=1,
                    max_steps=count,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    default_root_dir=folder,
                )
                data: Any = torch.rand(count * 4, 8)
                trainer.fit(Tiny(), DataLoader(data, batch_size=4))
            least[name] = min(least[name], *(1e6 * each for each in watch.seconds))
    measuring.found |= {name: NOT_MEASURED._replace(host=value) for name, value in least.items()}


# ---- targets


class Goal(NamedTuple):
    """An upper limit of a ratio or of microseconds."""

    what: str
    ours: float
    beside: float
    most: float
    """the limit of ``ours`` divided by ``beside``; in microseconds if ``beside`` is 1"""


def goals(found: dict[str, Measured]) -> list[Goal]:
    """The goals. A ratio of a way that was not measured is NaN."""

    def of(name: str) -> Measured:
        return found.get(name, NOT_MEASURED)

    listed = [
        Goal(
            f"host time, {what}, to tensor operations",
            of(f"ALRC, {what}").host,
            of(f"tensor operations, {what}").host,
            1 / 5,
        )
        for what in ("a scalar loss", "256 losses")
    ]
    sizes = [m for m in MILLIONS if f"clip_grad_norm_, {m} M parameters" in found]
    if sizes:
        peers = ("clip_grad_norm_", "ZClip", "AutoClip")

        def cheapest(millions: int, field: str) -> float:
            names = (f"{peer}, {millions} M parameters" for peer in peers)
            return min(getattr(of(name), field) for name in names if name in found)

        ours = {m: of(f"ALRC beside {m} M parameters") for m in sizes}
        first, last = sizes[0], sizes[-1]
        listed += [
            Goal(
                f"host time, to the cheapest peer's at {first} M",
                ours[first].host,
                cheapest(first, "host"),
                1 / 3,
            ),
            Goal(
                f"host time at {last} M parameters, to that at {first} M",
                ours[last].host,
                ours[first].host,
                1.1,
            ),
            Goal(
                f"device time, to the cheapest peer's at {last} M",
                ours[last].device,
                cheapest(last, "device"),
                1 / 20,
            ),
        ]
    listed += [
        Goal("device time, a scalar loss, us", of("ALRC, a scalar loss").device, 1, 10),
        Goal("device time, 256 losses, us", of("ALRC, 256 losses").device, 1, 10),
        Goal(
            "device time, a million losses, to a read of them",
            of("ALRC, a million losses").device,
            of("floor: a read of a million losses").device,
            1.5,
        ),
        Goal(
            "a Trainer's step, added to an empty callback's, us",
            of("a Trainer's step, ALRC").host
            - of("floor: a Trainer's step, an empty callback").host,
            1,
            20,
        ),
    ]
    for kind in ("a compiled step", "a step"):
        suffix = " as a graph" if kind == "a step" else ""
        if f"{kind} with ALRC{suffix}" in found:
            listed.append(
                Goal(
                    f"device time, {kind}{suffix}, to its floor",
                    of(f"{kind} with ALRC{suffix}").device,
                    of(f"floor: {kind}{suffix}").device,
                    1.05,
                )
            )
    return listed


def tables(found: dict[str, Measured], title: str) -> list[Table]:
    measured = Table("a step", "host us", "device us", "kernels", "copies", title=title)
    for name, each in found.items():
        cells = ("" if value != value else f"{value:.1f}" for value in each)
        measured.add_row(name, *cells)
    reached = Table("to reach", "found", "at most", "reached")
    for goal in goals(found):
        ratio = goal.ours / goal.beside
        cell = "not measured" if ratio != ratio else "yes" if ratio <= goal.most else "no"
        reached.add_row(goal.what, f"{ratio:.3g}", f"{goal.most:.3g}", cell)
    for table in (measured, reached):
        table.box = box.MARKDOWN
    return [measured, reached]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="a file to write what was measured to")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        message = (
            "This benchmark needs a CUDA device and a PyTorch built for CUDA; "
            f"torch {torch.__version__} finds none. Nothing was measured."
        )
        Console(stderr=True, soft_wrap=True).print(message)
        return 2
    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    started = time.monotonic()
    measuring = Measuring(options.device)
    measuring.measure(calls(measuring.device))
    for millions in MILLIONS if measuring.is_gpu else MILLIONS[:1]:
        ways = clippers(millions, measuring.device)
        measuring.measure(ways, waits={name for name in ways if not name.startswith("ALRC")})
        del ways
        if measuring.is_gpu:
            torch.cuda.empty_cache()
    measuring.measure(steps(measuring))
    trainers(measuring)
    name = torch.cuda.get_device_name() if measuring.is_gpu else "a CPU, without device times"
    title = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    console = Console(width=140)
    console.print(*tables(measuring.found, title))
    for what, failure in measuring.failures.items():
        console.print(f"FAILED: {what}: {failure}", soft_wrap=True)
    if measuring.is_gpu and not measuring.failures:
        console.print("No call of ALRC waits for the device; Trainers are not checked.")
    console.print(f"{time.monotonic() - started:.0f} s in all")
    if options.json is not None:
        rows = {name: each._asdict() for name, each in measuring.found.items()}
        results = {
            "device": name,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "microseconds": rows,
            "goals": [goal._asdict() for goal in goals(measuring.found)],
            "failures": measuring.failures,
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if measuring.failures else 0


if __name__ == "__main__":
    sys.exit(main())
