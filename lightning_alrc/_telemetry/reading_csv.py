"""The columns of a CSVLogger's ``metrics.csv``.

Large files are read by pandas where it is installed: that takes a sixth of the time of Python's own
reader. Both give the same numbers, except for the last digit in releases of pandas before 3.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_csv"]

LARGE = 2**22
"""Bytes above which a file is worth the half second that importing pandas takes."""

CHUNK = 500
"""Lines held as strings at a time. More of them slow down Python's garbage collection."""

Columns = dict[str, NDArray[np.float64]]


def read_csv(path: Path, wanted: Callable[[str], bool]) -> Columns:
    """Read columns of numbers.

    A line that is incomplete is left out: a full disk, or a training that still runs, may leave
    one.

    Args:
        path: the file; one whose name ends in ``.gz`` is decompressed.
        wanted: whether a column is to be read, by its name.

    Returns:
        By name, each column, [lines]; NaN where a cell is empty.

    Raises:
        ValueError: if it is no CSV file, or a cell is no number.
    """
    try:
        if path.stat().st_size >= LARGE and find_spec("pandas") is not None:
            columns = _read_by_pandas(path, wanted)
            if columns is not None:
                return columns
        with _opened(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            return _read_by_csv(path, text, wanted)
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"source {str(path)!r} cannot be read as CSV: {error}") from error


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_by_pandas(path: Path, wanted: Callable[[str], bool]) -> Columns | None:
    """The same, for a file in which each line is complete; ``None`` for any other."""
    pandas: Any = import_module("pandas")
    with _opened(path) as file:
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    width = data.partition(b"\n")[0].count(b",")
    # pandas would read a line that is too short as a line with empty cells.
    if b'"' in data or data.count(b",") != width * data.count(b"\n"):
        return None
    try:
        frame = pandas.read_csv(io.BytesIO(data), usecols=wanted, dtype=np.float64)
    except ValueError:  # Python's reader finds the cell that is no number
        return None
    return {str(key): frame[key].to_numpy() for key in frame}


def _read_by_csv(path: Path, file: Any, wanted: Callable[[str], bool]) -> Columns:
    reader = csv.reader(line for line in file if line.endswith("\n"))
    header = next(reader, [])
    chosen = [index for index, key in enumerate(header) if wanted(key)]
    parts: list[list[NDArray[np.float64]]] = [[] for _ in chosen]
    for lines in _chunks(reader):
        cells = list(zip(*(line for line in lines if len(line) == len(header)), strict=True))
        if not cells:
            continue
        for index, part in zip(chosen, parts, strict=True):
            try:
                part.append(_numbers(cells[index]))
            except ValueError:
                raise ValueError(
                    f"source {str(path)!r} must have numbers or nothing in the column "
                    f"{header[index]!r}, got {_first_wrong(cells[index])!r:.100}"
                ) from None
    return {
        header[index]: np.concatenate(part) if part else np.empty(0)
        for index, part in zip(chosen, parts, strict=True)
    }


def _chunks(reader: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    while lines := list(islice(reader, CHUNK)):
        yield lines


def _numbers(cells: tuple[str, ...]) -> NDArray[np.float64]:
    if "" in cells:
        return np.array([float(cell or "nan") for cell in cells])
    return np.array(list(map(float, cells)))


def _first_wrong(cells: tuple[str, ...]) -> str:
    """The first cell that is no number."""
    for cell in cells:
        try:
            float(cell or "nan")
        except ValueError:
            return cell
    return ""
