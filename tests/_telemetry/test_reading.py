"""Logs read back: from Lightning's own loggers, a record of clips, and memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from lightning_alrc import ALRCCallback
from lightning_alrc._telemetry import reading_csv
from lightning_alrc._telemetry.reading import RECORD, Clip, LoggedLoss, read
from tests import offline_wandb
from tests.nets import NAMED_NETS, NETS, SETTINGS, callback_of
from tests.offline_wandb import finished
from tests.scripts.launching import execute

Fit = Callable[..., Any]
ROWS = [
    {"step": 9, "alrc/loss": 2.0, "alrc/threshold": None},
    {"step": 4, "alrc/loss": 8.0, "alrc/critic/loss": -1.0},
]


def series(loss: LoggedLoss, metric: str) -> tuple[list[float], list[float]]:
    """The steps and the values of a metric, as lists."""
    steps, values = loss.series(metric)
    return steps.tolist(), values.tolist()


def same(*losses: dict[str, LoggedLoss]) -> bool:
    as_lists = [
        {
            name: (
                loss.steps.tolist(),
                {metric: series(loss, metric) for metric in loss.columns},
                loss.clips,
            )
            for name, loss in each.items()
        }
        for each in losses
    ]
    return all(each == as_lists[0] for each in as_lists)


def line(step: int, loss: float, name: str = "loss") -> str:
    """The line of a record for a clip to a threshold of 2."""
    entry = {"name": name, "step": step, "epoch": 0, "batch_idx": step, "sample": None, "id": None}
    entry |= {"loss": loss, "threshold": 2.0, "scale": 2 / loss, "rank": 0}
    return json.dumps(entry) + "\n"


def csv_run(fit: Fit, tmp_path: Path, net: Any, *callbacks: Any) -> tuple[Path, Any]:
    """The folder of a training's CSV log, and the Trainer."""
    logger = CSVLogger(tmp_path)
    trainer = fit(net, *callbacks, logger=logger, log_every_n_steps=2)
    logger.finalize("success")
    return Path(logger.log_dir), trainer


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training's W&B run, offline."""
    folder = tmp_path_factory.mktemp("wandb_run")
    with pytest.MonkeyPatch.context() as patch, offline_wandb.loggers(folder, patch) as make:
        logger = make()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            log_every_n_steps=2,
            logger=logger,
            callbacks=[ALRCCallback(**SETTINGS)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(NETS["pytorch_lightning"]())
        return finished(logger).folder


@pytest.fixture
def wandb_run(logged_run: Path, tmp_path: Path) -> Path:
    """A copy of the folder for one test."""
    return shutil.copytree(logged_run, tmp_path / logged_run.name)


# ---- each form of source


def test_a_csv_log_and_its_folder_are_read_alike(fit: Fit, tmp_path: Path, namespace: str) -> None:
    folder, trainer = csv_run(fit, tmp_path, NETS[namespace](), ALRCCallback(**SETTINGS))
    (loss,) = read(folder).values()
    assert same(read(folder / "metrics.csv"), read(str(folder)), {"loss": loss})
    steps, clipped = series(loss, "clipped_total")
    assert steps == [1, 3, 5, 7, 9, 11]
    assert clipped[-1] == callback_of(trainer).losses["loss"].clipped_total.item() > 0


def test_empty_cells_of_a_csv_log_are_left_out(fit: Fit, tmp_path: Path, namespace: str) -> None:
    class Logging(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("own", 1.0)  # in rows of its own
            return super().training_step(batch, batch_idx)

    folder, _ = csv_run(fit, tmp_path, Logging(), ALRCCallback())
    loss = read(folder)["loss"]
    assert ",," in (folder / "metrics.csv").read_text()
    assert series(loss, "loss")[0] == [1, 3, 5, 7, 9, 11]
    assert series(loss, "threshold")[0] == [9, 11]  # none before the tenth loss


def test_a_wandb_run_is_read_by_the_training_step(wandb_run: Path, fit: Fit) -> None:
    trainer = fit(NETS["pytorch_lightning"](), ALRCCallback(**SETTINGS))
    (loss,) = read(wandb_run).values()
    steps, clipped = series(loss, "clipped_total")
    assert steps == [1, 3, 5, 7, 9, 11]
    assert clipped[-1] == callback_of(trainer).losses["loss"].clipped_total.item() > 0
    assert len(series(loss, "loss")[1]) == 6


def test_an_unfinished_wandb_run_is_read(wandb_run: Path) -> None:
    (log,) = wandb_run.glob("run-*.wandb")
    log.write_bytes(log.read_bytes()[: -log.stat().st_size // 2])
    (loss,) = read(wandb_run).values()
    assert 0 < len(series(loss, "loss")[1]) < 6


def test_a_wandb_run_is_found_from_its_dir(wandb_run: Path) -> None:
    assert same(read(wandb_run / "files"), read(wandb_run))


def test_the_table_of_a_wandb_run_has_the_clips_of_its_record(fit: Fit, wandb_logger: Any) -> None:
    logger, net = wandb_logger(), NETS["pytorch_lightning"]("vector")
    # The table also has images.
    callback = ALRCCallback(**SETTINGS, render=lambda spike: torch.zeros(3, 4, 4))
    fit(net, callback, logger=logger, log_every_n_steps=2)
    folder = finished(logger).folder
    clips = read(folder)["loss"].clips
    assert clips == read(callback.spikes)["loss"].clips
    assert len(clips) > 3
    assert same(read(folder, callback.spikes), read(folder))  # each clip once
    (table,) = folder.glob("files/media/table/alrc/spikes*.json")
    table.unlink()
    assert read(folder)["loss"].clips == []


def test_rows_of_a_csv_log_that_pandas_read_are_the_same(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    class Logging(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("own", 1.0)  # in rows of its own, at the same steps
            return super().training_step(batch, batch_idx)

    pandas = pytest.importorskip("pandas")
    folder, _ = csv_run(fit, tmp_path, Logging(), ALRCCallback(**SETTINGS))
    rows = pandas.read_csv(folder / "metrics.csv").to_dict("records")
    in_memory, from_file = read(rows)["loss"], read(folder / "metrics.csv")["loss"]
    assert series(in_memory, "loss") == series(from_file, "loss")
    assert len(series(in_memory, "loss")[1]) == 6


def test_rows_may_have_the_step_of_weights_and_biases() -> None:
    rows = [{"_step": 3, "trainer/global_step": 9, "alrc/loss": 2.0}]
    assert series(read(rows)["loss"], "loss") == ([9.0], [2.0])


@pytest.mark.parametrize("prefix", ["", "exp-1-", "runs/exp-"])
def test_a_loggers_prefix_is_ignored(prefix: str) -> None:
    losses = read([{"step": 1, f"{prefix}alrc/loss": 2.0, f"{prefix}alrc/a.b-c/loss": 3.0}])
    assert series(losses["loss"], "loss") == ([1], [2])
    assert series(losses["a.b-c"], "loss") == ([1], [3])


@pytest.mark.parametrize("prefix", ["", "exp-", "my-alrc-"])
def test_the_name_of_a_loss_may_end_in_alrc(prefix: str) -> None:
    key = f"{prefix}alrc/with-alrc/loss"
    rows = [{"step": 1, key: 2.0, f"{prefix}alrc/without-alrc/loss": 5.0}]
    losses = {name: series(loss, "loss") for name, loss in read(rows).items()}
    assert losses == {"with-alrc": ([1], [2.0]), "without-alrc": ([1], [5.0])}


def test_metrics_of_others_are_ignored() -> None:
    with pytest.raises(ValueError, match="must have ALRC's metrics"):
        read([{"step": 1, "myalrc/loss": 2.0, "alrc/a/b/loss": 1.0, "alrc/lossy": 1.0}])


def test_named_losses_are_read_separately(fit: Fit, tmp_path: Path, namespace: str) -> None:
    folder, trainer = csv_run(fit, tmp_path, NAMED_NETS[namespace]("matrix"))
    losses = read(folder)
    assert set(losses) == {"first", "second"}
    for name, loss in losses.items():
        last = series(loss, "mu1")[1][-1]
        assert last == callback_of(trainer).losses[name].mu1.item()


def test_rows_in_memory_are_sorted_and_missing_values_are_left_out() -> None:
    losses = read(iter(ROWS))
    assert series(losses["loss"], "loss") == ([4, 9], [8, 2])
    assert series(losses["loss"], "threshold") == ([], [])
    assert series(losses["critic"], "loss") == ([4], [-1])


def test_values_that_are_not_finite_are_left_out() -> None:
    rows = [{"step": 1, "alrc/loss": math.nan}, {"step": 2, "alrc/loss": "Infinity"}, *ROWS]
    assert series(read(rows)["loss"], "loss") == ([4, 9], [8, 2])


def test_other_columns_are_ignored() -> None:
    others = {"loss": 1, "alrc": 2, "alrc/other": 3, "val/alrc/loss": 4, "epoch": None}
    assert same(read([*ROWS, {"step": 5, **others}, others]), read(ROWS))


def test_each_clip_of_a_record_is_read(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(line(3, 9.0) + line(5, 7.0, "critic"))
    losses = read(tmp_path / RECORD)
    assert losses["loss"].clips == [Clip(step=3, loss=9, threshold=2)]
    assert losses["critic"].clips == [Clip(step=5, loss=7, threshold=2)]
    assert same(read(tmp_path), losses)


def test_spikes_in_memory_are_read_as_their_record_is(fit: Fit, tmp_path: Path) -> None:
    folder, trainer = csv_run(
        fit, tmp_path, NETS["pytorch_lightning"]("vector"), ALRCCallback(**SETTINGS)
    )
    spikes = callback_of(trainer).spikes
    assert read(spikes)["loss"].clips == read(folder / RECORD)["loss"].clips
    assert len(spikes) > 3
    assert same(*({"critic": read(rows)["critic"]} for rows in ([*ROWS, *spikes], ROWS)))


def test_the_unfinished_last_line_of_a_record_is_left_out(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(line(3, 9.0) + line(5, 7.0)[:30])
    assert len(read(tmp_path / RECORD)["loss"].clips) == 1


# ---- several sources


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_record_beside_a_log_is_found_and_read_once(
    fit: Fit, tmp_path: Path, namespace: str, below: str
) -> None:
    callback = ALRCCallback(**SETTINGS, record=0)
    folder, _ = csv_run(fit, tmp_path, NETS[namespace](), callback)
    record = folder / below / RECORD
    record.parent.mkdir(exist_ok=True)
    record.write_text(line(3, 9.0))
    assert len(read(folder)["loss"].clips) == 1
    assert same(read(folder / "metrics.csv", record, os.path.relpath(record)), read(folder))


def test_the_newest_of_several_records_beside_a_log_is_read(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    folder, _ = csv_run(fit, tmp_path, NETS[namespace](), ALRCCallback(**SETTINGS, record=0))
    for version, loss in (("", 9.0), ("-v2", 8.0), ("-v10", 7.0)):
        record = folder / f"alrc_spikes{version}.jsonl"
        record.write_text(line(3, loss))
        os.utime(record, (1e9, 1e9))
    assert [clip.loss for clip in read(folder)["loss"].clips] == [7.0]
    # A resumed run may write to a file of a lower version last.
    os.utime(folder / "alrc_spikes-v2.jsonl", (1e9, 1e9 + 1))
    assert [clip.loss for clip in read(folder)["loss"].clips] == [8.0]


PLACES = ["{}", "{}-alrc", "{}/checkpoints-alrc", "{}/checkpoints"]
"""Where the record of a training with the folder ``{}`` may be. The first that exists is read."""


@pytest.mark.parametrize("place", PLACES)
def test_a_record_is_found_in_each_folder_where_it_may_be(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "version_0"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,alrc/loss\n9,2.0\n")
    for index, each in enumerate(PLACES[PLACES.index(place) :]):
        record = Path(each.format(folder)) / RECORD
        record.parent.mkdir(exist_ok=True)
        record.write_text(line(3, 9.0 + index))
    for source in (folder, folder / "metrics.csv", os.path.relpath(folder)):
        assert [clip.loss for clip in read(source)["loss"].clips] == [9.0]


def test_the_empty_record_of_a_new_training_hides_an_earlier_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,alrc/loss\n9,2.0\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / RECORD).write_text(line(3, 9.0))
    assert len(read(tmp_path)["loss"].clips) == 1
    (tmp_path / RECORD).touch()
    assert read(tmp_path)["loss"].clips == []
    (tmp_path / RECORD).write_text(line(3, 9.0))
    (tmp_path / "alrc_spikes-v1.jsonl").touch()
    assert read(tmp_path)["loss"].clips == []


def test_other_fields_of_a_record_are_ignored(tmp_path: Path) -> None:
    more = json.dumps(json.loads(line(3, 9.0)) | {"run": "a1b2", "call": 2}) + "\n"
    (tmp_path / RECORD).write_text(more)
    assert read(tmp_path)["loss"].clips == [Clip(3, 9, 2)]


@pytest.fixture(params=["csv", "pandas"])
def csv_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each reader. In the run with pandas, pandas reads small files, too."""
    if request.param == "pandas":
        pytest.importorskip("pandas")
        monkeypatch.setattr(reading_csv, "LARGE", 0)
    return str(request.param)


@pytest.mark.usefixtures("csv_reader")
def test_a_half_written_line_of_a_csv_log_is_left_out(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    folder, _ = csv_run(fit, tmp_path, NETS[namespace](), ALRCCallback(**SETTINGS))
    log = folder / "metrics.csv"
    whole = log.read_bytes()
    *lines, last = whole.splitlines(keepends=True)
    before = b"".join(lines)
    log.write_bytes(before)
    expected = read(folder)
    for cut in range(1, len(last) - 1):
        log.write_bytes(before + last[:cut])
        assert same(read(folder), expected)
    log.write_bytes(before + last[:20] + last)  # as after a full disk
    assert same(read(folder), expected)


@pytest.mark.usefixtures("csv_reader")
def test_lines_that_are_too_short_or_too_long_are_left_out(tmp_path: Path) -> None:
    lines = ["alrc/loss,alrc/threshold,step", "1.0,4.0,0", "2.0,1", "3.0,4.0,2", "5.0,4.0,3,0"]
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, "6.0,4.0,4", ""]))
    assert series(read(tmp_path)["loss"], "loss") == ([0, 2, 4], [1, 3, 6])


@pytest.mark.usefixtures("csv_reader")
def test_everything_that_a_csv_logger_writes_is_read(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-320, -1.5e300, math.inf, math.nan, 7]
    logger = CSVLogger(tmp_path)
    for step, value in enumerate(values):
        logger.log_metrics({"alrc/loss": value, "alrc/mu1": 2.5}, step)
        logger.log_metrics({"note": 'a "word", or two'}, step)
    logger.finalize("success")
    loss = read(logger.log_dir)["loss"]
    finite = [0, 1, 2, 5]
    assert series(loss, "loss") == (finite, [values[step] for step in finite])
    assert series(loss, "mu1") == ([*range(6)], [2.5] * 6)


def test_both_readers_of_a_csv_log_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(500, generator=generator, dtype=torch.float64).exp().tolist()
    rows = [f"{loss!r},{step},,0.5\n,{step},nan,\n" for step, loss in enumerate(losses)]
    log = tmp_path / "metrics.csv"
    log.write_text("alrc/loss,step,other,alrc/scale\n" + "".join(rows) + "1.0,5")
    plain = read(log)
    monkeypatch.setattr(reading_csv, "_read_by_csv", lambda *_: pytest.fail("it is read by csv"))
    monkeypatch.setattr(reading_csv, "LARGE", 0)
    by_pandas = read(log)["loss"]
    for metric, column in plain["loss"].columns.items():
        np.testing.assert_allclose(by_pandas.columns[metric], column, rtol=1e-14)
    assert by_pandas.steps.tolist() == plain["loss"].steps.tolist()
    assert series(plain["loss"], "loss") == ([*range(500)], losses)


def test_a_file_that_is_not_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("alrc/loss,step\n" + "1" * 200_000 + ",1\n")
    with pytest.raises(ValueError, match=r"metrics\.csv' cannot be read as CSV: field larger"):
        read(tmp_path)


@pytest.mark.usefixtures("csv_reader")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("2.0,1\nlow,2", r"numbers or nothing in the column 'alrc/loss', got 'low'"),
        ("2.0,1\nNone,2", r"numbers or nothing in the column 'alrc/loss', got 'None'"),
        ("2.0,1\n3.0,last", r"numbers or nothing in the column 'step', got 'last'"),
        ("2.0,", r"the step of a row must be a number, got none in .*metrics\.csv"),
    ],
)
def test_a_wrong_value_in_a_csv_log_is_named(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "metrics.csv").write_text(f"alrc/loss,step\n{rows}\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_record_beside_a_wandb_run_is_found(wandb_run: Path) -> None:
    of_table = read(wandb_run)["loss"].clips
    (wandb_run / RECORD).write_text(line(3, 9.0))
    assert len(read(wandb_run)["loss"].clips) == 1 + len(of_table)


def test_rows_of_a_resumed_training_replace_earlier_ones() -> None:
    first = [{"step": step, "alrc/loss": 1.0, "alrc/scale": 1.0} for step in range(4)]
    resumed = [{"step": step, "alrc/loss": 2.0} for step in range(2, 6)]
    loss = read(first, resumed)["loss"]
    assert series(loss, "loss") == ([0, 1, 2, 3, 4, 5], [1, 1, 2, 2, 2, 2])
    assert series(loss, "scale")[0] == [0, 1, 2, 3]


@pytest.mark.usefixtures("csv_reader")
def test_two_rows_of_the_same_step_in_one_source_are_both_kept(tmp_path: Path) -> None:
    rows = [(0, 1.0), (2, 2.0), (2, 30.0), (4, 4.0), (3, 5.0)]
    in_memory = [{"step": step, "alrc/loss": loss} for step, loss in rows]
    (tmp_path / "metrics.csv").write_text(
        "step,alrc/loss\n" + "".join(f"{step},{loss}\n" for step, loss in rows)
    )
    for source in (in_memory, tmp_path):
        loss = read(source)["loss"]
        assert series(loss, "loss") == ([0, 2, 2, 3, 4], [1, 2, 30, 5, 4])


# ---- what is refused


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.*does not exist.*metrics\.csv"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("name", ["notes.txt", "folder/anything"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("step,alrc/loss\n1,2\n")
    (path.parent / RECORD).write_text(line(3, 9.0))
    with pytest.raises(ValueError, match=rf"source must be.*metrics\.csv.*{path.name}"):
        read(path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source must be.*run-<id>\.wandb.*alrc_spikes"):
        read(tmp_path)


@pytest.mark.parametrize("source", [3, None, {"step": 1}, b"path", [("step", 1)], ["path"]])
def test_a_source_that_is_no_path_and_no_rows_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="source must be"):
        read(source)


def test_a_log_without_alrc_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,2.0\n")
    for source in (path, [{"step": 1, "loss": 2.0}]):
        with pytest.raises(ValueError, match="source must have ALRC's metrics"):
            read(ROWS, source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"alrc/loss": 1.0}, "the step of alrc/loss must be a number, got None"),
        ({"step": "last", "alrc/loss": 1.0}, "step of alrc/loss must be a number, got 'last'"),
        ({"step": 7, "alrc/loss": "low"}, "alrc/loss at step 7 must be a number, got 'low'"),
    ],
)
def test_a_value_that_is_no_number_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read([row])


@pytest.mark.parametrize("bad", ["{", "3", "{}", line(1, 2.0).replace("2.0", '"high"')])
def test_a_wrong_line_of_a_record_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / RECORD).write_text(line(3, 9.0) + bad.strip() + "\n")
    with pytest.raises(ValueError, match=rf"line 2 of .*{RECORD} must be a JSON object"):
        read(tmp_path / RECORD)


def test_a_wandb_log_that_wandb_cannot_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "run-x.wandb").write_text("something else")
    with pytest.raises(ValueError, match=r"run-x\.wandb' cannot be read by .*--json`.* 0\.31 and"):
        read(tmp_path)


WITHOUT_WANDB = """
import os, pytest, sys
from importlib.machinery import PathFinder
from lightning_alrc._telemetry import reading

class OnlyHere:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, ["."]) if name == "wandb" else None

sys.meta_path.insert(0, OnlyHere)
os.chdir({folder!r})
with pytest.raises(ImportError, match=r"pip install 'lightning-alrc\\[wandb\\]'"):
    reading.read("wandb")
"""


def test_without_wandb_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()  # the folder of runs has the name of the package
    (tmp_path / "wandb" / "run-x.wandb").touch()
    execute(WITHOUT_WANDB.format(folder=str(tmp_path)))
