"""A refused step is undone: parameters, optimizer state and settings, and buffers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_alrc._trainer.undo import Buffers, EarlyUpdates, Snapshot
from tests import nets
from tests.nets import Core, weights_of

BATCHES = list(nets.loader())


class Refused(Exception):
    pass


def closure_of(net: Core, optimizer: Any, batch: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = net.losses(batch)
            loss.backward()
        return loss.detach()

    return closure


def state_of(optimizer: Any) -> list[Any]:
    """A copy of the optimizer's state, in order, and of its settings."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    itself = {id(each): each for each in parameters}
    return copy.deepcopy([list(optimizer.state.values()), settings], itself)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- optimizers


class LikeTRAC(torch.optim.SGD):
    """Keeps a reference point for each parameter in ``state["points"]``, as TRAC does."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        points = self.state["points"]  # type: ignore[index]
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                points[parameter] = parameter.detach().clone()
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.05, max_iter=3),
    "LikeTRAC": lambda p: LikeTRAC(p, 0.05),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_snapshot_restores_weights_state_and_settings(kind: str, steps: int) -> None:
    net = Core()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for batch in BATCHES[:steps]:
        optimizer.step(closure_of(net, optimizer, batch))
    weights, state = weights_of(net), state_of(optimizer)
    snapshot = Snapshot(optimizer)
    assert not snapshot.parameters_have_changed()
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for batch in BATCHES[:3]:
        optimizer.step(closure_of(net, optimizer, batch))
    assert snapshot.parameters_have_changed()
    snapshot.restore()
    assert weights_of(net) == weights
    assert_same(state_of(optimizer), state)
    # The state still belongs to the same parameters, so the next step equals that of an optimizer
    # that was never restored.
    reference_net = Core()
    reference = OPTIMIZERS[kind](reference_net.parameters())
    for batch in BATCHES[: steps + 1]:
        reference.step(closure_of(reference_net, reference, batch))
    optimizer.step(closure_of(net, optimizer, BATCHES[steps]))
    assert weights_of(net) == weights_of(reference_net)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_snapshot_of_parameters_of_unusual_kinds() -> None:
    frozen = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.ones(1).expand(3)]
    trained, lazy = nn.Parameter(torch.ones(3)), nn.LazyLinear(3)
    parameters = [nn.Parameter(each, requires_grad=False) for each in frozen]
    snapshot = Snapshot(torch.optim.SGD([trained, *parameters, *lazy.parameters()], 0.1))
    assert not snapshot.parameters_have_changed()
    with torch.no_grad():
        lazy(torch.ones(1, 2))  # gives its parameters a shape
        assert not snapshot.parameters_have_changed()
        trained.fill_(2.0)
    assert snapshot.parameters_have_changed()
    snapshot.restore()
    assert trained.tolist() == [1.0] * 3


class Early(torch.optim.SGD):
    """From a given step on, moves its parameters before the closure runs, and back afterwards."""

    def __init__(self, parameters: Any, begins: int = 0, by_data: bool = False) -> None:
        super().__init__(parameters, 0.05, momentum=0.9)
        self.begins, self.by_data, self.steps = begins, by_data, 0

    @torch.no_grad()
    def shift(self, by: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.by_data:
                    parameter.data = parameter.data + by
                else:
                    parameter.add_(by)

    def step(self, closure: Any = None) -> Any:
        moves, self.steps = self.steps >= self.begins, self.steps + 1
        if moves:
            self.shift(0.5)
        loss = closure()
        if moves:
            self.shift(-0.5)
        super().step()
        return loss


def refused_step(undoing: EarlyUpdates, net: Core, optimizer: Any, batch: Any) -> None:
    def refuse() -> None:
        closure_of(net, optimizer, batch)()
        raise Refused

    with pytest.raises(Refused):
        undoing.step(optimizer, refuse, optimizer.step, Refused)


@pytest.mark.parametrize("by_data", [False, True], ids=["in place", "by data"])
@pytest.mark.parametrize("good_steps", [0, 1, 12, 30])
def test_a_step_that_moves_parameters_early_is_undone(good_steps: int, by_data: bool) -> None:
    net, undoing = Core(), EarlyUpdates()
    optimizer = Early(net.parameters(), by_data=by_data)
    for step in range(good_steps):
        batch = BATCHES[step % len(BATCHES)]
        undoing.step(optimizer, closure_of(net, optimizer, batch), optimizer.step, Refused)
    weights, state = weights_of(net), state_of(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused_step(undoing, net, optimizer, BATCHES[0])
    assert weights_of(net) == weights
    assert_same(state_of(optimizer), state)


def test_a_first_early_update_after_many_steps_is_warned_of_and_the_next_is_undone() -> None:
    net, undoing = Core(), EarlyUpdates()
    optimizer = Early(net.parameters(), begins=EarlyUpdates.STEPS_WITH_SNAPSHOT + 5)
    for _ in range(EarlyUpdates.STEPS_WITH_SNAPSHOT + 5):
        undoing.step(optimizer, closure_of(net, optimizer, BATCHES[0]), optimizer.step, Refused)
    weights = weights_of(net)
    with pytest.warns(UserWarning, match="Early for the first time updated parameters before"):
        refused_step(undoing, net, optimizer, BATCHES[1])
    assert weights_of(net) == pytest.approx([each + 0.5 for each in weights])
    before = weights_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused_step(undoing, net, optimizer, BATCHES[1])
    assert weights_of(net) == before


def test_after_an_early_update_in_a_good_step_the_next_refused_step_is_undone() -> None:
    net, undoing = Core(), EarlyUpdates()
    optimizer = Early(net.parameters(), begins=EarlyUpdates.STEPS_WITH_SNAPSHOT + 5)
    for _ in range(EarlyUpdates.STEPS_WITH_SNAPSHOT + 6):
        undoing.step(optimizer, closure_of(net, optimizer, BATCHES[0]), optimizer.step, Refused)
    before = weights_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused_step(undoing, net, optimizer, BATCHES[1])
    assert weights_of(net) == before


def test_another_error_in_the_closure_undoes_nothing() -> None:
    net, undoing = Core(), EarlyUpdates()
    optimizer, weights = Early(net.parameters()), weights_of(net)

    def fail() -> None:
        raise KeyError("another")

    with pytest.raises(KeyError):
        undoing.step(optimizer, fail, optimizer.step, Refused)
    assert weights_of(net) == pytest.approx([each + 0.5 for each in weights])


def copies(monkeypatch: pytest.MonkeyPatch, optimizer: Any, net: Core, steps: int) -> int:
    """In how many of these steps the optimizer's parameters are copied."""
    count = 0

    class Counting(Snapshot):
        def __init__(self, *args: Any) -> None:
            nonlocal count
            count += 1
            super().__init__(*args)

    monkeypatch.setattr("lightning_alrc._trainer.undo.Snapshot", Counting)
    undoing = EarlyUpdates()
    for _ in range(steps):
        undoing.step(optimizer, closure_of(net, optimizer, BATCHES[0]), optimizer.step, Refused)
    return count


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (lambda p: torch.optim.SGD(p, 0.01), 0),
        (lambda p: torch.optim.AdamW(p, 0.01, fused=True), 0),
        (lambda p: LikeTRAC(p, 0.01), EarlyUpdates.STEPS_WITH_SNAPSHOT),
        (Early, 25),
        (OPTIMIZERS["LBFGS"], 25),
    ],
    ids=["SGD", "fused AdamW", "like TRAC", "early", "LBFGS"],
)
def test_parameters_are_copied_only_as_long_as_the_optimizer_may_update_early(
    monkeypatch: pytest.MonkeyPatch, kind: Any, expected: int
) -> None:
    net = Core()
    assert copies(monkeypatch, kind(net.parameters()), net, 25) == expected


# ---- buffers


class BuffersOfAllKinds(nn.Module):
    """Buffers that change in all possible ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=None)
        self.frozen = nn.BatchNorm1d(3).eval()
        for name in ("in_place", "by_data", "anew", "constant"):
            self.register_buffer(name, torch.ones(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("absent", None)

    def step(self, x: Tensor) -> None:
        self.norm(x)
        mean = x.mean(0)
        self.in_place.mul_(0.9).add_(mean)
        self.by_data.data = self.by_data.data + mean
        self.anew = self.anew + mean
        self.count += 1


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in module.named_buffers()}


def buffers_before_a_refused_step(module: Any, good_steps: int) -> dict[str, Tensor]:
    """Take some good steps, and undo a refused one. Returns the buffers before the refused step."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    buffers = Buffers(module)
    for _ in range(good_steps):
        buffers.save()
        module.step(x)
    buffers.save()
    before = buffers_of(module)
    module.step(x * torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffers.restore()
    return before


@pytest.mark.parametrize("good_steps", [0, 1, 2, 3, 4, 9])
def test_buffers_are_restored_in_whatever_way_they_change(good_steps: int) -> None:
    module = BuffersOfAllKinds()
    before = buffers_before_a_refused_step(module, good_steps)
    assert_same(buffers_of(module), before)


class UnusualBuffers(nn.Module):
    """Buffers of unusual kinds. Half of them are constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.BatchNorm1d(3))
        for name in ("graph", "constant_graph"):
            self.register_buffer(f"{name}_coo", torch.eye(3).to_sparse())
            self.register_buffer(f"{name}_csr", torch.eye(3).to_sparse_csr())
        self.register_buffer("new_graph", torch.eye(3).to_sparse_csr())
        self.register_buffer("scale", torch.ones(2, 1))
        self.register_buffer("scales", self.scale.expand(2, 3))
        self.register_buffer("series", torch.arange(5.0))
        self.register_buffer("windows", self.series.unfold(0, 3, 1))
        self.register_buffer("constant_scales", torch.ones(1).expand(3))
        self.register_buffer("empty", torch.ones(1, 0).expand(2, 0))
        self.register_buffer("bits", torch.zeros(3, dtype=torch.uint8))
        with torch.inference_mode():  # as a buffer that validation_step assigns
            self.register_buffer("validated", torch.ones(3))
            self.register_buffer("validated_and_trained", torch.ones(3))
        if hasattr(torch, "float4_e2m1fn_x2"):
            self.bits = self.bits.view(torch.float4_e2m1fn_x2)

    def step(self, x: Tensor) -> None:
        self.scripted(x)
        for buffer in (self.graph_coo, self.graph_csr, self.scale, self.series):
            buffer.mul_(x.mean())
        self.validated_and_trained = x.mean(0)
        self.new_graph = torch.full((3, 3), float(x.mean())).to_sparse_csr()


@pytest.mark.parametrize("good_steps", [0, 1, 2, 3, 4, 9])
def test_buffers_of_unusual_kinds_are_restored(good_steps: int) -> None:
    module = UnusualBuffers()
    before = buffers_before_a_refused_step(module, good_steps)
    bits, bits_before = module.bits.view(torch.uint8), before.pop("bits").view(torch.uint8)
    assert bits.tolist() == bits_before.tolist()
    assert_same({name: each for name, each in buffers_of(module).items() if name in before}, before)
    module.scale.fill_(7.0)  # the views are still views
    module.series.fill_(7.0)
    assert module.scales.tolist() == [[7.0] * 3] * 2
    assert module.windows.tolist() == [[7.0] * 3] * 3


def test_restore_puts_back_the_buffer_that_the_step_replaced_by_another_tensor() -> None:
    module = BuffersOfAllKinds()
    buffers, before = Buffers(module), module.anew
    buffers.save()
    module.step(torch.full((4, 3), torch.nan))
    buffers.restore()
    assert module.anew is before


@pytest.mark.parametrize("good_steps", [0, 1, 5])
@pytest.mark.parametrize("unused_steps", [0, 5])
def test_a_lazy_norm_is_restored_also_if_the_refused_step_is_its_first(
    good_steps: int, unused_steps: int
) -> None:
    module, x = nn.LazyBatchNorm1d(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    buffers = Buffers(module)
    for _ in range(unused_steps):
        buffers.save()
        buffers.restore()
    for _ in range(good_steps):
        buffers.save()
        module(x)
    buffers.save()
    assert buffers.may_change
    before = buffers_of(module) if good_steps else buffers_of(nn.BatchNorm1d(3))
    module(x * torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffers.restore()
    assert_same(buffers_of(module), before)


@pytest.mark.parametrize("kind", [lambda: nn.BatchNorm1d(3), nn.LazyBatchNorm1d])
def test_a_graph_made_before_restore_can_still_be_differentiated(kind: Any) -> None:
    module, x = kind(), torch.randn(4, 3, requires_grad=True)
    buffers = Buffers(module)
    buffers.save()
    out = module(x)
    buffers.restore()
    out.square().sum().backward()
    assert x.grad is not None
    assert_same(buffers_of(module), buffers_of(nn.BatchNorm1d(3)))


def test_a_buffer_that_is_new_or_gone_does_not_end_the_training() -> None:
    module, x = BuffersOfAllKinds(), torch.ones(4, 3)
    buffers = Buffers(module)
    for step in range(3):
        buffers.save()
        module.step(x * step)
        if step == 1:
            module.register_buffer("late", torch.ones(2))
    module.register_buffer("in_place", None)
    del module._buffers["anew"]
    buffers.restore()
    assert module.anew is not None
    assert module.late.tolist() == [1, 1]


def test_a_buffer_that_first_changes_in_a_refused_step_is_warned_of_and_saved_from_then_on() -> (
    None
):
    module = BuffersOfAllKinds()
    buffers = Buffers(module)
    for _ in range(6):
        buffers.save()
        module.norm(torch.randn(4, 3))
    buffers.save()
    module.constant.fill_(torch.nan)
    with pytest.warns(
        UserWarning, match=r"\['BuffersOfAllKinds.constant'\] changed for the first time"
    ):
        buffers.restore()
    module.constant.fill_(2.0)
    buffers.save()
    module.constant.fill_(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffers.restore()
    assert module.constant.tolist() == [2.0] * 3


@pytest.mark.parametrize("is_refused", [False, True], ids=["", "steps are refused"])
def test_buffers_that_do_not_change_are_not_kept(is_refused: bool) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 3))
    module.register_buffer("mask", torch.ones(1000))
    module.register_buffer("graph", torch.eye(3).to_sparse_csr())
    buffers = Buffers(module)
    for _ in range(Buffers.STEPS_WITH_VALUES):
        buffers.save()
        assert buffers.may_change  # until the first steps have shown no change
        module(torch.ones(4, 3))
        if is_refused:
            buffers.restore()
    buffers.save()
    assert not buffers.may_change
    assert not buffers._saved


def test_a_module_that_a_refused_step_has_cast_stays_cast() -> None:
    module = nn.BatchNorm1d(3)
    buffers = Buffers(module)
    buffers.save()
    module.double()(torch.full((4, 3), torch.nan, dtype=torch.float64))
    buffers.restore()
    assert module.running_mean is not None
    assert module.running_mean.dtype == torch.float64
    assert module.running_mean.tolist() == [0.0] * 3


def test_a_buffer_of_inference_mode_is_restored() -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.register_buffer("mean", torch.ones(3))
    buffers = Buffers(module)
    buffers.save()
    with torch.inference_mode():
        module.mean.fill_(torch.nan)
    buffers.restore()
    assert module.mean.tolist() == [1.0] * 3


def test_a_module_without_buffers_has_none_to_save() -> None:
    buffers = Buffers(nn.Linear(3, 3))
    buffers.save()
    assert not buffers.may_change
