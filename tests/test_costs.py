"""Upper bounds of a step's cost, counted and not timed; ``tests/benchmarks`` times it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._moments.state import Moments
from lightning_alrc._spikes.ledger import Ledger
from lightning_alrc._spikes.record import REDUCE_AFTER, SpikeRecord
from tests.benchmarks.launches import added_in_a_trainer
from tests.counting import Capture, Crossings, Operations, allocated, generated, operations
from tests.nets import state_of
from tests.scripts.launching import execute

# The bounds. If a cost falls, lower its bound.
OPERATIONS = {
    "host": {"a scalar": 2, "a scalar, clipped": 3, "256 losses": 9, "256, some clipped": 32},
    "device": {"a scalar": 46, "a scalar, clipped": 38, "256 losses": 62, "256, some clipped": 54},
    "kernel": {"a scalar": 3, "a scalar, clipped": 3, "256 losses": 3, "256, some clipped": 3},
}
"""Operations of the forward pass of one call, by path and case."""
LAUNCHES_OF_A_LEDGER = {"host": 2.7, "device": 3.7, "kernel": 3.7}
"""Launches that a ledger adds to a step, on average: one or two in each step, and about a hundred
in every 64th step."""
BYTES_OF_A_SAMPLE = 64
"""Bytes of a ledger on the device for each id from 0 to the largest."""
LAUNCHES = {"host": 32, "device": 62, "kernel": 1}
"""Limits on the launches of the forward pass of one call: operations, without views and empty
tensors."""
OPERATIONS_OF_BACKWARD = {"host": 2, "device": 2, "kernel": 1}
LAUNCHES_IN_A_TRAINER = 3
"""Launches that ALRC adds to a step if it uses the kernel and keeps a record: a copy of the moments
for the checkpoint, the kernel, and a multiplication in the backward pass."""
LAUNCHES_OF_REDUCTION = 0.25
"""The record reduces the clips on the device to the worst once in many steps. This is the mean
number of launches per step that these reductions add."""
LOOPS = {"a scalar": 6, "256 losses": 12}
"""Loops in the one function that torch.compile makes of the forward pass of a call."""
LOOPS_OF_BACKWARD = 1
BYTES_OF_A_NAMED_LOSS = {"host": 4900, "device": 4900, "kernel": 6200}
BYTES_OF_2000_STEPS = 64_000
"""Most bytes that 2,000 steps may allocate and keep. One object for each step would exceed them."""
OPTIONAL = {"wandb", "matplotlib", "torchvision", "rich", "mlflow", "tensorboard", "jsonargparse"}

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "start": {"mu1_start": 2.0, "mu2_start": 5.0},
    "two-sided": {"num_stddev_below": 2.0},
    "two decays": {"mu2_decay": 0.99},
}


def losses(case: str) -> Tensor:
    values = torch.linspace(2.0, 2.1, 256) if "256" in case else torch.tensor(2.0)
    if "clipped" in case:
        values.view(-1)[0] = 50.0
    return values.requires_grad_()


def alrc_for(case: str) -> ALRC:
    """An ALRC. If the case says so, it clips in every step: its moments stay nearly constant."""
    if "clipped" not in case:
        return ALRC()
    return ALRC(num_stddev=2.0, decay=1 - 1e-12, mu1_start=2.0, mu2_start=8.0)


# ---- operations


@pytest.mark.parametrize("case", OPERATIONS["host"])
def test_operations_of_a_call_are_bounded(each_path: str, case: str) -> None:
    alrc, loss = alrc_for(case), losses(case)
    counted = operations(lambda: alrc(loss))
    assert len(counted.calls) <= OPERATIONS[each_path][case], counted.calls
    assert len(counted.launches) <= LAUNCHES[each_path], counted.launches
    assert bool(alrc.clipped_total > 0) == ("clipped" in case)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_operations_do_not_grow_with_steps_or_losses(
    each_path: str, settings: dict[str, Any]
) -> None:
    counts = set()
    for size in (2, 256, 10_000):
        alrc, loss = ALRC(**settings), torch.linspace(2.0, 2.1, size).requires_grad_()
        for steps in (1, 6) if each_path == "kernel" else (5, 20):
            counts.add(len(operations(lambda: alrc(loss), steps).calls))  # noqa: B023
    assert len(counts) == 1, each_path


class Deep(pl.LightningModule):
    """A network of many layers."""

    def __init__(self, layers: int, counted: Operations) -> None:
        super().__init__()
        self.counted, self.calls = counted, 0
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def on_train_batch_end(self, *_: Any) -> None:  # runs after the hooks of callbacks
        self.calls = len(self.counted.calls)


@pytest.mark.usefixtures("each_path")
def test_operations_in_a_trainer_do_not_grow_with_the_model(fit: Callable[..., Any]) -> None:
    def in_a_step(layers: int, *callbacks: pl.Callback) -> int:
        counted = Operations()

        class Steps(pl.Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                counted.calls = []

        net = Deep(layers, counted)
        with counted:
            batches = DataLoader(torch.ones(80, 3), batch_size=4)  # type: ignore[arg-type]
            fit(net, Steps(), *callbacks, batches=batches, max_epochs=1)
        return net.calls

    added = [in_a_step(layers, ALRCCallback()) - in_a_step(layers) for layers in (1, 30)]
    assert 0 < added[0] == added[1]


@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize(("size", "averages"), [(8, True), (256, False)], ids=["scalar", "256"])
def test_launches_added_in_a_trainer_are_bounded(size: int, averages: bool) -> None:
    usual, mean = added_in_a_trainer(size, averages)
    assert 2 <= usual <= LAUNCHES_IN_A_TRAINER
    assert mean <= LAUNCHES_IN_A_TRAINER + LAUNCHES_OF_REDUCTION


@pytest.mark.parametrize("case", OPERATIONS["host"])
def test_operations_of_the_backward_pass_are_bounded(each_path: str, case: str) -> None:
    alrc, loss = alrc_for(case), losses(case)
    for _ in range(20):
        clipped = alrc(loss)
    gradient = torch.ones_like(clipped)
    with Operations() as counted:
        torch.autograd.grad(clipped, loss, gradient)
    assert len(counted.calls) <= OPERATIONS_OF_BACKWARD[each_path], counted.calls


# ---- waits for the device

ON_THE_DEVICE: dict[str, Callable[[Tensor], object]] = {
    "a read": lambda loss: loss.sum().item(),
    "a decision": lambda loss: bool(loss.sum() > 0),
    "a copy to the host": lambda loss: loss.cpu(),
    "a number from the host": lambda loss: torch.tensor(1.0, device=loss.device),
}


def crossings(make: Callable[[], Callable[[Tensor], object]], shape: tuple[int, ...]) -> list[str]:
    """The operations in which a step would wait for its device, or the device for the host.

    The tensors are fake: everything runs except the computation, so the device need not exist.
    The device type is ``lazy``, which every build of PyTorch knows. A read raises.
    """
    with FakeTensorMode():
        step, loss = make(), torch.empty(shape, device="lazy", requires_grad=True)
        for _ in range(3):
            step(loss)  # the first call moves the moments to the device
        with Crossings() as seen:
            for _ in range(3):
                step(loss)
    return seen.calls


def differentiated(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    return lambda loss: torch.autograd.grad(step(loss).sum(), loss)


@pytest.mark.parametrize("read", ON_THE_DEVICE.values(), ids=ON_THE_DEVICE)
def test_crossings_are_seen_if_the_host_or_the_device_waits(
    read: Callable[[Tensor], object],
) -> None:
    try:
        seen = crossings(lambda: read, (256,))
    except DataDependentOutputException:
        return
    assert seen


@pytest.mark.parametrize("shape", [(), (1,), (256,), (16, 16)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_layer_never_waits_for_an_accelerator(
    settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    assert crossings(lambda: differentiated(ALRC(**settings)), shape) == []


def ledger_of(size: int) -> Ledger:
    ledger = Ledger(size)
    ledger.start(None)
    return ledger


@pytest.mark.usefixtures("each_path")
def test_operations_of_a_ledger_are_bounded(each_path: str) -> None:
    loss, ids = torch.linspace(2.0, 2.1, 256), torch.arange(256)
    number = torch.tensor(2.0, dtype=torch.float64)
    moments: Moments = torch.stack(3 * [number]) if each_path == "device" else (2.0, 2.0, 2.0)
    ledger = ledger_of(256)

    def step() -> None:
        ledger.observe("loss", {"id": ids}, loss, loss, moments)
        ledger.finish_batch()

    with Operations() as counted:
        for _ in range(640):
            step()
    assert len(counted.launches) / 640 <= LAUNCHES_OF_A_LEDGER[each_path]
    scatters = [each for each in counted.calls if each is torch.ops.aten.index_copy_.default]
    assert len(scatters) == 20  # each of 10 flushes has 2: in by_sample, and into the table


def test_memory_of_a_ledger_is_fixed_by_the_largest_id() -> None:
    loss = torch.rand(64)

    def steps(ledger: Ledger, count: int) -> Ledger:
        for _ in range(count):
            ids = torch.randint(100_000, (64,))
            ledger.observe("loss", {"id": ids}, loss, loss, (2.0, 1.0, 20.0))
            ledger.finish_batch()
        return ledger

    ledger = steps(ledger_of(100_000), 64)
    taken = allocated(lambda: steps(ledger_of(100_000), 64))
    assert taken / 100_000 <= BYTES_OF_A_SAMPLE + 4
    assert allocated(lambda: steps(ledger, 640) and None) <= BYTES_OF_2000_STEPS


@pytest.mark.parametrize("shape", [(8,), (8, 3)], ids=str)
def test_a_ledger_never_waits_for_an_accelerator(shape: tuple[int, ...]) -> None:
    def make() -> Callable[[Tensor], object]:
        alrc, ledger = ALRC(), ledger_of(100)
        ids = torch.arange(8, device="lazy")

        def on_call(loss: Tensor, clipped: Tensor, moments: Moments) -> None:
            for _ in range(40):  # so that pending losses are flushed, too
                ledger.observe("loss", {"id": ids}, loss, clipped, moments)

        alrc.on_call = on_call

        def step(loss: Tensor) -> None:
            differentiated(alrc)(loss)
            ledger.finish_batch()

        return step

    assert crossings(make, shape) == []


@pytest.mark.parametrize("shape", [(), (8,), (8, 3), (8, 0)], ids=str)
def test_a_record_never_waits_for_an_accelerator(shape: tuple[int, ...]) -> None:
    def make() -> Callable[[Tensor], object]:
        record = SpikeRecord(4)

        def step(loss: Tensor) -> None:
            for _ in range(REDUCE_AFTER):  # so that pending losses are reduced, too
                record.observe("loss", torch.stack(3 * [loss.detach()]))

        return step

    assert crossings(make, shape) == []


@pytest.mark.parametrize(("shape", "launches"), [((), 0), ((8,), 0), ((8, 3), 2)], ids=str)
def test_launches_of_a_record_are_bounded(shape: tuple[int, ...], launches: int) -> None:
    record, seen = SpikeRecord(4), torch.rand(3, *shape)
    counted = operations(lambda: record.observe("loss", seen))
    assert len(counted.launches) == launches


@pytest.mark.parametrize("shape", [(), (256,)], ids=str)
def test_the_callback_never_waits_for_an_accelerator(shape: tuple[int, ...]) -> None:
    def make() -> Callable[[Tensor], object]:
        callback = ALRCCallback()
        return differentiated(lambda loss: callback.clip(loss, "a") + callback.clip(loss, "b"))

    assert crossings(make, shape) == []


# ---- captured


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_replay_of_a_captured_step_updates_the_moments(settings: dict[str, Any]) -> None:
    """As in a CUDA graph: later losses are copied into the first losses' tensor."""
    alrc, plain = ALRC(**settings), ALRC(**settings)
    weight = torch.tensor(1.0, requires_grad=True)
    loss, stream = torch.empty(8), torch.rand(40, 8) + 1.0
    stream[30:, 0] = 90.0  # clipped

    def step(alrc: ALRC) -> list[Tensor]:
        clipped = alrc(weight * loss)
        return [clipped.detach(), *torch.autograd.grad(clipped.sum(), weight)]

    for values in stream[:20]:
        loss.copy_(values)
        step(alrc), step(plain)
    with Capture() as captured:
        results = step(alrc)
    step(plain)
    for values in stream[20:]:
        loss.copy_(values)
        captured.replay()
        torch.testing.assert_close(results, step(plain))
    assert state_of(alrc) == state_of(plain)
    assert alrc.clipped_total.item() > 0


# ---- compiled


@pytest.mark.parametrize(
    ("case", "settings"), zip(LOOPS, [{}, SETTINGS["start"]], strict=True), ids=LOOPS
)
def test_all_of_a_compiled_step_is_one_function(case: str, settings: dict[str, Any]) -> None:
    functions, (forwards, backwards) = generated(ALRC(**settings), losses(case))
    assert functions == (1, 1)
    assert 1 <= forwards <= LOOPS[case]
    assert backwards <= LOOPS_OF_BACKWARD


# ---- memory


def test_memory_is_constant_in_steps(each_path: str) -> None:
    count = 20 if each_path == "kernel" else 2000
    callback, loss = ALRCCallback(), torch.linspace(1.0, 1.1, 16).requires_grad_()

    def steps(count: int) -> None:
        for _ in range(count):
            callback.clip(loss)

    steps(count // 2)
    # One of three is enough, because other objects may be collected or made meanwhile.
    grown = (allocated(lambda: steps(count)) for _ in range(3))
    assert any(each <= BYTES_OF_2000_STEPS * count / 2000 for each in grown), each_path


def test_memory_of_a_named_loss_is_bounded(each_path: str) -> None:
    count = 10 if each_path == "kernel" else 100
    callback, loss = ALRCCallback(), torch.tensor(1.0, requires_grad=True)

    def clip_names(first: int, last: int) -> None:
        for index in range(first, last):
            callback.clip(loss, f"name{index}")

    clip_names(0, count // 10)
    taken = allocated(lambda: clip_names(count, 2 * count))
    assert len(callback.losses) == count + count // 10
    assert taken / count <= BYTES_OF_A_NAMED_LOSS[each_path]


# ---- import


def test_an_import_of_alrc_imports_no_optional_package() -> None:
    """Torch and Lightning are imported first. Then imports of optional packages are refused."""
    execute(
        "import sys, torch, pytorch_lightning; before = set(sys.modules)\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import lightning_alrc; new = set(sys.modules) - before\n"
        "assert 'lightning_alrc' in new\n"
        "assert 'lightning_alrc.plotting' not in new\n"
    )
