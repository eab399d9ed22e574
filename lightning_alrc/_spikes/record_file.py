"""The file of a run's record of spikes, which no other run overwrites."""

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
from lightning_alrc._spikes.files import part_of, written_atomically
from lightning_alrc._spikes.ids import PLAIN
from lightning_alrc._spikes.judging import KINDS
from lightning_alrc._spikes.ledger import History
from lightning_alrc._spikes.ledger_file import SUFFIXES, suffix, write_ledger
from lightning_alrc._spikes.places import RECORDS
from lightning_alrc._spikes.record import Spike

__all__ = [
    "FILE",
    "Owned",
    "RecordFile",
    "checked_owned",
    "checked_spikes",
    "new_run",
    "read_spikes",
    "write_spikes",
]

FILE = "alrc_spikes.jsonl"
NAMES = r"alrc_spikes(-v\d{1,9})?\.jsonl"
RUNS = r"[0-9a-f]{1,32}"
EMPTY = "empty since "


def new_run() -> str:
    """An id that no other run has. It takes nothing from the random numbers of the training."""
    return secrets.token_hex(6)


class Owned(NamedTuple):
    """The record file of a run, as a checkpoint has it."""

    file: str | None = None
    """its name"""
    run: str | None = None
    """id of the run, which is in each of the file's lines"""
    empty_since: int | None = None
    """when it was written, in nanoseconds, if it had no line then"""


class RecordFile:
    """One file in a folder that several runs may share.

    The file is created exclusively, under the first free name. Each line has the run's id. An empty
    file has none, and is told by the time at which it was written. Only a file that is told to be
    this run's is written again.

    Args:
        folder: which need not exist.
        run: id of the run that writes.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run
        self.path: Path | None = None
        """``None`` until it is created"""
        self._owner: str | None = None

    @property
    def batches(self) -> Path | None:
        """The folder of batches that goes with it."""
        return None if self.path is None else _batches_of(self.path)

    @property
    def has_vanished(self) -> bool:
        """Whether somebody removed it."""
        return self.path is not None and not self.path.exists()

    @property
    def owned(self) -> Owned:
        """For a checkpoint."""
        name = None if self.path is None else self.path.name
        _, is_empty, since = (self._owner or "").partition(EMPTY)
        return Owned(name, self.run, int(since) if is_empty else None)

    def create(self, with_batches: bool = False) -> None:
        """Make an empty file under the first name that no run has, nor its batches or ledger.

        Args:
            with_batches: make the folder of batches that goes with it, too.

        Raises:
            OSError: if it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for version in count():
            name = FILE if not version else f"{Path(FILE).stem}-v{version}.jsonl"
            path = self.folder / name
            beside = [_batches_of(path), *_ledgers_of(path)]
            if any(each.exists() for each in beside) or not _is_created(path):
                continue
            # Another run may have made the folder of batches since.
            folder = _batches_of(path)
            if _is_made(folder) if with_batches else not folder.exists():
                break
            path.unlink(missing_ok=True)
        self.path, self._owner = path, _owner(path)

    def write(self, spikes: Iterable[Spike]) -> None:
        """Write the record, over what this run wrote before.

        A file that was removed is created again. Where another run has taken it over, as one that
        resumed from a checkpoint of this run, the next free name is taken.

        Raises:
            OSError: if it cannot be written; what was there before still is.
        """
        if not (self._is_as_it_was() or self._is_created_again()):
            self.create()
        assert self.path is not None
        write_spikes(self.path, spikes, self.run)
        self._owner = _owner(self.path)

    def write_ledger(self, histories: Mapping[str, History]) -> None:
        """Write the ledger that goes with the record, over what this run wrote before.

        Raises:
            OSError: if it cannot be written; what was there before still is.
        """
        if not self._is_as_it_was():
            if not self._is_created_again():
                self.create()
            assert self.path is not None
            self._owner = _owner(self.path)
        assert self.path is not None
        for path in _ledgers_of(self.path):
            if path.suffix == suffix():
                write_ledger(path, histories, self.run)
            else:
                path.unlink(missing_ok=True)  # pyarrow was not installed then, or is not now

    def _is_as_it_was(self) -> bool:
        """Whether the file is there, and is the one that this run wrote."""
        return self.path is not None and _owner(self.path) == self._owner is not None

    def _is_created_again(self) -> bool:
        """Create the file again if somebody removed it; whether it was created."""
        if self.path is None or self.path.exists():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return _is_created(self.path)

    def take_over(self, before: Owned, spikes: Iterable[Spike]) -> bool:
        """Write the record over that of a run which this one resumes, if it is still there.

        The file then has this run's id, so that only one of several runs that resume from the same
        checkpoint takes it over.

        Returns:
            Whether it was there, under that run's id.

        Raises:
            OSError: if it cannot be written; what was there before still is.
        """
        if before.run is None:
            return False
        owners = (before.run, f"{EMPTY}{before.empty_since}")
        # It may have been created after the checkpoint was saved.
        files = sorted(self.folder.glob(RECORDS))
        path = next((each for each in files if _owner(each) in owners), None)
        if path is None:
            return False
        # Of runs that resume at once, one makes this file; it looks again while it has it.
        lock = path.with_name(f".{path.name}.{before.run}.taken")
        if not _is_created(lock):
            return False
        try:
            if _owner(path) not in owners:
                return False
            write_spikes(path, spikes, self.run)
        finally:
            lock.unlink(missing_ok=True)
        self.path, self._owner = path, _owner(path)
        for each in (path, *_ledgers_of(path)):
            part_of(each, before.run).unlink(missing_ok=True)  # it was killed while it wrote
        return True


def _batches_of(path: Path) -> Path:
    return path.with_name(path.stem.replace("spikes", "batches"))


def _ledgers_of(path: Path) -> list[Path]:
    return [path.with_name(path.stem.replace("spikes", "ledger") + each) for each in SUFFIXES]


def _is_created(path: Path) -> bool:
    """Create an empty file; whether it was not there before."""
    try:
        open(path, "xb").close()
    except FileExistsError:
        return False
    return True


def _is_made(folder: Path) -> bool:
    """Make a folder; whether it was not there before."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _owner(path: Path) -> str | None:
    """What tells whose a record is: its run's id, or since when it is empty.

    ``None`` if there is no file; an empty string if it has no id.
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
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
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
SINCE = {
    "call": WHOLE,
    "gradient_norm": (f"{FINITE[0]}, or None", lambda value: value is None or _is_finite(value)),
    "kind": (f"one of {list(KINDS)}, or None", lambda value: value is None or value in KINDS),
}
"""What records of earlier releases do not have."""


def checked_spikes(rows: Any) -> list[Spike]:
    """Spikes from rows of plain numbers and strings.

    Raises:
        ValueError: if one is not a spike's; names it and what is allowed.
    """
    if not isinstance(rows, list):
        raise ValueError(f"a record of spikes must be a list, got {rows!r:.100}")
    for row in rows:
        if not isinstance(row, Mapping) or set(row) - set(SINCE) != set(ALLOWED):
            raise ValueError(f"a spike must have {list(ALLOWED)}, got {row!r:.300}")
        for key, value in row.items():
            allowed, is_allowed = (ALLOWED | SINCE)[key]
            if not is_allowed(value):
                raise ValueError(f"a spike's {key!r} must be {allowed}, got {value!r:.100}")
    return [Spike(**row) for row in rows]


def checked_owned(state: Mapping[str, Any]) -> Owned:
    """The record file of a checkpoint's run; one of an earlier release has no run.

    Raises:
        ValueError: names what is wrong with it, and what is allowed.
    """
    file, run, since = (state.get(key) for key in ("file", "run", "empty_since"))
    if file is not None and not (isinstance(file, str) and re.fullmatch(NAMES, file)):
        raise ValueError(
            f"a recording's 'file' must be a name like {FILE!r} or None, got {file!r:.100}"
        )
    if run is not None and not (isinstance(run, str) and re.fullmatch(RUNS, run)):
        raise ValueError(
            f"a recording's 'run' must be a hexadecimal number or None, got {run!r:.100}"
        )
    if since is not None and type(since) is not int:
        raise ValueError(f"a recording's 'empty_since' must be an int or None, got {since!r:.100}")
    return Owned(file, run, since)


def write_spikes(path: Path, spikes: Iterable[Spike], run: str = "") -> None:
    """Write one JSON object a line. At no moment is there half a file under ``path``.

    Args:
        path: of the file.
        spikes: the worst first.
        run: id of the run, which each line has.

    Raises:
        OSError: if it cannot be written; what was there before still is.
    """
    with written_atomically(path, run) as file:
        rows = (spike._asdict() | {"run": run} for spike in spikes)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def read_spikes(path: str | Path) -> list[Spike]:
    """The spikes in a file that :class:`~lightning_alrc.ALRCCallback` wrote, the worst first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not one of those.
    """
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for row in rows:
        if isinstance(row, dict):
            row.pop("run", None)
    return checked_spikes(rows)
