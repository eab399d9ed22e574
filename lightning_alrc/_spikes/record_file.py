"""The file of a run's record of spikes. Only that run, or a run that resumes it, overwrites it."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lightning_alrc._moments.arguments import is_name
from lightning_alrc._spikes.atomic_files import temporary_path, written_atomically
from lightning_alrc._spikes.ids import PLAIN
from lightning_alrc._spikes.judging import KINDS
from lightning_alrc._spikes.ledger import History
from lightning_alrc._spikes.ledger_file import SUFFIXES, suffix, write_ledger
from lightning_alrc._spikes.places import RECORDS, newest_file
from lightning_alrc._spikes.record import Spike

__all__ = [
    "BATCHES",
    "FILE",
    "OwnedFile",
    "RecordFile",
    "checked_owned_file",
    "checked_spikes",
    "new_run",
    "read_spikes",
    "write_spikes",
]

FILE = "alrc_spikes.jsonl"
BATCHES = "alrc_batches"
"""Name of the folder of batches beside :data:`FILE`."""
NAME_PATTERN = re.compile(r"alrc_spikes(-v\d{1,9})?\.jsonl")
RUN_PATTERN = r"[0-9a-f]{1,32}"
EMPTY = "empty since "


def new_run() -> str:
    """A unique id. It does not draw from the random generators of the training."""
    return secrets.token_hex(6)


class OwnedFile(NamedTuple):
    """The record file of a run, as stored in a checkpoint."""

    file: str | None = None
    """name of the file"""
    run: str | None = None
    """id of the run, which each line of the file has"""
    empty_since: int | None = None
    """time at which the empty file was written, in nanoseconds; ``None`` if the file has spikes"""


class RecordFile:
    """The file of one run. Several runs may have their files in the same folder.

    The file is created exclusively, under the first free name. Each line has the run's id. An empty
    file is identified by the time at which it was written. A run overwrites only a file that it
    identifies as its own, or as the file of the run that it resumes.

    Args:
        folder: folder of the file; it is made if it is missing.
        run: id of the run that writes.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run
        self.path: Path | None = None
        """path of the file; ``None`` until it is created"""
        self._owner: str | None = None

    @property
    def batches(self) -> Path | None:
        """The folder of batches that belongs to the file; ``None`` until the file is created."""
        return None if self.path is None else _batches_of(self.path)

    @property
    def has_vanished(self) -> bool:
        """Whether somebody removed the file."""
        return self.path is not None and not self.path.exists()

    @property
    def owned(self) -> OwnedFile:
        """What a checkpoint stores about the file."""
        name = None if self.path is None else self.path.name
        _, is_empty, since = (self._owner or "").partition(EMPTY)
        return OwnedFile(name, self.run, int(since) if is_empty else None)

    def create(self, with_batches: bool = False) -> None:
        """Create an empty file, under the first free name.

        A name is free if there is no record with this name, and neither a folder of batches nor a
        ledger that would belong to this record.

        Args:
            with_batches: whether to make the folder of batches, too.

        Raises:
            OSError: if the file or the folder cannot be created.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for version in count():
            name = FILE if not version else f"{Path(FILE).stem}-v{version}.jsonl"
            path = self.folder / name
            beside = [_batches_of(path), *_ledgers_of(path)]
            if any(each.exists() for each in beside) or not _create_exclusively(path):
                continue
            # Another run may have made the folder of batches since the check.
            folder = _batches_of(path)
            if _make_exclusively(folder) if with_batches else not folder.exists():
                break
            path.unlink(missing_ok=True)
        self.path, self._owner = path, _owner(path)

    def write(self, spikes: Iterable[Spike]) -> None:
        """Write the record, over what this run wrote before.

        A file that was removed is created again. If another run resumed from a checkpoint of this
        run and took the file over, the record goes into a new file.

        Raises:
            OSError: if the file cannot be written; an existing file is unchanged.
        """
        if not (self._is_ours() or self._recreate()):
            self.create()
        assert self.path is not None
        write_spikes(self.path, spikes, self.run)
        self._owner = _owner(self.path)

    def write_ledger(self, histories: Mapping[str, History], spikes: Iterable[Spike]) -> None:
        """Write the ledger that belongs to the record, over what this run wrote before.

        Args:
            histories: histories by name of the loss.
            spikes: the record. It is written, too, if its file is missing or another run's.

        Raises:
            OSError: if the file cannot be written; an existing file is unchanged.
        """
        if not self._is_ours():
            self.write(spikes)
        assert self.path is not None
        for path in _ledgers_of(self.path):
            if path.suffix == suffix():
                write_ledger(path, histories, self.run)
            else:
                path.unlink(missing_ok=True)  # written before pyarrow was installed or removed

    def _is_ours(self) -> bool:
        """Whether the file exists and is the one that this run wrote."""
        return self.path is not None and _owner(self.path) == self._owner is not None

    def _recreate(self) -> bool:
        """Create the file again if somebody removed it. Returns whether the file was created."""
        if self.path is None or self.path.exists():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return _create_exclusively(self.path)

    def take_over(self, before: OwnedFile, spikes: Iterable[Spike]) -> bool:
        """Write the record over the file of the run that this one resumes, if that file exists.

        The file then has this run's id. If several runs resume from the same checkpoint, only one
        of them takes the file over.

        Returns:
            Whether the file was taken over.

        Raises:
            OSError: if the file cannot be written; an existing file is unchanged.
        """
        if before.run is None:
            return False
        owners = (before.run, f"{EMPTY}{before.empty_since}")
        # The file is found by its owner. Its name is not in the checkpoint if the file was created
        # after the checkpoint was saved. Copies of the file, which have the same owner, are left
        # alone: most have another kind of name, or a higher version.
        files = [each for each in self.folder.glob(RECORDS) if NAME_PATTERN.fullmatch(each.name)]
        files.sort(key=lambda each: (each.name != before.file, len(each.name), each.name))
        path = next((each for each in files if _owner(each) in owners), None)
        if path is None:
            return False
        # If several runs resume at once, one at a time has the lock. The owner is checked again,
        # because another run may have had the lock since the search.
        lock = path.with_name(f".{path.name}.{before.run}.taken")
        if not _create_exclusively(lock):
            return False
        try:
            if _owner(path) not in owners:
                return False
            write_spikes(path, spikes, self.run)
        finally:
            lock.unlink(missing_ok=True)
        self.path, self._owner = path, _owner(path)
        # The earlier run may have been killed while it wrote. Then it left temporary files.
        for each in (path, *_ledgers_of(path)):
            temporary_path(each, before.run).unlink(missing_ok=True)
        return True


def _batches_of(path: Path) -> Path:
    return path.with_name(path.stem.replace("spikes", "batches"))


def _ledgers_of(path: Path) -> list[Path]:
    return [path.with_name(path.stem.replace("spikes", "ledger") + each) for each in SUFFIXES]


def _create_exclusively(path: Path) -> bool:
    """Create an empty file. Returns ``False`` if it existed before."""
    try:
        open(path, "xb").close()
    except FileExistsError:
        return False
    return True


def _make_exclusively(folder: Path) -> bool:
    """Make a folder. Returns ``False`` if it existed before."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _owner(path: Path) -> str | None:
    """What identifies the owner of a record: the run's id, or the time an empty file was written.

    ``None`` if there is no file. An empty string if the file has a first line without an id.
    """
    try:
        with open(path, "rb") as file:
            line, written_at = file.readline(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    if not line:
        return f"{EMPTY}{written_at}"
    try:
        return str(json.loads(line)["run"])
    except (ValueError, KeyError, TypeError):
        return ""


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_id(value: Any) -> bool:
    return type(value) in PLAIN


WHOLE = "a whole number, 0 or above", _is_whole
FINITE = "a finite number", _is_finite
REQUIRED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("the name of a loss", is_name),
    "step": WHOLE,
    "epoch": WHOLE,
    "batch_idx": WHOLE,
    "sample": (f"{WHOLE[0]}, or None", lambda value: value is None or _is_whole(value)),
    "id": (
        "a string, a number or None, or a list of them",
        lambda value: all(map(_is_id, value)) if type(value) is list else _is_id(value),
    ),
    "loss": FINITE,
    "threshold": FINITE,
    "scale": ("a number in [0, 1)", lambda value: _is_finite(value) and 0 <= value < 1),
    "rank": WHOLE,
}
OPTIONAL = {
    "call": WHOLE,
    "gradient_norm": (f"{FINITE[0]}, or None", lambda value: value is None or _is_finite(value)),
    "kind": (f"one of {list(KINDS)}, or None", lambda value: value is None or value in KINDS),
}
"""Columns that records of earlier releases lack."""


def checked_spikes(rows: Any) -> list[Spike]:
    """Spikes from rows of plain numbers and strings.

    Raises:
        ValueError: if a row is not a spike; names the value and what is allowed.
    """
    if not isinstance(rows, list):
        raise ValueError(f"a record of spikes must be a list, got {rows!r:.100}")
    for row in rows:
        if not isinstance(row, Mapping) or set(row) - set(OPTIONAL) != set(REQUIRED):
            raise ValueError(f"a spike must have {list(REQUIRED)}, got {row!r:.300}")
        for key, value in row.items():
            allowed, is_allowed = (REQUIRED | OPTIONAL)[key]
            if not is_allowed(value):
                raise ValueError(f"a spike's {key!r} must be {allowed}, got {value!r:.100}")
    return [Spike(**row) for row in rows]


def checked_owned_file(state: Mapping[str, Any]) -> OwnedFile:
    """The record file of a checkpoint's run. A checkpoint of an earlier release has no run id.

    Raises:
        ValueError: if the state is invalid. The error says what is allowed.
    """
    file, run, since = (state.get(key) for key in ("file", "run", "empty_since"))
    if file is not None and not (isinstance(file, str) and NAME_PATTERN.fullmatch(file)):
        raise ValueError(
            f"a recording's 'file' must be a name like {FILE!r} or None, got {file!r:.100}"
        )
    if run is not None and not (isinstance(run, str) and re.fullmatch(RUN_PATTERN, run)):
        raise ValueError(
            f"a recording's 'run' must be a hexadecimal number or None, got {run!r:.100}"
        )
    if since is not None and type(since) is not int:
        raise ValueError(f"a recording's 'empty_since' must be an int or None, got {since!r:.100}")
    return OwnedFile(file, run, since)


def write_spikes(path: Path, spikes: Iterable[Spike], run: str = "") -> None:
    """Write spikes as one JSON object a line. ``path`` is never a half-written file.

    Args:
        path: path of the file.
        spikes: spikes, the worst first.
        run: id of the run, written into each line.

    Raises:
        OSError: if the file cannot be written; an existing file is unchanged.
    """
    with written_atomically(path, run) as file:
        rows = (spike._asdict() | {"run": run} for spike in spikes)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def read_spikes(path: str | Path) -> list[Spike]:
    """The spikes that :class:`~lightning_alrc.ALRCCallback` recorded, the worst first.

    >>> read_spikes("lightning_logs/version_0")  # doctest: +SKIP

    Args:
        path: path of ``alrc_spikes.jsonl``, or of the folder of the training's logs.

    Raises:
        FileNotFoundError: if there is no such file, or no record in the folder.
        TypeError: if ``path`` is not a path.
        ValueError: if the file is not a record of spikes.
    """
    file = newest_file(path, RECORDS, "a record of spikes")
    try:
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not a record of spikes: {error}") from error
    for row in rows:
        if isinstance(row, dict):
            row.pop("run", None)
    return checked_spikes(rows)
