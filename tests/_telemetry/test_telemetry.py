"""What real loggers, monitors and dashboards get from a training."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_alrc.alrc as implementation
from lightning_alrc import ALRCCallback, plotting
from lightning_alrc._moments.bounds import BURN_IN
from lightning_alrc._telemetry import drawing, telemetry
from tests import nets
from tests.nets import BATCHES_IN_EPOCH, NAMED_NETS, NETS, SETTINGS, Net
from tests.offline_wandb import finished
from tests.reference import Reference

Fit = Callable[..., Any]


def reference_rows(seen: list[Tensor], every: int, prefix: str = "alrc/") -> list[dict[str, float]]:
    """The rows that ALRC must log. Each covers the next ``every`` losses of ``seen``."""
    reference, rows = Reference(**SETTINGS), []
    are_spikes: list[Any] = []
    for start in range(0, len(seen) - every + 1, every):
        chunk = [loss.double().numpy() for loss in seen[start : start + every]]
        clipped, scale = [], []
        for loss in chunk:
            are_spikes.append(loss > reference.bounds_at(0.0, 6.0)[1])
            for found, value in zip((clipped, scale), reference(loss), strict=True):
                found.append(value)
        row = {
            "loss": np.mean(chunk),
            "loss_clipped": np.mean(clipped),
            "scale": np.mean(scale),
            "clipped_fraction": np.mean(np.array(scale) < 1),
            "clipped_total": reference.clipped_total,
            "nonfinite_total": 0,
            "resets": 0,
            "mu1": reference.mu[0],
            "stddev": reference.stddev,
            "threshold": reference.bounds[1],
            "spike_score": np.mean(are_spikes),
            "spike_score_total": np.mean(are_spikes),
        }
        rows.append({prefix + key: float(value) for key, value in row.items()})
    return rows


def logging_net(namespace: str, *arguments: Any) -> Any:
    class Logging(NETS[namespace]):  # type: ignore[misc]
        """Logs a marker, so that Lightning's own rows show at which steps it logs."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("marker", float(batch_idx))
            return super().training_step(batch, batch_idx)

    return Logging(*arguments)


def csv_logger(namespace: str, folder: Path) -> Any:
    return nets.NAMESPACES[namespace].loggers.CSVLogger(folder, flush_logs_every_n_steps=1)


def csv_rows(logger: Any, key: str = "alrc/") -> dict[int, dict[str, float]]:
    """The rows with keys that start with ``key``, by step."""
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        values = {name: float(text) for name, text in row.items() if name.startswith(key) and text}
        if values:
            found.setdefault(int(row["step"]), {}).update(values)
    return found


# ---- rows


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("shape", ["scalar", "vector"])
# The namespace has nothing to do with the steps between rows.
@pytest.mark.parametrize(
    ("namespace", "every"), [("pytorch_lightning", 1), ("lightning.pytorch", 2)]
)
def test_rows_are_logged_whenever_lightning_logs_with_the_right_values(
    fit: Fit, tmp_path: Path, namespace: str, every: int, shape: str
) -> None:
    net, logger = logging_net(namespace, shape), csv_logger(namespace, tmp_path)
    fit(net, ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=every)
    rows = csv_rows(logger)
    assert list(rows) == list(csv_rows(logger, "marker")) == list(range(every - 1, 12, every))
    expected = reference_rows(net.seen, every)
    for row, values in zip(rows.values(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_rows_are_logged_whenever_lightning_logs_with_accumulation(
    fit: Fit, tmp_path: Path, namespace: str, every: int
) -> None:
    net, logger = logging_net(namespace, "vector"), csv_logger(namespace, tmp_path)
    fit(
        net,
        ALRCCallback(**SETTINGS),
        logger=logger,
        log_every_n_steps=every,
        accumulate_grad_batches=3,
    )
    rows = csv_rows(logger)
    assert list(rows) == sorted(set(csv_rows(logger, "marker")))
    for row, values in zip(rows.values(), reference_rows(net.seen, 3 * every), strict=True):
        assert row == pytest.approx(values, rel=1e-5)


def test_rows_are_logged_in_manual_optimization(fit: Fit, tmp_path: Path, namespace: str) -> None:
    net, logger = logging_net(namespace, "vector", "tensor", True), csv_logger(namespace, tmp_path)
    fit(net, ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=2)
    rows = csv_rows(logger)
    assert list(rows) == list(csv_rows(logger, "marker"))
    for row, values in zip(rows.values(), reference_rows(net.seen, 2), strict=True):
        assert row == pytest.approx(values, rel=1e-5)


def test_named_losses_have_rows_under_their_own_prefix(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    seen: dict[str, list[Tensor]] = {"first": [], "second": []}

    class Watching(NAMED_NETS[namespace]):  # type: ignore[misc]
        def alrc(self, loss: Tensor, name: str = "loss") -> Tensor:
            seen[name].append(loss.detach().clone())
            return super().alrc(loss, name)  # type: ignore[no-any-return]

    logger = csv_logger(namespace, tmp_path)
    fit(Watching("matrix"), logger=logger, log_every_n_steps=3)
    rows = list(csv_rows(logger).values())
    first = reference_rows(seen["first"], 3, "alrc/first/")
    second = reference_rows(seen["second"], 3, "alrc/second/")
    assert len(rows) == 4
    for row, values in zip(rows, zip(first, second, strict=True), strict=True):
        assert row == pytest.approx(values[0] | values[1], rel=1e-5)


def test_no_threshold_is_logged_before_there_is_one(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    logger = csv_logger(namespace, tmp_path)
    fit(NETS[namespace](), ALRCCallback(), logger=logger, log_every_n_steps=1, max_epochs=4)
    having = ["alrc/threshold" in row for row in csv_rows(logger).values()]
    burn_in = BURN_IN
    assert having == [step + 1 >= burn_in for step in range(4 * BATCHES_IN_EPOCH)]


def test_a_module_whose_losses_do_not_reach_alrc_has_no_row(fit: Fit, tmp_path: Path) -> None:
    class Direct(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.losses(batch).backward()

    class Logger(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            pytest.fail(f"it logs {metrics}")

    with pytest.warns(UserWarning, match=r"loss\.backward\(\) passes by ALRC"):
        fit(Direct(manual=True), ALRCCallback(), logger=Logger(tmp_path), log_every_n_steps=1)


@pytest.mark.parametrize("every", [5, 50])
def test_remaining_losses_have_a_row_at_the_last_step(
    fit: Fit, tmp_path: Path, namespace: str, every: int
) -> None:
    net, logger = logging_net(namespace, "vector"), csv_logger(namespace, tmp_path)
    callback = ALRCCallback(**SETTINGS)
    fit(net, callback, logger=logger, log_every_n_steps=every)
    rows = csv_rows(logger)
    assert list(rows) == [*range(every - 1, 12, every), 11]
    rest = 12 % every
    assert rows[11] == pytest.approx(reference_rows(net.seen, rest)[-1], rel=1e-5)
    assert rows[11]["alrc/loss"] == pytest.approx(np.mean(torch.stack(net.seen[-rest:]).numpy()))
    assert rows[11]["alrc/clipped_total"] == callback.losses["loss"].clipped_total.item()


def test_the_first_row_of_a_second_fit_has_no_earlier_losses(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    callback = ALRCCallback(**SETTINGS)
    for fold in ("first", "second"):
        net, logger = NETS[namespace]("vector"), csv_logger(namespace, tmp_path / fold)
        fit(net, callback, logger=logger, log_every_n_steps=5)
        mean = np.mean(torch.stack(net.seen[:5]).numpy())
        assert csv_rows(logger)[4]["alrc/loss"] == pytest.approx(mean)


def test_an_interrupted_fit_has_a_row_of_its_remaining_losses(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    class Failing(NETS[namespace]):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 8:
                raise RuntimeError("enough")

    net, logger = Failing("vector"), csv_logger(namespace, tmp_path)
    with pytest.raises(RuntimeError, match="enough"):
        fit(net, ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=5)
    rows = csv_rows(logger)
    assert list(rows) == [4, 7]
    mean = np.mean(torch.stack(net.seen[5:]).numpy())
    assert rows[7]["alrc/loss"] == pytest.approx(mean)


def test_a_device_that_is_lost_does_not_hide_the_error(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 8:
                monkeypatch.setattr(implementation.State, "copied_as_floats", lost)
                raise ValueError("enough")

    def lost(state: Any) -> Any:
        raise RuntimeError("CUDA error")

    logger = csv_logger("pytorch_lightning", tmp_path)
    with pytest.raises(ValueError, match="enough"):
        fit(Failing("vector"), ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=5)


class Uncomputable(torchmetrics.Metric):
    """A metric that cannot be computed, as one that has got no samples."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def update(self) -> None:
        pass

    def compute(self) -> Tensor:
        raise self.error("no samples")


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_metric_that_cannot_be_computed_hides_neither_row_nor_checkpoint(
    fit: Fit, tmp_path: Path, error: type[Exception]
) -> None:
    class Scored(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.score = Uncomputable(error)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.score.update()
            self.log("score", self.score, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Finalized(CSVLogger):
        def finalize(self, status: str) -> None:
            statuses.append(status)
            super().finalize(status)

    statuses: list[str] = []
    net, logger = Scored(), Finalized(tmp_path)
    callbacks = [ALRCCallback(**SETTINGS), OnExceptionCheckpoint(tmp_path, "rescued")]
    arguments: dict[str, Any] = {"log_every_n_steps": 4, "enable_checkpointing": True}
    with pytest.raises(error, match="no samples"):
        fit(net, *callbacks, logger=logger, **arguments)
    assert (tmp_path / "rescued.ckpt").is_file()
    assert statuses == ["failed"]
    assert [step for step, _ in written(logger)] == [3, 5]


def test_a_metric_that_is_updated_at_the_end_of_an_epoch_has_its_value(fit: Fit) -> None:
    class Scored(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.score = torchmetrics.MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("score", self.score, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.score.update(torch.tensor(3.0))

    trainer = fit(Scored(), ALRCCallback(**SETTINGS), max_epochs=1)
    assert trainer.callback_metrics["score"] == 3.0


def test_rows_have_the_same_epoch_as_lightnings(fit: Fit, tmp_path: Path, namespace: str) -> None:
    net, logger = logging_net(namespace), csv_logger(namespace, tmp_path)
    fit(net, ALRCCallback(), logger=logger, log_every_n_steps=4, max_epochs=3)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    epochs = {
        key: {row["step"]: row["epoch"] for row in rows if row[key]}
        for key in ("marker", "alrc/loss")
    }
    # The last row has the remaining losses, which are of the last epoch.
    assert epochs["alrc/loss"] == {**epochs["marker"], "17": "2"}
    assert set(epochs["marker"].values()) == {"0", "1", "2"}


# ---- the steps of rows


class StoppingWhileAccumulating(Net):
    """Ends the fit at the fifth batch, before all gradients of a step are accumulated."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.should_stop = batch_idx == 4
        return super().training_step(batch, batch_idx)


def written(logger: Any) -> list[tuple[int, float]]:
    """The step and the mean loss of each of ALRC's rows, in the order written."""
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]), float(row["alrc/loss"])) for row in rows if row["alrc/loss"]]


def means(seen: list[Tensor], *slices: slice) -> list[Any]:
    return [pytest.approx(np.mean(torch.stack(seen[part]).numpy())) for part in slices]


def test_a_fit_that_stops_while_accumulating_keeps_the_last_row(fit: Fit, tmp_path: Path) -> None:
    net, logger = StoppingWhileAccumulating("vector"), csv_logger("pytorch_lightning", tmp_path)
    fit(
        net,
        ALRCCallback(**SETTINGS),
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=4,
    )
    assert len(net.seen) == 5
    assert written(logger) == list(
        zip((0, 1), means(net.seen, slice(0, 4), slice(4, 5)), strict=True)
    )


@pytest.mark.parametrize("same_process", [True, False])
def test_a_resumed_fit_writes_no_second_row_at_a_step(
    fit: Fit, tmp_path: Path, same_process: bool
) -> None:
    callback, logger = ALRCCallback(**SETTINGS), csv_logger("pytorch_lightning", tmp_path)
    arguments: dict[str, Any] = {"logger": logger, "accumulate_grad_batches": 4}
    stopped = StoppingWhileAccumulating("vector")
    trainer = fit(stopped, callback, log_every_n_steps=1, **arguments)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    if not same_process:
        callback = ALRCCallback(**SETTINGS)
    steps_of_losses: list[int] = []

    class Resumed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps_of_losses.append(self.global_step)
            return super().training_step(batch, batch_idx)

    net, checkpoint = Resumed("vector"), tmp_path / "stopped.ckpt"
    fit(net, callback, ckpt_path=checkpoint, log_every_n_steps=1, max_epochs=3, **arguments)
    steps = [step for step, _ in written(logger)]
    assert steps == sorted(set(steps))
    assert steps[:3] == [0, 1, 2]
    # The losses of step 1, which has a row already, are in the row of step 2.
    assert steps_of_losses[0] == 1
    count = sum(step <= 2 for step in steps_of_losses)
    assert count > 4
    assert written(logger)[2][1] == means(net.seen, slice(0, count))[0]


def test_steps_that_are_trained_again_from_an_older_checkpoint_are_logged_again(
    fit: Fit, tmp_path: Path
) -> None:
    callback, logger = ALRCCallback(**SETTINGS), csv_logger("pytorch_lightning", tmp_path)
    trainer = fit(Net("vector"), callback, logger=logger, log_every_n_steps=2, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module)
    arguments: dict[str, Any] = {"ckpt_path": tmp_path / "old.ckpt", "log_every_n_steps": 2}
    fit(Net("vector"), callback, logger=logger, **arguments)
    assert [step for step, _ in written(logger)] == [1, 3, 5, 7, 9, 11, 7, 9, 11]


def test_rows_of_a_second_training_start_at_step_0(fit: Fit, tmp_path: Path) -> None:
    callback, logger = ALRCCallback(**SETTINGS), csv_logger("pytorch_lightning", tmp_path)
    for _ in range(2):
        fit(Net("vector"), callback, logger=logger, log_every_n_steps=6)
    assert [step for step, _ in written(logger)] == [5, 11, 5, 11]


@pytest.mark.parametrize("last_row", [-1, 2.0, "2", True])
def test_a_wrong_step_of_the_last_row_in_a_checkpoint_is_refused(last_row: Any) -> None:
    callback = ALRCCallback()
    state = callback.state_dict() | {"last_row": last_row}
    with pytest.raises(ValueError, match="'last_row' must be a whole number, 0 or above, or None"):
        callback.load_state_dict(state)


# ---- loggers


class ByKeyword(CSVLogger):
    """Takes arguments only by keyword, as Lightning gives them to a logger."""

    def log_metrics(self, *, metrics: Any, step: Any) -> None:  # type: ignore[override]
        super().log_metrics(metrics=metrics, step=step)


class OfItsOwnForm(CSVLogger):
    """Has another name for the argument ``metrics``."""

    def log_metrics(self, numbers: Any) -> None:  # type: ignore[override]
        pass


def test_loggers_are_called_as_lightning_calls_them(fit: Fit, tmp_path: Path) -> None:
    logger = ByKeyword(tmp_path, flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ALRC")
        fit(Net(), ALRCCallback(), logger=logger, log_every_n_steps=2)
    assert list(csv_rows(logger)) == [1, 3, 5, 7, 9, 11]


def test_a_logger_with_another_signature_gives_one_warning_and_others_get_each_row(
    fit: Fit, tmp_path: Path
) -> None:
    class AlsoOfItsOwnForm(OfItsOwnForm):
        pass

    good = csv_logger("pytorch_lightning", tmp_path)
    bad = [OfItsOwnForm(tmp_path / "bad"), AlsoOfItsOwnForm(tmp_path / "worse")]
    with pytest.warns(UserWarning, match="lost a row of ALRC's") as caught:
        fit(Net(), ALRCCallback(), logger=[bad[0], good, bad[1]], log_every_n_steps=2)
    lost = [str(each.message).split()[0] for each in caught if "lost a row" in str(each.message)]
    assert lost == ["OfItsOwnForm", "AlsoOfItsOwnForm"]
    assert list(csv_rows(good)) == [1, 3, 5, 7, 9, 11]


class WithoutAStep(CSVLogger):
    """Takes no step."""

    def log_metrics(self, metrics: Any) -> None:  # type: ignore[override]
        pass


class Finite(CSVLogger):
    """Refuses values that are not finite."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:  # type: ignore[override]
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError(f"not finite: {metrics}")
        super().log_metrics(metrics, step)


def test_a_logger_that_takes_no_step_gives_one_warning(fit: Fit, tmp_path: Path) -> None:
    good = csv_logger("pytorch_lightning", tmp_path)
    with pytest.warns(UserWarning, match="WithoutAStep lost a row of ALRC's") as caught:
        fit(Net(), ALRCCallback(), logger=[WithoutAStep(tmp_path), good], log_every_n_steps=2)
    assert len([each for each in caught if "ALRC" in str(each.message)]) == 1
    assert list(csv_rows(good)) == [1, 3, 5, 7, 9, 11]


def test_a_logger_that_refuses_nan_gets_every_row(fit: Fit, tmp_path: Path) -> None:
    """Rows have no NaN, whatever the losses are."""
    logger = Finite(tmp_path, flush_logs_every_n_steps=1)
    net = Troubled({step: float(value) for step, value in enumerate(["nan", "inf"] * 3)})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ALRC")
        fit(
            net,
            ALRCCallback(num_stddev=math.inf, nonfinite="skip"),
            logger=logger,
            log_every_n_steps=1,
        )
    assert list(csv_rows(logger)) == list(range(12))


def mlflow_logger(namespace: str, database: Path) -> Any:
    return nets.NAMESPACES[namespace].loggers.MLFlowLogger(
        tracking_uri=f"sqlite:///{database}",
        artifact_location=str(database.with_name("artifacts")),
    )


def mlflow_rows(logger: Any) -> dict[int, dict[str, float]]:
    """The rows of a run, by step."""
    rows: dict[int, dict[str, float]] = {}
    run = logger.experiment.get_run(logger.run_id)
    for name in run.data.metrics:
        for metric in logger.experiment.get_metric_history(logger.run_id, name):
            if name != "epoch":
                rows.setdefault(metric.step, {})[name] = metric.value
    return rows


def events_of(logger: Any) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(logger.log_dir, {"images": 0}).Reload()


def test_every_logger_gets_every_row(
    fit: Fit, tmp_path: Path, namespace: str, wandb_logger: Any, mlflow_database: Path
) -> None:
    pytest.importorskip("tensorboard")
    files = csv_logger(namespace, tmp_path)
    tensorboard = nets.NAMESPACES[namespace].loggers.TensorBoardLogger(tmp_path / "tb")
    wandb = wandb_logger(namespace)
    mlflow = mlflow_logger(namespace, mlflow_database)
    net, loggers = NETS[namespace]("vector"), [files, tensorboard, wandb, mlflow]
    fit(net, ALRCCallback(**SETTINGS), logger=loggers, log_every_n_steps=4)
    rows = dict(zip((3, 7, 11), reference_rows(net.seen, 4), strict=True))
    expected = {step: pytest.approx(row, rel=1e-5) for step, row in rows.items()}

    assert csv_rows(files) == expected
    assert mlflow_rows(mlflow) == expected

    events = events_of(tensorboard)
    for name in rows[3]:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({step: row[name] for step, row in rows.items()}, rel=1e-5)

    history = {
        row["trainer/global_step"]: {name: row[name] for name in rows[3]}
        for row in finished(wandb).history
        if "alrc/loss" in row
    }
    assert history == expected


def test_fast_dev_run_logs_nothing_and_does_not_warn(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    tensorboard = nets.NAMESPACES[namespace].loggers.TensorBoardLogger(tmp_path / "tb")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(ALRC|alert)")
        fit(
            NETS[namespace](),
            ALRCCallback(**SETTINGS, alerts=True, save_batches=True),
            logger=tensorboard,
            fast_dev_run=True,
            log_every_n_steps=1,
        )
    assert not (tmp_path / "tb").exists()


def test_only_rank_0_has_dashboards(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path)]
    for first in (True, False):
        trainer = SimpleNamespace(is_global_zero=first, loggers=loggers)
        assert len(telemetry.dashboards_of(trainer)) == first


# ---- callbacks that monitor a metric


class Monitor(Callback):
    """Keeps the metrics that callbacks can monitor after each step."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.found.append({name: metrics[name] for name in metrics if name.startswith("alrc/")})


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("has_logger", [True, False])
def test_callbacks_can_monitor_each_row(fit: Fit, tmp_path: Path, has_logger: bool) -> None:
    logger = csv_logger("pytorch_lightning", tmp_path) if has_logger else False
    net, monitor = logging_net("pytorch_lightning", "vector"), Monitor()
    # The monitor comes before ALRC in the list, so it finds the metrics of the previous step.
    callbacks = [monitor, ALRCCallback(**SETTINGS)]
    trainer = fit(net, *callbacks, logger=logger, log_every_n_steps=4, num_sanity_val_steps=0)
    rows = reference_rows(net.seen, 4)
    expected = [{}] * 4 + [rows[0]] * 4 + [rows[1]] * 4
    for found, row in zip(monitor.found, expected, strict=True):
        assert {name: each.item() for name, each in found.items()} == pytest.approx(row, rel=1e-5)
        assert all(each.shape == () and each.dtype == torch.float32 for each in found.values())
    after = {name: trainer.callback_metrics[name].item() for name in rows[2]}
    assert after == pytest.approx(rows[2], rel=1e-5)
    assert "marker" in trainer.callback_metrics


def with_validation(namespace: str) -> Any:
    class Validated(NETS[namespace]):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def val_dataloader(self) -> Any:
            return nets.loader()

    return Validated("vector")


@pytest.mark.parametrize("at", ["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("every", [1, 50])
def test_early_stopping_and_checkpoints_monitor_what_alrc_logs(
    fit: Fit, tmp_path: Path, namespace: str, every: int, at: str
) -> None:
    """This holds even if no epoch is long enough for a row."""
    callbacks = nets.NAMESPACES[namespace].callbacks
    at_epoch_end = at == "on_train_epoch_end"
    net = with_validation(namespace) if at == "on_validation_end" else NETS[namespace]("vector")
    stopping = callbacks.EarlyStopping(
        "alrc/clipped_total", patience=2, mode="min", check_on_train_epoch_end=at_epoch_end
    )
    checkpoint = callbacks.ModelCheckpoint(
        tmp_path,
        "{epoch}-{alrc/threshold:.3f}",
        monitor="alrc/threshold",
        save_top_k=-1,
        auto_insert_metric_name=False,
        save_on_train_epoch_end=at_epoch_end,
    )
    alrc = ALRCCallback(**SETTINGS)
    arguments: dict[str, Any] = {"log_every_n_steps": every, "enable_checkpointing": True}
    trainer = fit(net, stopping, checkpoint, alrc, max_epochs=9, **arguments)
    assert trainer.current_epoch == 3  # after the first epoch, clipped_total only rises
    assert float(checkpoint.best_model_score) > 0
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_losses_that_are_monitored_early_are_in_the_first_row(fit: Fit, tmp_path: Path) -> None:
    net, logger = Net("vector"), csv_logger("pytorch_lightning", tmp_path)
    found: list[float] = []

    class AtEpochEnd(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            found.append(trainer.callback_metrics["alrc/loss"].item())

    fit(net, ALRCCallback(**SETTINGS), AtEpochEnd(), logger=logger, log_every_n_steps=10)
    assert found == means(net.seen, slice(0, 6), slice(0, 10))
    assert written(logger)[0][1] == means(net.seen, slice(0, 10))[0]


class Improving(Net):
    """Its losses are 1,000, 999, 998 and so on."""

    def losses(self, batch: Any) -> Tensor:
        loss = super().losses(batch)
        return loss / loss.detach() * (1000 - self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Validated(Improving):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def val_dataloader(self) -> Any:
        return DataLoader(nets.dataset(), batch_size=24)


class Readings(Callback):
    """Keeps what callbacks find when validations and epochs end."""

    def __init__(self, metric: str = "alrc/loss") -> None:
        self.metric = metric
        self.at_validations: list[float] = []
        self.at_epochs: list[float] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.at_validations.append(trainer.callback_metrics[self.metric].item())

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.at_epochs.append(trainer.callback_metrics[self.metric].item())


def mean_of_steps(first: int, last: int) -> Any:
    """The mean loss of :class:`Improving` over the steps from ``first`` to ``last``."""
    return pytest.approx(1000 - (first + last) / 2)


def test_early_stopping_continues_while_the_loss_falls_in_epochs_without_a_row(fit: Fit) -> None:
    """A row is logged every 24 steps, which is every fourth epoch."""
    readings, stopping = Readings(), EarlyStopping("alrc/loss", patience=2)
    arguments: dict[str, Any] = {"log_every_n_steps": 24, "max_epochs": 9}
    trainer = fit(Improving(), ALRCCallback(), stopping, readings, **arguments)
    assert trainer.current_epoch == 9
    lasts = [6 * epoch + 5 for epoch in range(9)]
    # Each reading is the mean of the losses since the last row. If an epoch ends with a new row,
    # the reading is that row's mean, over 24 losses.
    assert readings.at_epochs == [mean_of_steps(last // 24 * 24, last) for last in lasts]


def test_early_stopping_continues_while_the_loss_falls_between_validations(fit: Fit) -> None:
    readings = Readings()
    stopping = EarlyStopping("alrc/loss", patience=1, check_on_train_epoch_end=False)
    trainer = fit(
        Validated(),
        ALRCCallback(),
        stopping,
        readings,
        batches=DataLoader(nets.dataset(), batch_size=1),
        log_every_n_steps=10,
        val_check_interval=4,
        max_epochs=1,
    )
    assert trainer.global_step == 24
    parts = [(0, 3), (0, 7), (0, 9), (10, 15), (10, 19), (20, 23)]
    assert readings.at_validations == [mean_of_steps(*part) for part in parts]
    assert readings.at_epochs == readings.at_validations[-1:]


def test_a_scheduler_that_steps_between_rows_reads_the_losses_since_the_last_row(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []

    class Scheduled(Improving):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            config = {"scheduler": plateau, "interval": "step", "frequency": 4}
            return [optimizer], [config | {"monitor": "alrc/loss"}]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            read.append(metric.item())

    taken: list[int] = []
    original = telemetry.Telemetry.publish_early

    def publish_early(self: Any, trainer: Any, losses: Any) -> None:
        taken.append(trainer.fit_loop.epoch_loop.batch_idx)
        original(self, trainer, losses)

    monkeypatch.setattr(telemetry.Telemetry, "publish_early", publish_early)
    batches = DataLoader(nets.dataset(), batch_size=1)
    fit(Scheduled(), ALRCCallback(), batches=batches, log_every_n_steps=8, max_epochs=1)
    parts = [(0, 3), (0, 7), (8, 11), (8, 15), (16, 19), (16, 23)]
    assert read == [mean_of_steps(*part) for part in parts]
    assert taken == [3, 7, 11, 15, 19, 23, 23]  # the last is at the end of the epoch


def test_a_validation_at_the_end_of_an_epoch_leaves_the_row_to_the_epochs_end(fit: Fit) -> None:
    readings = Readings()
    fit(Validated(), ALRCCallback(), readings, log_every_n_steps=5)
    assert readings.at_epochs == [mean_of_steps(0, 4), mean_of_steps(5, 9)]
    assert readings.at_validations == readings.at_epochs


@pytest.mark.parametrize("every", [1, 50])
def test_checkpoints_can_monitor_a_threshold_that_is_still_infinite(
    fit: Fit, tmp_path: Path, every: int
) -> None:
    """The first epoch has 6 losses, and ALRC has no threshold before it has had 10 losses."""
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="alrc/threshold")
    readings, logger = Readings("alrc/threshold"), csv_logger("pytorch_lightning", tmp_path)
    arguments: dict[str, Any] = {"enable_checkpointing": True, "log_every_n_steps": every}
    fit(Validated(), ALRCCallback(), checkpoint, readings, logger=logger, **arguments)
    assert readings.at_epochs[0] == math.inf
    assert readings.at_epochs[1] == pytest.approx(float(checkpoint.best_model_score))
    assert math.isfinite(readings.at_epochs[1])
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = [row.get("alrc/threshold") for row in csv.DictReader(file)]
    assert "inf" not in logged  # no logger gets it


@pytest.mark.parametrize("every", [1, 50])
def test_metrics_that_have_no_value_yet_are_nan_for_callbacks(fit: Fit, every: int) -> None:
    net = Troubled(dict.fromkeys(range(12), math.nan))
    callback = ALRCCallback(nonfinite="skip")
    readings = [Readings(f"alrc/{name}") for name in telemetry.VALUES_BEFORE_THE_FIRST]
    trainer = fit(net, callback, *readings, log_every_n_steps=every, max_epochs=3)
    firsts = {reading.metric: reading.at_epochs[:2] for reading in readings}
    assert firsts.pop("alrc/threshold") == [math.inf, math.inf]
    for values in firsts.values():
        assert values == [pytest.approx(math.nan, nan_ok=True)] * 2
    assert trainer.callback_metrics["alrc/loss"] == 1.0


def test_a_last_loss_that_is_not_finite_stops_no_fit(fit: Fit) -> None:
    """Callbacks still find the last finite value. At a NaN, EarlyStopping would stop the fit."""
    net = Troubled({5: math.nan, 11: math.nan})
    stopping = EarlyStopping("alrc/loss", patience=9)
    callback = ALRCCallback(nonfinite="skip")
    trainer = fit(net, callback, stopping, log_every_n_steps=1, max_epochs=4)
    assert trainer.current_epoch == 4


def test_a_scheduler_can_monitor_what_alrc_logs(fit: Fit) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = self.optimizer()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", patience=0)
            scheduler = {"scheduler": plateau, "monitor": "alrc/clipped_total"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    trainer = fit(Scheduled("vector"), ALRCCallback(**SETTINGS))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


# ---- charts


@pytest.mark.usefixtures("charts_of_short_fits")
def test_tensorboard_has_the_charts_as_a_figure(fit: Fit, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = nets.NAMESPACES["lightning.pytorch"].loggers.TensorBoardLogger(tmp_path / "tb")
    fit(NAMED_NETS["lightning.pytorch"]("matrix"), logger=logger, log_every_n_steps=1)
    (image,) = events_of(logger).Images("alrc/charts")
    assert image.step == 12
    assert image.encoded_image_string.startswith(b"\x89PNG")
    # The charts of two losses, one above the other, readable without zooming in.
    assert (image.width, image.height) == (1200, 2 * 750 + 100)


@pytest.mark.usefixtures("charts_of_short_fits")
def test_charts_are_drawn_during_a_training_at_growing_intervals(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(telemetry, "FIRST_SHOWN_AFTER", 5.0)

    logger = nets.NAMESPACES["pytorch_lightning"].loggers.TensorBoardLogger(tmp_path / "tb")
    net = Clocked(monkeypatch)
    fit(net, ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=1, max_epochs=4)
    images = events_of(logger).Images("alrc/charts")
    assert [image.step for image in images] == [5, 10, 20, 24]


class Clocked(Net):
    """Sets the clock so that each step takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("vector")
        self.clock = monkeypatch
        self.clock.setattr(telemetry, "monotonic", lambda: 1000.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        now = float(1000 + self.trainer.global_step)
        self.clock.setattr(telemetry, "monotonic", lambda: now)


@pytest.mark.parametrize(("epochs", "drawn"), [(10, []), (11, [66])])
def test_a_fit_shorter_than_a_minute_has_no_charts(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, drawn: list[int]
) -> None:
    logger, net = TensorBoardLogger(tmp_path), Clocked(monkeypatch)
    fit(net, ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=1, max_epochs=epochs)
    events = events_of(logger)
    images = events.Images("alrc/charts") if "alrc/charts" in events.Tags()["images"] else []
    assert [image.step for image in images] == drawn


def test_charts_can_be_switched_off(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb_logger: Any
) -> None:
    tensorboard, wandb, net = TensorBoardLogger(tmp_path), wandb_logger(), Clocked(monkeypatch)
    callback = ALRCCallback(**SETTINGS, charts=False)
    fit(net, callback, logger=[tensorboard, wandb], log_every_n_steps=1, max_epochs=51)
    assert events_of(tensorboard).Tags()["images"] == []
    run = finished(wandb)
    assert not [row for row in run.history if "alrc/charts.path" in row]
    # The table is shown nevertheless.
    steps = [row["trainer/global_step"] for row in run.history if "alrc/spikes.path" in row]
    assert steps[0] == 300


def test_charts_must_be_true_or_false() -> None:
    with pytest.raises(TypeError, match="charts must be True or False, got 'off'"):
        ALRCCallback(charts="off")  # type: ignore[arg-type]


class Broken(TensorBoardLogger):
    """It cannot show a figure."""

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_figure = None
        return writer


@pytest.mark.usefixtures("charts_of_short_fits")
def test_charts_that_fail_give_one_warning(fit: Fit, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="could not draw on the Broken") as caught:
        trainer = fit(
            NETS["pytorch_lightning"](),
            ALRCCallback(**SETTINGS),
            logger=Broken(tmp_path),
            log_every_n_steps=1,
        )
    assert trainer.global_step == 12
    assert len([each for each in caught if "could not draw" in str(each.message)]) == 1


@pytest.mark.usefixtures("charts_of_short_fits")
def test_charts_that_fail_in_another_fit_give_another_warning(fit: Fit, tmp_path: Path) -> None:
    callback = ALRCCallback(**SETTINGS)
    for fold in ("first", "second"):
        with pytest.warns(UserWarning, match="could not draw on the Broken"):
            fit(Net(), callback, logger=Broken(tmp_path / fold), log_every_n_steps=1)


@pytest.mark.usefixtures("charts_of_short_fits")
def test_charts_have_no_rows_of_earlier_fits(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def noted(rows: Any, *more: Any, **options: Any) -> Any:
        drawn.append(len(list(rows)))
        return Figure()

    monkeypatch.setattr(plotting, "draw_charts", noted)
    callback = ALRCCallback(**SETTINGS)
    for fold in ("first", "second"):
        logger = TensorBoardLogger(tmp_path / fold)
        fit(Net(), callback, logger=logger, log_every_n_steps=2)
    assert drawn == [6, 6]


@pytest.mark.usefixtures("charts_of_short_fits")
def test_charts_are_drawn_if_nothing_was_clipped(fit: Fit, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ALRC")
        fit(Net(), ALRCCallback(num_stddev=1e9), logger=logger, log_every_n_steps=2)
    assert len(events_of(logger).Images("alrc/charts")) == 1


@pytest.mark.usefixtures("charts_of_short_fits")
def test_without_matplotlib_nothing_is_drawn_and_no_warning_given(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    monkeypatch.setattr(plotting, "draw_charts", lambda *_, **__: pytest.fail("they are drawn"))
    logger = TensorBoardLogger(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ALRC")
        fit(Net(), ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=2)


# ---- warnings


def long_run(fit: Fit, *callbacks: Any, net: Any, steps: int, **kwargs: Any) -> Any:
    """Some hundred steps of a net."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(steps, size, generator=generator) for size in (3, 2)]
    batches = DataLoader(TensorDataset(*tensors), batch_size=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*limit on the step size")
        return fit(net, *callbacks, batches=batches, max_epochs=1, **kwargs)


def rising(namespace: str = "pytorch_lightning") -> Any:
    """A net whose losses rise faster than the threshold of an ALRC with ``LIMITED``."""

    class Rising(NETS[namespace]):  # type: ignore[misc]
        def losses(self, batch: Any) -> Tensor:
            loss = super().losses(batch)
            return loss / loss.detach() * 1.02**self.trainer.global_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return Rising()


LIMITED: dict[str, Any] = {"mu1_start": 1.0, "mu2_start": 1.01}


def test_a_step_size_limiter_is_shown_on_dashboards(
    fit: Fit,
    tmp_path: Path,
    namespace: str,
    wandb_logger: Any,
    mlflow_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(telemetry, "STEPS_BEFORE_WARNING", 200)
    tensorboard = nets.NAMESPACES[namespace].loggers.TensorBoardLogger(tmp_path / "tb")
    wandb, mlflow = wandb_logger(namespace), mlflow_logger(namespace, mlflow_database)
    loggers = [tensorboard, wandb, mlflow]
    long_run(fit, ALRCCallback(**LIMITED), net=rising(namespace), steps=300, logger=loggers)
    message = "a limit on the step size rather than a guard"

    (event,) = events_of(tensorboard).Tensors("alrc/warning/text_summary")
    assert message in event.tensor_proto.string_val[0].decode()

    assert message in mlflow.experiment.get_run(mlflow.run_id).data.tags["alrc/warning"]

    run = finished(wandb)
    (row,) = (row for row in run.history if "alrc/warning.path" in row)
    assert row["trainer/global_step"] == event.step
    assert message in (run.folder / "files" / row["alrc/warning.path"]).read_text()


# ---- alerts


def test_alerts_are_sent_by_weights_and_biases_if_asked_for(fit: Fit, wandb_logger: Any) -> None:
    for alerts, expected in ((False, 0), (True, 1), ({"hours": 0.0}, 2)):
        logger = wandb_logger()
        callback = ALRCCallback(**LIMITED, alerts=alerts)  # type: ignore[arg-type]
        long_run(fit, callback, net=rising(), steps=300, logger=logger)
        alerts_sent = finished(logger).of("alert")
        sent = [each for each in alerts_sent if "diverge" not in each["title"]]
        assert len(sent) == expected
        if alerts:  # the losses rise from the first step to the last
            levels = {each["title"]: each["level"] for each in alerts_sent}
            assert levels["ALRC: losses diverge: loss"] == "ERROR"
        for alert in sent:
            assert alert["title"] == "ALRC: many losses are clipped: loss"
            assert alert["level"] == "WARN"  # ALRC limits the step size
            assert "Raise num_stddev" in alert["text"]


class Troubled(Net):
    """Its losses are 1, except those in ``troubles``, by step."""

    def __init__(self, troubles: dict[int, float]) -> None:
        super().__init__()
        self.troubles = troubles

    def losses(self, batch: Any) -> Tensor:
        loss = super().losses(batch)
        return loss / loss.detach() * self.troubles.get(self.trainer.global_step, 1.0)


@pytest.mark.parametrize(
    ("troubles", "titles"),
    [
        ({500: 1e6}, []),  # after a short calm
        (
            {500: float("nan"), 600: float("inf"), 1100: 1e6},
            [
                "ALRC: a loss is not finite: loss",
                "ALRC: a loss spiked: loss",
                "ALRC: a spike comes from the data: loss",
            ],
        ),
    ],
    ids=["early spike", "not finite, and a spike"],
)
def test_each_kind_of_event_sends_its_alert(
    fit: Fit, wandb_logger: Any, troubles: dict[int, float], titles: list[str]
) -> None:
    logger, callback = wandb_logger(), ALRCCallback(alerts=True, nonfinite="skip")
    long_run(fit, callback, net=Troubled(troubles), steps=1150, logger=logger)
    alerts = finished(logger).of("alert")
    assert [alert["title"] for alert in alerts] == titles
    for alert in alerts:
        assert alert["level"] == ("ERROR" if "not finite" in alert["title"] else "INFO")


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_a_loss_that_is_not_finite_at_the_end_sends_an_alert(
    fit: Fit, wandb_logger: Any, nonfinite: Any
) -> None:
    logger, callback = wandb_logger(), ALRCCallback(alerts=True, nonfinite=nonfinite)
    ended = pytest.raises(FloatingPointError) if nonfinite == "raise" else nullcontext()
    with ended:
        fit(Troubled({10: float("nan")}), callback, logger=logger)
    run = finished(logger)
    assert [alert["title"] for alert in run.of("alert")] == ["ALRC: a loss is not finite: loss"]
    assert [row["alrc/nonfinite_total"] for row in run.history if "alrc/loss" in row][-1] > 0


def test_a_second_fit_in_the_same_hour_sends_no_second_alert(fit: Fit, wandb_logger: Any) -> None:
    logger, callback = wandb_logger(), ALRCCallback(**LIMITED, alerts=True)
    for _ in range(2):
        long_run(fit, callback, net=rising(), steps=300, logger=logger)
    titles = [alert["title"] for alert in finished(logger).of("alert")]
    assert sorted(titles) == ["ALRC: losses diverge: loss", "ALRC: many losses are clipped: loss"]


def test_alerts_without_weights_and_biases_are_warned_of(fit: Fit) -> None:
    with pytest.warns(UserWarning, match="alerts are sent by a WandbLogger"):
        fit(NETS["pytorch_lightning"](), ALRCCallback(alerts=True))
