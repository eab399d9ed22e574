"""A file is never half-written. tests/_spikes/test_record_file.py also kills the writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_alrc._spikes.atomic_files import written_atomically


def test_a_file_exists_only_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with written_atomically(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_existing_file_is_unchanged_if_writing_fails(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(error), written_atomically(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_existing_file_is_unchanged_if_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"), written_atomically(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match="no space"), written_atomically(tmp_path / "file"):
        raise OSError("no space left on device")


def test_a_file_is_on_the_disk_before_it_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with written_atomically(tmp_path / "file") as file:
        file.write(b"content")
    assert sizes == [7]
