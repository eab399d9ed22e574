"""The layer on a device: results as on a CPU, one kernel, and captured in a graph."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_alrc import ALRC
from lightning_alrc._moments import accelerator as kernel
from lightning_alrc._moments import distributed
from tests.nets import state_of
from tests.test_alrc import DATA

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (16, 3), (300,), (5000,), (40_000,), (200_000,)]
SETTINGS: dict[str, dict[str, float]] = {
    "first losses": {},
    "start": {"mu1_start": 2.0, "mu2_start": 9.0},
    "two-sided": {"num_stddev": 1.0, "decay": 0.9, "num_stddev_below": 0.5},
    "two decays": {"num_stddev": 1.5, "decay": 0.97, "mu2_decay": 0.9},
    "negative": {"num_stddev": 1.0, "mu1_start": -1.0, "mu2_start": 2.0},
}


def stream(calls: int, dtype: torch.dtype, shapes: list[Any]) -> Iterator[Tensor]:
    """Losses of about 2, some of them outliers or not finite."""
    random = torch.Generator().manual_seed(0)
    for index in range(calls):
        values = 2.0 + torch.randn(shapes[index % len(shapes)], generator=random)
        values += 20.0 * (torch.rand(values.shape, generator=random) < 0.1)
        if index % 5 == 4 and values.ndim:
            values.view(-1)[0] = [math.nan, math.inf, -math.inf][index % 3]
        yield values.to(dtype)


def clip(alrc: ALRC, loss: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss.detach().clone().requires_grad_()
    clipped = alrc(loss)
    (factors,) = torch.autograd.grad(clipped.sum(), loss)
    return clipped.detach().cpu(), factors.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SETTINGS)
def test_the_layer_equals_the_cpu(device: str, case: str, dtype: torch.dtype) -> None:
    on_device, on_cpu = ALRC(**SETTINGS[case]), ALRC(**SETTINGS[case])
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    for values in stream(40, dtype, SHAPES):
        clipped, factors = clip(on_device, values.to(device))
        expected, expected_factors = clip(on_cpu, values)
        torch.testing.assert_close(clipped, expected, rtol=2 * eps, atol=2 * eps, equal_nan=True)
        torch.testing.assert_close(factors, expected_factors, rtol=2 * eps, atol=2 * eps)
        if values.numel() < 2**16:
            # A CPU sums more than 2**16 losses in float32. Later moments keep a trace of that.
            assert state_of(on_device) == pytest.approx(state_of(on_cpu), rel=1e-5, abs=1e-5)
    assert on_device.clipped_total > 0


@pytest.mark.parametrize("case", SETTINGS)
def test_moments_equal_the_cpus_to_the_last_digits(device: str, case: str) -> None:
    on_device, on_cpu = ALRC(**SETTINGS[case]), ALRC(**SETTINGS[case])
    for values in stream(60, torch.float64, SHAPES[:6]):
        clip(on_device, values.to(device)), clip(on_cpu, values)
        assert state_of(on_device) == pytest.approx(state_of(on_cpu), rel=1e-12)


@pytest.mark.parametrize("trace", ["defaults_scalar", "per_sample_b16"])
def test_traces_of_the_original_are_reproduced(device: str, trace: str) -> None:
    data = np.load(DATA / f"{trace}.npz")
    alrc = ALRC(**json.loads(str(data["params"])))
    for step, loss in enumerate(data["loss"]):
        clipped, factors = clip(alrc, torch.tensor(loss, dtype=torch.float32, device=device))
        np.testing.assert_allclose(clipped.numpy(), data["clipped"][step], rtol=1e-4)
        np.testing.assert_allclose(factors.numpy(), data["grad_scale"][step], rtol=1e-4)
        np.testing.assert_allclose(alrc.mu1.item(), data["mu1"][step], rtol=1e-4)


def test_other_layouts_equal_contiguous_losses(device: str) -> None:
    values = torch.rand(6, 4, device=device) + 1.0
    for loss in (values.T, values[:, ::2], values[:1].expand(6, 4), values[1:, 1:]):
        first, second = ALRC(), ALRC()
        found, expected = clip(first, loss)[0], clip(second, loss.contiguous())[0]
        assert torch.equal(found, expected)
        assert state_of(first) == state_of(second)


def test_a_second_gradient_equals_the_cpus(device: str) -> None:
    results = []
    for place in (device, "cpu"):
        alrc = ALRC(num_stddev=1.0, mu1_start=2.0, mu2_start=5.0)
        x = torch.tensor([1.0, 3.0], device=place, requires_grad=True)
        (first,) = torch.autograd.grad(alrc(x**3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.sum(), x)[0].cpu())
    torch.testing.assert_close(*results)


def test_compiled_equals_eager(device: str) -> None:
    alrc, eager = ALRC(decay=0.9), ALRC(decay=0.9)
    compiled = torch.compile(alrc, fullgraph=True)
    for values in stream(30, torch.float32, [(8,)]):
        loss = values.nan_to_num(2.0, 2.0, 2.0).to(device).requires_grad_()
        torch.testing.assert_close(compiled(loss), eager(loss))
    assert state_of(alrc) == pytest.approx(state_of(eager), rel=1e-6)


def test_state_goes_to_a_cpu_and_back_bit_for_bit(device: str) -> None:
    alrc = ALRC()
    values = list(stream(20, torch.float32, [(8,)]))
    for each in values:
        alrc(each.to(device).requires_grad_())
    before = alrc.dump()
    there = ALRC()
    there.load_state_dict(alrc.state_dict())
    assert there.dump() == before
    again = ALRC()
    again.load_state_dict(copy.deepcopy(there).cpu().state_dict())
    for each in values:
        alrc(each.to(device).requires_grad_()), again(each.to(device).requires_grad_())
    assert again.dump() == alrc.dump()


# ---- what only a device can do


def test_a_call_takes_the_kernel_and_launches_3_times_at_most(cuda: str) -> None:
    pytest.importorskip("triton")
    alrc = ALRC()
    for shape in ((), (256,)):
        loss = torch.ones(shape, device=cuda, requires_grad=True)
        assert kernel.takes(loss)
        gradient = torch.ones_like(loss)
        for _ in range(3):
            torch.autograd.grad(alrc(loss), loss, gradient)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            torch.autograd.grad(alrc(loss), loss, gradient)
            torch.cuda.synchronize()
        kinds = torch.autograd.DeviceType
        names = [e.name for e in profiler.events() or [] if e.device_type == kinds.CUDA]
        assert len(names) <= 3, names


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("shape", [(), (256,), (100_000,)], ids=str)
def test_no_call_waits_for_the_device(cuda: str, case: str, shape: tuple[int, ...]) -> None:
    alrc = ALRC(**SETTINGS[case])
    seen: list[Tensor] = []
    alrc.on_clip = seen.append
    loss = torch.ones(shape, device=cuda, requires_grad=True)
    alrc(loss).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(5):
            alrc.num_stddev = 2.0 + index
            alrc(loss).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 6


@pytest.mark.parametrize("shape", [(), (8,), (100_000,)], ids=str)
def test_a_replayed_graph_updates_the_moments(cuda: str, shape: tuple[int, ...]) -> None:
    alrc, eager = ALRC(), ALRC()
    loss = torch.zeros(shape, device=cuda, requires_grad=True)
    gradient = torch.ones_like(loss)
    values = [torch.rand(shape, device=cuda) + 1.0 for _ in range(40)]
    values[30:] = [each * 50.0 for each in values[30:]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in values[:12]:
            with torch.no_grad():
                loss.copy_(each)
            torch.autograd.grad(alrc(loss), loss, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    before = alrc.dump()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipped = alrc(loss)
        (factors,) = torch.autograd.grad(clipped, loss, gradient)
    assert alrc.dump() == before  # a capture runs nothing
    for each in values[:12]:
        clip(eager, each)
    for each in values[12:]:
        with torch.no_grad():
            loss.copy_(each)
        graph.replay()
        expected, expected_factors = clip(eager, each)
        torch.testing.assert_close(clipped.detach().cpu(), expected)
        torch.testing.assert_close(factors.cpu(), expected_factors)
        assert state_of(alrc) == pytest.approx(state_of(eager), rel=1e-9)
    assert alrc.clipped_total > 0


def test_memory_is_flat_over_2000_steps(cuda: str) -> None:
    alrc = ALRC()
    loss = torch.rand(256, device=cuda).requires_grad_()

    def steps(count: int) -> int:
        for _ in range(count):
            alrc(loss).sum().backward()
        loss.grad = None
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = steps(100)
    assert steps(2000) == before


def test_one_rank_on_nccl_equals_one_process(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums go through NCCL, as with several ranks."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "is_active", lambda: True)
        shared, alone = ALRC(), ALRC(synchronize=False)
        for values in stream(20, torch.float32, [(8,), (), (40_000,)]):
            found, expected = clip(shared, values.to(cuda)), clip(alone, values.to(cuda))
            torch.testing.assert_close(found, expected, equal_nan=True)
            assert state_of(shared) == pytest.approx(state_of(alone), rel=1e-12)
    finally:
        dist.destroy_process_group()


def test_each_of_several_losses_launches_once(cuda: str) -> None:
    pytest.importorskip("triton")
    launches: list[Any] = []
    launch: Callable[..., None] = kernel._launch
    losses = {name: ALRC() for name in "abc"}
    loss = torch.ones(4, device=cuda, requires_grad=True)
    assert kernel.takes(loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernel, "_launch", lambda *a, **k: (launches.append(a[0]), launch(*a, **k))[1]
        )
        for alrc in losses.values():
            alrc(loss)
    assert len(launches) == 3
