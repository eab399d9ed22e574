import numpy as np
import pytest
import torch

from examples.cifar10_supersampling import results, together
from examples.cifar10_supersampling.together import (
    CHECKPOINT,
    CUT_OFF_TABLE,
    Trainings,
    check,
    groups,
    method_of,
    read_state,
    train_together,
    write_cut_off,
)
from examples.cifar10_supersampling.training import Run, train
from examples.comparison import files
from tests.examples.cifar10_supersampling.marks import needs_weight_averaging

pytestmark = [
    pytest.mark.usefixtures("few_images"),
    pytest.mark.filterwarnings("ignore"),
]

FOUR = (
    {"method": "none", "loss": "squared"},
    {"method": "alrc2", "seed": 1},
    {"method": "published2+norm"},
    {"method": "alrc3+norm", "alrc_start": "authors", "seed": 2},
)


@pytest.fixture
def four(make_run):
    """Four trainings that differ in all settings in which stacked trainings may differ."""

    def make(**changes):
        return [make_run(**(changes | each)) for each in FOUR]

    return make


def assert_same(ours, theirs, tolerance):
    for name, value in theirs.row.items():
        if isinstance(value, float) and name != "seconds":
            assert ours.row[name] == pytest.approx(value, rel=tolerance), name
        elif name != "seconds":
            assert ours.row[name] == value, name
    for ours_of, theirs_of in ((ours.history, theirs.history), (ours.images, theirs.images)):
        assert ours_of.keys() == theirs_of.keys()
        for name, values in theirs_of.items():
            np.testing.assert_allclose(ours_of[name], values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("batch_size", "precision", "tolerance"),
    [(1, "64-true", 1e-6), (4, "64-true", 1e-6), (4, "32-true", 0.02)],
)
def test_four_stacked_trainings_equal_four_single_trainings(
    batch_size, precision, tolerance, four, tmp_path
):
    settings = {"precision": precision, "batch_size": batch_size}
    runs = four(steps=15, outlier_fraction=0.3, **settings)
    train_together(runs, tmp_path / "at once", 4)
    for run in runs:
        train(run, tmp_path / "alone")
        ours, theirs = (results.load(tmp_path / name / run.name) for name in ("at once", "alone"))
        assert_same(ours, theirs, tolerance)
        if precision == "64-true":  # the moments are float64, too
            np.testing.assert_allclose(
                ours.history["threshold"], theirs.history["threshold"], rtol=1e-10
            )
    rows = {run.method: results.load(tmp_path / "alone" / run.name).row for run in runs}
    assert rows["none"]["clipped"] is None
    assert rows["alrc2"]["clipped"] > 0
    assert rows["published2+norm"]["clipped"] > 0


def test_in_bfloat16_stacked_and_single_trainings_start_from_the_same_losses(four, tmp_path):
    runs = four(steps=2, precision="bf16-mixed")
    train_together(runs, tmp_path / "at once", 4)
    for run in runs:
        train(run, tmp_path / "alone")
        ours, theirs = (results.load(tmp_path / name / run.name) for name in ("at once", "alone"))
        np.testing.assert_allclose(ours.history["loss"], theirs.history["loss"], rtol=0.02)


def test_convolutions_of_the_tests_are_not_in_tf32(make_run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    together.tester(make_run())
    assert not torch.backends.cudnn.allow_tf32


def test_the_learning_rate_drops_once(make_run, monkeypatch):
    monkeypatch.setattr(Run, "learning_rate_drop_at", 3)
    trainings = Trainings([make_run()], torch.device("cpu"))
    rates = []
    for step in range(1, 6):
        trainings.train(step)
        rates.append(trainings.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1 / 1280] * 2 + [1 / 12800] * 3)
    resumed = Trainings([make_run()], torch.device("cpu"), {make_run().name: trainings.state(0)})
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(1 / 12800)


def test_stacked_weights_equal_those_of_single_trainings(four):
    runs = four(steps=20, precision="64-true", batch_size=1)
    device = torch.device("cpu")
    at_once = Trainings(runs, device)
    at_once.train(20)
    for index, run in enumerate(runs):
        alone = Trainings([run], device)
        alone.train(20)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(at_once.weights[name][index], weight[0], rtol=1e-10, atol=0)


@needs_weight_averaging
def test_the_average_of_the_weights_is_kept(make_run, tmp_path):
    changes = {"outlier_kind": None, "outlier_fraction": 0.0, "average": True, "steps": 8}
    run = make_run(experiment="squared", loss="squared", precision="64-true", **changes)
    train_together([run], tmp_path / "at once", 1)
    train(run, tmp_path / "alone")
    ours, theirs = (results.load(tmp_path / name / run.name) for name in ("at once", "alone"))
    assert ours.row["ema_test_error"] != ours.row["test_error"]
    assert_same(ours, theirs, 1e-6)


class CutError(Exception):
    pass


def cut_at(step):
    def report(done):
        if done >= step:
            raise CutError

    return report


def test_interrupted_trainings_are_resumed_to_the_same_results(four, tmp_path):
    runs = four(steps=25, checkpoint_every=7, batch_size=1)
    train_together(runs, tmp_path / "whole", 4)
    for step in (15, 21):
        with pytest.raises(CutError):
            train_together(runs, tmp_path / "cut", 4, cut_at(step))
    assert read_state(tmp_path / "cut" / runs[0].name)["done"] == 14
    train_together(runs, tmp_path / "cut", 4)
    for run in runs:
        whole, resumed = (results.load(tmp_path / name / run.name) for name in ("whole", "cut"))
        assert_same(resumed, whole, 0.0)
        assert not (tmp_path / "cut" / run.name / CHECKPOINT).exists()
    assert (tmp_path / "cut" / files.TABLE).exists()


def test_the_table_of_interrupted_trainings_has_the_steps_done_and_asked_for(
    four, make_run, tmp_path
):
    runs = four(steps=25, checkpoint_every=7, batch_size=1)
    with pytest.raises(CutError):
        train_together(runs, tmp_path, 4, cut_at(21))
    assert write_cut_off(runs, tmp_path) == 4
    header, *rows = (tmp_path / CUT_OFF_TABLE).read_text().splitlines()
    for run, line in zip(runs, rows, strict=True):
        row = dict(zip(header.split(","), line.split(","), strict=True))
        assert (row["method"], row["steps"], row["steps_asked"]) == (run.method, "14", "25")
        assert float(row["train_loss"]) > 0
        assert not files.is_finished(tmp_path / run.name)
    # The training loss is that of a training of 14 steps.
    short = make_run(**(FOUR[1] | {"steps": 14, "batch_size": 1}))
    train(short, tmp_path / "short")
    expected = results.load(tmp_path / "short" / short.name).row["train_loss"]
    row = dict(zip(header.split(","), rows[1].split(","), strict=True))
    assert float(row["train_loss"]) == pytest.approx(expected, rel=1e-3)


def test_trainings_of_different_settings_or_steps_are_not_stacked(make_run, tmp_path):
    runs = [make_run(seed=seed, batch_size=size) for size in (1, 4) for seed in range(3)]
    found = [[run.seed for run in group] for group, _ in groups(runs, tmp_path, 2)]
    assert found == [[0, 1], [2], [0, 1], [2]]


def test_a_training_that_loses_its_weights_does_not_change_the_others(make_run, tmp_path):
    changes = {"steps": 60, "batch_size": 1, "learning_rate": 0.1, "optimizer": "sgd"}
    runs = [make_run(method=method, **changes) for method in ("none", "norm")]
    train_together(runs, tmp_path, 2)
    lost, kept = (results.load(tmp_path / run.name).row for run in runs)
    assert lost["steps_survived"] < 60
    assert lost["train_loss"] is None
    assert kept["steps_survived"] == 60


@pytest.mark.parametrize("method", ["zclip", "alrc2+agc", "alrc1", "huber", "norm01.yaml"])
def test_other_methods_are_refused(method):
    with pytest.raises(ValueError, match="to be trained together, got"):
        method_of(method)


def test_other_precisions_are_refused(make_run):
    with pytest.raises(ValueError, match="precision must be one of"):
        check([make_run(precision="16-mixed")])


def test_a_device_without_float64_is_refused(make_run):
    with pytest.raises(ValueError, match="accelerator: these trainings need float64"):
        Trainings([make_run()], torch.device("mps"))
