"""Logs of a training without ALRC, read back from what Lightning's own loggers wrote."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from lightning_alrc._telemetry.reading_runs import Logged, read_run
from tests import nets
from tests.offline_wandb import finished
from tests.scripts.launching import execute

Fit = Callable[..., Any]
STEPS, NAME = 12, "train/loss"


@pytest.fixture
def logged(namespace: str, fit: Fit) -> Callable[..., list[float]]:
    """Trains with a logger, without ALRC; returns the loss of each step."""

    def train(logger: Any, every: int = 1) -> list[float]:
        losses: list[float] = []
        package = nets.NAMESPACES[namespace]

        class Net(nets.NETS[namespace]):  # type: ignore[misc]
            def training_step(self, *batch: Any) -> Tensor:
                loss: Tensor = super().training_step(*batch)
                losses.append(float(loss.detach()))
                self.log_dict({NAME: loss, "accuracy": 0.5})
                return loss

        assert issubclass(Net, package.LightningModule)
        fit(Net(), logger=logger, log_every_n_steps=every)
        assert len(losses) == STEPS
        return losses

    return train


def read(path: Path, *names: str, run: str | None = None) -> dict[str, Logged]:
    return read_run(path, lambda name: name in names, run)


def as_lists(logged: Logged) -> tuple[list[float], list[float]]:
    return logged.steps.tolist(), logged.values.tolist()


def test_the_folder_and_file_of_a_csv_logger_are_read(
    logged: Callable[..., list[float]], namespace: str, tmp_path: Path
) -> None:
    logger = nets.NAMESPACES[namespace].loggers.CSVLogger(tmp_path)
    losses = logged(logger)
    for path in (Path(logger.log_dir), Path(logger.log_dir) / "metrics.csv"):
        steps, values = as_lists(read(path, NAME)[NAME])
        assert steps == list(range(STEPS))
        assert values == pytest.approx(losses)


def test_the_folder_and_file_of_tensorboard_are_read(
    logged: Callable[..., list[float]], namespace: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    logger = nets.NAMESPACES[namespace].loggers.TensorBoardLogger(tmp_path)
    losses = logged(logger, every=3)
    (events,) = Path(logger.log_dir).glob("events*")
    for path in (Path(logger.log_dir), events):
        steps, values = as_lists(read(path, NAME)[NAME])
        assert steps == [2, 5, 8, 11]
        assert values == pytest.approx(losses[2::3])


def test_all_of_tensorboards_events_are_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:  # type: ignore[no-untyped-call]
        for step in range(10_500):
            writer.add_scalar("loss", step, step)  # type: ignore[no-untyped-call]
    assert len(read(tmp_path, "loss")["loss"].values) == 10_500


def test_the_folder_of_a_wandb_run_is_read(
    logged: Callable[..., list[float]], namespace: str, wandb_logger: Any
) -> None:
    logger = wandb_logger(namespace)
    losses = logged(logger)
    folder = finished(logger).folder
    for path in (folder, folder / "files", next(folder.glob("run-*.wandb"))):
        found = read(path, NAME, "accuracy")
        steps, values = as_lists(found[NAME])
        assert steps == list(range(STEPS))
        assert values == pytest.approx(losses)
        assert set(found["accuracy"].values) == {0.5}


def test_a_value_that_is_no_number_in_a_wandb_run_is_named(wandb_logger: Any) -> None:
    logger = wandb_logger()
    logger.experiment.log({"loss": "low"})
    folder = finished(logger).folder
    with pytest.raises(ValueError, match="loss must be a number at each step, got 'low'"):
        read(folder, "loss")


def test_media_of_a_wandb_run_are_left_out(wandb_logger: Any) -> None:
    import wandb

    logger = wandb_logger()
    media = {"loss_hist": wandb.Histogram([1.0, 2.0]), "loss_note": wandb.Html("<p>low</p>")}
    logger.experiment.log({"loss": 1.5, **media})
    folder, names = finished(logger).folder, []
    read_run(folder, lambda name: names.append(name) or "loss" in name)
    assert {name for name in names if "loss" in name} == {"loss"}


def test_a_wandb_run_whose_texts_have_line_separators_is_read(wandb_logger: Any) -> None:
    logger, text = wandb_logger(), "one\x85two\u2028three\u2029four"
    logger.experiment.config.update({"prompt": text})
    logger.experiment.log({"loss": 1.5, "text": text, "trainer/global_step": 3})
    folder = finished(logger).folder
    assert as_lists(read(folder, "loss")["loss"]) == ([3], [1.5])


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_each_store_of_mlflow_is_read(
    logged: Callable[..., list[float]],
    namespace: str,
    tmp_path: Path,
    store: str,
    new_mlflow_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / ("mlruns" if store == "file" else "mlflow.db")
    if store == "sqlite":
        shutil.copy(new_mlflow_database, place)
    uri = place.as_uri() if store == "file" else f"sqlite:///{place}"

    def train() -> tuple[Any, list[float]]:
        with writing_allowed(monkeypatch):
            logger = nets.NAMESPACES[namespace].loggers.MLFlowLogger(
                tracking_uri=uri, artifact_location=str(tmp_path / "artifacts")
            )
            return logger, logged(logger)

    first, losses = train()
    places = [place]
    if store == "file":
        places += [place / first.experiment_id, place / first.experiment_id / first.run_id]
    for path in places:
        steps, values = as_lists(read(path, NAME)[NAME])
        assert steps == list(range(STEPS))
        assert values == pytest.approx(losses)

    second, _ = train()
    with pytest.raises(ValueError, match=f"run must be the id of one of the 2.*{first.run_id}"):
        read(place, NAME)
    assert as_lists(read(place, NAME, run=first.run_id)[NAME])[1] == pytest.approx(losses)
    with writing_allowed(monkeypatch):
        second.experiment.delete_run(second.run_id)
    assert as_lists(read(place, NAME)[NAME])[1] == pytest.approx(losses)


@contextlib.contextmanager
def writing_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let MLflow 3.17 write a folder of runs. It refuses without this variable."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield


def test_all_values_in_a_folder_of_mlflow_are_read(tmp_path: Path) -> None:
    """The folder as any release of MLflow writes it; the last line is not complete."""
    (tmp_path / "0/a1/metrics/train").mkdir(parents=True)
    (tmp_path / "0/models/m-1/metrics").mkdir(parents=True)
    for folder in ("0", "0/a1", "0/models/m-1"):
        (tmp_path / folder / "meta.yaml").write_text("lifecycle_stage: active\nstatus: 1\n")
    metrics = tmp_path / "0/a1/metrics"
    (metrics / "train" / "loss").write_text("17 1.5 0\n17 inf 1\n18 nan 2\n19 -inf 1\n20 3")
    (metrics / "old").write_text("17 2.5\n")
    (metrics / "new").write_text("17 4.5 7 samples 0123abcd m-1\n")
    (metrics / "wrong").write_text("17 high 0\n")
    before = sorted(tmp_path.rglob("*"))
    assert as_lists(read(tmp_path / "0", "old")["old"]) == ([0], [2.5])
    found = read(tmp_path, "train/loss", "old", "new")
    assert as_lists(found["train/loss"]) == ([0, 1, 1], [1.5, np.inf, -np.inf])
    assert as_lists(found["old"]) == ([0], [2.5])
    assert as_lists(found["new"]) == ([7], [4.5])
    with pytest.raises(ValueError, match=r"'.*wrong' cannot be read: got the line '17 high 0'"):
        read(tmp_path, "wrong")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def database_with_a_run(
    tmp_path_factory: pytest.TempPathFactory, new_mlflow_database: Path
) -> tuple[Path, str]:
    """A database, and the id of a run in it."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    place = Path(shutil.copy(new_mlflow_database, folder))
    client = MlflowClient(tracking_uri=f"sqlite:///{place}")
    experiment = client.create_experiment("one", artifact_location=str(folder / "artifacts"))
    run = client.create_run(experiment).info.run_id
    for step, value in enumerate([1.0, np.inf, -np.inf, np.nan, 2.0]):
        client.log_metric(run, "loss", value, step=step)
    return place, run


def test_infinite_values_in_mlflows_database_are_infinite(
    database_with_a_run: tuple[Path, str],
) -> None:
    place, run = database_with_a_run
    found = as_lists(read(place, "loss", run=run)["loss"])
    assert found == ([0, 1, 2, 4], [1, np.inf, -np.inf, 2])


def test_a_run_is_found_among_more_than_1000_in_mlflows_database(
    database_with_a_run: tuple[Path, str],
) -> None:
    place, run = database_with_a_run
    with contextlib.closing(sqlite3.connect(place)) as database:
        columns = [row[1] for row in database.execute("pragma table_info(runs)")]
        copied = ", ".join("? || run_uuid" if each == "run_uuid" else each for each in columns)
        # MLflow itself would take a minute.
        database.executemany(
            f"insert into runs select {copied} from runs where run_uuid = '{run}'",
            [(str(number),) for number in range(1_000)],
        )
        database.execute("update runs set start_time = start_time + 1 where run_uuid != ?", (run,))
        database.commit()
    assert len(read(place, "loss", run=run)["loss"].values) == 4


@pytest.mark.parametrize("revision", ["acf3f17fdcc7", "of another release"])
def test_a_database_of_another_release_of_mlflow_is_read_and_left_as_it_is(
    database_with_a_run: tuple[Path, str], tmp_path: Path, revision: str
) -> None:
    place, run = tmp_path / "a%20b ?#.db", database_with_a_run[1]
    shutil.copy(database_with_a_run[0], place)
    with contextlib.closing(sqlite3.connect(place)) as database:
        database.execute("update alembic_version set version_num = ?", (revision,))
        database.commit()
    before = place.read_bytes()
    assert as_lists(read(place, "loss", run=run)["loss"])[1] == [1, np.inf, -np.inf, 2]
    assert place.read_bytes() == before
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_database_with_a_write_ahead_log_is_read(
    database_with_a_run: tuple[Path, str], tmp_path: Path, is_open: bool
) -> None:
    place, run = tmp_path / "mlflow.db", database_with_a_run[1]
    shutil.copy(database_with_a_run[0], place)
    with contextlib.closing(sqlite3.connect(place)) as database:
        database.execute("pragma journal_mode = wal")
        database.execute("update metrics set value = 7 where step = 4")
        database.commit()
        if is_open:
            assert as_lists(read(place, "loss", run=run)["loss"])[1] == [1, np.inf, -np.inf, 7]
    assert list(tmp_path.iterdir()) == [place]
    assert as_lists(read(place, "loss", run=run)["loss"])[1] == [1, np.inf, -np.inf, 7]
    assert list(tmp_path.iterdir()) == [place]


def test_a_database_that_is_not_as_mlflow_made_it_is_refused(
    database_with_a_run: tuple[Path, str], tmp_path: Path
) -> None:
    place = tmp_path / "mlflow.db"
    shutil.copy(database_with_a_run[0], place)
    with contextlib.closing(sqlite3.connect(place)) as database:
        database.execute("drop table experiments")
    with pytest.raises(ValueError, match="cannot be read as MLflow's database: no such"):
        read(place, "loss")


def test_another_database_is_left_as_it_is(tmp_path: Path) -> None:
    other = tmp_path / "data.db"
    with contextlib.closing(sqlite3.connect(other)) as database:
        database.execute("create table samples (id)")
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.sqlite").write_text("text" * 1_000)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in (tmp_path, *files):
        with pytest.raises(ValueError, match="source must be a CSV file"):
            read(path, "loss")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_mlflows_database_is_found_beside_another(
    database_with_a_run: tuple[Path, str], tmp_path: Path
) -> None:
    place, run = database_with_a_run
    with contextlib.closing(sqlite3.connect(tmp_path / "data.db")) as database:
        database.execute("create table samples (id)")
    shutil.copy(place, tmp_path / "mlflow.db")
    assert len(read(tmp_path, "loss", run=run)["loss"].values) == 4


def test_metrics_csv_is_preferred_to_a_database(
    database_with_a_run: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copy(database_with_a_run[0], tmp_path / "a.db")
    (tmp_path / "metrics.csv").write_text("step,loss\n1,7\n")
    assert as_lists(read(tmp_path, "loss")["loss"]) == ([1], [7])


def test_a_resumed_run_in_mlflows_database_is_in_the_order_of_the_log(
    database_with_a_run: tuple[Path, str],
) -> None:
    from mlflow.tracking import MlflowClient

    place, run = database_with_a_run
    client = MlflowClient(tracking_uri=f"sqlite:///{place}")
    for time, step in enumerate((0, 1, 2, 1, 2, 3)):
        client.log_metric(run, "resumed", 10.0 * time, timestamp=time, step=step)
    expected = [0, 1, 2, 1, 2, 3], [0, 10, 20, 30, 40, 50]
    assert as_lists(read(place, "resumed", run=run)["resumed"]) == expected


def test_a_resumed_run_in_tensorboard_is_in_the_order_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for part, steps in enumerate(((0, 1, 2), (1, 2, 3))):
        name = f".{part}"  # two files of the same second would otherwise have one name
        with SummaryWriter(tmp_path, filename_suffix=name) as writer:  # type: ignore[no-untyped-call]
            for step in steps:
                writer.add_scalar("loss", 10 * part + step, step)  # type: ignore[no-untyped-call]
    assert as_lists(read(tmp_path, "loss")["loss"]) == ([0, 1, 2, 1, 2, 3], [0, 1, 2, 11, 12, 13])


@pytest.mark.parametrize("name", ["losses.csv", "losses.csv.gz"])
def test_any_csv_file_is_read(tmp_path: Path, name: str) -> None:
    text = "iteration,note,mse,loss\n2,b,2.5,\n1,a,inf,4\n2,c,3.5,5\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = read(path, "mse", "loss")
    assert as_lists(found["mse"]) == ([2, 1, 2], [2.5, np.inf, 3.5])
    assert as_lists(found["loss"]) == ([1, 2], [4, 5])


@pytest.mark.parametrize("reader", ["csv", "pandas"])
def test_a_csv_file_with_a_byte_order_mark_has_its_first_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    if reader == "pandas":
        pytest.importorskip("pandas")
        monkeypatch.setattr("lightning_alrc._telemetry.reading_csv.LARGE", 0)
    path = tmp_path / "from_excel.csv"
    path.write_text("step,loss\n100,4\n200,5\n", encoding="utf-8-sig")
    assert as_lists(read(path, "loss")["loss"]) == ([100, 200], [4, 5])


def test_a_large_compressed_csv_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    monkeypatch.setattr("lightning_alrc._telemetry.reading_csv.LARGE", 0)
    path = tmp_path / "losses.csv.gz"
    path.write_bytes(gzip.compress(b"step,loss\n4,1.5\n"))
    assert as_lists(read(path, "loss")["loss"]) == ([4], [1.5])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        read(path, "loss")


@pytest.mark.parametrize("name", ["Step", "STEP", "Global_Step", "Iteration"])
def test_the_step_is_found_in_any_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / "downloaded.csv"
    path.write_text(f"Wall time,{name},Value\n1.7e9,49,1.5\n1.8e9,99,2.5\n")
    found = read_run(path, lambda name: True)
    assert as_lists(found["Value"]) == ([49, 99], [1.5, 2.5])
    assert name not in found


def test_the_step_in_its_usual_case_is_preferred(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("trainer/global_step,Step,step,loss\n1,2,3,1.5\n")
    assert as_lists(read(path, "loss")["loss"]) == ([3], [1.5])


def test_without_a_step_rows_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("loss\n3\n\n5\n")
    assert as_lists(read(path, "loss")["loss"]) == ([0, 1], [3, 5])


def test_a_row_without_its_step_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("step,loss\n1,3\n,4\n")
    with pytest.raises(ValueError, match="the step of a row must be a number"):
        read(path, "loss")


def test_a_path_that_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; it must be a CSV file"):
        read(tmp_path / "none", "loss")
    (tmp_path / "notes.txt").write_text("loss")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="source must be a CSV file"):
            read(path, "loss")


def test_the_error_for_a_folder_of_runs_names_the_newest(tmp_path: Path) -> None:
    for version in (0, 1):
        logger = CSVLogger(tmp_path, "net", version)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finalize("success")
    with pytest.raises(ValueError, match=r"got '.*net', which has '.*net/version_1'"):
        read(tmp_path / "net", "loss")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    execute(
        "import pytest; from importlib.machinery import PathFinder; from pathlib import Path\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *more: "
        "None if name == 'tensorboard' else find(name, *more)\n"
        "from lightning_alrc._telemetry.reading_runs import read_run\n"
        "with pytest.raises(ImportError) as raised:\n"
        f"    read_run(Path({str(tmp_path)!r}), bool)\n"
        "assert \"tensorboard: pip install 'lightning-alrc[preview]'\" in str(raised.value)\n"
    )
