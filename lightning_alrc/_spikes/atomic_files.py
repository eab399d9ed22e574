"""Files that are never half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["temporary_path", "written_atomically"]


@contextmanager
def written_atomically(path: Path, run: str = "") -> Iterator[IO[Any]]:
    """Open a temporary file for bytes, and move it to ``path`` when it is complete on the disk.

    ``path`` is never a half-written file.

    Args:
        path: path of the file; its folder is made if it is missing.
        run: id of the run that writes; default: none. Runs with different ids never write to the
            same temporary file.

    Raises:
        OSError: if the file cannot be written; an existing file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary_path(path, run)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to raise
            part.unlink(missing_ok=True)
        raise


def temporary_path(path: Path, run: str) -> Path:
    """Path of the temporary file. A run that is killed may leave the file behind."""
    return path.with_name(f".{path.name}.{run}.part" if run else f".{path.name}.part")
