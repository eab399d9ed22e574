"""The record of spikes is written and found beside the logs, outside the folders of other tools."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_alrc import ALRCCallback, plot, read_ledger, read_spikes
from lightning_alrc._spikes.places import LEDGERS, record_files
from lightning_alrc._spikes.record_file import write_spikes
from tests.nets import SETTINGS, Net
from tests.spikes import NAME, spike

Fit = Callable[..., Any]


class SavingIn(DummyLogger):
    """A logger without a ``log_dir``, like the loggers of most services."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> Any:
        return self.folder

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return "run"


def places(fit: Fit, tmp_path: Path, *callbacks: Any, **arguments: Any) -> list[str]:
    """The folder of a training's record, with ``default_root_dir=root``."""
    arguments = {"enable_checkpointing": bool(callbacks), "max_epochs": 1} | arguments
    fit(Net("vector"), ALRCCallback(**SETTINGS), *callbacks, **arguments)
    return [path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(NAME)]


def test_the_record_is_beside_the_logs_if_a_logger_has_a_folder(fit: Fit, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", version=3)
    saving = ModelCheckpoint(tmp_path / "deep")
    assert places(fit, tmp_path, saving, logger=logger) == ["logs/lightning_logs/version_3"]


def test_the_first_logger_with_a_folder_gets_the_record(fit: Fit, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    loggers = [SavingIn(tmp_path / "service"), TensorBoardLogger(tmp_path / "logs", "it", 0)]
    assert places(fit, tmp_path, logger=loggers) == ["logs/it/version_0"]


def test_the_record_is_next_to_the_checkpoints_of_the_trainer(fit: Fit, tmp_path: Path) -> None:
    assert places(fit, tmp_path, ModelCheckpoint()) == ["root/checkpoints-alrc"]


def test_the_record_is_next_to_the_checkpoints_of_a_logger_without_a_folder(
    fit: Fit, tmp_path: Path
) -> None:
    logger = SavingIn(tmp_path / "service")
    found = places(fit, tmp_path, ModelCheckpoint(), logger=logger)
    assert found == ["service/project/run/checkpoints-alrc"]


@pytest.mark.parametrize("folder", ["root", "root/deep/er"])
def test_a_folder_of_checkpoints_in_the_root_has_only_checkpoints(
    fit: Fit, tmp_path: Path, folder: str
) -> None:
    assert places(fit, tmp_path, ModelCheckpoint(tmp_path / folder)) == [f"{folder}-alrc"]
    assert {path.suffix for path in (tmp_path / folder).iterdir()} == {".ckpt"}


def test_a_folder_of_checkpoints_outside_the_root_gets_the_record(fit: Fit, tmp_path: Path) -> None:
    assert places(fit, tmp_path, ModelCheckpoint(tmp_path / "elsewhere")) == ["elsewhere"]


def test_a_link_into_the_root_counts_as_in_the_root(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert places(fit, tmp_path, ModelCheckpoint(tmp_path / "link/it")) == ["root/it-alrc"]


def test_a_folder_of_checkpoints_gets_the_record_if_its_parent_is_locked(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert places(fit, tmp_path, ModelCheckpoint(tmp_path / "root")) == ["root"]


def test_no_folder_is_made_for_checkpoints_that_are_not_saved(fit: Fit, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "none", save_top_k=0)
    assert places(fit, tmp_path, saving) == []
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "root").exists()
    saving = ModelCheckpoint(tmp_path / "last", save_top_k=0, save_last=True)
    assert places(fit, tmp_path, saving) == ["last"]


def test_no_folder_is_made_before_there_is_something_to_write(fit: Fit, tmp_path: Path) -> None:
    fit(
        Net("vector"),
        ALRCCallback(),
        OnExceptionCheckpoint(tmp_path / "it"),
        max_epochs=1,
        enable_checkpointing=True,
    )
    assert not list(tmp_path.iterdir())


def test_fast_dev_run_writes_no_record(fit: Fit, tmp_path: Path) -> None:
    assert places(fit, tmp_path, ModelCheckpoint(tmp_path / "it"), fast_dev_run=True) == []
    assert not list(tmp_path.iterdir())


def test_a_local_folder_comes_before_a_remote_one(fit: Fit, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "it")
    assert places(fit, tmp_path, saving, logger=SavingIn("s3://bucket/logs")) == ["it"]


def test_a_logger_without_any_folder_is_passed_over(fit: Fit, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts")
    )
    assert logger.save_dir is None
    assert places(fit, tmp_path, ModelCheckpoint(tmp_path / "it"), logger=logger) == ["it"]


# ---- found again


@pytest.mark.parametrize(
    "place", [".", "checkpoints", "checkpoints-alrc", "../run-alrc"], ids=lambda place: place
)
def test_a_record_is_found_from_its_training_s_folder(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "run"
    path = folder / place / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    write_spikes(path, [spike()])
    (found,) = record_files(folder)
    assert found.samefile(path)
    assert read_spikes(folder) == [spike()]
    assert len(plot(folder).axes) == 1


def test_the_newest_record_is_the_last(tmp_path: Path) -> None:
    for name, at in (("-v1", 3), ("", 1), ("-v2", 2)):
        path = tmp_path / f"alrc_spikes{name}.jsonl"
        write_spikes(path, [spike()])
        os.utime(path, (at, at))
        (tmp_path / f".{path.name}.abc.part").touch()
    names = [path.name for path in record_files(tmp_path)]
    assert names == [f"alrc_spikes{version}.jsonl" for version in ("", "-v2", "-v1")]


def test_a_missing_folder_has_no_record(tmp_path: Path) -> None:
    assert record_files(tmp_path / "none") == []


@pytest.mark.parametrize("read", [read_spikes, read_ledger])
def test_a_folder_without_a_file_and_a_wrong_path_are_named(tmp_path: Path, read: Any) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no alrc_.* in {tmp_path}"):
        read(tmp_path)
    with pytest.raises(TypeError, match=r"path must be the path of a .*, got 3 of type int"):
        read(3)


def test_figures_beside_a_ledger_are_not_taken_for_it(tmp_path: Path) -> None:
    names = ["alrc_ledger.csv", "alrc_ledger-v1.parquet", "alrc_ledger.png", "alrc_ledger.pdf"]
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in record_files(tmp_path, LEDGERS)} == set(names[:2])
