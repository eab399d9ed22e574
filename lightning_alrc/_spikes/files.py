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
    """Open a temporary file for bytes, and move it to ``path`` when it is complete on the disk.

    ``path`` is never a half-written file.

    Args:
        path: path of the file; its folder is made if it is missing.
        run: id of the run that writes it. Two runs never write to the same temporary file.

    Raises:
        OSError: if it cannot be written; a file from before is unchanged.
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
            part.unlink(missing_ok=True)  # the disk may be full
        raise


def part_of(path: Path, run: str) -> Path:
    """Path of the temporary file. A run that is killed may leave it behind."""
    return path.with_name(f".{path.name}.{run}.part" if run else f".{path.name}.part")
