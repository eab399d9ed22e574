"""Reads columns of numbers from a CSV file, such as a CSVLogger's ``metrics.csv``.

If pandas is installed, it reads large files, in a sixth of the time of Python's own reader. Both
readers give the same numbers, except that releases of pandas before 3 may differ in the last digit.
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
"""Least size in bytes of a file that pandas reads. Pandas would not save time on a smaller file,
because importing pandas takes half a second."""

CHUNK = 500
"""Lines held as strings at a time. More lines would slow down Python's garbage collection."""

Columns = dict[str, NDArray[np.float64]]


def read_csv(path: Path, wanted: Callable[[str], bool]) -> Columns:
    """Read columns of numbers.

    Incomplete lines are left out. A full disk, or a training that still runs, may leave one.

    Args:
        path: path of the file. If its name ends in ``.gz``, the file is decompressed.
        wanted: returns whether the column of a given name is to be read.

    Returns:
        Each column by name, [lines]. Empty cells are NaN.

    Raises:
        ValueError: if the file is not CSV, or a cell is not a number.
    """
    try:
        if path.stat().st_size >= LARGE and find_spec("pandas") is not None:
            columns = _read_by_pandas(path, wanted)
            if columns is not None:
                return columns
        with _opened(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            return _read_by_csv(path, text, wanted)
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"source {str(path)!r} cannot be read as CSV: {error}") from error


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_by_pandas(path: Path, wanted: Callable[[str], bool]) -> Columns | None:
    """What :func:`read_csv` returns, by pandas; ``None`` if Python's reader must read the file.

    Python's reader is needed for quotes, for lines with a wrong number of cells, and to find a cell
    that is not a number.
    """
    pandas: Any = import_module("pandas")
    with _opened(path) as file:
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    # pandas would fill up a line that is too short with empty cells, and cut one that is too long.
    if b'"' in data or len({line.count(b",") for line in io.BytesIO(data)}) > 1:
        return None
    # By default, pandas reads words like "None" and "NA" as NaN, too.
    nan = {"keep_default_na": False, "na_values": ["", "nan", "NaN"]}
    try:
        frame = pandas.read_csv(io.BytesIO(data), usecols=wanted, dtype=np.float64, **nan)
    except ValueError:  # Python's reader then finds the cell that is not a number
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
    """The first cell that is not a number."""
    for cell in cells:
        try:
            float(cell or "nan")
        except ValueError:
            return cell
    return ""
