import csv
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from filelock import FileLock

from examples.cifar10_supersampling import results
from examples.cifar10_supersampling.results import Result


def made_up(**changes):
    return Result(
        row={"method": "alrc2", "seed": 0, "train_loss": 1.5, "clipped": None} | changes,
        history={"loss": np.arange(4, dtype=np.float32)},
        images={"input": np.zeros((8, 3, 32, 32), dtype=np.float32)},
    )


def table(output):
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def save(output, name, **changes):
    (output / name).mkdir()
    results.save(output / name, made_up(**changes))


def test_what_is_saved_is_loaded(tmp_path):
    assert not results.is_finished(tmp_path / "a")
    save(tmp_path, "a")
    assert results.is_finished(tmp_path / "a")
    loaded = results.load(tmp_path / "a")
    assert loaded.row == made_up().row
    np.testing.assert_array_equal(loaded.history["loss"], made_up().history["loss"])
    assert loaded.images["input"].shape == (8, 3, 32, 32)


def test_table_has_a_row_for_each_finished_training(tmp_path):
    results.write_table(tmp_path)
    assert table(tmp_path) == []
    save(tmp_path, "b", seed=1)
    save(tmp_path, "a", seed=0)
    (tmp_path / "cut off").mkdir()
    for _ in range(2):
        results.write_table(tmp_path)
        assert [row["seed"] for row in table(tmp_path)] == ["0", "1"]
    assert table(tmp_path)[0]["clipped"] == ""


def test_of_two_grids_neither_writes_fewer_rows_than_the_other(tmp_path):
    save(tmp_path, "a", seed=0)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / results.LOCK, thread_local=False):
            other = pool.submit(results.write_table, tmp_path)
            time.sleep(0.3)
            save(tmp_path, "b", seed=1)
        other.result()
    assert [row["seed"] for row in table(tmp_path)] == ["0", "1"]


def test_what_is_not_finite_becomes_null(tmp_path):
    save(tmp_path, "a", train_loss=float("nan"), clipped=float("inf"))
    row = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (row["train_loss"], row["clipped"]) == (None, None)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    results.write_whole(path, b"before")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os if failing == "fsync" else type(path), failing, fail)
    with pytest.raises(OSError, match="no space"):
        results.write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_all_of_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync

    def noted(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    results.write_whole(tmp_path / "file", b"content")
    assert sizes == [7]


def test_row_comes_last(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        results.save(tmp_path / "a", made_up())
    assert not results.is_finished(tmp_path / "a")


def test_what_a_killed_process_was_writing_is_cleared(tmp_path):
    kept = [results.LOCK, results.RUN, results.CHECKPOINT, results.RESULT]
    for name in [*kept, ".run.json.1392", ".last.ckpt.1395"]:
        (tmp_path / name).touch()
    results.clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
