"""Files that are never half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[IO[Any]]:
    """A file to write bytes to, which takes its place when it is whole and on the disk.

    At no moment is there half of one under ``path``.

    Raises:
        OSError: if it cannot be written; what was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk has no room for half a file
        raise
