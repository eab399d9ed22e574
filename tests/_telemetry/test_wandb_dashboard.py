"""What a real offline W&B run has of a training, read back by wandb's own reader."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback

from lightning_alrc import ALRCCallback, ALRCMixin, plot, replay
from lightning_alrc._telemetry import telemetry
from lightning_alrc._telemetry.reading import read
from lightning_alrc._telemetry.wandb_dashboard import SUMMARIES
from lightning_alrc.spikes import read_spikes
from tests._telemetry.test_pictures import HALVES
from tests._telemetry.test_telemetry import Clocked
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
        "charts": False,
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
    assert not config.get("losses")  # some releases of wandb leave out an empty entry


def test_names_that_occur_one_after_another_are_described_once_each(
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


def test_a_name_that_occurs_last_leaves_the_settings_of_the_others(
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
    """Each picture is the same grey, in different forms."""
    logger, pictures = wandb_logger(), cycle(HALVES)
    callback = ALRCCallback(**SETTINGS, render=lambda spike: next(pictures))
    fit(NETS["pytorch_lightning"]("matrix"), callback, logger=logger)
    run = finished(logger)
    table = table_of(run)
    assert table["columns"][-1] == "image"
    assert all(row[-1] is not None for row in table["data"])
    assert len(callback.spikes) >= len(HALVES)
    files = [file for each in run.of("artifact") for file in each["manifest"]["contents"]]
    images = [Path(file["local_path"]) for file in files if file["path"].endswith(".png")]
    assert images
    for image in images:
        pixels = np.asarray(Image.open(run.folder.parent.parent / image))
        assert pixels.shape[:2] == (4, 5)
        assert set(pixels.flatten().tolist()) == {128}


def test_a_render_that_fails_gives_one_warning_and_the_other_pictures_are_shown(
    fit: Fit, wandb_logger: Any
) -> None:
    def render(spike: Any) -> Any:
        if spike.step % 2:
            raise OSError("no such image")
        return torch.full((3, 4, 5), 0.5)

    callback, logger = ALRCCallback(**SETTINGS, render=render), wandb_logger()
    with pytest.warns(UserWarning, match="because render failed.*no such image") as caught:
        fit(NETS["pytorch_lightning"]("vector"), callback, logger=logger)
    assert len([each for each in caught if "no picture" in str(each.message)]) == 1
    table = table_of(finished(logger))
    step, image = table["columns"].index("step"), table["columns"].index("image")
    found = {(row[step] % 2 == 1, row[image] is None) for row in table["data"]}
    assert found == {(False, False), (True, True)}


@pytest.mark.usefixtures("charts_of_short_fits")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_has_table_and_charts(
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


def test_a_run_without_spikes_has_no_table_and_no_artifact(fit: Fit, wandb_logger: Any) -> None:
    logger = wandb_logger()
    callback = ALRCCallback(num_stddev=1e9, save_batches=True)
    fit(NETS["pytorch_lightning"](), callback, logger=logger)
    run = finished(logger)
    assert not any("alrc/spikes.path" in row for row in run.history)
    assert run.of("artifact") == []


def test_the_table_of_spikes_is_logged_during_the_training(
    fit: Fit, wandb_logger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "FIRST_SHOWN_AFTER", 5.0)
    logger, net = wandb_logger(), Clocked(monkeypatch)
    callback = ALRCCallback(**SETTINGS, charts=False)
    fit(net, callback, logger=logger, log_every_n_steps=1, max_epochs=8)
    run = finished(logger)
    rows = [row for row in run.history if "alrc/spikes.path" in row]
    assert [row["trainer/global_step"] for row in rows] == [5, 10, 20, 40, 48]
    for row in rows:
        table = json.loads((run.folder / "files" / row["alrc/spikes.path"]).read_text())
        steps = [each[table["columns"].index("step")] for each in table["data"]]
        assert len(steps) > 0
        assert max(steps) <= row["trainer/global_step"]
    last = json.loads((run.folder / "files" / rows[-1]["alrc/spikes.path"]).read_text())
    loss = last["columns"].index("loss")
    assert [row[loss] for row in last["data"]] == [spike.loss for spike in callback.spikes]
    # ``read`` uses the last table.
    clips = {(clip.step, clip.loss) for clip in read(run.folder)["loss"].clips}
    assert clips == {(spike.step, spike.loss) for spike in callback.spikes}


def test_a_table_that_has_not_changed_is_not_logged_again(
    fit: Fit, wandb_logger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that always changes would be logged after 1, 2, 4, 8, 16 and 24 steps."""
    monkeypatch.setattr(telemetry, "FIRST_SHOWN_AFTER", 1.0)
    logger, net = wandb_logger(), Clocked(monkeypatch)
    callback = ALRCCallback(**SETTINGS, record=1, charts=False)
    fit(net, callback, logger=logger, log_every_n_steps=1, max_epochs=4)
    run = finished(logger)
    paths = [row["alrc/spikes.path"] for row in run.history if "alrc/spikes.path" in row]
    tables = [json.loads((run.folder / "files" / path).read_text())["data"] for path in paths]
    assert 1 < len(tables) < 6
    assert all(table != later for table, later in pairwise(tables))


# ---- the artifact of the spikes


@pytest.mark.parametrize("broken_off", [False, True])
def test_a_batch_is_replayed_from_the_artifact_of_a_run(
    fit: Fit, namespace: str, wandb_logger: Any, tmp_path: Path, broken_off: bool
) -> None:
    class Failing(NETS[namespace]):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if broken_off and self.global_step == 8:
                raise RuntimeError("enough")

    logger, callback = wandb_logger(namespace), ALRCCallback(**SETTINGS, save_batches=3)
    with pytest.raises(RuntimeError, match="enough") if broken_off else nullcontext():
        fit(Failing("vector"), callback, logger=logger, log_every_n_steps=2)
    name = f"alrc-spikes-{logger.experiment.id}"
    run = finished(logger)
    assert name in {each["name"] for each in run.of("artifact")}
    files = run.files_of("alrc-spikes")
    for path, stored in files.items():  # as a download of the artifact
        target = tmp_path / "downloaded" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stored, target)
    downloaded = tmp_path / "downloaded"
    spikes = read_spikes(downloaded / "alrc_spikes.jsonl")
    assert spikes == callback.spikes
    kept = {each.batch_file for each in spikes}
    assert {Path(path).name for path in files} - {"alrc_spikes.jsonl"} <= kept
    assert len(files) == 1 + 3
    losses = replay(downloaded / "alrc_batches" / spikes[0].batch_file, NETS[namespace]("vector"))
    assert losses["loss"].shape == (4,)
    assert plot(downloaded).axes


def test_the_artifact_has_only_the_batches_of_its_own_run(
    fit: Fit, wandb_logger: Any, tmp_path: Path
) -> None:
    class Overtaken(Callback):
        """Writes over a batch, as another run that resumes from a checkpoint of this run does."""

        def on_train_end(self, trainer: Any, module: Any) -> None:
            path = next(tmp_path.rglob(worst_batches(callback, 3)[1]))
            torch.save(torch.load(path) | {"run": "0123456789ab"}, path)

    logger, callback = wandb_logger(), ALRCCallback(**SETTINGS, save_batches=3)
    net = NETS["pytorch_lightning"]("vector")
    fit(net, Overtaken(), callback, logger=logger, log_every_n_steps=2)
    first, _, third = worst_batches(callback, 3)
    assert set(finished(logger).files_of("alrc-spikes")) == {
        "alrc_spikes.jsonl",
        f"alrc_batches/{first}",
        f"alrc_batches/{third}",
    }


def worst_batches(callback: ALRCCallback, count: int) -> list[str]:
    return list(dict.fromkeys(spike.batch_file for spike in callback.spikes))[:count]


def test_a_run_that_keeps_no_batches_has_its_record_in_the_artifact(
    fit: Fit, wandb_logger: Any
) -> None:
    logger, callback = wandb_logger(), ALRCCallback(**SETTINGS)
    fit(NETS["pytorch_lightning"]("vector"), callback, logger=logger, enable_checkpointing=False)
    files = finished(logger).files_of("alrc-spikes")
    assert list(files) == ["alrc_spikes.jsonl"]
    assert read_spikes(files["alrc_spikes.jsonl"]) == callback.spikes


@pytest.mark.parametrize("run_id", ["fold=0 seed+1", "a" * 128])
def test_a_run_with_any_id_has_the_artifact(fit: Fit, wandb_logger: Any, run_id: str) -> None:
    logger, callback = wandb_logger(id=run_id), ALRCCallback(**SETTINGS)
    fit(NETS["pytorch_lightning"]("vector"), callback, logger=logger, enable_checkpointing=False)
    run = finished(logger)
    assert list(run.files_of("alrc-spikes")) == ["alrc_spikes.jsonl"]
    names = {"alrc-spikes-fold-0-seed-1", f"alrc-spikes-{'a' * 116}"}
    assert names & {each["name"] for each in run.of("artifact")}


def test_render_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="render must be a function or None, got 'image'"):
        ALRCCallback(render="image")  # type: ignore[arg-type]
