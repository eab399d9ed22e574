"""Faults around a training: a run is killed, a checkpoint is truncated, a disk is full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from lightning_alrc import ALRCCallback
from tests.nets import SETTINGS, Net, ResumableLoader, callback_of, state_of, weights_of
from tests.scripts import lives as script
from tests.scripts.launching import forked, join

Fit = Callable[..., Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    script.live(folder)
    final: dict[str, Any] = json.loads((folder / "final.json").read_text())
    assert final["steps"] == script.STEPS
    assert 0 < final["moments"]["total_clipped"] < final["moments"]["losses"]
    assert len(final["spikes"]) > 20
    return final


@pytest.mark.parametrize(("by", "deaths"), [(signal.SIGKILL, 10), (signal.SIGTERM, 3)])
def test_a_run_that_is_ended_and_resumed_equals_an_undisturbed_run(
    tmp_path: Path, undisturbed: dict[str, Any], by: signal.Signals, deaths: int
) -> None:
    join(forked(script.main, tmp_path, by, deaths))
    assert json.loads((tmp_path / "final.json").read_text()) == undisturbed
    # A killed run loses some steps. A terminated run saves "exception.ckpt", and loses no step.
    newest_at_ends = json.loads((tmp_path / "ends.json").read_text())
    assert len(newest_at_ends) == deaths
    assert newest_at_ends.count("exception") == (deaths if by is signal.SIGTERM else 0)


@pytest.fixture
def checkpoints(fit: Fit, tmp_path: Path) -> list[Path]:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(
        Net("vector"),
        ALRCCallback(**SETTINGS),
        saving,
        batches=ResumableLoader(),
        enable_checkpointing=True,
    )
    return [tmp_path / f"step={step}.ckpt" for step in (9, 12)]


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_refused_by_lightning_and_an_older_one_loads(
    fit: Fit, checkpoints: list[Path], part: float
) -> None:
    older, newer = checkpoints
    content = newer.read_bytes()
    newer.write_bytes(content[: int(len(content) * part)])
    callback, net = ALRCCallback(**SETTINGS), Net("vector")
    before = callback.state_dict()
    with pytest.raises((RuntimeError, EOFError, OSError)) as raised:
        fit(net, callback, ckpt_path=newer)
    assert not any("lightning_alrc" in str(entry.path) for entry in raised.traceback)
    assert callback.state_dict() == before
    trainer = fit(net, callback, ckpt_path=older, batches=ResumableLoader())
    assert trainer.global_step == 12
    assert state_of(callback.losses["loss"])["updates"] == 12


# ---- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
    assert os.statvfs(folder).f_bavail == 0


def logger_on(disk: Path, kind: str) -> Any:
    """A logger that writes each row at once.

    Its ``finalize`` does nothing. Lightning calls ``finalize`` at the end of a fit. The base class
    would then write to the full disk, and the fit would raise the error.
    """
    base, arguments = {
        "csv": (CSVLogger, {"save_dir": disk, "flush_logs_every_n_steps": 1}),
        "tensorboard": (TensorBoardLogger, {"save_dir": disk, "max_queue": 1, "flush_secs": 0}),
        "mlflow": (MLFlowLogger, {"tracking_uri": f"sqlite:///{disk}/runs.db"}),
    }[kind]
    return type(base.__name__, (base,), {"finalize": lambda self, status: None})(**arguments)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "tensorboard", "mlflow"])
def test_a_disk_that_fills_up_gives_two_warnings_and_does_not_end_the_training(
    fit: Fit, disk: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "mlflow":
        shutil.copy(request.getfixturevalue("new_mlflow_database"), disk / "runs.db")
    expected, net = Net("vector"), Net("vector")
    undisturbed = callback_of(fit(expected, ALRCCallback(**SETTINGS), max_epochs=9))

    def fill_up(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            fill(disk)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            net,
            ALRCCallback(**SETTINGS),
            LambdaCallback(on_train_batch_end=fill_up),
            OnExceptionCheckpoint(disk),  # sets the record's folder, and saves nothing
            logger=logger_on(disk, kind),
            log_every_n_steps=1,
            enable_checkpointing=True,
            max_epochs=9,
        )
    assert weights_of(net) == weights_of(expected)
    callback = callback_of(trainer)
    assert callback.spikes == undisturbed.spikes
    assert state_of(callback.losses["loss"]) == state_of(undisturbed.losses["loss"])
    messages = [str(each.message) for each in caught]
    assert sum("lost a row of ALRC's" in each for each in messages) == 1, messages
    assert sum("the record of spikes" in each for each in messages) == 1, messages
    assert not list(disk.glob(".*"))
