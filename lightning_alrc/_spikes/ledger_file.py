"""The file of a ledger: Parquet if pyarrow is installed, otherwise CSV."""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_alrc._spikes.atomic_files import written_atomically
from lightning_alrc._spikes.ids import encodable
from lightning_alrc._spikes.ledger import Entry, History, is_whole

__all__ = ["COLUMNS", "SUFFIXES", "read_rows", "suffix", "write_ledger"]

SUFFIXES = (".parquet", ".csv")


FLOATS = ("mean", "last", "largest", "variance", "stddevs")
COLUMNS = ("id", "count", *FLOATS, "clipped", "nonfinite")
WHOLE = ("count", "clipped", "nonfinite")
HEADER = ("name", *COLUMNS)


def _row(name: str, entry: Entry) -> tuple[Any, ...]:
    """A row of the file: one sample of one loss."""
    count = entry.finite
    floats = (math.nan,) * len(FLOATS)
    if count:
        means = entry.squared_deviation / count, entry.stddevs / count
        floats = entry.mean, entry.last, entry.largest, *means
    return name, entry.id, count + entry.nonfinite, *floats, entry.clipped, entry.nonfinite


def suffix() -> str:
    """Suffix of the ledgers that this environment writes."""
    return SUFFIXES[0] if find_spec("pyarrow") is not None else SUFFIXES[1]


def write_ledger(path: Path, histories: Mapping[str, History], run: str = "") -> None:
    """Write a ledger. ``path`` is never a half-written file.

    If any id is not a whole number of 64 bits, all ids are written as strings. What UTF-8 cannot
    encode, as in some names of files, is written as escapes such as ``\\udce9``.

    Args:
        path: path of the file; its suffix sets the format.
        histories: histories by name of the loss.
        run: id of the run that writes.

    Raises:
        OSError: if the file cannot be written; an existing file is unchanged.
    """
    rows = [_row(name, entry) for name in histories for entry in histories[name].entries]
    if not all(is_whole(row[1]) for row in rows):
        rows = [(row[0], encodable(row[1]), *row[2:]) for row in rows]
    write = _write_parquet if path.suffix == SUFFIXES[0] else _write_csv
    with written_atomically(path, run) as file:
        write(file, rows)


def _write_parquet(file: Any, rows: list[tuple[Any, ...]]) -> None:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    columns = zip(*rows, strict=True) if rows else [[] for _ in HEADER]
    named = {name: list(column) for name, column in zip(HEADER, columns, strict=True)}
    parquet.write_table(pyarrow.table(named), file)


def _write_csv(file: Any, rows: Iterable[tuple[Any, ...]]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    # Strings are quoted, so that read_rows can tell an id that is a string of digits from a number.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(HEADER)
    writer.writerows(rows)
    text.detach()


def read_rows(path: Path) -> Any:
    """All rows of a ledger's file, as a pandas DataFrame.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if pandas is not installed, or if the file is a Parquet file and pyarrow is not
            installed.
        ValueError: if the file is not a ledger.
    """
    pandas = importlib.import_module("pandas")
    # The file is opened only once: a run may replace it after it was opened.
    with open(path, "rb") as file:
        if path.suffix == SUFFIXES[0]:
            parquet = importlib.import_module("pyarrow.parquet")
            try:
                frame = parquet.read_table(file).to_pandas()
            except (importlib.import_module("pyarrow").ArrowInvalid, OSError) as error:
                raise ValueError(f"{path} is not a ledger: {error}") from None
        else:
            header, first = (file.readline().decode(errors="replace") for _ in range(2))
            if next(csv.reader([header]), []) != list(HEADER):
                raise ValueError(f"{path} is not a ledger: its first line is {header!r:.100}")
            are_strings = re.match(r'"[^"]*","', first) is not None
            file.seek(0)
            frame = pandas.read_csv(
                file,
                dtype={"name": str, "id": str if are_strings else "int64"},
                keep_default_na=False,  # an id may be "NA"
                na_values={name: ["nan"] for name in FLOATS},
                float_precision="round_trip",
            )
    if list(frame.columns) != list(HEADER):
        raise ValueError(
            f"{path} is not a ledger: its columns are {list(frame.columns)}, and must be "
            f"{list(HEADER)}"
        )
    types = dict.fromkeys(WHOLE, "int64") | dict.fromkeys(FLOATS, "float64")
    return frame.astype(types)
