import csv
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from examples.comparison import files


def save(output, name, **changes):
    (output / name).mkdir()
    row = {"method": "alrc2", "seed": 0, "train_loss": 1.5, "clipped": None}
    files.write_json(output / name / files.RESULT, row | changes)


def table(output):
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_a_row_for_each_finished_training(tmp_path):
    files.write_table(tmp_path)
    assert table(tmp_path) == []
    save(tmp_path, "b", seed=1)
    save(tmp_path, "a", seed=0)
    (tmp_path / "cut off").mkdir()
    for _ in range(2):
        files.write_table(tmp_path)
        assert [row["seed"] for row in table(tmp_path)] == ["0", "1"]
    assert table(tmp_path)[0]["clipped"] == ""


def test_a_grid_does_not_replace_a_newer_table_by_an_older_one(tmp_path):
    save(tmp_path, "a", seed=0)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / files.LOCK, thread_local=False):
            other = pool.submit(files.write_table, tmp_path)
            time.sleep(0.3)
            save(tmp_path, "b", seed=1)
        other.result()
    assert [row["seed"] for row in table(tmp_path)] == ["0", "1"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    save(tmp_path, "a", train_loss=float("nan"), clipped=float("inf"))
    row = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (row["train_loss"], row["clipped"]) == (None, None)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_does_not_change_the_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    files.write_whole(path, b"before")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os if failing == "fsync" else type(path), failing, fail)
    with pytest.raises(OSError, match="no space"):
        files.write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_flushed_to_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync

    def noted(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files.write_whole(tmp_path / "file", b"content")
    assert sizes == [7]


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    kept = [files.LOCK, files.RUN, "last.ckpt", files.RESULT]
    for name in [*kept, ".run.json.1392", ".last.ckpt.1395"]:
        (tmp_path / name).touch()
    files.clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
