import csv
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from examples import language_model
from examples.comparison import files
from examples.comparison.compare import Comparison, Training, train
from examples.comparison.tables import Cell, Table

REPOSITORY = Path(__file__).parents[3]
FACTORS = {"none": 2.0, "norm": 1.0, "alrc2": 0.9}


def measure(setting, method, seed, steps, folder, report=None, scale=1.0):
    """Invented measures. In the setting "unstable", "none" with seed 1 loses its weights."""
    if report is not None:
        report(1)
    (folder / "trained").write_text("once")
    error = scale * (1 + 0.1 * seed + 0.01 * len(setting)) * FACTORS[method]
    lost = setting == "unstable" and method == "none" and seed == 1
    return {
        "error": math.nan if lost else error,
        "other": None if lost else 10 * error,
        "clipped": 7 if method == "alrc2" else None,
    }


def afterwards(output):
    """A further table."""
    trained = sorted(path.parent.name for path in output.glob("*/trained"))
    return Table("Trained", [""], [[Cell(name)] for name in trained])


COMPARISON = Comparison(
    "made_up",
    measure,
    {"stable": tuple(FACTORS), "unstable": tuple(FACTORS)},
    {"error": "error", "other": "another error"},
    steps=10,
    afterwards=afterwards,
)


def run(output, **changes):
    arguments = {"seeds": 3, "steps": 10, "settings": None, "methods": None, "workers": 1}
    COMPARISON.compare(**(arguments | changes), output=output)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("made_up")
    run(output)
    return output


def test_a_row_has_the_training_and_its_measures(tmp_path):
    told = []
    train(measure, {"scale": 1.0}, Training("stable", "alrc2", 1, 10), tmp_path, told.append)
    assert told == [1]
    row = json.loads((tmp_path / "stable-alrc2-seed1" / files.RESULT).read_text())
    seconds = row.pop("seconds")
    assert 0 <= seconds < 5
    assert row == {
        "setting": "stable",
        "method": "alrc2",
        "seed": 1,
        "steps": 10,
        "scale": 1.0,
        "error": pytest.approx(1.16 * 0.9),
        "other": pytest.approx(11.6 * 0.9),
        "clipped": 7,
    }


def test_two_commands_with_one_output_run_a_training_once(tmp_path):
    folders = []

    def slow(setting, method, seed, steps, folder, report=None):
        folders.append(folder)
        time.sleep(0.1)
        return {"error": float(len(folders))}

    with ThreadPoolExecutor(2) as pool:
        arguments = (slow, {}, Training("stable", "norm", 0, 10), tmp_path)
        for command in [pool.submit(train, *arguments) for _ in range(2)]:
            command.result()
    assert len(folders) == 1
    (row,) = files.read_rows(tmp_path)
    assert row["error"] == 1


def test_the_tables_and_the_report_have_all_methods(written):
    with (written / files.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    report = (written / "report.md").read_text()
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    assert titles == [
        "## stable: error",
        "## stable: another error",
        "## stable: also measured",
        "## unstable: error",
        "## unstable: another error",
        "## unstable: also measured",
        "## Trained",
    ]
    # In each seed, ALRC's error is 0.9 of the clipper's error, and 0.45 of the unprotected error.
    assert "| alrc2 | **1.044 ± 0.224** | −10.0 % (−10.0 to −10.0) | lower, p < 0.001 |" in report
    assert "−55.0 % (−55.0 to −55.0)" in report
    assert "| none | lost 1 of 3 |" in report
    assert "No comparison with none: it lost 1 of 3." in report
    assert "stable-alrc2-seed2" in report


def test_finished_trainings_are_not_run_again(written, capsys):
    for path in written.glob("*/trained"):
        path.write_text("")
    run(written)
    assert not any(path.read_text() for path in written.glob("*/trained"))
    assert "stable: error" in capsys.readouterr().out


def test_a_report_has_only_the_settings_asked_for(tmp_path, capsys):
    run(tmp_path, seeds=2, settings=["stable"], methods=["none", "norm"])
    assert len(files.read_rows(tmp_path)) == 4
    assert "unstable" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"settings": ["calm"]}, r"settings must be some of \['stable', 'unstable'\], got 'calm'"),
        ({"methods": ["norm", "norm"]}, r"methods must .* each once, got \['norm', 'norm'\]"),
        ({"settings": ["stable"] * 2}, "settings must be some values, each once"),
        ({"methods": []}, r"methods must be some values, each once, got \[\]"),
        ({"methods": ["none", "clip"]}, "methods must be none, norm, .* got 'clip'"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


OWN = {"stable": ("none", "alrc1-token"), "unstable": ("norm", "huber1+norm")}


@pytest.mark.parametrize(
    ("setting", "method"),
    [
        ("stable", "huber1"),
        ("stable", "alrc3-word"),
        ("stable", "alrc2-token+alrc3"),
        ("unstable", "alrc1-token"),
        ("unstable", "norm+huber1+huber2"),
    ],
)
def test_a_method_that_a_setting_does_not_have_is_refused(setting, method, tmp_path):
    message = rf"methods of '{setting}' must be none, norm, .* got '{re.escape(method)}'"
    with pytest.raises(ValueError, match=message):
        replace(COMPARISON, settings=OWN).compare(1, 10, [setting], [method], 1, tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_of_other_numbers_of_steps_are_refused(written):
    with pytest.raises(ValueError, match="was made with steps 10, now it is 20"):
        run(written, steps=20)


def test_all_trainings_have_the_same_options(tmp_path):
    comparison = replace(
        COMPARISON,
        measure=partial(measure, scale=2.0),
        options={"scale": 2.0},
        also={"other": "one more"},
    )
    comparison.compare(1, 10, ["stable"], ["norm"], 1, tmp_path)
    (row,) = files.read_rows(tmp_path)
    assert row["scale"] == 2.0
    assert row["error"] == pytest.approx(2 * 1.06)
    assert "|  | one more | seconds |" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=r"was made with scale 2.0, now it is 3.0"):
        replace(comparison, options={"scale": 3.0}).compare(1, 10, None, None, 1, tmp_path)


def test_the_help_of_an_example_describes_compare(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["language_model", "compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        language_model.COMPARISON.main()
    told = capsys.readouterr().out
    for word in ("--seeds", "--methods", "number of seeds", "comparison/language_model"):
        assert word in told


def test_a_missing_package_raises_before_the_first_training(tmp_path):
    needy = replace(COMPARISON, needs={"no_such_package": "flights"})
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package' is not installed: pip"):
        needy.compare(1, 10, None, None, 1, tmp_path / "output")
    assert not (tmp_path / "output").exists()
