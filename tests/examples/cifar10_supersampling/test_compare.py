import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torchvision.datasets import CIFAR10

from examples.cifar10_supersampling import compare as comparison
from examples.cifar10_supersampling.training import METHODS, Result, Run

REPOSITORY = Path(__file__).parents[3]


def made_up(method="alrc", seed=0, **changes):
    result = Result(
        run=Run("outliers", method, seed, 2000, 0.25, 2.0, "photographs", Path("data")),
        train_loss=1.0 + seed,
        test={"error": 2.0, "input_error": 3.0, "mse": 0.1, "psnr": 20.0, "ssim": 0.5},
        clips=12,
        survived=2000,
        seconds=3.0,
        history={"loss": np.ones((4, 8), dtype=np.float32)},
        images={},
    )
    return replace(result, **changes)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def printed(results):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison.summary(results))
    return capture.get()


def test_command_line_writes_everything(tmp_path):
    command = [sys.executable, "-m", "examples.cifar10_supersampling", "compare"]
    arguments = ["--steps", "12", "--width", "0.05", "--workers", "2", "--output", "written"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for method in METHODS.values():
        assert method.label in done.stdout
    assert "Warning" not in done.stderr
    written = tmp_path / "written"
    table = rows(written / "results.csv")
    assert {row["method"] for row in table} == set(METHODS)
    assert {row["steps_survived"] for row in table} == {"12"}
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    histories = {f"history/outliers-{method}-seed0.npz" for method in METHODS}
    assert files == {"curves.png", "images.png", "results.csv"} | histories


def test_rows_are_added(tmp_path):
    comparison.save_result(made_up(), tmp_path)
    comparison.save_result(made_up(method="none", seed=1), tmp_path)
    first, second = rows(tmp_path / "results.csv")
    assert first["num_stddev"] == "2.0"
    assert second["num_stddev"] == ""
    assert second["seed"] == "1"
    comparison.check_columns(tmp_path / "results.csv")
    with np.load(tmp_path / "history" / "outliers-alrc-seed0.npz") as history:
        assert history["loss"].shape == (4, 8)


def test_interrupted_write_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    comparison.save_result(made_up(), tmp_path)
    before = (tmp_path / "results.csv").read_bytes()

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        comparison.save_result(made_up(seed=1), tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == before


def test_table_of_one_seed():
    text = printed([made_up(method) for method in METHODS])
    assert "seed 0" in text
    assert "±" not in text
    assert "outliers: 2,000 steps" in text


def test_table_of_seeds_has_mean_and_standard_deviation():
    text = printed([made_up(seed=seed) for seed in (0, 1, 2)])
    assert "2.000 ± 1.000" in text
    assert "3 seeds" in text


def test_table_says_what_was_lost():
    assert "lost" in printed([made_up("none", train_loss=float("nan"))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 1, got -1"),
        ({"methods": []}, r"methods must be some of \['none', 'norm', 'alrc', 'both'\]"),
        ({"methods": ["alrc", "alrc"]}, "each once, got"),
        ({"methods": ["zclip"]}, "each once, got"),
        ({"width": 0.0}, "width must be a number above 0, got 0.0"),
        ({"num_stddev": -1.0}, "num_stddev"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        comparison.compare(output=tmp_path, **arguments)


def test_table_with_other_columns_is_left_alone(tmp_path):
    table = tmp_path / "results.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"results\.csv has the columns \['a', 'b'\]"):
        comparison.compare(output=tmp_path)
    assert table.read_text() == "a,b\n1,2\n"


def test_unreachable_download_is_told_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError, match="--data photographs"):
        comparison.compare(data="download", root=tmp_path / "data", output=tmp_path)
