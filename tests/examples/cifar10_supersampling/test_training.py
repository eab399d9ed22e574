import json
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from pytorch_lightning import callbacks
from torchvision.io import write_png

from examples.cifar10_supersampling import recording, results, training
from examples.cifar10_supersampling.command_line import CONFIGS
from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.photographs import cut_images
from examples.cifar10_supersampling.training import check_same, train
from examples.comparison import files
from tests.examples.cifar10_supersampling.marks import needs_weight_averaging

METHODS = ("none", "norm", "alrc2", "alrc2+norm")

pytestmark = [
    pytest.mark.usefixtures("few_images"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def trained(make_run, tmp_path):
    """Train a run, by default in a new folder."""

    def trained(output=tmp_path, **changes):
        run = make_run(**changes)
        train(run, output)
        return results.load(output / run.name)

    return trained


def without_time(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def same(first, second):
    """Whether two trainings have exactly the same results."""
    assert without_time(first.row) == without_time(second.row)
    for ours, theirs in ((first.history, second.history), (first.images, second.images)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    return True


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_every_precision_ends_in_a_row_and_images(trained, precision):
    result = trained(precision=precision, method="alrc2", every_image=True)
    assert result.row["steps_survived"] == 20
    assert np.isfinite(result.row["test_error"])
    assert result.images["output"].shape == result.images["truth"].shape
    assert np.isfinite(result.images["output"]).all()


def test_methods_start_from_the_same_weights_and_see_the_same_images(trained):
    by_method = {method: trained(method=method, every_image=True) for method in METHODS}
    first = by_method["none"]
    for method, result in by_method.items():
        history = result.history
        np.testing.assert_array_equal(history["image_loss"][0], first.history["image_loss"][0])
        np.testing.assert_array_equal(history["outlier"], first.history["outlier"])
        assert result is first or result.row["train_loss"] != first.row["train_loss"]
        # Only ALRC clips losses, and says how many.
        assert ("alrc" in method) == (result.row["clipped"] is not None)
        assert ("alrc" in method) == bool(np.isfinite(history["threshold"]).any())


def test_the_row_has_the_settings_and_the_measures(trained):
    result = trained(method="alrc2", every_image=True)
    row = result.row
    assert row["method"] == "alrc2"
    assert row["steps_survived"] == row["steps"] == 20
    assert all(row[f"ema_test_{name}"] is None for name in ("error", "mse", "psnr", "ssim"))
    clean = ~result.history["outlier"][-8:]
    mean = result.history["image_loss"][-8:][clean].mean()
    assert row["train_loss"] == pytest.approx(mean, rel=1e-5)
    for images in result.images.values():
        assert images.shape == (8, 3, 32, 32)
        assert images.min() >= 0
        assert images.max() <= 1


def test_a_training_repeats_exactly_with_the_same_seed(trained, tmp_path):
    first, again, other = (
        trained(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same(first, again)
    assert first.row["train_loss"] != other.row["train_loss"]


def test_a_history_without_every_image_has_only_means(trained, tmp_path):
    without, of_every_image = trained(tmp_path / "a"), trained(tmp_path / "b", every_image=True)
    assert without.history.keys() == {"loss", "threshold"}
    clean = ~of_every_image.history["outlier"]
    losses = of_every_image.history["image_loss"]
    expected = (losses * clean).sum(axis=1) / clean.sum(axis=1)
    np.testing.assert_allclose(without.history["loss"], expected, rtol=1e-5)


def test_lost_weights_are_reported(trained):
    result = trained(optimizer="sgd", learning_rate=1e30, steps=120)
    row = result.row
    assert 0 < row["steps_survived"] < 10
    assert row["train_loss"] is row["test_error"] is row["test_ssim"] is None
    assert row["test_input_error"] > 0
    assert np.isnan(result.history["loss"][row["steps_survived"] :]).all()
    assert len(result.history["loss"]) == 120


@needs_weight_averaging
def test_the_average_of_the_weights_is_tested_as_well_as_the_last_weights(trained, tmp_path):
    settings = {"experiment": "quartic", "outlier_kind": None, "outlier_fraction": 0.0}
    averaged = trained(tmp_path / "a", average=True, **settings).row
    without = trained(tmp_path / "b", average=False, **settings).row
    for name in ("test_error", "test_mse", "test_psnr", "test_ssim", "train_loss"):
        assert averaged[name] == without[name]
        if name != "train_loss":
            assert without[f"ema_{name}"] is None
            assert averaged[f"ema_{name}"] != averaged[name]


class PowerCutError(Exception):
    """An exception in place of whatever ends a training at once."""


# An epoch has 12 batches: checkpoints are within epochs, or after every second epoch.
CUT_OFF = [
    (17, {"method": "alrc2+zclip"}),
    (24, {"method": "alrc3+autoclip", "outlier_kind": "noise"}),
    pytest.param(
        24,
        {"method": "value"},
        marks=pytest.mark.skipif(
            not hasattr(callbacks, "EMAWeightAveraging"),
            reason="Lightning 2.4 counts a batch too many where an epoch's last one was saved",
        ),
    ),
    (17, {"method": "norm+alrc4", "outlier_kind": "wrong_target", "every_image": True}),
    (17, {"method": str(CONFIGS / "variants" / "quantile0.9.yaml")}),
    pytest.param(
        24,
        {"experiment": "squared", "loss": "squared", "average": True},
        marks=needs_weight_averaging,
    ),
]
PACKAGES = {"alrc2+zclip": "zclip", "alrc3+autoclip": "autoclip"}


@pytest.mark.parametrize(("checkpoint_every", "changes"), CUT_OFF)
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    checkpoint_every, changes, trained, make_run, tmp_path, monkeypatch
):
    if changes.get("method") in PACKAGES:
        pytest.importorskip(PACKAGES[changes["method"]])
    monkeypatch.setattr(recording, "READ_EVERY", 10)  # steps between two reports, too
    changes = changes | {"steps": 60, "checkpoint_every": checkpoint_every}
    undisturbed = trained(tmp_path / "undisturbed", **changes)

    run, output = make_run(**changes), tmp_path / "cut off"
    starts = []
    for cut in (30, 50):
        steps = []

        def report(step, steps=steps, cut=cut):
            steps.append(step)
            if step == cut:
                raise PowerCutError

        with pytest.raises(PowerCutError):
            train(run, output, report)
        starts.append(steps[0])
        assert not files.is_finished(output / run.name)
    steps = []
    train(run, output, steps.append)
    starts.append(steps[0])
    assert starts == ([0, 17, 34] if checkpoint_every == 17 else [0, 24, 48])
    assert same(results.load(output / run.name), undisturbed)
    assert not (output / run.name / "last.ckpt").exists()


@pytest.mark.parametrize("checkpoint_every", [6, 1000])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "alrc2"},
        pytest.param({"experiment": "quartic", "average": True}, marks=needs_weight_averaging),
    ],
    ids=["last", "average"],
)
def test_a_training_interrupted_in_its_test_ends_like_an_uninterrupted_one(
    checkpoint_every, changes, trained, make_run, tmp_path, monkeypatch
):
    changes = changes | {"steps": 12, "checkpoint_every": checkpoint_every}
    undisturbed = trained(tmp_path / "undisturbed", **changes)

    def power_cut(*args):
        raise PowerCutError

    run, output = make_run(**changes), tmp_path / "cut off"
    with monkeypatch.context() as patch:
        patch.setattr(training, "test", power_cut)
        with pytest.raises(PowerCutError):
            train(run, output)
    starts = []
    train(run, output, starts.append)
    assert starts[0] == {6: 6, 1000: 0}[checkpoint_every]
    assert same(results.load(output / run.name), undisturbed)


def test_a_finished_training_is_not_changed(make_run, tmp_path, monkeypatch):
    run = make_run()
    train(run, tmp_path)
    monkeypatch.setattr(training, "train_in", lambda *args: pytest.fail("trained again"))
    train(run, tmp_path)


def test_a_process_waits_for_a_training_that_another_process_runs(make_run, tmp_path, monkeypatch):
    run = make_run()
    folder = tmp_path / run.name
    folder.mkdir()
    monkeypatch.setattr(training, "train_in", lambda *args: pytest.fail("trained again"))
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / files.LOCK, thread_local=False):
            waiting = pool.submit(train, run, tmp_path)
            time.sleep(0.3)
            assert not waiting.done()
            results.save(folder, results.Result({"seed": 0}, {}, {}))
        waiting.result()


def test_nothing_is_validated(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Supersampling, "validation_step", lambda *args: pytest.fail("it is validated")
    )
    run = make_run(steps=13)  # an epoch has 12 batches
    train(run, tmp_path)
    assert files.is_finished(tmp_path / run.name)


def test_another_training_of_the_same_name_is_refused(make_run, tmp_path):
    run = make_run()
    check_same(run, tmp_path)
    train(run, tmp_path)
    check_same(run, tmp_path)
    for free in (
        {"checkpoint_every": 7},
        {"wandb": True},
        {"accelerator": "auto"},
        {"root": tmp_path},
    ):
        check_same(replace(run, **free), tmp_path)
    with pytest.raises(ValueError, match="was made with steps 20, now it is 30"):
        check_same(replace(run, steps=30), tmp_path)


def test_another_folder_of_images_is_refused_and_a_copy_is_not(make_run, tmp_path):
    here, copy, other = (tmp_path / name for name in ("here", "copy", "other"))
    image = cut_images(["coffee"], 1, seed=0)[0]
    for split in ("train", "test"):
        folder = here / split / "cup"
        folder.mkdir(parents=True)
        for number in range(8):
            write_png(image, str(folder / f"{number}.png"))
    shutil.copytree(here, copy)
    shutil.copytree(here, other)
    write_png(image // 4, str(other / "train" / "cup" / "3.png"))
    runs = {root: make_run(data="folder", root=root, steps=2) for root in (here, copy, other)}
    output = tmp_path / "output"
    train(runs[here], output)
    check_same(runs[copy], output)
    with pytest.raises(ValueError, match=r"made with images '16 images, .*', now it is '16 images"):
        check_same(runs[other], output)
    # Results of releases before this check do not say which images they are of.
    path = output / runs[here].name / files.RUN
    known = json.loads(path.read_text())
    del known["images"]
    files.write_json(path, known)
    check_same(runs[other], output)


def test_ones_own_configuration_is_compared_by_its_content(make_run, tmp_path, monkeypatch):
    path = tmp_path / "norm01.yaml"
    path.write_text("trainer: {gradient_clip_val: 0.1}")
    run = make_run(method=str(path))
    train(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    check_same(replace(run, method="norm01.yaml"), tmp_path)
    path.write_text("trainer: {gradient_clip_val: 0.5}")
    with pytest.raises(ValueError, match=r"own_configurations .*0\.1.*, now it is .*0\.5"):
        check_same(run, tmp_path)


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="there is no second file system for temporary files",
)
def test_a_checkpoint_is_never_half_written(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    # The checkpoint's size depends on the width alone.
    run = make_run(steps=15, checkpoint_every=1, width=0.25, batch_size=1)
    path, sizes, ended = tmp_path / run.name / results.CHECKPOINT, set(), threading.Event()

    def look():
        while not ended.is_set():
            if path.exists():
                sizes.add(path.stat().st_size)

    looking = threading.Thread(target=look)
    looking.start()
    train(run, tmp_path)
    ended.set()
    looking.join()
    # Sizes differ a little, because the record in the checkpoint grows from step to step.
    assert min(sizes) > 0.95 * max(sizes)


def test_a_training_logs_to_wandb(trained, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from tests import offline_wandb

    offline_wandb.isolate(monkeypatch, tmp_path / "wandb")
    row = trained(wandb=True, method="alrc2", steps=50).row
    (run,) = (tmp_path).glob("outliers-*/wandb/offline-run-*")
    found = offline_wandb.read(run)
    assert found.summary["train_loss"] == pytest.approx(row["train_loss"])
    assert found.config["method"] == "alrc2"
    assert "alrc/threshold" in found.summary
