"""The files of trainings, which are never half-written, and the table of all results.

OUTPUT/results.csv          one row for each finished training
OUTPUT/<name>/result.json   the row of a training; it exists if and only if the training is finished
OUTPUT/<name>/run.json      what determines the training
OUTPUT/<name>/*.npz         arrays, of the steps or of images
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

RESULT = "result.json"
RUN = "run.json"
TABLE = "results.csv"
LOCK = ".lock"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, even if the power fails."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Remove temporary files of a process that was killed. No process may be writing there."""
    for path in folder.glob(".*.*.[0-9]*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a flat object; NaN and infinity, which JSON lacks, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    write_whole(path, (json.dumps(finite, indent=1) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a compressed `.npz`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote."""
    with np.load(path) as arrays:
        return dict(arrays)


def is_finished(folder: Path) -> bool:
    """Whether a training has a row."""
    return (folder / RESULT).exists()


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of all finished trainings, in order of their names."""
    return [json.loads(path.read_text()) for path in sorted(output.glob(f"*/{RESULT}"))]


def write_table(output: Path) -> None:
    """Write `results.csv` from the rows of all finished trainings."""
    # Two processes with the same output must not overwrite a newer table with an older one.
    with FileLock(output / LOCK):
        rows = read_rows(output)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(output / TABLE, text.getvalue().encode())


def update_table(output: Path) -> None:
    """Write `results.csv` between trainings; on Windows, another program may have it open."""
    try:
        write_table(output)
    except PermissionError as error:
        # Python shows the same warning once.
        warnings.warn(
            f"{output / TABLE} cannot be written, perhaps because another program has it open "
            f"({error.strerror}); it is written again after each training",
            stacklevel=1,
        )
