"""All-reduces of the layer and of the exchange. Ranks with a Trainer each start no all-reduce."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._moments import accelerator, distributed
from lightning_alrc._trainer import exchange
from lightning_alrc._trainer.exchange import Exchange
from lightning_alrc._trainer.named_losses import NamedLosses
from tests.nets import SETTINGS, state_of
from tests.scripts import fabric_ranks as script
from tests.scripts import separate_trainers
from tests.scripts.launching import forked, join, reports
from tests.scripts.ranks import moments
from tests.test_distributed import flat, moments_in_one_process
from tests.test_loops import Tuned, lr_find, scale_batch_size


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fabric-2")
    join(forked(script.main, folder))
    return reports(folder, "fabric", 2)


def test_the_layer_trains_two_ranks_in_fabric_like_one_process(
    two: list[dict[str, Any]],
) -> None:
    expected = script.trained(Fabric(accelerator="cpu", devices=1))
    runs = [report["trained"] for report in two]
    assert runs[0]["moments"] == runs[1]["moments"]
    assert flat(runs[0]["moments"]) == pytest.approx(flat(moments_in_one_process(runs)), rel=1e-12)
    assert flat(runs[0]["moments"]) == pytest.approx(flat(expected["moments"]), rel=1e-9)
    assert runs[0]["final"] == pytest.approx(expected["final"], rel=1e-9)
    assert expected["moments"][-1]["loss"]["clipped_total"] > 0


def test_a_call_does_not_wait_for_a_slow_rank_but_reading_moments_does(
    two: list[dict[str, Any]],
) -> None:
    waited = two[0]["waited"]
    assert waited["call"] < script.DELAY / 2 < waited["look"]


def test_ranks_agree_on_names_whatever_their_order(two: list[dict[str, Any]]) -> None:
    expected = {name: ALRC(**SETTINGS) for name in "ab"}
    for name, alrc in expected.items():
        for step in range(3):
            alrc(script.losses(*[ord(name) + step] * 2))
    for report in two:
        found = {name: report["exchanged"]["moments"][name] for name in "ab"}
        assert flat([found]) == pytest.approx(flat([moments(expected)]), rel=1e-12)


def test_losses_of_a_late_name_wait_until_ranks_agree_on_the_name(
    two: list[dict[str, Any]],
) -> None:
    assert [report["exchanged"]["before"] for report in two] == [["a", "b", "late"], ["a", "b"]]
    alrc = ALRC(**SETTINGS)
    alrc(script.losses(5.0, 6.0, 5.0, 6.0))  # the losses of both steps, learned together
    for report in two:
        found = {"late": report["exchanged"]["moments"]["late"]}
        assert flat([found]) == pytest.approx(flat([moments({"late": alrc})]), rel=1e-12)


# ---- pending all-reduces, in a single process


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which nevertheless exchanges its sums."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(distributed, "is_active", lambda: True)
    yield
    # Without this, destroy_process_group of torch 2.5 may wait forever for a thread of gloo. The
    # thread waits for the interpreter, which it needs to release a tensor.
    distributed.wait_for_gloo()
    dist.destroy_process_group()


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def state_without_all_reduce(*calls: tuple[float, ...]) -> dict[str, float]:
    """The state after these calls of a layer that starts no all-reduce."""
    alrc = ALRC(**SETTINGS, synchronize=False)
    for values in calls:
        alrc(losses(*values))
    return state_of(alrc)


@pytest.mark.usefixtures("one_rank")
def test_a_captured_call_learns_at_once_and_needs_a_flush_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The replay of a CUDA graph runs no Python. An update left to the next call is never made."""
    alrc = ALRC(**SETTINGS)
    alrc(losses(9.0))
    monkeypatch.setattr(accelerator, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"call flush\(\) of this ALRC before the capture"):
        alrc(losses(2.0))
    alrc.flush()
    alrc(losses(2.0))
    assert alrc.is_flushed
    assert state_of(alrc) == pytest.approx(state_without_all_reduce((9.0,), (2.0,)))


@pytest.mark.usefixtures("one_rank")
def test_a_loss_of_one_number_updates_moments_as_without_an_all_reduce() -> None:
    alrc = ALRC(**SETTINGS)
    for value in (9.0, 2.0):
        alrc(losses(value)[0])
    assert state_of(alrc) == pytest.approx(state_without_all_reduce((9.0,), (2.0,)))


@pytest.mark.usefixtures("one_rank")
def test_a_pending_all_reduce_is_dropped_by_forget_and_by_a_loaded_state() -> None:
    alrc = ALRC(**SETTINGS)
    saved = alrc.get_extra_state()
    for forget in (alrc.forget, lambda: alrc.set_extra_state(saved)):
        alrc(losses(1.0, 9.0))
        forget()
        assert state_of(alrc) == state_without_all_reduce()


@pytest.mark.usefixtures("one_rank")
def test_a_reset_counts_the_losses_of_a_pending_all_reduce() -> None:
    alrc = ALRC(**SETTINGS)
    alrc(losses(1.0, 900.0))
    alrc.reset()
    assert (alrc.losses_total.item(), alrc.clipped_total.item()) == (2, 1)
    assert alrc.updates.item() == 0


@pytest.mark.usefixtures("one_rank")
def test_a_row_has_the_losses_of_a_pending_all_reduce() -> None:
    alrc = ALRC(**SETTINGS)
    alrc(losses(1.0, 3.0))
    assert alrc.take_row()["loss"] == 2.0


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_losses_of_a_pending_all_reduce(duplicate: Any) -> None:
    alrc = ALRC(**SETTINGS)
    alrc(losses(1.0, 9.0))
    assert state_of(duplicate(alrc)) == state_of(alrc) == state_without_all_reduce((1.0, 9.0))


def test_ranks_with_a_trainer_each_keep_their_own_moments(tmp_path: Path) -> None:
    """The ranks have different numbers of batches, so an all-reduce would hang."""
    join(*[forked(separate_trainers.main, rank, tmp_path) for rank in (0, 1)])
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (one["losses"], other["losses"]) == (20, 40)
    assert 1.0 < one["mu1"] < 3.0
    assert 100.0 < other["mu1"] < 300.0


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("search", [lr_find, scale_batch_size])
def test_a_search_with_a_trainer_of_one_device_sends_nothing(
    make_trainer: Callable[..., Any], search: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks may search longer, or not at all, so an all-reduce would hang."""
    monkeypatch.setattr(distributed, "PendingSums", lambda rows: pytest.fail("sums were sent"))
    net = Tuned()
    search(make_trainer(net, callbacks=[ALRCCallback(**SETTINGS)]), net)
    assert len(net.seen) > 0


@pytest.mark.usefixtures("one_rank")
def test_a_layer_that_does_not_synchronize_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PendingSums", lambda rows: pytest.fail("sums were sent"))
    alrc = ALRC(**SETTINGS, synchronize=False)
    alrc(losses(1.0, 9.0))
    assert state_of(alrc) == state_without_all_reduce((1.0, 9.0))


class Exchanging:
    """Named losses and their exchange, step by step."""

    def __init__(self) -> None:
        self.losses = NamedLosses(dict(SETTINGS))
        self.exchange = Exchange(self.losses)

    def clip(self, **values: tuple[float, ...]) -> None:
        for name, value in values.items():
            self.losses.get_or_add(name)
            self.exchange.clip(name, losses(*value))

    def step(self, **values: tuple[float, ...]) -> None:
        self.clip(**values)
        self.exchange.send(torch.device("cpu"))


@pytest.mark.usefixtures("one_rank")
def test_a_name_that_a_step_does_not_clip_keeps_its_moments() -> None:
    exchanging = Exchanging()
    exchanging.step(a=(1.0, 2.0), b=(3.0, 4.0))
    exchanging.step(a=(5.0, 6.0))
    assert state_of(exchanging.losses["a"]) == pytest.approx(
        state_without_all_reduce((1.0, 2.0), (5.0, 6.0))
    )
    assert state_of(exchanging.losses["b"]) == pytest.approx(state_without_all_reduce((3.0, 4.0)))


@pytest.mark.usefixtures("one_rank")
def test_a_name_that_is_clipped_twice_in_a_step_learns_from_both_calls() -> None:
    exchanging = Exchanging()
    exchanging.clip(a=(1.0, 2.0))
    exchanging.step(a=(3.0, 4.0))
    assert state_of(exchanging.losses["a"]) == pytest.approx(
        state_without_all_reduce((1.0, 2.0, 3.0, 4.0))
    )


@pytest.mark.usefixtures("one_rank")
def test_ranks_agree_on_a_late_name_although_nothing_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "AGREE_EVERY", 3)
    exchanging = Exchanging()
    exchanging.step(a=(1.0, 2.0))
    found = []
    for _ in range(3):
        exchanging.step(a=(1.0, 2.0), late=(3.0,))
        found.append(exchanging.losses["late"].losses_total.item())
    assert found == [0, 2, 3]
