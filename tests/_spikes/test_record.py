"""The worst clips are found on the device, and kept in memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_alrc import ALRC
from lightning_alrc._spikes.record import REDUCE_AFTER, Origin, SpikeRecord
from tests.nets import SETTINGS
from tests.spikes import spike

pytestmark = pytest.mark.quick


def clipped_by(losses: list[Tensor], *records: SpikeRecord) -> list[tuple[float, int, int | None]]:
    """Let records observe losses. Returns the scale, step and index of each that was clipped."""
    alrc = ALRC(**SETTINGS)
    expected: list[tuple[float, int, int | None]] = []

    def observe(seen: Tensor) -> None:
        for record in records:
            record.observe("loss", seen)

    alrc.on_clip = observe
    for step, loss in enumerate(losses):
        for record in records:
            record.origin = Origin(step=step, batch_idx=step)
        loss = loss.requires_grad_()
        (scales,) = torch.autograd.grad(alrc(loss).sum(), loss)
        rows = scales[None] if not loss.ndim else scales if loss.numel() else []
        for index, row in enumerate(rows):
            if row.min() < 1:
                expected.append((row.min().item(), step, index if loss.ndim else None))
    return sorted(expected, key=lambda each: each[0])


def found(record: SpikeRecord) -> list[tuple[float, int, int | None]]:
    record.read()
    return [(spike.scale, spike.step, spike.sample) for spike in record.worst]


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 0)], ids=str)
def test_the_worst_are_found_in_losses_of_any_shape(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_alrc._spikes.record.REDUCE_AFTER", 25)
    generator = torch.Generator().manual_seed(0)
    losses = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).exp()
        for _ in range(2 * 25 + 5)
    ]
    everything, few = SpikeRecord(10_000), SpikeRecord(5)
    expected = clipped_by(losses, everything, few)
    assert found(everything) == expected
    assert found(few) == expected[:5]
    assert len(expected) > 7 or 0 in shape


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("shape", [(4, 50), (4, 5, 10)], ids=str)
def test_a_sample_with_many_clipped_losses_takes_one_place(shape: tuple[int, ...]) -> None:
    """Three batches have a sample of large losses, the first the largest, the last the smallest."""
    factors = {5: 1e4, 9: 1e3, 12: 1e2}
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(15):
        loss = torch.rand(shape, generator=generator, dtype=torch.float64)
        loss[2] *= factors.get(step, 1.0)
        losses.append(loss)
    record = SpikeRecord(3)
    expected = clipped_by(losses, record)
    assert len(expected) == 3
    assert found(record) == expected


def test_the_ids_of_the_last_batch_are_released_and_its_spikes_stay() -> None:
    ids = torch.arange(3)
    alive, record = weakref.ref(ids), SpikeRecord(5)
    record.begin_batch(Origin(ids={"id": ids}))
    record.observe("loss", torch.tensor([[0.5, 0.1, 0.2]] * 3))
    record.finish_batch()
    record.read()
    del ids
    assert alive() is not None
    record.release_ids()
    assert alive() is None
    assert [spike.id for spike in record.worst] == [1, 2, 0]


def test_the_index_is_exact_among_millions_of_losses_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_alrc._spikes.record.widest_dtype", lambda device: torch.float32)
    many, record = 2**23, SpikeRecord(5)
    for step in range(3):  # float32 cannot represent the last position
        seen = torch.ones(3, many)
        seen[0, many - 1 - step] = 0.5 + step / 8
        record.origin = Origin(step)
        record.observe("loss", seen)
    assert found(record) == [(0.5 + step / 8, step, many - 1 - step) for step in range(3)]


@pytest.mark.usefixtures("device_path")
@given(
    st.lists(st.lists(st.floats(0.1, 1e6), max_size=12), max_size=12),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_reading_at_any_time_finds_the_same(
    batches: list[list[float]], size: int, period: int
) -> None:
    losses = [torch.tensor(batch, dtype=torch.float64) for batch in batches]
    at_once, now_and_then = SpikeRecord(size), SpikeRecord(size)
    see = now_and_then.observe

    def see_and_read(name: str, seen: Tensor) -> None:
        see(name, seen)
        if now_and_then.origin.step % period == 0:
            now_and_then.read()

    now_and_then.observe = see_and_read  # type: ignore[method-assign]
    clipped_by(losses, at_once, now_and_then)
    assert [each[0] for each in found(at_once)] == [each[0] for each in found(now_and_then)]


def test_losses_of_one_name_may_be_on_several_devices() -> None:
    """Fake tensors have a device, but no values. So no GPU is needed."""
    record, mixed = SpikeRecord(5), ["cpu", "cuda", "cuda"] * REDUCE_AFTER
    with FakeTensorMode():
        for device in ["cuda"] * REDUCE_AFTER + mixed:
            record.observe("loss", torch.ones(3, 4, device=device))
    assert record.calls_held == 4 * REDUCE_AFTER


def test_each_loss_has_its_own_worst() -> None:
    record = SpikeRecord(2)
    record.enter([spike(name, index, scale=0.1 * index) for name in "ab" for index in range(1, 5)])
    assert [(each.name, each.step) for each in record.worst] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("b", 2),
    ]


def test_a_spike_entered_twice_is_kept_once_with_the_smaller_scale() -> None:
    record = SpikeRecord(5)
    record.enter([spike(scale=0.5), spike(scale=0.3), spike(scale=0.4)])
    record.enter([spike(scale=0.6)])
    assert record.worst == [spike(scale=0.3)]


@pytest.mark.parametrize("field", ["step", "epoch", "batch_idx", "call", "sample", "rank"])
def test_spikes_of_two_places_are_both_kept(field: str) -> None:
    record = SpikeRecord(5)
    record.enter([spike(), spike(**{field: 7})])
    assert len(record.worst) == 2


def clip(record: SpikeRecord, *scales: float, name: str = "loss") -> None:
    """Let a record observe losses of 6.0, clipped with these scales."""
    values = torch.tensor(scales)
    seen = torch.stack([values, torch.full_like(values, 6.0), 6.0 * values])
    record.observe(name, seen if len(scales) > 1 else seen[:, 0])


def test_calls_of_one_name_in_a_batch_are_counted() -> None:
    record = SpikeRecord(100)
    for batch in range(2):
        record.begin_batch(Origin(batch, 0, batch))
        for _ in range(3):
            clip(record, 0.5)
            clip(record, 0.5, name="other")
        record.finish_batch()
        record.read()
    expected = [(batch, call) for batch in range(2) for call in range(3)] * 2
    assert sorted((each.batch_idx, each.call) for each in record.worst) == sorted(expected)


def test_calls_are_counted_whenever_they_are_read() -> None:
    record = SpikeRecord(100)
    record.begin_batch(Origin())
    for _ in range(3):
        clip(record, 0.5)
        record.read()
    assert [each.call for each in record.worst] == [0, 1, 2]


def test_an_unfinished_batch_is_left_out_of_a_state_on_demand() -> None:
    record = SpikeRecord(2)
    for batch, scale in enumerate((0.5, 0.4, 0.3)):
        record.begin_batch(Origin(batch, 0, batch))
        clip(record, scale)
        record.read()
        if batch < 2:
            record.finish_batch()
    assert [each.scale for each in record.worst] == pytest.approx([0.3, 0.4])
    assert steps_of(record.state_dict()) == [2, 1]
    assert steps_of(record.state_dict(without_current_batch=True)) == [1, 0]
    record.read()  # a second time, as for a checkpoint after an exception
    assert steps_of(record.state_dict(without_current_batch=True)) == [1, 0]
    record.finish_batch()
    assert steps_of(record.state_dict(without_current_batch=True)) == [2, 1]


def steps_of(rows: list[dict[str, object]]) -> list[object]:
    return [row["step"] for row in rows]


@pytest.mark.parametrize("read_between", [True, False])
def test_ids_are_removed_once_losses_turn_out_not_to_be_of_samples(read_between: bool) -> None:
    """Every batch has four losses. The first two batches have four ids, and the last has three."""
    record = SpikeRecord(100)
    for batch, ids in enumerate((list("abcd"), list("efgh"), list("ijk"))):
        record.begin_batch(Origin(batch, 0, batch, {"id": ids}))
        clip(record, 1.0, 0.5, 1.0, 1.0)
        record.finish_batch()
        if read_between and batch < 2:
            record.read()
            assert [each.id for each in record.worst] == ["b", "f"][: batch + 1]
            assert record.take_unshared() != []
            record.changed = False
    record.read()
    found = {each.step: each.id for each in record.worst}
    assert found[2] == ["i", "j", "k"]
    assert found[0] in (None, ["a", "b", "c", "d"])
    assert found[1] in (None, ["e", "f", "g", "h"])
    assert record.changed
    told = {each.step: each.id for each in record.take_unshared()}
    assert told == found  # what other ranks are sent


def test_an_unwritten_change_is_not_forgotten() -> None:
    record = SpikeRecord(5)
    record.enter([spike(scale=0.3)])
    record.enter([spike(scale=0.6)])  # the same place, not worse
    assert record.changed


def test_no_call_is_held_after_it_was_read() -> None:
    record = SpikeRecord(5)
    for _ in range(3):
        record.observe("loss", torch.tensor([[0.5], [6.0], [3.0]]))
    assert record.calls_held == 3
    record.read()
    assert record.calls_held == 0


def test_loading_drops_unread_clips() -> None:
    record = SpikeRecord(5)
    record.observe("loss", torch.tensor([[0.5], [6.0], [3.0]]))
    record.load([spike()])
    assert record.calls_held == 0
    assert record.read() == []
    assert record.worst == [spike()]
