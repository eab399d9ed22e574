"""Scripts that are run by hand: the table and figure of measured costs, and the GPU benchmark."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import cuda, table
from tests.benchmarks.figure import draw
from tests.benchmarks.table import ROWS, Results
from tests.scripts.launching import forked, join

ROOT = Path(__file__).parents[2]


def run_benchmarks(file: Path) -> None:
    """Write the results of the fastest benchmarks."""
    os.chdir(ROOT)
    options = ["-q", "-k", "64", "--benchmark-only", f"--benchmark-json={file}"]
    sys.exit(pytest.main(["tests/benchmarks/test_named_losses.py", *options]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the fastest benchmarks."""
    file = tmp_path_factory.mktemp("benchmarks") / "costs.json"
    join(forked(run_benchmarks, file))
    return file


def test_a_benchmark_has_a_floor_and_all_its_rounds(measured: Path) -> None:
    benchmarks = json.loads(measured.read_text())["benchmarks"]
    assert {each["group"] for each in benchmarks} == {"64 named losses"}
    names = [each["name"] for each in benchmarks]
    assert "ALRC" in names
    assert any(name.startswith("floor: ") for name in names)
    rounds = [each["stats"]["rounds"] for each in benchmarks]
    assert min(rounds) == max(rounds) >= 5
    for each in benchmarks:
        assert 1e-7 < each["stats"]["min"] < 0.1


def test_the_table_has_every_row_and_says_what_was_not_measured(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.main([str(measured)])
    lines = capsys.readouterr().out.splitlines()
    for row in ROWS:
        (line,) = (line for line in lines if line.startswith(f"| {row.what} "))
        assert ("not measured" in line) == (row.what != "memory of a named loss")
        assert row.target in line


def test_the_table_says_whether_a_target_is_reached(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"

    def entry(name: str, seconds: float) -> dict[str, object]:
        return {
            "group": "25 M parameters",
            "name": name,
            "stats": {"min": seconds},
            "extra_info": {},
        }

    for ours, expected in ((1e-4, ("1/20", "yes")), (1.1e-4, ("1/18", "no"))):
        entries = [entry("ALRC", ours), entry("floor: a", 1e-6), entry("peer: b", 2e-3)]
        file.write_text(json.dumps({"benchmarks": entries}))
        (row,) = (row for row in ROWS if row.what == "25 M parameters")
        _, floor, over_floor, *_, found, _, reached = table._cells(row, Results([file]))
        assert (floor, over_floor) == ("a, 1 us", f"{ours / 1e-6:.2g}")
        assert (found, reached) == expected


def test_the_figure_has_what_was_measured_and_the_model(measured: Path) -> None:
    figure = draw(Results([measured]))
    losses, named, _, ranks = figure.axes
    assert not any(len(line.get_xdata()) for line in losses.lines)
    assert all(list(line.get_xdata()) == [64] for line in named.lines)
    assert max(max(line.get_xdata(), default=0) for line in ranks.lines) == 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_for_a_gpu_says_that_it_needs_a_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cuda.main([]) == 2
    printed = capsys.readouterr()
    assert "needs a CUDA device" in printed.err
    assert printed.out == ""


def test_a_way_that_raises_is_noted_and_the_others_are_measured() -> None:
    def fails() -> None:
        raise RuntimeError("no compiler\nmore about it")

    measuring = cuda.Measuring("cpu")
    measuring.measure({"ALRC, 256 losses": fails, "tensor operations, 256 losses": lambda: None})
    assert measuring.failures == {"ALRC, 256 losses": "RuntimeError: no compiler"}
    assert list(measuring.found) == ["tensor operations, 256 losses"]
    *_, goals = cuda.tables(measuring.found, "")
    assert set(goals.columns[-1].cells) == {"not measured"}
