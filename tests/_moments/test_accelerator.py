"""The accelerator's kernel, run on the CPU by Triton's interpreter, against tensor operations."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_alrc import ALRC
from lightning_alrc._moments import accelerator, paths, tensors
from lightning_alrc._moments.call import Call
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import zero_sums
from tests import test_alrc, test_fuzz
from tests.conftest import on_device
from tests.nets import state_of
from tests.reference import Reference

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (2, 3), (300,), (1100,)]
SETTINGS: dict[str, dict[str, float]] = {
    "first losses": {},
    "start": {"mu1_start": 2.0, "mu2_start": 9.0},
    "two-sided": {"num_stddev": 1.0, "decay": 0.9, "num_stddev_below": 0.5},
    "two decays": {"num_stddev": 1.5, "decay": 0.97, "mu2_decay": 0.9},
    "no decay": {"num_stddev": 0.5, "decay": 0.0},
    "negative": {"num_stddev": 1.0, "mu1_start": -1.0, "mu2_start": 2.0},
    "open": {"num_stddev": math.inf},
}
# Triton's interpreter truncates to bfloat16, while a device rounds.
ROUNDING = {
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
    torch.float32: 2e-7,
    torch.float64: 1e-12,
}


@pytest.fixture(autouse=True)
def _kernel(kernel_path: None) -> None:
    """Losses of the CPU go to the kernel."""


def by_tensors(alrc: ALRC, loss: Tensor, outgoing: Tensor | None = None) -> Tensor:
    """The clipped losses of a call that uses tensor operations."""
    hooks = alrc.on_clip, alrc.on_sums
    call = Call(alrc._state, alrc._rules, *hooks, alrc.spiked_calls_offend, outgoing=outgoing)
    return tensors.clip(loss, call)


def stream(calls: int, shapes: list[Any] = SHAPES, dtypes: Any = DTYPES) -> Iterator[Tensor]:
    """Losses of about 2, some of them outliers or not finite, of changing shape and dtype."""
    random = torch.Generator().manual_seed(0)
    for index in range(calls):
        shape = shapes[index % len(shapes)]
        values = 2.0 + torch.randn(shape, generator=random, dtype=torch.float64)
        values += 20.0 * (torch.rand(shape, generator=random) < 0.1)
        if index % 5 == 4 and values.ndim:
            values.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])[: values.numel()]
        yield values.to(dtypes[index % len(dtypes)])


def assert_states_equal(first: ALRC, second: ALRC) -> None:
    found, expected = first.get_extra_state().tolist(), second.get_extra_state().tolist()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("case", SETTINGS)
def test_the_kernel_equals_tensor_operations_at_every_step(case: str) -> None:
    alrc, plain = ALRC(**SETTINGS[case]), ALRC(**SETTINGS[case])
    alrc.spiked_calls_offend = plain.spiked_calls_offend = True
    seen: tuple[list[Tensor], list[Tensor]] = [], []
    sums: tuple[list[Any], list[Any]] = [], []
    alrc.on_sums, plain.on_sums = sums[0].append, sums[1].append
    alrc.on_clip, plain.on_clip = seen[0].append, seen[1].append
    for values in stream(12):
        found, expected = (values.clone().requires_grad_() for _ in range(2))
        clipped, plain_clipped = alrc(found), by_tensors(plain, expected)
        rounding = ROUNDING[values.dtype]
        torch.testing.assert_close(clipped, plain_clipped, rtol=rounding, atol=0.0, equal_nan=True)
        clipped.sum().backward(), plain_clipped.sum().backward()
        rounding = max(rounding, 1e-6)
        torch.testing.assert_close(found.grad, expected.grad, rtol=rounding, atol=rounding)
        assert_states_equal(alrc, plain)
    for first, second in zip(*seen, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one.packed(), other.packed(), rtol=1e-12, atol=1e-12)
    if case in ("two-sided", "no decay"):  # most calls are clipped
        assert alrc.offending_total > alrc.nonfinite_total
    assert (alrc.clipped_total > 0) == (case != "open")


@pytest.mark.parametrize("trace", ["defaults_scalar", "per_sample_b16"])
def test_the_kernel_reproduces_the_first_steps_of_the_authors_traces(trace: str) -> None:
    data = np.load(test_alrc.DATA / f"{trace}.npz")
    alrc = ALRC(**json.loads(str(data["params"])))
    for step in range(60):
        clipped, factors = test_alrc.clip(alrc, torch.tensor(data["loss"][step]).requires_grad_())
        moments = alrc.mu1.item(), alrc.mu2.item()
        expected = data["mu1"][step], data["mu2"][step]
        np.testing.assert_allclose(clipped.numpy(), data["clipped"][step], rtol=1e-4)
        np.testing.assert_allclose(factors.numpy(), data["grad_scale"][step], rtol=1e-4)
        np.testing.assert_allclose(moments, expected, rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in SETTINGS if case != "open"])
def test_the_kernel_equals_the_reference(case: str) -> None:
    alrc, reference = ALRC(**SETTINGS[case]), Reference(**SETTINGS[case])
    for values in stream(20, [(3, 4)], [torch.float64]):
        expected, expected_factors = reference(values.numpy())
        clipped, factors = test_alrc.clip(alrc, values.requires_grad_())
        np.testing.assert_allclose(clipped.numpy(), expected, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(factors.numpy(), expected_factors, rtol=1e-7, atol=1e-9)
        assert alrc.mu2.item() == pytest.approx(reference.mu[1], rel=1e-7, abs=1e-9)
    assert alrc.clipped_total.item() == reference.clipped_total > 0


# ---- the properties of the other paths, with fewer examples because the interpreter is slow


@settings(max_examples=max(8, test_fuzz.FUZZ_CASES // 40))
@given(test_fuzz.cases(test_fuzz.SHAPES))
@pytest.mark.filterwarnings("ignore:the checkpoint has no ALRC moments")
def test_any_stream_equals_the_reference(case: test_fuzz.Case) -> None:
    test_fuzz.run(case._replace(calls=case.calls[:6]))


@settings(max_examples=10)
@given(test_alrc.all_settings, test_alrc.streams(test_alrc.everything, 6))
def test_any_losses_leave_moments_finite_and_factors_in_0_to_1(
    options: dict[str, float], losses: list[Tensor]
) -> None:
    test: Any = test_alrc.test_any_losses_leave_moments_finite_and_factors_in_0_to_1
    test.hypothesis.inner_test(options, losses)


@settings(max_examples=10)
@given(test_alrc.all_settings, test_alrc.streams(length=6))
def test_strides_do_not_matter(options: dict[str, float], losses: list[Tensor]) -> None:
    test: Any = test_alrc.test_strides_do_not_matter
    test.hypothesis.inner_test(options, losses)


def test_a_view_with_the_opposite_numbers_in_memory_is_read_right() -> None:
    loss = torch.tensor(3.0 + 2.0j).conj().imag.detach().requires_grad_()
    assert loss.is_neg()
    assert ALRC()(loss).item() == -2.0


# ---- many losses, read by several programs


@pytest.fixture
def few_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "ONE_PROGRAM", 32)
    monkeypatch.setattr(accelerator, "BLOCKS", ((32, 1),))
    monkeypatch.setattr(accelerator, "MOST_PROGRAMS", 4)


@pytest.mark.usefixtures("few_in_a_program")
@pytest.mark.parametrize("case", ["first losses", "two-sided"])
@pytest.mark.parametrize("has_outgoing", [False, True], ids=["to moments", "to outgoing"])
def test_many_losses_are_read_by_several_programs(case: str, has_outgoing: bool) -> None:
    alrc, plain = ALRC(**SETTINGS[case]), ALRC(**SETTINGS[case])
    for values in stream(4, [(33,), (300,), (7, 11)], [torch.float64]):
        outgoing = [zero_sums(values.device) if has_outgoing else None for _ in range(2)]
        clipped = alrc.clip(values.clone().requires_grad_(), outgoing[0])
        expected = by_tensors(plain, values.clone().requires_grad_(), outgoing[1])
        torch.testing.assert_close(clipped, expected, rtol=1e-12, atol=0.0, equal_nan=True)
        torch.testing.assert_close(outgoing[0], outgoing[1], rtol=1e-12, atol=1e-12)
        assert_states_equal(alrc, plain)


# ---- the reduced sums of several ranks


class Arrived:
    """An all-reduce that has finished."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def __getitem__(self, index: int) -> Tensor:
        return self.sums


def reduced() -> Tensor:
    """The sums of two ranks, all-reduced, in the order of Sums."""
    return torch.tensor([12.0, 1, 3, 11.5, 30, 27, 6, 14, 12, 2, 1], dtype=torch.float64)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("size", [7, 77], ids=["one program", "several"])
@pytest.mark.parametrize("has_outgoing", [False, True], ids=["to moments", "to outgoing"])
@pytest.mark.usefixtures("few_in_a_program")
def test_reduced_sums_are_learned_before_the_losses_are_clipped(
    case: str, size: int, has_outgoing: bool
) -> None:
    alrc, plain = ALRC(**SETTINGS[case]), ALRC(**SETTINGS[case])
    for values in stream(2, [(size,)], [torch.float64]):
        sums = reduced()
        alrc.learn_when_reduced(Arrived(sums), 0)  # type: ignore[arg-type]
        tensors.learn(plain._state, plain._rules, sums)
        outgoing = [zero_sums(values.device) if has_outgoing else None for _ in range(2)]
        clipped = alrc.clip(values.clone().requires_grad_(), outgoing[0])
        expected = by_tensors(plain, values.clone().requires_grad_(), outgoing[1])
        torch.testing.assert_close(clipped, expected, rtol=1e-12, atol=0.0, equal_nan=True)
        torch.testing.assert_close(outgoing[0], outgoing[1], rtol=1e-12, atol=1e-12)
        assert_states_equal(alrc, plain)


def test_several_calls_of_a_step_add_to_the_same_sums() -> None:
    alrc, plain = ALRC(), ALRC()
    sums, expected = zero_sums(torch.device("cpu")), zero_sums(torch.device("cpu"))
    for values in stream(3):
        alrc.clip(values.clone().requires_grad_(), sums)
        by_tensors(plain, values.clone().requires_grad_(), expected)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    assert alrc.updates == 0


@pytest.mark.parametrize("case", SETTINGS)
def test_reduced_sums_are_learned_before_moments_are_read(case: str) -> None:
    alrc, plain = ALRC(**SETTINGS[case]), ALRC(**SETTINGS[case])
    for values in stream(1):
        alrc(values.clone().requires_grad_())
        by_tensors(plain, values.clone().requires_grad_())
    assert paths.path_of_state(alrc._state) is accelerator
    alrc.learn_when_reduced(Arrived(reduced()), 0)  # type: ignore[arg-type]
    tensors.learn(plain._state, plain._rules, reduced())
    assert_states_equal(alrc, plain)
    assert state_of(alrc) == pytest.approx(state_of(plain), rel=1e-12)


def test_a_call_without_losses_learns_the_reduced_sums_of_the_step_before() -> None:
    alrc, plain = ALRC(), ALRC()
    alrc.learn_when_reduced(Arrived(reduced()), 0)  # type: ignore[arg-type]
    alrc.clip(torch.empty(0, requires_grad=True), zero_sums(torch.device("cpu")))
    tensors.learn(plain._state, plain._rules, reduced())
    assert_states_equal(alrc, plain)


# ---- the state


def test_moments_continue_when_the_path_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    alrc, plain = ALRC(), ALRC()
    ways: list[Callable[[Any], Any]] = [
        lambda _: accelerator,
        lambda _: paths.cpu,
        lambda _: accelerator,
        lambda _: tensors,
    ]
    for index, values in enumerate(stream(24, [(3,)], [torch.float64])):
        monkeypatch.setattr(paths, "path_of", ways[index % 4])
        alrc(values.clone().requires_grad_())
        by_tensors(plain, values.clone().requires_grad_())
        assert_states_equal(alrc, plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_alone(duplicate: Callable[[ALRC], ALRC]) -> None:
    alrc = ALRC()
    values = list(stream(4, [(12,)]))
    for each in values:
        alrc(each.requires_grad_())
    before = state_of(alrc)
    copied = duplicate(alrc)
    copied(values[0])
    assert state_of(alrc) == before != state_of(copied)
    alrc(values[0])
    assert state_of(alrc) == state_of(copied)


def test_a_snapshot_keeps_the_moments_before_the_next_call() -> None:
    alrc = ALRC()
    values = next(stream(1, [(12,)])).requires_grad_()
    alrc(values)
    before = alrc.dump()
    alrc.take_snapshot()
    alrc(values)
    assert alrc.dump(of_snapshot=True) == before != alrc.dump()


def test_a_setting_may_change_between_calls() -> None:
    alrc, plain = ALRC(), ALRC()
    for index, values in enumerate(stream(10, [(12,)])):
        alrc.num_stddev = plain.num_stddev = 1.0 + index / 10
        alrc.decay = plain.decay = 0.9 + index / 1000
        alrc(values.clone().requires_grad_())
        by_tensors(plain, values.clone().requires_grad_())
    assert_states_equal(alrc, plain)


RESTARTS: dict[str, Callable[[ALRC], Any]] = {
    "nothing": lambda alrc: None,
    "reset": ALRC.reset,
    "forget": ALRC.forget,
    "a row": ALRC.take_row,
    "state": lambda alrc: alrc.set_extra_state(State(mu1=2.0, variance=5.0).as_tensor()),
}


@pytest.mark.parametrize("restart", RESTARTS.values(), ids=RESTARTS)
def test_a_replay_of_the_launches_updates_the_moments(
    monkeypatch: pytest.MonkeyPatch, restart: Callable[[ALRC], Any]
) -> None:
    """Replays like a CUDA graph: no Python runs, and each kernel has the same tensors as before."""
    alrc, plain = ALRC(), ALRC()
    loss = torch.empty(8, requires_grad=True)
    stored: list[Any] = []
    launch = accelerator._launch
    values = list(stream(12, [(8,)], [torch.float32]))

    def noted(*arguments: Any, **constants: Any) -> None:
        stored.append((arguments, constants))
        launch(*arguments, **constants)

    with monkeypatch.context() as patch:
        for step, each in enumerate(values[:6]):
            if step == 5:
                patch.setattr(accelerator, "_launch", noted)
            loss.data.copy_(each)
            result = alrc(loss)
            by_tensors(plain, each.clone().requires_grad_())
    restart(alrc), restart(plain)
    for each in values[6:]:
        loss.data.copy_(each)
        for arguments, constants in stored:
            launch(*arguments, **constants)
        expected = by_tensors(plain, each.clone().requires_grad_())
        torch.testing.assert_close(result.detach(), expected.detach(), equal_nan=True)
        assert_states_equal(alrc, plain)
    assert len(stored) == 1


def test_changed_settings_are_in_the_tensor_that_a_captured_graph_reads() -> None:
    alrc, loss = ALRC(), torch.ones(2, requires_grad=True)
    alrc(loss)
    kept = alrc._state.kernel_settings
    assert kept is not None
    alrc.num_stddev = 1.5
    alrc(loss)
    assert alrc._state.kernel_settings is not None
    assert alrc._state.kernel_settings[1] is kept[1]
    assert kept[1][0] == 1.5


@pytest.mark.parametrize("change", ["first", "copied", "set", "moved"])
def test_a_captured_call_that_would_make_or_write_its_tensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    alrc, loss = ALRC(), torch.ones(2, requires_grad=True)
    if change != "first":
        alrc(loss)
    if change == "copied":
        alrc = copy.deepcopy(alrc)
    elif change == "set":
        alrc.num_stddev = 1.5
    elif change == "moved":
        alrc._state.move_to(torch.device("meta"))
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="captures the first call of this ALRC on cpu"):
            alrc(loss)
    if change != "moved":
        alrc(loss)
        monkeypatch.setattr(accelerator, "is_capturing", lambda device: True)
        alrc(loss)


def test_moments_continue_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    alrc, plain = ALRC(), ALRC()
    compiled = torch.compile(alrc, backend="aot_eager", fullgraph=True)
    for index, values in enumerate(stream(12, [(3,)], [torch.float64])):
        (compiled if index % 4 > 1 else alrc)(values.clone().requires_grad_())
        by_tensors(plain, values.clone().requires_grad_())
        assert_states_equal(alrc, plain)


def test_a_second_gradient_equals_the_second_gradient_by_tensor_operations() -> None:
    alrc, plain = (ALRC(num_stddev=1.0, mu1_start=2.0, mu2_start=5.0) for _ in range(2))
    results = []
    for call in (alrc, lambda loss: by_tensors(plain, loss)):
        x = torch.tensor([1.0, 3.0], requires_grad=True)
        (first,) = torch.autograd.grad(call(x**3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.sum(), x)[0])
    torch.testing.assert_close(*results)
    assert results[0][1] < 18.0  # the loss is clipped


# ---- which losses the kernel takes


def test_losses_of_other_devices_take_other_paths() -> None:
    assert not accelerator.takes(torch.ones(2))
    assert not accelerator.takes(torch.ones(2, device="meta"))


def test_tensor_operations_take_over_if_triton_cannot_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(accelerator, "_launch", broken)
    accelerator._compiles.cache_clear()
    with pytest.warns(UserWarning, match="Triton cannot compile for cpu.*C compiler"):
        assert not accelerator._compiles(torch.device("cpu"), torch.float32)
    accelerator._compiles.cache_clear()


def test_a_lack_of_memory_does_not_turn_the_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    accelerator._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "_launch", full)
        with pytest.raises(torch.OutOfMemoryError):
            accelerator._compiles(torch.device("cpu"), torch.float32)
    assert accelerator._compiles(torch.device("cpu"), torch.float32)


def test_a_first_call_within_a_capture_is_refused_and_a_later_call_takes_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"captures the first call of ALRC .*\.float32"):
            accelerator._compiles(torch.device("cpu"), torch.float32)
    assert accelerator._compiles(torch.device("cpu"), torch.float32)


def test_the_kernel_is_not_used_if_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: None)
    accelerator._compiles.cache_clear()
    assert not accelerator._compiles(torch.device("cpu"), torch.float32)
    accelerator._compiles.cache_clear()


def test_the_kernels_compile_for_devices_that_this_machine_lacks() -> None:
    """Compiles to the devices' code, as Triton does before a launch."""
    targets = ["cuda:75", "cuda:90", "hip:gfx942"]
    process = subprocess.run(
        [sys.executable, "-m", "tests.scripts.compiled_kernels", *targets],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("learn") == len(targets)


def test_the_kernel_fixture_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = accelerator._launch
    monkeypatch.setattr(
        accelerator, "_launch", lambda *a, **k: (launches.append(a[0]), launch(*a, **k))
    )
    ALRC()(torch.ones(3, requires_grad=True))
    on_device(monkeypatch)
    ALRC()(torch.ones(3, requires_grad=True))
    assert len(launches) == 1
