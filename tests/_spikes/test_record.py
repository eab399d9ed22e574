"""The record of the worst clips: found where the losses are, kept in a file, checkpointed."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import time
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._spikes import recording
from lightning_alrc._spikes.record import (
    FOLD_AFTER,
    Origin,
    Spike,
    SpikeRecord,
    checked_spikes,
    read_spikes,
    write_spikes,
)
from tests.nets import SETTINGS, Net, ResumableLoader, WithALRC, callback_of, loader

Fit = Callable[..., Any]
NAME = "alrc_spikes.jsonl"


def clipped_by(record: SpikeRecord, losses: list[Tensor]) -> list[tuple[float, int, int | None]]:
    """What is clipped of losses: factor, step and index; the record sees it."""
    alrc = ALRC(**SETTINGS)
    expected: list[tuple[float, int, int | None]] = []
    alrc.watcher = partial(record.see, "loss")
    for step, loss in enumerate(losses):
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


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 0)], ids=str)
def test_the_worst_are_found_in_losses_of_any_shape(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).exp()
        for _ in range(3 * FOLD_AFTER)
    ]
    everything, few = SpikeRecord(10_000), SpikeRecord(5)
    expected = clipped_by(everything, losses)
    clipped_by(few, losses)
    assert found(everything) == expected
    assert found(few) == expected[:5]
    assert len(expected) > 10 or 0 in shape


def test_the_place_is_right_among_millions_where_floats_are_narrow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_alrc._spikes.record.widest_dtype", lambda device: torch.float32)
    many, record = 2**23, SpikeRecord(5)
    for step in range(3):  # the last of the last has a position that float32 has not
        seen = torch.ones(3, many)
        seen[0, many - 1 - step] = 0.5 + step / 8
        record.origin = Origin(step)
        record.see("loss", seen)
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
    clipped_by(at_once, [loss.clone() for loss in losses])
    see = now_and_then.see

    def see_and_read(name: str, seen: Tensor) -> None:
        see(name, seen)
        if now_and_then.origin.step % period == 0:
            now_and_then.read()

    now_and_then.see = see_and_read  # type: ignore[method-assign]
    clipped_by(now_and_then, losses)
    assert [each[0] for each in found(at_once)] == [each[0] for each in found(now_and_then)]


def test_each_loss_has_its_own_worst() -> None:
    record = SpikeRecord(2)
    record.enter([spike(name, index, scale=0.1 * index) for name in "ab" for index in range(1, 5)])
    assert [(each.name, each.step) for each in record.worst] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("b", 2),
    ]


def test_what_is_entered_twice_is_there_once_with_the_worse_factor() -> None:
    record = SpikeRecord(5)
    record.enter([spike(scale=0.5), spike(scale=0.3), spike(scale=0.4)])
    record.enter([spike(scale=0.6)])
    assert record.worst == [spike(scale=0.3)]


def spike(name: str = "loss", step: int = 3, **fields: Any) -> Spike:
    defaults: dict[str, Any] = {
        "name": name,
        "step": step,
        "epoch": 0,
        "batch_idx": step,
        "sample": 1,
        "id": "seven",
        "loss": 9.0,
        "threshold": 3.0,
        "scale": 1 / 3,
        "rank": 0,
    }
    return Spike(**(defaults | fields))


def test_a_change_that_is_not_written_yet_stays_one() -> None:
    record = SpikeRecord(5)
    record.enter([spike(scale=0.3)])
    record.enter([spike(scale=0.6)])  # of the same place, and no worse
    assert record.changed


def test_what_was_read_is_read() -> None:
    record = SpikeRecord(5)
    for _ in range(3):
        record.see("loss", torch.tensor([[0.5], [6.0], [3.0]]))
    assert record.unread == 3
    record.read()
    assert record.unread == 0


def test_what_is_loaded_takes_the_place_of_what_is_not_read_yet() -> None:
    record = SpikeRecord(5)
    record.see("loss", torch.tensor([[0.5], [6.0], [3.0]]))
    record.load([spike()])
    assert record.unread == 0
    assert record.read() == []
    assert record.worst == [spike()]


# ---- the file


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    spikes = [spike(), spike(step=4, sample=None, id=[1, 2]), spike(step=5, id=None)]
    write_spikes(tmp_path / NAME, spikes)
    assert read_spikes(tmp_path / NAME) == spikes
    lines = (tmp_path / NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    records = [[spike(step=step, id=name) for step in range(3000)] for name in ("odd", "even")]
    path, deaths = tmp_path / NAME, 0
    write_spikes(path, records[0])
    for _ in range(25):
        child = os.fork()
        if child == 0:
            while True:
                write_spikes(path, records[0])
                write_spikes(path, records[1])
        time.sleep(random.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deaths += (tmp_path / f".{NAME}.part").exists()
        assert read_spikes(path) in records
    assert deaths > 5  # in the middle of writing


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 1}, "a spike must have .*'name'.*got {'step': 1}"),
        (spike()._asdict() | {"loss": "9"}, "'loss' must be a finite number, got '9'"),
        (spike()._asdict() | {"loss": math.nan}, "'loss' must be a finite number, got nan"),
        (spike()._asdict() | {"loss": 10**400}, "'loss' must be a finite number, got 1000"),
        (
            spike()._asdict() | {"threshold": math.inf},
            "'threshold' must be a finite number, got inf",
        ),
        (spike()._asdict() | {"scale": 1.0}, r"'scale' must be a number in \[0, 1\), got 1.0"),
        (spike()._asdict() | {"scale": math.nan}, r"'scale' must be a number in \[0, 1\), got nan"),
        (spike()._asdict() | {"sample": 1.0}, "'sample' must be a whole number.* or None, got 1.0"),
        (spike()._asdict() | {"batch_idx": True}, "'batch_idx' must be a whole number.*got True"),
        (spike()._asdict() | {"step": -1}, "'step' must be a whole number, 0 or above, got -1"),
        (
            spike()._asdict() | {"rank": 10**30},
            "'rank' must be a whole number, 0 or above, got 1000",
        ),
        (
            spike()._asdict() | {"id": {}},
            "'id' must be a string, a number or None, or a list.*got {}",
        ),
        (spike()._asdict() | {"id": [[1]]}, r"'id' must be a string.*got \[\[1\]\]"),
        (spike()._asdict() | {"id": torch.ones(2)}, r"'id' must be a string.*got tensor"),
        (spike()._asdict() | {"name": "x" * 10**6}, "'name' must be the name of a loss, got 'xxx"),
        (spike()._asdict() | {"name": "../a"}, r"'name' must be the name of a loss, got '\.\./a'"),
        (3, "a spike must have .*got 3"),
    ],
)
def test_what_is_no_spike_is_refused(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        checked_spikes([spike()._asdict(), row])
    assert len(str(raised.value)) < 1000
    with pytest.raises(ValueError, match="must be a list"):
        checked_spikes(row)


# ---- in a Trainer


class Named(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples with names, of which two have a loss beyond all others'."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        factor = 100.0 if index in (37, 50) else 1.0
        return {"x": torch.full((3,), factor + index / 64), "id": f"sample {index}"}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Named(), batch_size=4)


class Sum(pl.LightningModule):
    """Its losses are what its samples say."""

    def __init__(self, per_sample: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.per_sample = per_sample

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.weight * batch["x"].sum(1)
        return losses if self.per_sample else losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.usefixtures("path")
def test_the_samples_that_spiked_are_named(fit: Fit) -> None:
    callback = callback_of(
        fit(Sum(), ALRCCallback(), batches=Data().train_dataloader(), max_epochs=1)
    )
    worst = callback.spikes[:2]
    assert {(each.id, each.batch_idx, each.sample) for each in worst} == {
        ("sample 37", 9, 1),
        ("sample 50", 12, 2),
    }
    assert all(each.loss > 300 > each.threshold > 0 for each in worst)
    assert all(each.scale == pytest.approx(each.threshold / each.loss) for each in worst)


def test_a_loss_of_a_whole_batch_has_all_its_ids(fit: Fit) -> None:
    callback = ALRCCallback(**SETTINGS)
    fit(Sum(per_sample=False), callback, batches=Data().train_dataloader(), max_epochs=1)
    worst = callback.spikes[0]
    assert worst.sample is None
    assert worst.id in (
        [f"sample {i}" for i in range(36, 40)],
        [f"sample {i}" for i in range(48, 52)],
    )


def test_ids_come_from_the_datamodule_or_a_function(make_trainer: Fit) -> None:
    class Numbered(Data):
        def sample_ids(self, batch: dict[str, Any]) -> Tensor:
            return torch.tensor([int(name.split()[1]) for name in batch["id"]])

    for data, ids, expected in (
        (Numbered(), None, {37, 50}),
        (
            Numbered(),
            lambda batch: [name.upper() for name in batch["id"]],
            {"SAMPLE 37", "SAMPLE 50"},
        ),
    ):
        callback = ALRCCallback(sample_ids=ids)
        net = Sum()
        make_trainer(net, callbacks=[callback], max_epochs=1).fit(net, datamodule=data)
        assert {each.id for each in callback.spikes[:2]} == expected


@pytest.mark.parametrize("ids", ["name", 3, torch.zeros(4, 7)], ids=["str", "int", "matrix"])
def test_ids_that_are_none_raise_at_the_first_step(fit: Fit, ids: Any) -> None:
    callback = ALRCCallback(sample_ids=lambda batch: ids)
    with pytest.raises(TypeError, match="sample_ids must return a list or a tensor of one dim"):
        fit(Net("vector"), callback)


def test_an_id_that_is_no_number_or_string_is_told_in_200_characters(fit: Fit) -> None:
    callback = ALRCCallback(**SETTINGS, sample_ids=lambda batch: [b"x" * 10**5] * 4)
    fit(Net("vector"), callback, max_epochs=1)
    assert {len(str(spike.id)) for spike in callback.spikes} == {200}


def test_losses_that_are_not_of_samples_have_all_ids(fit: Fit) -> None:
    class Tasks(Sum):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            losses = self.weight * batch["x"].sum(1)
            return torch.stack([losses[0], losses.sum()])

    callback = ALRCCallback()
    fit(Tasks(), callback, batches=Data().train_dataloader(), max_epochs=1)
    for worst in callback.spikes[:2]:
        assert worst.sample == 1
        assert worst.id == [f"sample {4 * worst.batch_idx + i}" for i in range(4)]


def test_a_step_that_takes_its_batches_itself_has_no_ids(fit: Fit) -> None:
    class Taking(Sum):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return super().training_step(*next(dataloader_iter)[:2])

    callback = ALRCCallback(sample_ids=lambda batch: batch["id"])
    fit(Taking(), callback, batches=Data().train_dataloader(), max_epochs=1)
    worst = callback.spikes[:2]
    assert {(each.batch_idx, each.sample, each.id) for each in worst} == {
        (9, 1, None),
        (12, 2, None),
    }


def test_ids_of_a_datamodule_that_are_no_function_are_not_asked(make_trainer: Fit) -> None:
    data = Data()
    data.sample_ids = ["a", "list"]  # type: ignore[attr-defined]
    net, callback = Sum(), ALRCCallback()
    make_trainer(net, callbacks=[callback], max_epochs=1).fit(net, datamodule=data)
    assert {each.id for each in callback.spikes[:2]} == {"sample 37", "sample 50"}


@pytest.mark.usefixtures("device_path")
def test_ids_that_are_a_part_of_their_batch_do_not_hold_it_in_memory(fit: Fit) -> None:
    batches = [torch.full((4, 3), 1.0 + 99 * (step % 10 == 9)) for step in range(50)]
    alive: list[int] = []
    loaded: list[weakref.ref[Any]] = []

    class Rows(Sum):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            loaded.append(weakref.ref(batch))
            alive.append(sum(each() is not None for each in loaded))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.weight * batch.sum(1)

    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=torch.clone)
    callback = ALRCCallback(num_stddev=0.1, sample_ids=lambda batch: batch[:, 0])
    fit(Rows(), callback, batches=loader, max_epochs=1, log_every_n_steps=50)
    assert len(callback.spikes) > 3
    assert max(alive) <= 3


def test_the_record_is_bounded_where_nothing_is_logged(fit: Fit) -> None:
    class Watching(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            assert callback._recording is not None
            held.append(len(callback._recording.record._unshared))

    held: list[int] = []
    callback = ALRCCallback(**SETTINGS, record=3, save_batches=1)
    fit(Net("vector"), callback, Watching(), max_epochs=5, log_every_n_steps=0)
    assert held == [3] * 5


def test_the_record_is_read_now_and_then_where_nothing_is_logged(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "READ_AFTER", 4)
    unread: list[int] = []

    class Watching(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert callback._recording is not None
            unread.append(callback._recording.record.unread)

    callback = ALRCCallback(**SETTINGS)
    fit(Net("vector"), callback, Watching(), max_epochs=4, log_every_n_steps=0)
    assert 0 < max(unread) < 4
    assert 0 in unread


def test_token_ids_are_not_taken_for_ids_of_samples(fit: Fit) -> None:
    class Tokens(Sum):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return self.weight * batch["ids"].double().sum(1)

    batches = [{"ids": torch.full((4, 9), 1 + 99 * (step == 8))} for step in range(9)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    callback = callback_of(fit(Tokens(), ALRCCallback(), batches=loader, max_epochs=1))
    assert callback.spikes[0].batch_idx == 8
    assert callback.spikes[0].id is None


def test_nothing_is_kept_when_it_is_off(fit: Fit, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    callback = callback_of(fit(Net("vector"), ALRCCallback(**SETTINGS, record=0), logger=logger))
    assert callback.spikes == []
    assert not list(tmp_path.rglob(NAME))
    assert callback.state_dict()["recording"] is None


class Operations(TorchDispatchMode):
    """Lists every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Layered(Net):
    """Clips its losses by the bare layer, without a callback."""

    def losses(self, batch: Any) -> Tensor:
        if not hasattr(self, "clip"):
            self.clip = ALRC(**SETTINGS)
        return self.clip(super().losses(batch)).mean()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("device_path")
def test_it_costs_nothing_when_it_is_off(fit: Fit) -> None:
    operations = {}
    for name, net, callbacks in (
        ("off", Net("vector"), [ALRCCallback(**SETTINGS, record=0, sample_ids=pytest.fail)]),
        ("on", Net("vector"), [ALRCCallback(**SETTINGS)]),
        ("bare", Layered("vector"), []),
    ):
        with Operations() as watched:
            fit(net, *callbacks)
        operations[name] = Counter(watched.names)
    assert operations["off"] <= operations["bare"]
    assert operations["off"] < operations["on"]


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)


@pytest.mark.parametrize("log_every_n_steps", [0, 3, 50])
def test_it_is_written_beside_the_checkpoints(
    fit: Fit, tmp_path: Path, log_every_n_steps: int
) -> None:
    callback = ALRCCallback(**SETTINGS)
    fit(
        Net("vector"),
        callback,
        saving(tmp_path / "deep"),
        enable_checkpointing=True,
        log_every_n_steps=log_every_n_steps,
    )
    assert len(callback.spikes) > 3
    assert read_spikes(tmp_path / "deep" / NAME) == callback.spikes


def test_it_is_written_beside_the_logs_where_there_are_no_checkpoints(
    fit: Fit, tmp_path: Path
) -> None:
    callback, logger = ALRCCallback(**SETTINGS), CSVLogger(tmp_path, version=0)
    fit(Net("vector"), callback, logger=logger)
    assert read_spikes(Path(logger.log_dir) / NAME) == callback.spikes != []


def test_it_is_written_nowhere_where_there_are_neither(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert callback_of(fit(Net("vector"), ALRCCallback(**SETTINGS))).spikes
    fit(Net("vector"), ALRCCallback(**SETTINGS), logger=True, fast_dev_run=True)
    assert not list(tmp_path.rglob(NAME))


def test_beside_what_is_no_local_folder_it_is_kept_in_memory(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Remote(DummyLogger):
        @property
        def save_dir(self) -> str:
            return "s3://bucket/logs"

    monkeypatch.chdir(tmp_path)
    callback = ALRCCallback(**SETTINGS)
    with pytest.warns(UserWarning, match="kept in memory: s3://bucket/logs is not a local folder"):
        fit(Net("vector"), callback, logger=Remote())
    assert callback.spikes
    assert not list(tmp_path.iterdir())


def test_a_rank_that_is_not_the_first_writes_none(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "is_global_zero", False)
    callback = ALRCCallback(**SETTINGS)
    fit(Net("vector"), callback, logger=CSVLogger(tmp_path), max_epochs=1)
    assert callback.spikes
    assert not list(tmp_path.rglob("alrc_spikes*"))


def test_it_is_written_now_and_then_and_only_where_it_changed(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def counted(path: Path, spikes: list[Spike]) -> None:
        written.append(len(spikes))
        write_spikes(path, spikes)

    monkeypatch.setattr(recording, "write_spikes", counted)
    arguments = {"enable_checkpointing": True, "log_every_n_steps": 1}
    fit(Net("vector"), ALRCCallback(**SETTINGS), saving(tmp_path / "a"), **arguments)
    assert 1 <= len(written) <= 2
    written.clear()
    monkeypatch.setattr(recording, "WRITTEN_EVERY", 0.0)
    fit(Net("vector"), ALRCCallback(**SETTINGS, record=1), saving(tmp_path / "b"), **arguments)
    assert 1 <= len(written) < 12  # the worst clip of all comes up long before the end


def test_another_run_s_record_is_left_alone(fit: Fit, tmp_path: Path) -> None:
    for _ in range(3):
        fit(Net("vector"), ALRCCallback(**SETTINGS), saving(tmp_path), enable_checkpointing=True)
    names = {path.name for path in tmp_path.glob("*.jsonl")}
    assert names == {NAME, "alrc_spikes-v1.jsonl", "alrc_spikes-v2.jsonl"}


def test_a_callback_in_another_trainer_leaves_the_record_there_alone(
    fit: Fit, tmp_path: Path
) -> None:
    for folder in ("first", "second"):
        fit(
            Net("vector"),
            ALRCCallback(**SETTINGS),
            saving(tmp_path / folder),
            enable_checkpointing=True,
        )
    there = tmp_path / "second" / NAME
    before = there.read_bytes()
    callback = ALRCCallback(**SETTINGS)
    for folder in ("third", "second", "second"):
        fit(Net("vector"), callback, saving(tmp_path / folder), enable_checkpointing=True)
    assert there.read_bytes() == before
    # Each of them starts at step 0, and is a run of its own.
    assert len(list((tmp_path / "second").glob("alrc_spikes*"))) == 3


def test_a_fit_that_keeps_no_files_leaves_the_record_of_the_one_before_alone(
    fit: Fit, tmp_path: Path
) -> None:
    callback = ALRCCallback(**SETTINGS)
    fit(Net("vector"), callback, saving(tmp_path), enable_checkpointing=True)
    before = (tmp_path / NAME).read_bytes()
    callback.reset()
    fit(Net("scalar"), callback)
    assert callback.spikes
    assert (tmp_path / NAME).read_bytes() == before


def test_each_of_several_trainings_of_a_callback_has_a_record_of_its_own(
    fit: Fit, tmp_path: Path
) -> None:
    callback = ALRCCallback(**SETTINGS)
    for fold, factor in enumerate((100.0, 1.0)):
        batches = [(x, factor * y) for x, y in Net().train_dataloader()]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        callback.reset()
        folder = saving(tmp_path / str(fold))
        fit(Net("vector"), callback, folder, batches=loader, enable_checkpointing=True)
        assert read_spikes(tmp_path / str(fold) / NAME) == callback.spikes
    assert 0 < max(spike.loss for spike in callback.spikes) < 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_was_full_for_a_while_loses_nothing(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_alrc._spikes.recording.WRITTEN_EVERY", 0.0)
    part = tmp_path / f".{NAME}.part"

    class Disk(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if not part.is_symlink():
                part.symlink_to("/dev/full")

        def on_train_end(self, *_: Any) -> None:
            part.unlink(missing_ok=True)

    callback = ALRCCallback(**SETTINGS)
    with pytest.warns(UserWarning, match="the record of spikes .* was not written"):
        fit(
            Net("vector"),
            Disk(),
            callback,
            saving(tmp_path),
            enable_checkpointing=True,
            log_every_n_steps=1,
        )
    assert len(callback.spikes) > 3
    assert read_spikes(tmp_path / NAME) == callback.spikes


def test_it_survives_an_exception(fit: Fit, tmp_path: Path) -> None:
    class Failing(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 8:
                raise RuntimeError("as it goes")

    callback = ALRCCallback(**SETTINGS)
    with pytest.raises(RuntimeError, match="as it goes"):
        fit(Failing("vector"), callback, saving(tmp_path), enable_checkpointing=True)
    assert read_spikes(tmp_path / NAME) == callback.spikes != []


def test_a_record_that_cannot_be_read_hides_no_exception(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    class Failing(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 8:
                monkeypatch.setattr(SpikeRecord, "read", broken)
                raise ValueError("as it goes")

    with pytest.raises(ValueError, match="as it goes"):
        fit(
            Failing("vector"),
            ALRCCallback(**SETTINGS),
            saving(tmp_path),
            enable_checkpointing=True,
            log_every_n_steps=2,
        )
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize("stopped_after", [5, 10])
def test_a_resumed_run_s_record_is_that_of_one_never_stopped(
    fit: Fit, tmp_path: Path, stopped_after: int
) -> None:
    arguments: dict[str, Any] = {"enable_checkpointing": True, "log_every_n_steps": 2}
    whole, resumed = ALRCCallback(**SETTINGS), ALRCCallback(**SETTINGS)
    fit(Net("vector"), whole, saving(tmp_path), batches=ResumableLoader(), **arguments)
    before = read_spikes(tmp_path / NAME)
    fit(
        Net("vector"),
        resumed,
        saving(tmp_path),
        batches=ResumableLoader(),
        ckpt_path=tmp_path / f"step={stopped_after}.ckpt",
        **arguments,
    )
    assert counted_alike(resumed.spikes) == counted_alike(whole.spikes) == counted_alike(before)
    # The file is that of the run which is resumed, and has no spike twice.
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [NAME]
    assert read_spikes(tmp_path / NAME) == resumed.spikes


def counted_alike(spikes: list[Spike]) -> list[Spike]:
    """As they are, but for a Lightning that itself counts one batch too few after resuming."""
    if Version(pl.__version__) >= Version("2.5"):
        return spikes
    return [spike._replace(step=0, batch_idx=0) for spike in spikes]


def test_a_checkpoint_with_a_record_loads_with_weights_only(fit: Fit, tmp_path: Path) -> None:
    trainer = fit(Sum(), ALRCCallback(), batches=Data().train_dataloader(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    content = torch.load(tmp_path / "it.ckpt", weights_only=True)
    rows = content["callbacks"]["ALRCCallback"]["recording"]["worst"]
    assert {row["id"] for row in rows[:2]} == {"sample 37", "sample 50"}


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(4),
        list(np.arange(4) / 3),
        list(np.array(["a", "b", "c", "d"])),
        list(np.array([1, 2, 3, 4], "datetime64[D]")),
        [True, None, "\ud800", 2**70],
        list(torch.arange(8).view(4, 2)),
        [{"file": "a"}, {1}, (1, 2), b"x"],
    ],
    ids=lambda ids: f"{ids!r:.40}",
)
def test_ids_of_any_kind_load_with_weights_only(fit: Fit, tmp_path: Path, ids: Any) -> None:
    callback = ALRCCallback(**SETTINGS, sample_ids=lambda batch: ids)
    trainer = fit(Net("vector"), callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    content = torch.load(tmp_path / "it.ckpt", weights_only=True)
    again = ALRCCallback(**SETTINGS)
    again.load_state_dict(content["callbacks"]["ALRCCallback"])
    assert again.spikes == callback.spikes != []


@pytest.mark.parametrize(
    ("recording", "message"),
    [
        ([], r"'file' and 'worst', got \[\]"),
        ({"file": "../../etc/passwd", "worst": []}, "'file' must be a name like.*passwd"),
        ({"file": "alrc_spikes.jsonl/..", "worst": []}, "'file' must be a name like"),
        ({"file": None, "worst": [{"name": "loss"}]}, "a spike must have"),
        ({"file": None, "worst": {}}, "must be a list"),
        ({"file": "alrc_spikes.jsonl\n", "worst": []}, "'file' must be a name like"),
        ({"file": 1, "worst": []}, "'file' must be a name like"),
        ("x" * 10**6, "'file' and 'worst', got 'xxx"),
    ],
)
def test_a_hostile_record_is_refused_and_changes_nothing(
    fit: Fit, recording: Any, message: str
) -> None:
    callback = callback_of(fit(Net("vector"), ALRCCallback(**SETTINGS)))
    before = callback.state_dict()
    other = callback_of(fit(Net("scalar"), ALRCCallback(**SETTINGS))).state_dict()
    with pytest.raises(ValueError, match=message):
        callback.load_state_dict(other | {"recording": recording})
    assert callback.state_dict() == before


def test_a_compiled_step_records_nothing_and_breaks_no_graph(fit: Fit) -> None:
    net = Net("vector")
    callback = ALRCCallback(**SETTINGS)
    alrc = ALRC(**SETTINGS)
    alrc.watcher = lambda seen: pytest.fail("the watcher is called")
    step = torch.compile(lambda x: alrc(x).sum(), backend="eager", fullgraph=True)
    step(torch.full((4,), 1e6, requires_grad=True))
    fit(torch.compile(net, backend="eager"), callback)
    assert callback.spikes  # what Lightning returns from a compiled step is seen outside of it


def test_a_second_run_in_the_same_folder_has_a_record_of_its_own(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(num_stddev=0.5, save_batches=2)
    for run in ("", "-v1"):
        fit(Net("vector"), callback, default_root_dir=tmp_path, logger=CSVLogger(tmp_path, "", ""))
        (path,) = tmp_path.rglob(f"alrc_spikes{run}.jsonl")
        assert read_spikes(path) == callback.spikes
        assert max(spike.step for spike in callback.spikes) < 12
        assert len(callback.spikes) == len({spike.place for spike in callback.spikes})
        kept = {path.name for path in path.with_name(f"alrc_batches{run}").iterdir()}
        assert kept <= {spike.batch_file for spike in callback.spikes}


def test_a_fit_that_goes_on_has_the_record_of_before(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(num_stddev=0.5)
    trainer = fit(Net("vector"), callback, logger=CSVLogger(tmp_path, "", ""), max_epochs=1)
    before = callback.spikes
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, loader())
    assert set(before) & set(callback.spikes)
    assert len(list(tmp_path.rglob("alrc_spikes*.jsonl"))) == 1


def test_after_a_fit_nothing_of_its_data_is_held(fit: Fit) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def sample_ids(self, batch: Any) -> list[int]:
            return [0, 1, 2, 3]

    callback, data = ALRCCallback(**SETTINGS, save_batches=True), Data()
    fit(Net("vector"), callback, batches=data)
    assert {spike.id for spike in callback.spikes} <= {"0", "1", "2", "3", 0, 1, 2, 3}
    held = gc.get_referents(vars(callback._recording))
    assert not any(getattr(each, "__self__", None) is data for each in held)


def test_clips_inside_a_compiled_step_are_said_to_be_missing(fit: Fit) -> None:
    class Inside(WithALRC, Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.alrc(self.losses(batch), "inside").mean()

    net = Inside("vector")
    with pytest.warns(UserWarning, match="no spike is recorded of .* inside a compiled") as caught:
        trainer = fit(torch.compile(net, backend="eager"))
    assert len([each for each in caught if "no spike is recorded" in str(each.message)]) == 1
    assert callback_of(trainer).losses["inside"].clipped_total > 0
