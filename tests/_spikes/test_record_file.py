"""A run's record in a file: never half-written, checked, and not overwritten by other runs."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_alrc._spikes import record_file
from lightning_alrc._spikes.record_file import (
    OwnedFile,
    RecordFile,
    checked_spikes,
    new_run,
    read_spikes,
    write_spikes,
)
from tests.spikes import FOLDER, NAME, spike


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    spikes = [spike(), spike(step=4, sample=None, id=[1, 2]), spike(step=5, id=None)]
    write_spikes(tmp_path / NAME, spikes)
    assert read_spikes(tmp_path / NAME) == spikes
    lines = (tmp_path / NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 5]
    assert [json.loads(line)["call"] for line in lines] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_file_may_have_any_line_separator_in_its_texts(tmp_path: Path) -> None:
    spikes, path = [spike(id="a\x85b\u2028c"), spike(step=4)], tmp_path / NAME
    rows = [json.dumps(each._asdict(), ensure_ascii=False) for each in spikes]
    path.write_text("\n".join(rows), encoding="utf-8")
    assert read_spikes(path) == spikes
    path.write_text("high\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{NAME}' is not a record of spikes: Expecting"):
        read_spikes(path)


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    records = [[spike(step=step, id=name) for step in range(3000)] for name in ("odd", "even")]
    path, deaths = tmp_path / NAME, 0
    write_spikes(path, records[0])
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    write_spikes(path, records[0])
                    write_spikes(path, records[1])
            finally:
                os._exit(1)  # an error would make the child go on with the other tests
        time.sleep(random.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deaths += (tmp_path / f".{NAME}.part").exists()
        assert read_spikes(path) in records
    assert deaths > 5  # the writer was killed while writing


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 1}, "a spike must have .*'name'.*got {'step': 1}"),
        (spike()._asdict() | {"loss": "9"}, "'loss' must be a finite number, got '9'"),
        (spike()._asdict() | {"loss": math.nan}, "'loss' must be a finite number, got nan"),
        (spike()._asdict() | {"loss": 10**400}, "'loss' must be a finite number, got 1000"),
        (
            spike()._asdict() | {"threshold": math.inf},
            "'threshold' must be a finite number, got inf",
        ),
        (spike()._asdict() | {"scale": 1.0}, r"'scale' must be a number in \[0, 1\), got 1.0"),
        (spike()._asdict() | {"scale": math.nan}, r"'scale' must be a number in \[0, 1\), got nan"),
        (spike()._asdict() | {"sample": 1.0}, "'sample' must be a whole number.* or None, got 1.0"),
        (spike()._asdict() | {"batch_idx": True}, "'batch_idx' must be a whole number.*got True"),
        (spike()._asdict() | {"step": -1}, "'step' must be a whole number, 0 or above, got -1"),
        (
            spike()._asdict() | {"rank": 10**30},
            "'rank' must be a whole number, 0 or above, got 1000",
        ),
        (
            spike()._asdict() | {"id": {}},
            "'id' must be a string, a number or None, or a list.*got {}",
        ),
        (spike()._asdict() | {"id": [[1]]}, r"'id' must be a string.*got \[\[1\]\]"),
        (spike()._asdict() | {"id": torch.ones(2)}, r"'id' must be a string.*got tensor"),
        (spike()._asdict() | {"name": "x" * 10**6}, "'name' must be the name of a loss, got 'xxx"),
        (spike()._asdict() | {"name": "../a"}, r"'name' must be the name of a loss, got '\.\./a'"),
        (3, "a spike must have .*got 3"),
    ],
)
def test_an_invalid_spike_is_refused(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        checked_spikes([spike()._asdict(), row])
    assert len(str(raised.value)) < 1000
    with pytest.raises(ValueError, match="must be a list"):
        checked_spikes(row)


def test_a_record_of_an_earlier_release_loads(tmp_path: Path) -> None:
    row = spike()._asdict()
    for key in ("call", "gradient_norm", "kind"):
        del row[key]
    (tmp_path / NAME).write_text(json.dumps(row) + "\n")
    assert read_spikes(tmp_path / NAME) == checked_spikes([row]) == [spike()]


def test_an_empty_record_is_valid(tmp_path: Path) -> None:
    RecordFile(tmp_path, new_run()).create()
    assert read_spikes(tmp_path / NAME) == []


# ---- owners


@pytest.mark.parametrize("by", ["a person", "another run"])
def test_a_record_that_was_removed_or_replaced_is_written_with_the_ledger(
    tmp_path: Path, by: str
) -> None:
    file = begun(tmp_path)
    (tmp_path / NAME).unlink()
    if by == "another run":
        begun(tmp_path, spike(step=9))
    file.write_ledger({}, [spike(step=5)])
    assert file.path is not None
    assert read_spikes(file.path) == [spike(step=5)]
    assert runs_in(file.path) == {file.run}


def runs_in(path: Path) -> set[str]:
    return {json.loads(line)["run"] for line in path.read_text().splitlines()}


def begun(folder: Path, *spikes: Any, run: str = "") -> RecordFile:
    file = RecordFile(folder, run or new_run())
    file.write(spikes or [spike()])
    return file


def test_each_line_has_the_run(tmp_path: Path) -> None:
    file = begun(tmp_path, spike(), spike(step=4))
    assert runs_in(tmp_path / NAME) == {file.run}
    file.write([spike(step=5)])
    assert read_spikes(tmp_path / NAME) == [spike(step=5)]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_ids_of_runs_differ_and_take_no_random_numbers() -> None:
    torch.manual_seed(0)
    random.seed(0)
    states = random.getstate(), torch.get_rng_state().tolist()
    assert len({new_run() for _ in range(100)}) == 100
    assert (random.getstate(), torch.get_rng_state().tolist()) == states


def test_a_run_takes_the_first_free_name(tmp_path: Path) -> None:
    first = begun(tmp_path)
    (tmp_path / f"{FOLDER}-v1").mkdir()  # the record that it belongs to was removed
    third = begun(tmp_path, spike(step=9))
    assert third.path == tmp_path / "alrc_spikes-v2.jsonl"
    assert runs_in(tmp_path / NAME) == {first.run}


def test_a_record_comes_with_a_folder_of_batches_of_its_own(tmp_path: Path) -> None:
    for version in ("", "-v1"):
        file = RecordFile(tmp_path, new_run())
        file.create(with_batches=True)
        assert file.path == tmp_path / f"alrc_spikes{version}.jsonl"
        assert file.batches == tmp_path / f"{FOLDER}{version}"
        assert file.batches.is_dir()


def test_a_record_that_was_removed_is_written_again(tmp_path: Path) -> None:
    file = begun(tmp_path / "deep")
    (tmp_path / "deep" / NAME).unlink()
    (tmp_path / "deep").rmdir()
    assert file.has_vanished
    file.write([spike(step=4)])
    assert not file.has_vanished
    assert read_spikes(tmp_path / "deep" / NAME) == [spike(step=4)]


def test_a_run_whose_file_was_removed_does_not_write_over_the_file_of_another_run(
    tmp_path: Path,
) -> None:
    first = begun(tmp_path)
    (tmp_path / NAME).unlink()
    second = begun(tmp_path, spike(step=4))
    first.write([spike(step=5)])
    assert runs_in(tmp_path / NAME) == {second.run}
    assert read_spikes(tmp_path / "alrc_spikes-v1.jsonl") == [spike(step=5)]


@pytest.mark.parametrize("spikes", [[], [spike(step=8)]], ids=["empty", "not empty"])
@pytest.mark.parametrize("was_empty", [True, False])
def test_only_one_resuming_run_takes_the_record_over(
    tmp_path: Path, spikes: list[Any], was_empty: bool
) -> None:
    before = RecordFile(tmp_path, new_run())
    before.create()
    owned = before.owned
    if not was_empty:
        before.write([spike()])
    after, late = RecordFile(tmp_path, new_run()), RecordFile(tmp_path, new_run())
    assert after.take_over(owned, spikes)
    assert read_spikes(tmp_path / NAME) == spikes
    assert not late.take_over(owned, spikes)
    late.write([spike(step=9)])
    assert late.path == tmp_path / "alrc_spikes-v1.jsonl"
    after.write([spike(step=7)])
    assert runs_in(tmp_path / NAME) == {after.run}


def test_a_resuming_run_removes_the_temporary_files_of_a_killed_run(
    tmp_path: Path,
) -> None:
    before, other = begun(tmp_path), begun(tmp_path)
    for run in (before.run, other.run):
        (tmp_path / f".{NAME}.{run}.part").write_text("half")
    assert RecordFile(tmp_path, new_run()).take_over(before.owned, [])
    assert [path.name for path in tmp_path.glob(".*")] == [f".{NAME}.{other.run}.part"]


def test_a_record_that_was_created_after_the_checkpoint_is_taken_over(tmp_path: Path) -> None:
    begun(tmp_path)
    before = RecordFile(tmp_path, new_run())
    owned = before.owned
    before.write([spike()])
    after = RecordFile(tmp_path, new_run())
    assert after.take_over(owned, [spike(step=4)])
    assert after.path == before.path == tmp_path / "alrc_spikes-v1.jsonl"


@pytest.mark.parametrize("copy", ["alrc_spikes-before.jsonl", "alrc_spikes-v1.jsonl"])
@pytest.mark.parametrize("is_named", [True, False])
def test_a_copy_of_the_record_is_not_taken_over(tmp_path: Path, copy: str, is_named: bool) -> None:
    before = begun(tmp_path)
    shutil.copy(tmp_path / NAME, tmp_path / copy)
    after = RecordFile(tmp_path, new_run())
    owned = before.owned if is_named else before.owned._replace(file=None)
    assert after.take_over(owned, [spike(step=4)])
    assert after.path == before.path
    assert read_spikes(tmp_path / copy) == [spike()]


def test_the_record_is_taken_over_by_its_name_before_its_copies(tmp_path: Path) -> None:
    begun(tmp_path)
    before = begun(tmp_path, spike(step=4))
    shutil.copy(tmp_path / "alrc_spikes-v1.jsonl", tmp_path / NAME)
    after = RecordFile(tmp_path, new_run())
    assert after.take_over(before.owned, [])
    assert after.path == before.path


@pytest.mark.parametrize("content", ["", "half a li", '{"name": "loss"}\n'])
def test_a_file_without_a_run_id_is_not_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    for owned in (OwnedFile(NAME), OwnedFile(NAME, new_run()), OwnedFile(NAME, new_run(), 1)):
        assert not RecordFile(tmp_path, new_run()).take_over(owned, [])
    assert (tmp_path / NAME).read_text() == content


def test_a_record_that_is_taken_over_during_the_check_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, other = begun(tmp_path), RecordFile(tmp_path, new_run())
    create_exclusively = record_file._create_exclusively

    def after_the_other(path: Path) -> bool:
        monkeypatch.setattr(record_file, "_create_exclusively", create_exclusively)
        assert other.take_over(before.owned, [spike(step=8)])
        return create_exclusively(path)

    monkeypatch.setattr(record_file, "_create_exclusively", after_the_other)
    assert not RecordFile(tmp_path, new_run()).take_over(before.owned, [spike(step=9)])
    assert read_spikes(tmp_path / NAME) == [spike(step=8)]


def test_only_one_of_several_resuming_processes_takes_the_record_over(tmp_path: Path) -> None:
    before, children = begun(tmp_path), []
    start = time.time() + 0.5
    for step in range(10, 14):
        child = os.fork()
        if child == 0:
            try:
                file = RecordFile(tmp_path, new_run())
                time.sleep(max(0, start - time.time()))
                taken = file.take_over(before.owned, [spike(step=step)])
                for _ in range(20):
                    file.write([spike(step=step)])
                os._exit(10 if taken else 20)
            finally:
                os._exit(1)  # an error would make the child go on with the other tests
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [10, 20, 20, 20]
    records = list(tmp_path.glob("alrc_spikes*.jsonl"))
    assert sorted(read_spikes(path)[0].step for path in records) == [10, 11, 12, 13]
    assert all(len(runs_in(path)) == 1 for path in records)
