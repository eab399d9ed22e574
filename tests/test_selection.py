"""A dataset without the samples that a record or a ledger names."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_alrc import ALRCCallback, read_ledger, without_spikes
from lightning_alrc.spikes import read_spikes
from tests.nets import ResumableLoader
from tests.spikes import spike

Fit = Callable[..., Any]

SPIKES = [spike(sample=1, id=each, step=at) for at, each in enumerate([7, 42, 7, 3])]


def left_out(some: Subset[Any], length: int = 100) -> list[int]:
    """The indices that a subset leaves out."""
    return sorted(set(range(length)) - set(some.indices))


def test_the_samples_of_a_record_are_left_out_and_printed(capsys: Any) -> None:
    dataset = list(range(100))
    assert left_out(without_spikes(dataset, SPIKES)) == [3, 7, 42]
    printed = capsys.readouterr().out
    assert printed == "without_spikes leaves out 3 of 100 samples: 7, 42, 3\n"
    assert left_out(without_spikes(dataset, SPIKES, worst=2)) == [7, 42]
    assert left_out(without_spikes(dataset, range(50))) == list(range(50))
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 40 more\n" in capsys.readouterr().out


def test_only_spikes_of_the_named_loss_are_left_out(capsys: Any) -> None:
    spikes = [*SPIKES, spike(name="other", id=9)]
    assert left_out(without_spikes(range(100), spikes, name="other")) == [9]
    with pytest.raises(ValueError, match=r"name must be .* \['loss', 'other'\], got 'othr'"):
        without_spikes(range(100), spikes, name="othr")
    whole = [spike(sample=None, id=[1, 2]), spike(sample=None, id=None)]
    assert left_out(without_spikes(range(100), [*whole, *SPIKES])) == [3, 7, 42]
    with pytest.raises(ValueError, match=r"source must have spikes of single samples .* got 2"):
        without_spikes(range(100), whole)


@pytest.mark.parametrize("ids", ["list", "tensor", "function"])
def test_samples_are_found_by_the_ids_of_the_dataset(ids: str, capsys: Any) -> None:
    numbers = torch.arange(100) + 5
    known: Any = {
        "list": [str(each) for each in numbers.tolist()],
        "tensor": numbers,
        "function": lambda index: index + 5,
    }
    assert left_out(without_spikes(range(100), SPIKES, ids=known[ids])) == [2, 37]
    assert capsys.readouterr().out.endswith("samples: 7, 42; 1 more are not in it\n")


def test_the_ids_of_a_subset_are_the_indices_of_the_whole_dataset(capsys: Any) -> None:
    some = Subset(Subset(range(200, 300), torch.arange(99, 49, -1)), range(10, 30))
    rest = without_spikes(some, [7, 71, 61])
    assert sorted(set(some) - set(rest)) == [271]
    assert capsys.readouterr().out.endswith("1 of 20 samples: 71; 2 more are not in it\n")
    assert len(without_spikes(some, [5], ids=range(20))) == 19
    for unknown in ("71", 100):  # a name of digits is no index
        with pytest.raises(ValueError, match=r"ids must say .* from 0 to 99, got None"):
            without_spikes(some, [unknown])


def test_all_samples_with_the_same_id_are_left_out(capsys: Any) -> None:
    assert left_out(without_spikes(range(4), ["a"], ids=["a", "b", "a", "c"]), 4) == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": 3}, TypeError, "source must be a path, a ledger or a list, got 3"),
        ({"source": ["a"]}, ValueError, "ids must say which samples .* from 0 to 99, got None"),
        ({"source": [100]}, ValueError, "ids must say .* got None for 100"),
        ({"source": [1], "ids": [1, 2]}, ValueError, "ids must have one .* 100 samples, got 2"),
        ({"source": ["x"], "ids": list("y" * 100)}, ValueError, "ids must be those .* like 'x'"),
        ({"source": [1], "worst": -1}, ValueError, "worst must be a whole number, 0 or above"),
    ],
)
def test_wrong_arguments_raise(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        without_spikes(range(100), **arguments)


# ---- in trainings


class Numbers(pl.LightningModule):
    """Takes each sample as its own loss, and keeps the ids that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, ids = batch
        self.seen += ids.tolist()
        return self.weight * loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def numbers() -> TensorDataset:
    losses = 1.0 + torch.arange(40) / 40
    losses[[17, 31]] = 50.0
    return TensorDataset(losses, torch.arange(40))


@pytest.mark.parametrize("source", ["record", "ledger"])
def test_a_training_without_the_samples_that_spiked_resumes(
    fit: Fit, tmp_path: Path, source: str, capsys: Any
) -> None:
    if source == "ledger":
        pytest.importorskip("pandas")
    logger = CSVLogger(tmp_path, version=0)
    callback = ALRCCallback(ledger=True, sample_ids=lambda batch: batch[1])
    fit(Numbers(), callback, batches=DataLoader(numbers(), 4), max_epochs=1, logger=logger)
    folder = Path(logger.log_dir)
    assert {each.id for each in read_spikes(folder / "alrc_spikes.jsonl")} == {17, 31}
    path = next(folder.glob(f"alrc_{ {'record': 'spikes', 'ledger': 'ledger'}[source] }*"))
    if source == "ledger":
        assert set(read_ledger(path).nlargest(2, "mean")["id"]) == {17, 31}

    def again(name: str, ckpt_path: Path | None = None, **arguments: Any) -> Numbers:
        rest = without_spikes(numbers(), path, worst=2)
        assert "leaves out 2 of 40 samples" in capsys.readouterr().out
        net = Numbers()
        checkpoint = ModelCheckpoint(
            tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1
        )
        arguments = {"max_epochs": 2, "enable_checkpointing": True} | arguments
        batches = ResumableLoader()
        batches.batches = list(DataLoader(rest, 4))
        fit(net, ALRCCallback(), checkpoint, batches=batches, ckpt_path=ckpt_path, **arguments)
        return net

    whole = again("whole")
    again("part", max_steps=13)
    resumed = again("resumed", tmp_path / "part" / "step=13.ckpt")
    assert not {17, 31} & set(whole.seen)
    assert whole.seen[-len(resumed.seen) :] == resumed.seen
    assert whole.weight == resumed.weight
    assert 0 < len(resumed.seen) < len(whole.seen)


def test_a_folder_of_logs_may_have_ledger_in_its_name(fit: Fit, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="no-ledger")
    callback = ALRCCallback(sample_ids=lambda batch: batch[1])
    fit(Numbers(), callback, batches=DataLoader(numbers(), 4), max_epochs=1, logger=logger)
    assert left_out(without_spikes(numbers(), logger.log_dir), 40) == [17, 31]


def test_a_ledger_needs_a_number_of_worst_samples_and_a_column(capsys: Any) -> None:
    pandas = pytest.importorskip("pandas")
    nan = float("nan")
    ledger = pandas.DataFrame(
        {"id": [0, 1, 2, 3], "mean": [1.0, 3.0, 2.0, nan], "clipped": [2, 0, 2, 0]}
    )
    assert left_out(without_spikes(range(4), ledger, worst=2), 4) == [1, 3]
    assert left_out(without_spikes(range(4), ledger, worst=1, by="clipped"), 4) == [2]
    with pytest.raises(ValueError, match="worst must say how many samples a ledger names, got Non"):
        without_spikes(range(4), ledger)
    with pytest.raises(ValueError, match=r"by must be one of .*\['mean', 'clipped'\], got 'size'"):
        without_spikes(range(4), ledger, worst=1, by="size")


def test_a_file_name_that_is_not_utf_8_is_found_as_the_ledger_writes_it(capsys: Any) -> None:
    pandas = pytest.importorskip("pandas")
    names = [os.fsdecode(b"caf\xe9.jpg"), "a.jpg", "b.jpg"]
    ledger = pandas.DataFrame({"id": ["caf\\udce9.jpg", "a.jpg"], "mean": [9.0, 1.0]})
    for source in (ledger, [spike(id=names[0])]):
        rest = without_spikes(range(3), source, worst=1, by="mean", ids=names)
        assert left_out(rest, 3) == [0]
    assert capsys.readouterr().out.count("3 samples: caf\\udce9.jpg\n") == 2


def test_ids_that_the_output_cannot_encode_are_printed_with_escapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # as on Windows, in a file
    monkeypatch.setattr(sys, "stdout", output)
    without_spikes(list(range(3)), ["猫.jpg", "é"], ids=["猫.jpg", "é", "c"])
    assert "samples: \\u732b.jpg, é" in output.buffer.getvalue().decode("cp1252")
