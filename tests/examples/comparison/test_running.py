import csv
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.comparison import files, running
from examples.comparison.running import run_all


@dataclass(frozen=True)
class Training:
    """A training that takes no time, and may fail."""

    seed: int
    fails: bool = False
    steps: int = 10
    work: int = 10

    @property
    def name(self):
        return f"seed{self.seed}"


def train(run, output, report=None):
    """Train in no time."""
    if run.fails:
        raise ValueError("of clay")
    folder = output / run.name
    folder.mkdir(exist_ok=True)
    files.write_json(folder / files.RESULT, {"seed": run.seed})


@pytest.fixture
def trained_here(monkeypatch):
    """Runs trainings one after the other in this process.

    The fixture is a list of the names of the trainings that were run.
    """
    names = []

    def run_here(train, runs, output, workers, cluster):
        for number, run in enumerate(runs):
            names.append(run.name)
            try:
                train(run, output)
            except Exception as error:
                yield number, error
            else:
                yield number, None

    monkeypatch.setitem(running.BACKENDS, "local", run_here)
    return names


def test_finished_trainings_are_skipped(trained_here, tmp_path, capsys):
    runs = [Training(seed) for seed in range(3)]
    run_all(train, runs[:2], tmp_path)
    assert trained_here == ["seed0", "seed1"]
    run_all(train, runs, tmp_path)
    assert trained_here == ["seed0", "seed1", "seed2"]
    assert [row["seed"] for row in files.read_rows(tmp_path)] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "1 of 1 trainings" in printed
    # Without a terminal no moving bar is shown.
    assert printed.count(" finished; none left") == 2
    assert " finished; 1 left" in printed


def test_a_failure_raises_after_the_other_trainings(trained_here, tmp_path, capsys):
    runs = [Training(0, fails=True), Training(1)]
    with pytest.raises(
        RuntimeError, match=r"1 of 2 trainings failed, the first of them seed0: .*clay"
    ):
        run_all(train, runs, tmp_path)
    assert [row["seed"] for row in files.read_rows(tmp_path)] == [1]
    assert "failed: " in capsys.readouterr().out


def test_every_training_adds_a_row_to_the_table(tmp_path, monkeypatch):
    told = []

    def run_here(train, runs, output, workers, cluster):
        for number, run in enumerate(runs):
            train(run, output)
            yield number, None
            with (output / files.TABLE).open(newline="") as file:
                told.append([row["seed"] for row in csv.DictReader(file)])

    monkeypatch.setitem(running.BACKENDS, "local", run_here)
    run_all(train, [Training(seed) for seed in range(2)], tmp_path)
    assert told == [["0"], ["0", "1"]]


def test_a_lost_table_is_written_again(tmp_path):
    run = Training(0)
    train(run, tmp_path)
    run_all(train, [run], tmp_path)
    assert (tmp_path / files.TABLE).exists()


@pytest.fixture
def keep_open(monkeypatch):
    """Makes a file one that another program of Windows has open, until trainings are finished."""

    def keep_open(table, until):
        def replace(path, target, replace=Path.replace):
            if target == table and len(files.read_rows(table.parent)) < until:
                raise PermissionError(13, "another process is using the file", str(target))
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", replace)

    return keep_open


def test_a_table_that_another_program_has_open_is_written_later(trained_here, keep_open, tmp_path):
    keep_open(tmp_path / files.TABLE, until=3)
    with pytest.warns(UserWarning, match=r"results\.csv cannot be written, .* has it open"):
        run_all(train, [Training(seed) for seed in range(3)], tmp_path)
    assert (tmp_path / files.TABLE).read_text().split() == ["seed", "0", "1", "2"]


def test_a_table_that_stays_open_is_an_error_after_all_trainings(trained_here, keep_open, tmp_path):
    keep_open(tmp_path / files.TABLE, until=4)
    with pytest.warns(match="has it open"), pytest.raises(PermissionError, match=r"results\.csv"):
        run_all(train, [Training(seed) for seed in range(3)], tmp_path)
    assert len(files.read_rows(tmp_path)) == 3


def test_an_interrupt_ends_the_backend_at_once(tmp_path, monkeypatch):
    ended = []

    def run_here(train, runs, output, workers, cluster):
        try:
            yield 0, None
        finally:
            ended.append(True)

    def interrupted(output):
        raise KeyboardInterrupt

    monkeypatch.setitem(running.BACKENDS, "local", run_here)
    monkeypatch.setattr(files, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        run_all(train, [Training(0)], tmp_path)
    assert raised is not None  # its traceback keeps the backend from garbage collection
    assert ended == [True]


def test_trainings_run_in_processes_of_this_machine(tmp_path):
    run_all(train, [Training(seed) for seed in range(3)], tmp_path, workers=1)
    assert [row["seed"] for row in files.read_rows(tmp_path)] == [0, 1, 2]
