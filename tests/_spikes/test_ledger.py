"""Every sample's history: entered by step, merged over ranks, saved and resumed."""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_alrc import ALRCCallback, read_ledger
from lightning_alrc._moments.state import Moments
from lightning_alrc._spikes.ledger import (
    ADD_AFTER,
    History,
    Ledger,
    _to_device,
    checked_histories,
)
from lightning_alrc._spikes.ledger_file import SUFFIXES, read_rows, write_ledger
from tests.nets import ResumableLoader
from tests.scripts import ledgers
from tests.scripts.launching import forked, join

pytest.importorskip("pandas")

Fit = Callable[..., Any]
KNOWN: Moments = (1.0, 4.0, 20.0)


class Samples(Dataset[dict[str, Any]]):
    """64 samples with losses that grow by epoch. Two losses spike. With ``has_nan``, one is NaN.

    Args:
        ids: "numbers" or "strings".
    """

    def __init__(self, ids: str, has_nan: bool = False) -> None:
        self.ids, self.has_nan = ids, has_nan
        self.given: dict[Any, list[float]] = {}

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = index if self.ids == "numbers" else f"sample {index}"
        seen = self.given.setdefault(key, [])
        loss = (100.0 if index in (37, 50) else 1.0) + index / 64 + len(seen) / 8
        seen.append(float("nan") if self.has_nan and index == 3 else loss)
        return {"loss": torch.tensor(seen[-1]), "id": key}


class Given(pl.LightningModule):
    """Its losses are the values of its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return batch["loss"] + 0.0 * self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def loader(data: Samples, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size, shuffle=True, generator=generator)


def check(ledger: Any, given: dict[Any, list[float]]) -> None:
    """Assert that a ledger has the statistics that NumPy computes from the losses."""
    assert sorted(ledger["id"]) == sorted(given)
    for row in ledger.itertuples():
        losses = np.array(given[row.id])
        finite = losses[np.isfinite(losses)]
        assert (row.count, row.nonfinite) == (len(losses), len(losses) - len(finite))
        if len(finite):
            assert row.mean == pytest.approx(finite.mean(), rel=1e-6)
            assert (row.last, row.largest) == pytest.approx((finite[-1], finite.max()), rel=1e-6)
            assert row.variance == pytest.approx(finite.var(), rel=1e-4, abs=1e-9)
        else:
            assert np.isnan([row.mean, row.last, row.largest, row.variance, row.stddevs]).all()


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("ids", ["numbers", "strings"])
def test_every_samples_history_is_in_the_file(fit: Fit, tmp_path: Path, ids: str) -> None:
    data, logger = Samples(ids, has_nan=True), CSVLogger(tmp_path)
    callback = ALRCCallback(ledger=True, record=1000)
    fit(Given(), callback, batches=loader(data), max_epochs=3, logger=logger)
    ledger = read_ledger(logger.log_dir)
    check(ledger, data.given)
    clipped = ledger.set_index("id")["clipped"]
    spiked = [spike.id for spike in callback.spikes]
    assert {key: spiked.count(key) for key in clipped.index} == clipped.to_dict()
    assert set(clipped[clipped > 0].index) >= {37, 50} or ids == "strings"
    worst = ledger.nlargest(2, "stddevs")["id"]
    assert {int(str(each).split()[-1]) for each in worst} == {37, 50}


def test_each_named_loss_has_its_own_history(fit: Fit, tmp_path: Path) -> None:
    class Two(Given):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            clip = self.trainer.callbacks[0].clip  # type: ignore[attr-defined]
            return clip(loss, "one").mean() + clip(2.0 * loss, "two").mean()

    data, logger = Samples("numbers"), CSVLogger(tmp_path)
    fit(Two(), ALRCCallback(ledger=True), batches=loader(data), max_epochs=1, logger=logger)
    with pytest.raises(ValueError, match=r"name must be one of .*\['one', 'two'\], got None"):
        read_ledger(logger.log_dir)
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'three'"):
        read_ledger(logger.log_dir, "three")
    one, two = (read_ledger(logger.log_dir, name) for name in ("one", "two"))
    check(one, data.given)
    assert (two["mean"] == 2 * one["mean"]).all()


@pytest.mark.parametrize("losses", [torch.tensor(2.0), torch.ones(3)], ids=["one", "three"])
def test_losses_are_not_entered_unless_each_id_has_one_loss(losses: Tensor) -> None:
    ledger = Ledger()
    ledger.start(10)
    ledger.observe("loss", {"id": torch.arange(4)}, losses, losses, KNOWN)
    ledger.finish_batch()
    ledger.enter([ledger.take_unshared()])
    assert not ledger.histories


def entries(ledger: Ledger, name: str = "loss") -> list[tuple[Any, ...]]:
    ledger.enter([ledger.take_unshared()])
    ids, numbers = ledger.histories[name].in_order()
    return list(zip(ids, *torch.stack(numbers).tolist(), strict=True))


def test_a_row_of_losses_counts_as_its_mean_and_a_single_loss_as_its_value() -> None:
    ledger = Ledger()
    ledger.start(10)
    losses = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    ledger.observe("loss", {"id": torch.tensor([3, 4])}, losses, losses.clamp(max=6.0), KNOWN)
    ledger.observe("one", {"id": ["a"]}, torch.tensor(9.0), torch.tensor(9.0), KNOWN)
    ledger.finish_batch()
    expected = [(3, 1, 2.0, 0.0, 2.0, 2.0, 0.5, 0, 0), (4, 1, 6.0, 0.0, 6.0, 6.0, 2.5, 1, 0)]
    assert entries(ledger) == [pytest.approx(each, rel=1e-6) for each in expected]
    assert [each[:3] for each in entries(ledger, "one")] == [("a", 1, 9.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 256), (2, 16, 16)], ids=str)
def test_each_clip_in_a_row_counts_and_means_are_not_rounded_to_16_bits(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    ledger = Ledger()
    ledger.start(10)
    generator = torch.Generator().manual_seed(0)
    losses = (3.0 + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    clipped = losses.clone()
    clipped[1].view(-1)[7].copy_(
        torch.nextafter(losses[1].view(-1)[7], torch.zeros((), dtype=dtype))
    )
    for before in (losses, losses.mT if len(shape) == 3 else losses):  # or not contiguous
        after = clipped if before is losses else clipped.mT
        ledger.observe("loss", {"id": torch.tensor([3, 4])}, before, after, KNOWN)
    ledger.finish_batch()
    means = losses.double().flatten(1).mean(1).tolist()
    for entry, mean, clips in zip(entries(ledger), means, (0, 2), strict=True):
        assert entry[1:4:2] == (2, pytest.approx(0.0, abs=1e-9))
        assert entry[2] == pytest.approx(mean, rel=1e-6)
        assert entry[7:] == (clips, 0)


def test_rows_without_losses_are_not_entered() -> None:
    ledger, empty = Ledger(), torch.zeros(2, 0)
    ledger.start(10)
    ledger.observe("loss", {"id": torch.tensor([3, 4])}, empty, empty, KNOWN)
    ledger.finish_batch()
    assert ledger.take_unshared()["news"] == {}


def test_the_first_losses_add_no_standard_deviations() -> None:
    ledger, losses = Ledger(), torch.tensor([5.0])
    ledger.start(10)
    for seen, moments in enumerate([(0.0, 0.0, 0.0), (1.0, 4.0, 9.0), KNOWN]):
        ledger.observe("loss", {"id": torch.tensor([seen])}, losses, losses, moments)
        ledger.finish_batch()
    assert [each[6] for each in entries(ledger)] == pytest.approx([0.0, 0.0, 2.0])


def test_a_sample_may_come_twice_in_a_batch_and_later_changes_of_losses_are_not_seen() -> None:
    ledger, losses = Ledger(), torch.tensor([1.0, 2.0, 3.0])
    ledger.start(10)
    for _ in range(100):  # some losses are flushed before the end
        losses.copy_(torch.tensor([1.0, 2.0, 3.0]))
        ledger.observe("loss", {"id": torch.tensor([7, 7, 2])}, losses, losses, KNOWN)
        losses.zero_()
        ledger.finish_batch()
    assert [each[:5] for each in entries(ledger)] == [
        (2, 100, 3.0, 0.0, 3.0),
        (7, 200, 1.5, pytest.approx(50.0), 2.0),
    ]


def test_ids_that_turn_out_not_to_belong_to_losses_are_forgotten() -> None:
    ledger = Ledger()
    ledger.start(10)
    four = torch.ones(4)
    ledger.observe("loss", {"id": torch.arange(4)}, four, four, KNOWN)
    ledger.finish_batch()
    assert len(entries(ledger)) == 4
    ledger.observe("loss", {"id": torch.arange(3)}, four, four, KNOWN)
    ledger.finish_batch()
    other = Ledger()  # of a rank where the numbers of ids and losses always agreed
    other.start(10)
    other.observe("loss", {"id": torch.arange(4)}, four, four, KNOWN)
    other.finish_batch()
    told = [ledger.take_unshared(), other.take_unshared()]
    for each in (ledger, other):
        each.enter(told)
        assert not each.histories
        assert each.dump_sample_ids() == {"loss": {"agreeing": [], "used": None}}


def test_ids_beyond_the_size_are_counted_and_warned_of(fit: Fit, tmp_path: Path) -> None:
    data, logger = Samples("numbers"), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="14 losses are not in the ledger.*below 50.*ledger=SIZE"):
        fit(Given(), ALRCCallback(ledger=50), batches=loader(data), max_epochs=1, logger=logger)
    assert set(read_ledger(logger.log_dir)["id"]) == set(range(50))


def test_strings_beyond_the_size_are_counted() -> None:
    ledger, two = Ledger(3), torch.ones(2)
    for ids in (["a", "b"], ["c", "d"], ["a", "d"]):
        ledger.observe("loss", {"id": ids}, two, two, KNOWN)
        ledger.finish_batch()
    assert [each[:2] for each in entries(ledger)] == [("a", 2), ("b", 1), ("c", 1)]
    assert ledger.outside == 2


def test_a_subset_has_the_ids_of_the_whole_dataset(fit: Fit, tmp_path: Path) -> None:
    data, logger = Samples("numbers"), CSVLogger(tmp_path)
    some = torch.utils.data.Subset(data, [3, 37, 60, 63])
    fit(Given(), ALRCCallback(ledger=True), batches=DataLoader(some, 2), logger=logger)
    check(read_ledger(logger.log_dir), data.given)


def test_numbers_that_go_to_the_cpu_are_waited_for() -> None:
    class Noting(Tensor):
        waits: list[bool]

        def to(self, *arguments: Any, non_blocking: bool = False, **options: Any) -> Tensor:
            self.waits.append(not non_blocking)
            return super().to(*arguments, **options)

    numbers = torch.ones(2).as_subclass(Noting)
    numbers.waits = []
    for device in ("cpu", "meta"):
        _to_device(numbers, torch.device(device), torch.float64)
    assert numbers.waits == [True, False]


def test_losses_of_one_name_may_come_from_devices_with_and_without_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widest = iter([torch.float32, torch.float64, torch.float32])
    monkeypatch.setattr("lightning_alrc._spikes.ledger.widest_dtype", lambda device: next(widest))
    ledger, losses = Ledger(10), torch.ones(1)
    for _ in range(3 * ADD_AFTER):
        ledger.observe("loss", {"id": torch.tensor([7])}, losses, losses, KNOWN)
        ledger.finish_batch()
    assert [each[:3] for each in entries(ledger)] == [(7, 3 * ADD_AFTER, 1.0)]


@pytest.mark.usefixtures("quick_path")
@pytest.mark.parametrize("ids", ["numbers", "strings"])
def test_a_ledger_is_on_the_host_whatever_the_default_device(
    fit: Fit, tmp_path: Path, ids: str
) -> None:
    data, logger, batches, net = Samples(ids), CSVLogger(tmp_path), ResumableLoader(), Given()
    batches.batches = list(loader(data))
    with torch.device("meta"):
        trainer = fit(net, ALRCCallback(ledger=64), batches=batches, logger=logger)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    check(read_ledger(logger.log_dir), {key: each * 2 for key, each in data.given.items()})


def test_the_ledger_keeps_no_batch_in_memory() -> None:
    ledger = Ledger()
    ledger.start(100)
    batch = torch.arange(100_000)
    alive, losses = weakref.ref(batch), torch.ones(2)
    ledger.observe("loss", {"id": batch[:2]}, losses, losses, KNOWN)
    del batch
    assert alive() is None


# ---- saved and resumed


class Resumable(ResumableLoader):
    """Batches of 4 of 24 samples, with ids that are strings."""

    def __init__(self) -> None:
        super().__init__()
        losses = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 1.0
        losses[::7] *= 20.0
        names = [f"sample {index}" for index in range(24)]
        self.batches = [
            {"loss": losses[at : at + 4], "id": names[at : at + 4]} for at in range(0, 24, 4)
        ]


@pytest.mark.parametrize("step", [3, 6, 10])
def test_a_resumed_run_has_the_same_ledger(fit: Fit, tmp_path: Path, step: int) -> None:
    def run(name: str, ckpt_path: Path | None = None, **arguments: Any) -> Any:
        checkpoint = ModelCheckpoint(
            tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1
        )
        callbacks = ALRCCallback(ledger=True), checkpoint
        logger = CSVLogger(tmp_path, name, version=0)
        arguments = {"logger": logger, "enable_checkpointing": True, "max_epochs": 3} | arguments
        fit(Given(), *callbacks, batches=Resumable(), ckpt_path=ckpt_path, **arguments)
        return read_ledger(logger.log_dir)

    whole = run("whole")
    run("part", max_steps=step)
    path = tmp_path / "part" / f"step={step}.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["ALRCCallback"]["recording"]
    assert checked_histories(state["ledger"]).keys() == {"loss"}
    resumed = run("resumed", path)
    assert whole.equals(resumed)


def test_a_checkpoint_within_a_batch_leaves_the_batch_out(fit: Fit, tmp_path: Path) -> None:
    class Saving(Given):
        def on_before_optimizer_step(self, *_: Any) -> None:
            if self.trainer.global_step == 4:
                self.trainer.save_checkpoint(tmp_path / "in.ckpt")

    fit(Saving(), ALRCCallback(ledger=True), batches=Resumable(), max_epochs=1)
    state = torch.load(tmp_path / "in.ckpt", weights_only=True)["callbacks"]["ALRCCallback"]
    (history,) = checked_histories(state["recording"]["ledger"]).values()
    assert history.ids == [f"sample {index}" for index in range(16)]


def test_a_batch_that_has_ended_is_in_a_checkpoint_of_an_earlier_callback(
    fit: Fit, tmp_path: Path
) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step={trainer.global_step}.ckpt")

    fit(Given(), Saving(), ALRCCallback(ledger=True), batches=Resumable(), max_epochs=1)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]["ALRCCallback"]
    (history,) = checked_histories(state["recording"]["ledger"]).values()
    assert history.ids == [f"sample {index}" for index in range(16)]


@pytest.mark.parametrize(("hook", "count"), [("backward", 16), ("on_train_batch_end", 20)])
def test_after_an_exception_the_file_has_the_batches_that_have_ended(
    fit: Fit, tmp_path: Path, hook: str, count: int
) -> None:
    class Breaking(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            self._break("backward", 4)

        def on_train_batch_end(self, *_: Any) -> None:
            self._break("on_train_batch_end", 5)

        def _break(self, name: str, step: int) -> None:
            if name == hook and trainer.global_step == step:
                raise RuntimeError("as it goes")

        def on_fit_start(self, own: pl.Trainer, *_: Any) -> None:
            nonlocal trainer
            trainer = own

    trainer: Any = None
    logger = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="as it goes"):
        fit(Given(), Breaking(), ALRCCallback(ledger=True), batches=Resumable(), logger=logger)
    assert set(read_ledger(logger.log_dir)["id"]) == {f"sample {i}" for i in range(count)}


def test_another_fit_from_the_start_has_a_ledger_of_its_own(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(ledger=True)
    for version in range(2):
        data, logger = Samples("numbers"), CSVLogger(tmp_path, version=version)
        fit(Given(), callback, batches=loader(data), max_epochs=1, logger=logger)
        check(read_ledger(logger.log_dir), data.given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [], "a ledger must have the names of losses, got"),
        (lambda state: {"a b": state["loss"]}, "a ledger must have the names of losses, got"),
        (lambda state: {"loss": 3}, "a history must have 'ids' and 'table', got 3"),
        (lambda state: {"loss": state["loss"] | {"ids": [1, [2]]}}, "'ids' must be strings or"),
        (lambda state: {"loss": state["loss"] | {"ids": [1, 1]}}, "'ids' must differ"),
        (
            lambda state: {"loss": state["loss"] | {"ids": [1]}},
            r"must be float64 of shape \(8, 1\)",
        ),
    ],
)
def test_an_invalid_state_is_refused(change: Any, message: str) -> None:
    ledger, two = Ledger(3), torch.ones(2)
    ledger.observe("loss", {"id": ["a", "b"]}, two, two, KNOWN)
    ledger.finish_batch()
    ledger.enter([ledger.take_unshared()])
    assert checked_histories(ledger.state_dict())["loss"].ids == ["a", "b"]
    with pytest.raises(ValueError, match=message):
        checked_histories(change(ledger.state_dict()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ledger": -1}, ValueError, "ledger must be True, False or a whole number, .* got -1"),
        ({"ledger": "a"}, TypeError, "ledger must be True, False or a whole number, .* got 'a'"),
        ({"ledger": True, "record": 0}, ValueError, "ledger must be False where record is 0"),
    ],
)
def test_wrong_arguments_raise(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ALRCCallback(**arguments)


@pytest.mark.parametrize("loss", ["a number", "a vector without ids"])
def test_an_empty_ledger_is_warned_of_once(fit: Fit, loss: str) -> None:
    class Without(Given):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = super().training_step(batch, batch_idx)
            return losses.mean() if loss == "a number" else losses

    callback = ALRCCallback(ledger=True, sample_ids=lambda batch: batch["id"])
    if loss != "a number":
        callback = ALRCCallback(ledger=True, sample_ids=lambda batch: None)
    with pytest.warns(UserWarning, match="the ledger is empty") as warned:
        fit(Without(), callback, batches=loader(Samples("numbers")), max_epochs=2)
    told = [str(each.message) for each in warned if "the ledger is empty" in str(each.message)]
    assert len(told) == 1
    assert "returned as a vector" in told[0]


# ---- files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("ids", "read"),
    [
        ([1, -(2**63)], [-(2**63), 1]),
        ([1, 2**63], ["1", "9223372036854775808"]),
        (["a", os.fsdecode(b"caf\xe9.jpg")], ["a", "caf\\udce9.jpg"]),
    ],
    ids=["64 bits", "more bits", "not UTF-8"],
)
def test_ids_of_any_kind_are_written(
    tmp_path: Path, suffix: str, ids: list[Any], read: list[Any]
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    history = History()
    history.enter(ids, torch.ones(8, 2, dtype=torch.float64))
    write_ledger(tmp_path / f"it{suffix}", {"loss": history})
    assert read_rows(tmp_path / f"it{suffix}")["id"].tolist() == read


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_rows_of_a_file_are_in_order(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    one, two = History(), History()
    numbers = [[2, 0, 3], [3, 0, -1], [8, 0, 3], [4, 0, 1], [5, 0, 2], [1, 0, 6]]
    counts = [[1, 0, 0], [0, 2, 1]]
    one.enter(["b", 9, -4], torch.tensor(numbers + counts, dtype=torch.float64))
    two.enter([7], torch.ones(8, 1, dtype=torch.float64))
    write_ledger(tmp_path / f"it{suffix}", {"one": one, "two": two})
    rows = read_rows(tmp_path / f"it{suffix}").to_numpy().tolist()
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert rows == [
        ["one", "-4", 4, -1.0, 1.0, 2.0, 1.0, 2.0, 0, 1],
        ["one", "9", 2, nan, nan, nan, nan, nan, 0, 2],
        ["one", "b", 2, 3.0, 4.0, 5.0, 4.0, 0.5, 1, 0],
        ["two", "7", 2, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1],
    ]


def test_a_ledger_that_cannot_be_written_hides_no_exception(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Given):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.current_epoch == 1 and batch_idx == 3:
                raise RuntimeError("as it goes")
            return super().training_step(batch, batch_idx)

    (tmp_path / "pyarrow.py").write_text("raise ImportError('libarrow.so: cannot open')")
    for name in [each for each in sys.modules if each.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    logger = CSVLogger(tmp_path)
    with (
        pytest.warns(UserWarning, match="the ledger in .* was not written: libarrow") as warned,
        pytest.raises(RuntimeError, match="as it goes"),
    ):
        fit(Broken(), ALRCCallback(ledger=True), batches=loader(Samples("strings")), logger=logger)
    assert sum("was not written" in str(each.message) for each in warned) == 1


# ---- several processes


def test_ranks_merge_their_ledgers(tmp_path: Path) -> None:
    """Ranks merge after an epoch, and for a checkpoint in the middle of the next epoch."""
    join(forked(ledgers.main, "ranks", tmp_path))
    given = json.loads((tmp_path / "given.json").read_text())
    for name in ("after 1 epoch", "in the second"):
        (history,) = checked_histories(torch.load(tmp_path / f"{name}.pt")).values()
        assert sorted(history.ids) == list(range(20))
        ids, numbers = history.in_order()
        losses = [np.array(given[name][str(each)]) for each in ids]
        sums = [len(each) * each.var() for each in losses]
        assert numbers.finite.tolist() == list(map(len, losses))
        assert numbers.mean.tolist() == pytest.approx([each.mean() for each in losses], rel=1e-6)
        assert numbers.squared_deviation.tolist() == pytest.approx(sums, rel=1e-4, abs=1e-9)
        assert numbers.largest.tolist() == pytest.approx([each.max() for each in losses], rel=1e-6)
    check(
        read_ledger(tmp_path / "logs" / "version_0"), {int(k): v for k, v in given["all"].items()}
    )


def test_a_run_that_is_killed_leaves_a_whole_ledger(tmp_path: Path) -> None:
    process = forked(ledgers.main, "endless", tmp_path)
    folder = tmp_path / "logs" / "version_0"
    while not list(folder.glob("alrc_ledger*.[cp][sa][vr]*")):
        assert process.is_alive()
        time.sleep(0.02)
    sizes = set()
    for _ in range(50):  # while the run writes the ledger again and again
        sizes.add(len(read_ledger(folder)))
    process.kill()
    process.join()
    sizes.add(len(read_ledger(folder)))
    assert sizes == {2000}
