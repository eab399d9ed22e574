"""What goes wrong around a training: it is killed, its checkpoint is cut, its disk is full."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from lightning_alrc import ALRCCallback
from tests.nets import SETTINGS, Net, ResumableLoader, callback_of, state_of, weights_of
from tests.scripts import lives as script
from tests.scripts.launching import launch

Fit = Callable[..., Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    script.live(folder)
    final: dict[str, Any] = json.loads((folder / "final.json").read_text())
    assert final["steps"] == script.STEPS
    assert 0 < final["moments"]["row_clipped"] < final["moments"]["losses"]
    assert len(final["spikes"]) > 20
    return final


@pytest.mark.parametrize(("by", "deaths"), [(signal.SIGKILL, 10), (signal.SIGTERM, 3)])
def test_a_run_that_is_ended_and_resumed_equals_one_that_is_not(
    tmp_path: Path, undisturbed: dict[str, Any], by: signal.Signals, deaths: int
) -> None:
    output = launch(script, tmp_path, int(by), deaths)
    assert output.count("life ended by") == deaths
    assert json.loads((tmp_path / "final.json").read_text()) == undisturbed
    # Killed, a run loses some steps; told to end, none.
    assert output.count("newest is exception") == (deaths if by is signal.SIGTERM else 0)


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


def on_a_full_disk(work: Callable[[], None]) -> str:
    """What a fork prints, in which no file can grow beyond a few bytes."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        report = "it went well"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
            work()
        except BaseException:
            report = traceback.format_exc()
        os.write(write, report.encode()[-60_000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        report = pipe.read()
    os.waitpid(child, 0)
    return report


class Flushing(CSVLogger):
    """Writes each row at once. Lightning's own last write, in a fit's end, is left out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, flush_logs_every_n_steps=1)

    def finalize(self, status: str) -> None:
        pass


def test_the_disk_is_full_indeed(tmp_path: Path) -> None:
    report = on_a_full_disk(lambda: Flushing(tmp_path).log_metrics({"a" * 50: 1.0}, step=1))
    assert re.search(r"OSError: \[Errno 27\] File too large", report)


def test_a_row_that_cannot_be_written_costs_a_warning_and_not_the_training(
    fit: Fit, tmp_path: Path
) -> None:
    expected, net = Net("vector"), Net("vector")
    trainer = fit(expected, ALRCCallback(**SETTINGS))
    state = state_of(callback_of(trainer).losses["loss"])

    def work() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arguments: dict[str, Any] = {"logger": Flushing(tmp_path), "log_every_n_steps": 2}
            callback = ALRCCallback(**SETTINGS, record=0)
            found = callback_of(fit(net, callback, **arguments)).losses["loss"]
        assert weights_of(net) == weights_of(expected)
        assert state_of(found) == state
        messages = [str(each.message) for each in caught if "File too large" in str(each.message)]
        assert len(messages) == 1, messages
        assert "alrc" in messages[0].lower()

    assert on_a_full_disk(work) == "it went well"


def test_a_record_that_cannot_be_written_costs_a_warning_and_not_the_training(
    fit: Fit, tmp_path: Path
) -> None:
    expected, net = Net("vector"), Net("vector")
    spikes = callback_of(fit(expected, ALRCCallback(**SETTINGS))).spikes

    def work() -> None:
        nowhere = ModelCheckpoint(tmp_path, save_top_k=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arguments: dict[str, Any] = {"enable_checkpointing": True, "log_every_n_steps": 2}
            callback = callback_of(fit(net, ALRCCallback(**SETTINGS), nowhere, **arguments))
        assert weights_of(net) == weights_of(expected)
        assert callback.spikes == spikes
        messages = [str(each.message) for each in caught if "File too large" in str(each.message)]
        assert len(messages) == 1, messages
        assert "record of spikes" in messages[0]
        assert not (tmp_path / "alrc_spikes.jsonl").exists()

    assert on_a_full_disk(work) == "it went well"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system is mounted by root alone")
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
    """A logger that writes at once, and not in a fit's end, where its own error ends it."""
    base, arguments = {
        "csv": (CSVLogger, {"save_dir": disk, "flush_logs_every_n_steps": 1}),
        "tensorboard": (TensorBoardLogger, {"save_dir": disk, "max_queue": 1, "flush_secs": 0}),
        "mlflow": (MLFlowLogger, {"tracking_uri": f"sqlite:///{disk}/runs.db"}),
    }[kind]
    return type(base.__name__, (base,), {"finalize": lambda self, status: None})(**arguments)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "tensorboard", "mlflow"])
def test_a_disk_that_fills_up_costs_two_warnings_and_not_the_training(
    fit: Fit, disk: Path, kind: str
) -> None:
    expected, net = Net("vector"), Net("vector")
    spikes = callback_of(fit(expected, ALRCCallback(**SETTINGS), max_epochs=9)).spikes

    def fill_up(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            fill(disk)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            net,
            ALRCCallback(**SETTINGS),
            LambdaCallback(on_train_batch_end=fill_up),
            ModelCheckpoint(disk, save_top_k=0),
            logger=logger_on(disk, kind),
            log_every_n_steps=1,
            enable_checkpointing=True,
            max_epochs=9,
        )
    assert weights_of(net) == weights_of(expected)
    assert callback_of(trainer).spikes == spikes
    messages = [str(each.message) for each in caught]
    assert sum("lost a row of ALRC's" in each for each in messages) == 1, messages
    assert sum("the record of spikes" in each for each in messages) == 1, messages
    assert not list(disk.glob(".*"))
