"""Files that are never half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["part_of", "written_atomically"]


@contextmanager
def written_atomically(path: Path, run: str = "") -> Iterator[IO[Any]]:
    """A file to write bytes to, which takes its place when it is whole and on the disk.

    At no moment is there half of one under ``path``.

    Args:
        path: of the file; its folder is made if it is missing.
        run: id of the run that writes it. Two runs never write to the same part.

    Raises:
        OSError: if it cannot be written; what was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path, run)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)  # a full disk has no room for half a file
        raise


def part_of(path: Path, run: str) -> Path:
    """Where a file is until it is whole; a run that is killed may leave it behind."""
    return path.with_name(f".{path.name}.{run}.part" if run else f".{path.name}.part")
