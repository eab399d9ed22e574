import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from torchvision.datasets import CIFAR10

from examples.cifar10_supersampling import compare as comparison
from examples.cifar10_supersampling import results
from examples.cifar10_supersampling.results import Result
from examples.comparison import files
from examples.comparison.figures import label

REPOSITORY = Path(__file__).parents[3]
METHODS = ("none", "norm", "alrc2", "alrc2+norm")


def made_up(method="alrc2", seed=0, **changes):
    row = {
        "experiment": "outliers",
        "method": method,
        "seed": seed,
        "steps": 2000,
        "last_steps": 1000,
        "train_loss": 1.0 + seed,
        "test_error": 2.0,
        "test_input_error": 3.0,
        "clipped": 12 if "alrc" in method else None,
        "steps_survived": 2000,
        "seconds": 3.0,
    }
    return Result(row | changes, history={}, images={})


def printed(finished):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison.summary(finished))
    return capture.get()


def test_the_command_line_writes_all_files_and_trains_nothing_twice(
    folder_of_images, tmp_path, capsys
):
    command = [sys.executable, "-m", "examples.cifar10_supersampling", "compare"]
    arguments = ["--steps", "12", "--width", "0.05", "--workers", "1", "--output", "written"]
    arguments += ["--data", "folder", "--root", str(folder_of_images)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        assert label(method) in done.stdout
    assert "Trains a network 4 times, 12 steps each: unprotected, gradient" in done.stdout
    assert "That takes about 1 min on a CPU, 1 at a time." in done.stdout
    assert "4 of 4 trainings" in done.stdout
    assert not done.stderr
    written = tmp_path / "written"
    rows = files.read_rows(written)
    assert {row["method"] for row in rows} == set(METHODS)
    assert {row["steps_survived"] for row in rows} == {12}
    left = {path.name for path in written.iterdir() if path.is_file()}
    assert left == {"curves.png", "images.png", "results.csv", ".lock"}
    first = next(written.glob("*-alrc2+norm-seed0"))
    assert results.load(first).history["image_loss"].shape == (12, 8)
    drawn = {path.parent for path in written.glob("*/curves.png")}
    assert drawn == set(written.glob("*-alrc2*"))

    (written / "curves.png").unlink()
    settings = {"steps": 12, "width": 0.05, "data": "folder", "root": folder_of_images}
    comparison.compare(**settings, output=written)
    told = capsys.readouterr().out
    assert "of 4 trainings" not in told
    assert "Trains a network" not in told
    assert label("alrc2+norm") in told
    assert (written / "curves.png").exists()


def test_the_table_of_one_seed_has_no_standard_deviation():
    text = printed([made_up(method) for method in METHODS])
    assert "seed 0" in text
    assert "±" not in text
    assert "outliers: 2,000 steps" in text


def test_the_table_of_several_seeds_has_mean_and_standard_deviation():
    text = printed([made_up(seed=seed) for seed in (0, 1, 2)])
    assert "2.000 ± 1.000" in text
    assert "3 seeds" in text


def test_the_table_says_which_trainings_lost_their_weights():
    assert "lost" in printed([made_up("none", train_loss=None)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 1, got -1"),
        ({"methods": []}, "no training was asked for"),
        ({"methods": ["alrc2", "alrc2"]}, "asked for once, got .* 2 times"),
        ({"methods": ["both"]}, r"methods must be some of \['agc', .* got 'both'"),
        ({"width": 0.0}, "width must be a number above 0, got 0.0"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        comparison.compare(output=tmp_path, **arguments)


def test_results_of_other_numbers_of_steps_are_refused(tmp_path):
    folder = tmp_path / "outliers-quartic-batch8-adam0.00078125-hot_pixels0.05-none-seed0"
    folder.mkdir()
    files.write_json(folder / files.RUN, {"steps": 2000})
    with pytest.raises(ValueError, match="was made with steps 2000, now it is 30"):
        comparison.compare(steps=30, output=tmp_path)


@pytest.fixture
def asked_for(monkeypatch, tmp_path):
    """Returns the runs and the number of workers that a comparison would train with."""

    def compare(**arguments):
        asked = []

        def note(runs, output, workers):
            asked.append((runs, workers))
            raise InterruptedError

        monkeypatch.setattr(comparison, "run_all", note)
        with pytest.raises(InterruptedError):
            comparison.compare(**arguments, output=tmp_path)
        (found,) = asked
        return found

    return compare


@pytest.mark.parametrize("scenario", comparison.SCENARIOS)
def test_scenarios_are_parts_of_the_grid(scenario, asked_for):
    asked, _ = asked_for(scenario=scenario, seeds=2)
    assert [(run.method, run.seed) for run in asked] == [
        (method, seed) for seed in (0, 1) for method in METHODS
    ]
    assert {run.loss for run in asked} == {"quartic"}
    assert {run.optimizer for run in asked} == {"adam"}
    assert {(run.batch_size, run.learning_rate, run.steps, run.last_steps) for run in asked} == {
        "outliers": {(8, 1 / 1280, 1500, 750)},
        "unstable": {(1, 0.002, 6000, 2000)},
        "paper": {(1, 1 / 1280, 10_000, 5000)},
    }[scenario]


@pytest.mark.parametrize(("accelerator", "workers"), [("cpu", os.cpu_count()), ("gpu", 1)])
def test_trainings_share_a_gpu_only_if_asked_to(accelerator, workers, asked_for, capsys):
    _, asked = asked_for(accelerator=accelerator)
    assert asked == workers
    assert f"min on a CPU, {workers} at a time" in capsys.readouterr().out


def test_an_unreachable_download_raises_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError, match="--data photographs"):
        comparison.compare(data="download", root=tmp_path / "data", output=tmp_path)
