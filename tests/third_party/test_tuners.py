"""Packages that read ``trainer.callback_metrics``: they find what ALRC logs, without a logger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_alrc import ALRCCallback
from tests import nets
from tests.nets import SETTINGS, Net

Fit = Callable[..., Any]


class Validated(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def val_dataloader(self) -> Any:
        return nets.loader()


def test_optuna_prunes_by_what_alrc_logs(fit: Fit) -> None:
    optuna = pytest.importorskip("optuna")
    integration = pytest.importorskip("optuna_integration")
    reported: list[dict[int, float]] = []

    def objective(trial: Any) -> float:
        pruning = integration.PyTorchLightningPruningCallback(trial, "alrc/loss")
        trainer = fit(Validated("vector"), pruning, ALRCCallback(**SETTINGS), log_every_n_steps=6)
        reported.append(trial.study.trials[trial.number].intermediate_values)
        return float(trainer.callback_metrics["alrc/loss"])

    pruner = optuna.pruners.PercentilePruner(1.0, n_startup_trials=1, n_warmup_steps=0)
    study = optuna.create_study(pruner=pruner)
    study.optimize(objective, n_trials=2)
    assert list(reported[0]) == [0, 1]
    assert study.trials[0].value == pytest.approx(reported[0][1])
    assert study.trials[0].value < reported[0][0]


def test_mlflows_autolog_logs_what_alrc_logs(
    fit: Fit, tmp_path: Path, mlflow_database: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.pytorch")
    mlflow.set_tracking_uri(f"sqlite:///{mlflow_database}")
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("alrc", artifact_location=str(tmp_path))
    )
    mlflow.pytorch.autolog(log_models=False, checkpoint=False)
    try:
        with mlflow.start_run() as run:
            trainer = fit(Net("vector"), ALRCCallback(**SETTINGS), log_every_n_steps=2)
    finally:
        mlflow.pytorch.autolog(disable=True)
    logged = mlflow.get_run(run.info.run_id).data.metrics
    for name in ("alrc/loss", "alrc/threshold", "alrc/clipped_total"):
        assert logged[name] == pytest.approx(trainer.callback_metrics[name].item())


def trained_by_ray(config: dict[str, Any]) -> None:
    """A trial, in a process of Ray's."""
    from pytorch_lightning import Trainer
    from ray.tune.integration.pytorch_lightning import TuneReportCallback

    report = TuneReportCallback({"clipped": "alrc/clipped_total"}, on="train_epoch_end")
    Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ALRCCallback(**(SETTINGS | config)), report],
    ).fit(Net("vector"))


def test_ray_tune_reports_what_alrc_logs(tmp_path: Path) -> None:
    """The epochs are shorter than ``log_every_n_steps``."""
    ray = pytest.importorskip("ray")
    tune = pytest.importorskip("ray.tune")
    root = str(Path(__file__).parents[2])
    ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        results = tune.Tuner(
            trained_by_ray,
            param_space={"num_stddev": tune.grid_search([0.5, 100.0])},
            run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    clipped = {each.config["num_stddev"]: each.metrics["clipped"] for each in results}
    assert clipped[100.0] == 0 < clipped[0.5]
    assert all(each.metrics["training_iteration"] == 3 for each in results)
