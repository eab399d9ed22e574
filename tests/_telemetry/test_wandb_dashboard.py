"""What a real offline W&B run holds of a training, read back by wandb's own reader."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_alrc import ALRCCallback, ALRCMixin
from lightning_alrc._telemetry.wandb_dashboard import SUMMARIES
from tests._telemetry.test_pictures import HALVES
from tests.nets import NAMED_NETS, NETS, SETTINGS, callback_of
from tests.offline_wandb import OfflineRun, finished

Fit = Callable[..., Any]


@pytest.fixture
def run(fit: Fit, namespace: str, wandb_logger: Any) -> OfflineRun:
    logger = wandb_logger(namespace)
    fit(NETS[namespace](), ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=2)
    return finished(logger)


def test_metrics_are_defined_over_the_step_with_summaries(run: OfflineRun) -> None:
    for metric, summary in SUMMARIES.items():
        defined = run.metrics[f"alrc/{metric}"]
        assert defined["step_metric"] == "trainer/global_step"
        assert {kind for kind, on in defined["summary"].items() if on} == set(summary.split(","))
    losses = [row["alrc/loss"] for row in run.history if "alrc/loss" in row]
    assert run.summary["alrc/loss"]["max"] == max(losses)
    assert run.summary["alrc/loss"]["mean"] == pytest.approx(sum(losses) / len(losses))
    logged = {key for row in run.history for key in row if key.startswith("alrc/")}
    assert {f"alrc/{metric}" for metric in SUMMARIES} <= logged


def test_all_settings_are_in_the_config(fit: Fit, namespace: str, wandb_logger: Any) -> None:
    others = {
        "nonfinite": "skip",
        "on_spike": "clip",
        "ledger": False,
        "reset_on_lr_drop": 0.5,
        "record": 7,
        "save_batches": 2,
        "alerts": {"hours": 3.0},
    }
    logger = wandb_logger(namespace)
    fit(NETS[namespace](), ALRCCallback(**SETTINGS, **others), logger=logger, log_every_n_steps=2)
    found = finished(logger).config["alrc"]
    found = found.get("value", found)
    of_loss = ALRCCallback(**SETTINGS).losses.get_or_add("loss").settings
    assert found == {**of_loss, **others, "losses": {"loss": of_loss}}
    named = {name for name in inspect.signature(ALRCCallback).parameters if name != "losses"}
    assert named - {"sample_ids", "render"} == set(of_loss) | set(others)


def test_each_named_loss_is_described(fit: Fit, namespace: str, wandb_logger: Any) -> None:
    logger = wandb_logger(namespace)
    fit(NAMED_NETS[namespace]("matrix"), logger=logger, log_every_n_steps=2)
    run = finished(logger)
    assert {"alrc/first/threshold", "alrc/second/threshold"} <= set(run.metrics)
    config = run.config["alrc"]
    assert set(config.get("value", config)["losses"]) == {"first", "second"}


def test_settings_are_known_before_the_first_loss(
    fit: Fit, namespace: str, wandb_logger: Any
) -> None:
    class Failing(NETS[namespace]):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("enough")

    logger = wandb_logger(namespace)
    with pytest.raises(RuntimeError, match="enough"):
        fit(Failing(), ALRCCallback(num_stddev=2), logger=logger)
    config = finished(logger).config["alrc"]
    config = config.get("value", config)
    assert config["num_stddev"] == 2
    assert not config.get("losses")  # an empty one is left out by some of wandb's releases


def test_names_that_are_met_one_after_another_are_described_once_each(
    fit: Fit, namespace: str, wandb_logger: Any
) -> None:
    class Tasks(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.alrc(self.losses(batch).mean(), f"task{self.global_step}")

    logger = wandb_logger(namespace)
    fit(Tasks(), logger=logger, log_every_n_steps=1)
    run = finished(logger)
    config = run.config["alrc"]
    assert len(config.get("value", config)["losses"]) == 12
    names = [each["name"] for each in run.of("metric") if each.get("name", "").endswith("/mu1")]
    assert sorted(names) == sorted(f"alrc/task{step}/mu1" for step in range(12))


def test_a_name_that_is_met_last_leaves_the_settings_of_the_others(
    fit: Fit, namespace: str, wandb_logger: Any
) -> None:
    class Last(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            name = "last" if self.global_step == 11 else "usual"
            return self.alrc(self.losses(batch).mean(), name)

    logger = wandb_logger(namespace)
    fit(Last(), logger=logger, log_every_n_steps=11)
    config = finished(logger).config["alrc"]
    assert set(config.get("value", config)["losses"]) == {"usual", "last"}


@pytest.mark.parametrize("prefix", ["", "exp-1"])
def test_names_with_dots_and_prefixes_have_summaries(
    fit: Fit, namespace: str, wandb_logger: Any, prefix: str
) -> None:
    class Dotted(ALRCMixin, NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.alrc(self.losses(batch).mean(), "a.b")

    logger = wandb_logger(namespace, prefix=prefix)
    fit(Dotted(), logger=logger, log_every_n_steps=1)
    run = finished(logger)
    name = f"{prefix}-alrc/a.b/loss" if prefix else "alrc/a.b/loss"
    losses = [row[name] for row in run.history if name in row]
    assert len(losses) == 12
    assert run.summary[name]["max"] == max(losses)


def table_of(run: OfflineRun) -> dict[str, Any]:
    (path,) = (row["alrc/spikes.path"] for row in run.history if "alrc/spikes.path" in row)
    table: dict[str, Any] = json.loads((run.folder / "files" / path).read_text())
    return table


def test_spikes_end_up_in_one_table(fit: Fit, namespace: str, wandb_logger: Any) -> None:
    logger = wandb_logger(namespace)
    net = NETS[namespace]("vector")
    callback = callback_of(fit(net, ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=2))
    table = table_of(finished(logger))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["loss"] for row in rows] == [spike.loss for spike in callback.spikes]
    assert [row["sample"] for row in rows] == [spike.sample for spike in callback.spikes]
    assert "image" not in table["columns"]
    assert len(rows) > 3


def test_a_table_shows_what_render_returns(fit: Fit, wandb_logger: Any) -> None:
    """Each picture is half of white, whatever form it comes in."""
    logger, pictures = wandb_logger(), cycle(HALVES)
    callback = ALRCCallback(**SETTINGS, render=lambda spike: next(pictures))
    fit(NETS["pytorch_lightning"]("matrix"), callback, logger=logger)
    run = finished(logger)
    table = table_of(run)
    assert table["columns"][-1] == "image"
    assert all(row[-1] is not None for row in table["data"])
    assert len(callback.spikes) >= len(HALVES)
    for artifact in run.of("artifact"):
        for file in artifact["manifest"]["contents"]:
            if file["path"].endswith(".png"):
                pixels = np.asarray(Image.open(run.folder.parent.parent / file["local_path"]))
                assert pixels.shape[:2] == (4, 5)
                assert set(pixels.flatten().tolist()) == {128}


def test_a_render_that_fails_costs_one_warning_and_no_other_picture(
    fit: Fit, wandb_logger: Any
) -> None:
    def render(spike: Any) -> Any:
        if spike.step % 2:
            raise OSError("no such image")
        return torch.full((3, 4, 5), 0.5)

    callback, logger = ALRCCallback(**SETTINGS, render=render), wandb_logger()
    with pytest.warns(UserWarning, match="has no picture, as render.*no such image") as caught:
        fit(NETS["pytorch_lightning"]("vector"), callback, logger=logger)
    assert len([each for each in caught if "no picture" in str(each.message)]) == 1
    table = table_of(finished(logger))
    step, image = table["columns"].index("step"), table["columns"].index("image")
    found = {(row[step] % 2 == 1, row[image] is None) for row in table["data"]}
    assert found == {(False, False), (True, True)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_broken_off_has_table_and_charts(
    fit: Fit, namespace: str, wandb_logger: Any, error: type[BaseException]
) -> None:
    class Failing(NETS[namespace]):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 8:
                raise error("enough")

    callback, logger = ALRCCallback(**SETTINGS), wandb_logger(namespace)
    with pytest.raises((error, SystemExit)):
        fit(Failing("vector"), callback, logger=logger, log_every_n_steps=2)
    run = finished(logger)
    assert len(table_of(run)["data"]) == len(callback.spikes) > 3
    (row,) = (row for row in run.history if "alrc/charts.path" in row)
    assert row["trainer/global_step"] == 8


def test_a_run_without_spikes_has_no_table(fit: Fit, wandb_logger: Any) -> None:
    logger = wandb_logger()
    fit(NETS["pytorch_lightning"](), ALRCCallback(num_stddev=1e9), logger=logger)
    assert not any("alrc/spikes.path" in row for row in finished(logger).history)


def test_render_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="render must be a function or None, got 'image'"):
        ALRCCallback(render="image")  # type: ignore[arg-type]
