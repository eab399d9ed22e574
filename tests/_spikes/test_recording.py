"""The record of a Trainer's worst clips: their origin, and the record's files."""

from __future__ import annotations

import errno
import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from packaging.version import Version
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._spikes import record_file, recording
from lightning_alrc._spikes.history import Numbers
from lightning_alrc._spikes.record import Spike, SpikeRecord
from lightning_alrc._spikes.record_file import read_spikes, write_spikes
from tests.nets import SETTINGS, Net, ResumableLoader, WithALRC, callback_of, loader
from tests.scripts import sharing
from tests.scripts.launching import forked, join
from tests.scripts.ranks import FinderInFit
from tests.spikes import FOLDER, NAME

Fit = Callable[..., Any]


class Named(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples with names. Two of them have far larger losses than the others."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        factor = 100.0 if index in (37, 50) else 1.0
        return {"x": torch.full((3,), factor + index / 64), "id": f"sample {index}"}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Named(), batch_size=4)


class Sum(pl.LightningModule):
    """The loss of a sample is the sum of its values."""

    def __init__(self, per_sample: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.per_sample = per_sample

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.weight * batch["x"].sum(1)
        return losses if self.per_sample else losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.usefixtures("each_path")
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
def test_invalid_ids_raise_at_the_first_step(fit: Fit, ids: Any) -> None:
    callback = ALRCCallback(sample_ids=lambda batch: ids)
    with pytest.raises(TypeError, match="sample_ids must return a list or a tensor of one dim"):
        fit(Net("vector"), callback)


def test_an_id_that_is_no_number_or_string_is_cut_to_200_characters(fit: Fit) -> None:
    callback = ALRCCallback(**SETTINGS, sample_ids=lambda batch: [b"x" * 10**5] * 4)
    fit(Net("vector"), callback, max_epochs=1)
    assert {len(str(spike.id)) for spike in callback.spikes} == {200}


def test_losses_that_are_not_of_samples_have_all_ids_of_the_batch(fit: Fit) -> None:
    class Tasks(Sum):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            losses = self.weight * batch["x"].sum(1)
            return torch.stack([losses[0], losses.sum()])

    callback = ALRCCallback()
    fit(Tasks(), callback, batches=Data().train_dataloader(), max_epochs=1)
    for worst in callback.spikes[:2]:
        assert worst.sample == 1
        assert worst.id == [f"sample {4 * worst.batch_idx + i}" for i in range(4)]


def test_ids_are_those_of_the_batch_that_the_step_gets(fit: Fit) -> None:
    """The module reorders the batch first, as for ``pack_padded_sequence``."""

    class Reversing(Sum):
        def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
            batch["x"], batch["id"] = batch["x"].flip(0), batch["id"][::-1]

    callback = ALRCCallback(ledger=True)
    fit(Reversing(), callback, batches=Data().train_dataloader(), max_epochs=1)
    assert {each.id for each in callback.spikes[:2]} == {"sample 37", "sample 50"}
    assert callback._recording is not None
    assert callback._recording.ledger is not None
    history = callback._recording.ledger.histories["loss"]
    ids, means = history.ids, Numbers(*history.table).mean
    assert {ids[at] for at in (means > 100).nonzero()[:, 0]} == {"sample 37", "sample 50"}


def test_a_search_in_a_fit_reads_no_ids(make_trainer: Fit) -> None:
    net, callback = Sum(), ALRCCallback(sample_ids=lambda batch: batch["id"])
    net.lr = 0.0
    finder = FinderInFit(num_training_steps=4, update_attr=False, early_stop_threshold=None)
    make_trainer(net, callbacks=[callback, finder], max_epochs=1).fit(net, datamodule=Data())
    assert {each.id for each in callback.spikes[:2]} == {"sample 37", "sample 50"}


def test_a_step_that_draws_its_batches_itself_has_no_ids(fit: Fit) -> None:
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


def test_sample_ids_of_a_datamodule_are_ignored_unless_callable(make_trainer: Fit) -> None:
    data = Data()
    data.sample_ids = ["a", "list"]  # type: ignore[attr-defined]
    net, callback = Sum(), ALRCCallback()
    make_trainer(net, callbacks=[callback], max_epochs=1).fit(net, datamodule=data)
    assert {each.id for each in callback.spikes[:2]} == {"sample 37", "sample 50"}


@pytest.mark.usefixtures("device_path")
def test_ids_that_are_views_of_a_batch_do_not_keep_it_in_memory(fit: Fit) -> None:
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


def test_the_record_is_bounded_if_nothing_is_logged(fit: Fit) -> None:
    class Watching(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            assert callback._recording is not None
            held.append(len(callback._recording.record._unshared))

    held: list[int] = []
    callback = ALRCCallback(**SETTINGS, record=3, save_batches=1)
    fit(Net("vector"), callback, Watching(), max_epochs=5, log_every_n_steps=0)
    assert held == [3] * 5


def test_the_record_is_read_now_and_then_if_nothing_is_logged(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "READ_AFTER", 4)
    held: list[int] = []

    class Watching(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert callback._recording is not None
            held.append(callback._recording.record.calls_held)

    callback = ALRCCallback(**SETTINGS)
    fit(Net("vector"), callback, Watching(), max_epochs=4, log_every_n_steps=0)
    assert 0 < max(held) < 4
    assert 0 in held


def test_token_ids_are_not_taken_for_ids_of_samples(fit: Fit) -> None:
    class Tokens(Sum):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return self.weight * batch["ids"].double().sum(1)

    batches = [{"ids": torch.full((4, 9), 1 + 99 * (step == 8))} for step in range(9)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    callback = callback_of(fit(Tokens(), ALRCCallback(), batches=loader, max_epochs=1))
    assert callback.spikes[0].batch_idx == 8
    assert callback.spikes[0].id is None


def test_nothing_is_kept_if_the_record_is_off(fit: Fit, tmp_path: Path) -> None:
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
def test_the_record_costs_nothing_if_it_is_off(fit: Fit) -> None:
    class Steps(pl.Callback):
        """Lists the operations of the steps only, because a fit has others, too."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                watched.names.clear()

        def on_train_batch_end(self, *_: Any) -> None:
            operations[name] = Counter(watched.names)

    operations: dict[str, Counter[str]] = {}
    for name, net, callbacks in (  # noqa: B007
        ("off", Net("vector"), [ALRCCallback(**SETTINGS, record=0, sample_ids=pytest.fail)]),
        ("on", Net("vector"), [ALRCCallback(**SETTINGS)]),
        ("bare", Layered("vector"), []),
    ):
        with Operations() as watched:
            fit(net, *callbacks, Steps(), max_epochs=1)
    # A Trainer's batch begins with a snapshot of the moments.
    snapshots = Counter({"aten.stack.default": 6, "aten.unbind.int": 6})
    snapshots["aten.clone.default"] = 14  # the moments move to the device once
    assert operations["off"] - operations["bare"] <= snapshots
    assert operations["off"] < operations["on"]


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)


@pytest.mark.parametrize("log_every_n_steps", [0, 3, 50])
def test_the_record_is_written_beside_the_checkpoints(
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


def test_the_record_is_written_beside_the_logs_if_there_are_no_checkpoints(
    fit: Fit, tmp_path: Path
) -> None:
    callback, logger = ALRCCallback(**SETTINGS), CSVLogger(tmp_path, version=0)
    fit(Net("vector"), callback, logger=logger)
    assert read_spikes(Path(logger.log_dir) / NAME) == callback.spikes != []


def test_the_record_is_not_written_without_logs_and_checkpoints(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert callback_of(fit(Net("vector"), ALRCCallback(**SETTINGS))).spikes
    fit(Net("vector"), ALRCCallback(**SETTINGS), logger=True, fast_dev_run=True)
    assert not list(tmp_path.rglob(NAME))


def test_the_record_is_kept_in_memory_if_the_folder_is_not_local(
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


def test_only_rank_0_writes_the_record(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "is_global_zero", False)
    callback = ALRCCallback(**SETTINGS)
    fit(Net("vector"), callback, logger=CSVLogger(tmp_path), max_epochs=1)
    assert callback.spikes
    assert not list(tmp_path.rglob("alrc_spikes*"))


def test_the_record_is_written_now_and_then_and_only_if_it_changed(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def counted(path: Path, spikes: list[Spike], run: str) -> None:
        written.append(len(spikes))
        write_spikes(path, spikes, run)

    monkeypatch.setattr(record_file, "write_spikes", counted)
    arguments = {"enable_checkpointing": True, "log_every_n_steps": 1}
    fit(Net("vector"), ALRCCallback(**SETTINGS), saving(tmp_path / "a"), **arguments)
    assert 1 <= len(written) <= 2
    written.clear()
    monkeypatch.setattr(recording, "WRITTEN_EVERY", 0.0)
    fit(Net("vector"), ALRCCallback(**SETTINGS, record=1), saving(tmp_path / "b"), **arguments)
    assert 1 <= len(written) < 12  # the record no longer changes after the worst clip


def test_the_record_of_another_run_is_left_alone(fit: Fit, tmp_path: Path) -> None:
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
    # Each fit starts at step 0, and is a separate run.
    assert len(list((tmp_path / "second").glob("alrc_spikes*"))) == 3


def test_a_fit_without_files_leaves_the_record_of_the_previous_fit_alone(
    fit: Fit, tmp_path: Path
) -> None:
    callback = ALRCCallback(**SETTINGS)
    fit(Net("vector"), callback, saving(tmp_path), enable_checkpointing=True)
    before = (tmp_path / NAME).read_bytes()
    callback.reset()
    fit(Net("scalar"), callback)
    assert callback.spikes
    assert (tmp_path / NAME).read_bytes() == before


def test_each_training_with_one_callback_has_its_own_record(fit: Fit, tmp_path: Path) -> None:
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
def test_a_disk_that_is_full_for_a_while_loses_nothing(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_alrc._spikes.recording.WRITTEN_EVERY", 0.0)
    callback = ALRCCallback(**SETTINGS)

    class Disk(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert callback._recording is not None
            self.part = tmp_path / f".{NAME}.{callback._recording._run}.part"
            if not self.part.is_symlink():
                self.part.symlink_to("/dev/full")

        def on_train_end(self, *_: Any) -> None:
            self.part.unlink(missing_ok=True)

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


def test_a_folder_that_cannot_be_looked_into_ends_no_training(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_: Any) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(record_file.RecordFile, "has_vanished", property(stale))
    with pytest.warns(UserWarning, match="the record of spikes .* was not written: .*Stale file"):
        fit(Net("vector"), ALRCCallback(**SETTINGS), saving(tmp_path), enable_checkpointing=True)


def test_the_record_survives_an_exception(fit: Fit, tmp_path: Path) -> None:
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
    def broken(*_: Any, **__: Any) -> None:
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
def test_a_resumed_run_has_the_record_of_an_uninterrupted_run(
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
    # The resumed run's file is continued, and has no spike twice.
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [NAME]
    assert read_spikes(tmp_path / NAME) == resumed.spikes


def counted_alike(spikes: list[Spike]) -> list[Spike]:
    """Spikes without steps and batches, which Lightning 2.4 miscounts after resuming."""
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
        ({"file": None, "worst": [], "run": "../x"}, "'run' must be a hexadecimal number.*x"),
        ({"file": None, "worst": [], "run": 1}, "'run' must be a hexadecimal number.*1"),
        ({"file": None, "worst": [], "empty_since": "1"}, "'empty_since' must be an int"),
        ({"file": None, "worst": [], "sample_ids": []}, "ids must be under the names of losses"),
        ({"file": None, "worst": [], "judging": []}, "'judging' must map each loss"),
        ({"file": None, "worst": [], "judging": [{}, 3]}, "'judging' must map each loss"),
        ({"file": None, "worst": [], "ledger_sample_ids": {"loss": 3}}, "the ids of a loss must"),
        ({"file": None, "worst": [], "other": 1}, "'file' and 'worst', got .*other"),
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
    alrc.on_clip = lambda seen: pytest.fail("on_clip is called")
    step = torch.compile(lambda x: alrc(x).sum(), backend="eager", fullgraph=True)
    step(torch.full((4,), 1e6, requires_grad=True))
    fit(torch.compile(net, backend="eager"), callback)
    assert callback.spikes  # the loss that a compiled step returns is clipped outside the step


def test_a_second_run_in_the_same_folder_has_its_own_record(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(num_stddev=0.5, save_batches=2)
    for run in ("", "-v1"):
        fit(Net("vector"), callback, default_root_dir=tmp_path, logger=CSVLogger(tmp_path, "", ""))
        (path,) = tmp_path.rglob(f"alrc_spikes{run}.jsonl")
        assert read_spikes(path) == callback.spikes
        assert max(spike.step for spike in callback.spikes) < 12
        assert len(callback.spikes) == len({spike.place for spike in callback.spikes})
        kept = {path.name for path in path.with_name(f"alrc_batches{run}").iterdir()}
        assert kept <= {spike.batch_file for spike in callback.spikes}


def test_a_fit_that_continues_keeps_its_record(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(**SETTINGS)
    trainer = fit(Net("vector"), callback, logger=CSVLogger(tmp_path, "", ""), max_epochs=1)
    before = callback.spikes
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, loader())
    assert set(before) & set(callback.spikes)
    assert len(list(tmp_path.rglob("alrc_spikes*.jsonl"))) == 1


class Reloading(Sum):
    """Saves and loads the callback's state as a fit starts, as Lightning's LR finder does."""

    def on_fit_start(self) -> None:
        callback = callback_of(self.trainer)
        callback.load_state_dict(callback.state_dict())


@pytest.mark.parametrize("other", [Sum, Reloading])
def test_another_module_in_the_same_trainer_has_its_own_record_batches_and_ledger(
    fit: Fit, tmp_path: Path, other: type[Sum]
) -> None:
    callback = ALRCCallback(save_batches=True, ledger=True)
    trainer = fit(
        Sum(),
        callback,
        batches=Data().train_dataloader(),
        logger=CSVLogger(tmp_path, "", ""),
        max_epochs=1,
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("alrc_*") if path.is_file()}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other(), Data().train_dataloader())
    assert {path: path.read_bytes() for path in before} == before
    (path,) = tmp_path.rglob("alrc_spikes-v1.jsonl")
    assert read_spikes(path) == callback.spikes
    assert {spike.epoch for spike in callback.spikes} == {1}
    assert len(list(tmp_path.rglob("alrc_ledger-v1.*"))) == 1
    kept = {each.name for each in path.with_name("alrc_batches-v1").iterdir()}
    assert kept == {spike.batch_file for spike in callback.spikes}
    ledger = callback.state_dict()["recording"]["ledger"]
    assert Numbers(*ledger["loss"]["table"]).finite.tolist() == [1.0] * 64


def test_a_checkpoint_of_a_training_without_alrc_begins_another_record(
    fit: Fit, tmp_path: Path
) -> None:
    arguments = {"enable_checkpointing": True, "batches": stream(20)}
    net = Losses(lambda batch: batch)
    fit(net, ModelCheckpoint(tmp_path, "without"), max_epochs=1, **arguments)
    callback = ALRCCallback()
    for more in ({"max_epochs": 1}, {"max_epochs": 2, "ckpt_path": tmp_path / "without.ckpt"}):
        fit(net, callback, ModelCheckpoint(tmp_path, "with"), **arguments, **more)
    assert {spike.epoch for spike in callback.spikes} == {1}
    assert spike_batches(tmp_path) == [{20}, {20}]


def test_nothing_of_the_data_is_kept_in_memory_after_a_fit(fit: Fit) -> None:
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


def test_clips_inside_a_compiled_step_are_warned_of_as_missing(fit: Fit) -> None:
    class Inside(WithALRC, Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.alrc(self.losses(batch), "inside").mean()

    net = Inside("vector")
    with pytest.warns(UserWarning, match="no spike is recorded of .* inside a compiled") as caught:
        trainer = fit(torch.compile(net, backend="eager"))
    assert len([each for each in caught if "no spike is recorded" in str(each.message)]) == 1
    assert callback_of(trainer).losses["inside"].clipped_total > 0


# ---- which sample a loss belongs to


class Losses(pl.LightningModule):
    """Its losses are what ``losses_of`` returns for a batch."""

    def __init__(self, losses_of: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.losses_of, self.weight = losses_of, torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.weight * self.losses_of(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class SeveralCalls(WithALRC, Losses):
    """Gives the same loss to ``self.alrc`` three times."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self.alrc(self.weight * batch, "critic") for _ in range(3))


def stream(spike_at: int, count: int = 30) -> Any:
    losses = torch.ones(count)
    losses[spike_at] = 50.0
    return torch.utils.data.DataLoader(losses, batch_size=None)  # type: ignore[arg-type]


def test_each_call_of_a_loss_in_a_batch_has_its_own_spike(fit: Fit) -> None:
    trainer = fit(SeveralCalls(Tensor), batches=stream(20), max_epochs=1)
    found = [each.call for each in callback_of(trainer).spikes if each.batch_idx == 20]
    assert sorted(found) == [0, 1, 2]


def test_spikes_of_one_batch_before_and_after_an_exception_are_both_kept(fit: Fit) -> None:
    class Breaking(Losses):
        breaks = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 25 and self.breaks:
                self.breaks = False
                raise RuntimeError("as it goes")
            return super().training_step(batch, batch_idx)

    net, callback = Breaking(lambda batch: batch), ALRCCallback()
    trainer = None

    class Keeping(pl.Callback):
        def on_fit_start(self, own: Any, *_: Any) -> None:
            nonlocal trainer
            trainer = own

    with pytest.raises(RuntimeError, match="as it goes"):
        fit(net, callback, Keeping(), batches=stream(20), max_epochs=1)
    trainer.fit(net, stream(20))  # type: ignore[attr-defined]
    steps = [each.step for each in callback.spikes if each.batch_idx == 20]
    assert sorted(steps) == [20, 45]
    assert len({each.batch_file for each in callback.spikes}) == len(callback.spikes)


def test_a_batch_that_is_trained_on_again_is_not_in_the_state(fit: Fit, tmp_path: Path) -> None:
    class Breaking(Losses):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 20:
                raise RuntimeError("out of memory")

    callback, saving = ALRCCallback(), OnExceptionCheckpoint(tmp_path, "broken")
    net = Breaking(lambda batch: batch)
    arguments = {"batches": stream(20), "max_epochs": 1, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(net, callback, saving, **arguments)
    assert [each.batch_idx for each in read_spikes(tmp_path / NAME)] == [20]
    state = torch.load(tmp_path / "broken.ckpt", weights_only=True)["callbacks"]["ALRCCallback"]
    assert state["recording"]["worst"] == []


def batches_of(sizes: Iterable[int], spike_in: int) -> list[dict[str, Any]]:
    """Batches of these sizes, with ids. One loss is far larger than all others."""
    batches, first = [], 0
    for index, size in enumerate(sizes):
        ids = [f"image {first + i}" for i in range(size)]
        batches.append({"x": torch.full((size,), 50.0 if index == spike_in else 1.0), "id": ids})
        first += size
    return batches


def four_tasks(batch: dict[str, Any]) -> Tensor:
    return batch["x"].mean() * torch.ones(4)


@pytest.mark.parametrize("sizes", [[8] * 8 + [4], [4] * 12 + [3], [8, 4, 4, 8, 4, 4, 2, 4, 4]])
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_losses_of_tasks_have_no_ids_of_samples_in_the_end(
    fit: Fit, sizes: list[int], log_every_n_steps: int
) -> None:
    batches = batches_of(sizes, len(sizes) - 2)
    data = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    net, callback = Losses(four_tasks), ALRCCallback()
    fit(net, callback, batches=data, max_epochs=1, log_every_n_steps=log_every_n_steps)
    worst = callback.spikes[:4]
    assert {each.batch_idx for each in worst} == {len(sizes) - 2}
    assert not any(isinstance(each.id, str) for each in callback.spikes)


@pytest.mark.parametrize("sizes", [[4] * 12, [8] * 8 + [4], [8, 4, 4, 8, 4, 4, 2, 4, 4]])
def test_losses_of_samples_have_their_ids_for_any_batch_sizes(fit: Fit, sizes: list[int]) -> None:
    batches = batches_of(sizes, len(sizes) - 2)
    data = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    callback = ALRCCallback()
    fit(Losses(lambda batch: batch["x"]), callback, batches=data, max_epochs=1)
    size = sizes[-2]
    assert [each.id for each in callback.spikes[:size]] == [
        batches[-2]["id"][each.sample] for each in callback.spikes[:size]
    ]


@pytest.mark.parametrize("sizes", [[[4] * 12 + [3], [4] * 13], [[4] * 13, [3] + [4] * 12]])
def test_a_resumed_run_knows_that_losses_are_not_of_samples(
    fit: Fit, tmp_path: Path, sizes: list[list[int]]
) -> None:
    """The number of ids differs from that of losses only before, or only after the checkpoint."""
    path = None
    for epoch, of_epoch in enumerate(sizes):
        data = torch.utils.data.DataLoader(batches_of(of_epoch, 11), batch_size=None)  # type: ignore[arg-type]
        callback = ALRCCallback(ledger=True)
        trainer = fit(
            Losses(four_tasks), callback, batches=data, ckpt_path=path, max_epochs=epoch + 1
        )
        path = tmp_path / f"{epoch}.ckpt"
        trainer.save_checkpoint(path)
    assert {each.epoch for each in callback.spikes} == {0, 1}
    assert {type(each.id) for each in callback.spikes} <= {list, type(None)}
    assert callback._recording is not None
    assert callback._recording.ledger is not None
    assert not callback._recording.ledger.histories


def test_ids_that_the_user_gives_are_trusted(fit: Fit) -> None:
    batches = batches_of([8] * 8 + [4], 8)
    data = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    callback = ALRCCallback(sample_ids=lambda batch: batch["id"])
    fit(Losses(four_tasks), callback, batches=data, max_epochs=1)
    assert {each.id for each in callback.spikes if each.batch_idx == 8} == set(batches[8]["id"])


def test_packed_token_ids_do_not_fill_the_record(fit: Fit) -> None:
    batches = [{"x": batch, "ids": torch.randint(50_000, (8192,))} for batch in stream(20)]
    data = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    callback = ALRCCallback()
    fit(Losses(lambda batch: batch["x"]), callback, batches=data, max_epochs=1)
    assert [each.id for each in callback.spikes] == [None]


def test_graphs_have_their_ids(fit: Fit) -> None:
    geometric = pytest.importorskip("torch_geometric")
    from torch_geometric.loader import DataLoader

    graphs = [
        geometric.data.Data(x=torch.full((3, 2), 50.0 if index == 37 else 1.0), id=f"m{index}")
        for index in range(64)
    ]

    class OfGraphs(Losses):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            of_nodes = self.weight * batch.x.mean(1)
            return torch.zeros(batch.num_graphs).index_add(0, batch.batch, of_nodes)

    callback = ALRCCallback()
    fit(OfGraphs(Tensor), callback, batches=DataLoader(graphs, 4), max_epochs=1)
    assert callback.spikes[0].id == "m37"


# ---- owners of the files


def spike_batches(folder: Path) -> list[set[int]]:
    """The batches that spiked, for each record in a folder."""
    records = sorted(folder.glob("alrc_spikes*.jsonl"))
    return [{each.batch_idx for each in read_spikes(path)} for path in records]


def kept_batches(folder: Path) -> list[set[str]]:
    """The names of the files, for each folder of batches."""
    folders = sorted(folder.glob(f"{FOLDER}*"))
    return [{path.name for path in each.iterdir()} for each in folders]


def fitted(fit: Fit, folder: Path, spike_at: int, name: str, **more: Any) -> ALRCCallback:
    """A run whose checkpoints and files are in a folder."""
    callback = ALRCCallback(save_batches=True)
    arguments = {"enable_checkpointing": True, "max_epochs": 1} | more
    saving = ModelCheckpoint(folder, name)
    fit(Losses(lambda batch: batch), callback, saving, batches=stream(spike_at), **arguments)
    return callback


def test_a_run_that_is_resumed_elsewhere_leaves_files_of_other_runs_alone(
    fit: Fit, tmp_path: Path
) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    fitted(fit, own, 20, "own")
    fitted(fit, shared, 25, "other")
    before = (shared / NAME).read_bytes()
    fitted(fit, shared, 27, "resumed", ckpt_path=own / "own.ckpt", max_epochs=2)
    assert (shared / NAME).read_bytes() == before
    assert spike_batches(shared) == [{20, 27}, {25}]  # alrc_spikes-v1.jsonl comes first
    assert kept_batches(shared) == [
        {"epoch=0-batch=25-step=25-rank=0.pt"},
        {"epoch=1-batch=27-step=57-rank=0.pt"},
    ]


def test_a_run_that_is_resumed_twice_has_two_records(fit: Fit, tmp_path: Path) -> None:
    fitted(fit, tmp_path, 20, "first")
    for spike_at in (21, 22):
        more = {"ckpt_path": tmp_path / "first.ckpt", "max_epochs": 2}
        fitted(fit, tmp_path, spike_at, f"second{spike_at}", **more)
    assert spike_batches(tmp_path) == [{20, 22}, {20, 21}]
    first, second = kept_batches(tmp_path)
    assert first == {f"epoch={e}-batch={20 + e}-step={20 + 31 * e}-rank=0.pt" for e in (0, 1)}
    assert second == {"epoch=1-batch=22-step=52-rank=0.pt"}


def test_a_run_keeps_its_record_after_a_search_for_a_learning_rate(
    fit: Fit, tmp_path: Path
) -> None:
    fitted(fit, tmp_path, 20, "first")

    class Searching(Losses):
        """Lightning's search saves all state before it trains, and loads the state afterwards."""

        def on_fit_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "search.ckpt")
            content = torch.load(tmp_path / "search.ckpt", weights_only=True)
            callback_of(self.trainer).load_state_dict(content["callbacks"]["ALRCCallback"])

    arguments = {"enable_checkpointing": True, "ckpt_path": tmp_path / "first.ckpt"}
    callback, saving = ALRCCallback(save_batches=True), ModelCheckpoint(tmp_path, "second")
    net = Searching(lambda batch: batch)
    fit(net, callback, saving, batches=stream(21), max_epochs=2, **arguments)
    assert spike_batches(tmp_path) == [{20, 21}]


def test_a_resumed_run_removes_earlier_batches_that_are_no_longer_the_worst(
    fit: Fit, tmp_path: Path
) -> None:
    data = stream(20)
    data.dataset[25] = 60.0
    for epochs, name in ((1, "first"), (2, "second")):
        callback = ALRCCallback(save_batches=1)
        fit(
            Losses(lambda batch: batch),
            callback,
            ModelCheckpoint(tmp_path, name),
            batches=data,
            max_epochs=epochs,
            enable_checkpointing=True,
            ckpt_path=tmp_path / "first.ckpt" if epochs == 2 else None,
        )
        assert kept_batches(tmp_path) == [{callback.spikes[0].batch_file}]
        data.dataset[25] = 500.0  # worse in the second epoch
    assert callback.spikes[0].epoch == 1


def test_a_checkpoint_of_an_earlier_release_loads_and_goes_on(fit: Fit, tmp_path: Path) -> None:
    fitted(fit, tmp_path, 20, "it")
    content = torch.load(tmp_path / "it.ckpt", weights_only=True)
    recording = content["callbacks"]["ALRCCallback"]["recording"]
    old = {
        "file": recording["file"],
        "worst": [{k: v for k, v in row.items() if k != "call"} for row in recording["worst"]],
    }
    content["callbacks"]["ALRCCallback"]["recording"] = old
    torch.save(content, tmp_path / "old.ckpt")
    before = (tmp_path / NAME).read_bytes()
    callback = fitted(fit, tmp_path, 21, "new", ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    assert {each.batch_idx for each in callback.spikes} == {20, 21}
    assert (tmp_path / NAME).read_bytes() == before  # the file may belong to another run
    assert {20, 21} in spike_batches(tmp_path)


def test_an_old_record_is_not_taken_for_the_record_of_a_new_run(fit: Fit, tmp_path: Path) -> None:
    from lightning_alrc._spikes.places import record_files

    for spike_at in (20, None):
        logger = CSVLogger(tmp_path, version=0)
        data = stream(20) if spike_at else torch.utils.data.DataLoader([torch.ones(())] * 30, None)  # type: ignore[arg-type, list-item]
        fit(Losses(lambda batch: batch), ALRCCallback(), batches=data, logger=logger, max_epochs=1)
    old, new = record_files(Path(logger.log_dir))
    assert len(read_spikes(old)) == 1
    assert read_spikes(new) == []


def test_two_runs_at_once_in_one_folder_each_keep_their_files(tmp_path: Path) -> None:
    join(*[forked(sharing.main, tmp_path, spike_at) for spike_at in (20, 25)])
    assert sorted(map(sorted, spike_batches(tmp_path))) == [[20], [25]]
    assert sorted(map(len, kept_batches(tmp_path))) == [3, 3]
    for folder in tmp_path.glob(f"{FOLDER}*"):
        record = tmp_path / f"{folder.name.replace('batches', 'spikes')}.jsonl"
        (run,) = {json.loads(line)["run"] for line in record.read_text().splitlines()}
        files = [torch.load(path, weights_only=True) for path in folder.iterdir()]
        assert {content["run"] for content in files} == {run}
        assert {path.name for path in folder.iterdir()} == {
            each.batch_file for each in read_spikes(record)
        }
    assert not list(tmp_path.rglob(".*"))


def test_a_record_that_is_removed_is_written_with_the_ledger(fit: Fit, tmp_path: Path) -> None:
    class Clearing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 12:
                assert read_spikes(tmp_path / NAME)
                (tmp_path / NAME).unlink()

        def on_train_end(self, *_: Any) -> None:
            written.extend(read_spikes(tmp_path / NAME))

    written: list[Spike] = []
    batches = batches_of([4] * 13, 11)
    data = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    callback = ALRCCallback(ledger=True)
    fit(
        Losses(lambda batch: batch["x"]),
        Clearing(),
        callback,
        ModelCheckpoint(tmp_path),
        batches=data,
        max_epochs=1,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert {each.batch_idx for each in written} == {11}
    assert read_spikes(tmp_path / NAME) == callback.spikes


def test_files_that_others_remove_are_written_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "WRITTEN_EVERY", 0.0)

    class Clearing(pl.Callback):
        """Removes other files from the folder of checkpoints, as a logger may do."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (22, 29):
                for path in [*tmp_path.glob(f"{FOLDER}/*"), *tmp_path.glob("*.jsonl")]:
                    path.unlink()
                (tmp_path / FOLDER).rmdir()

    losses = torch.ones(30)
    losses[[20, 25]] = 50.0
    data = torch.utils.data.DataLoader(losses, batch_size=None)  # type: ignore[arg-type]
    callback = ALRCCallback(save_batches=True)
    fit(
        Losses(lambda batch: batch),
        callback,
        Clearing(),
        ModelCheckpoint(tmp_path),
        batches=data,
        max_epochs=1,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert spike_batches(tmp_path) == [{20, 25}]
    assert not (tmp_path / FOLDER).exists()  # nothing spiked after the second removal
