"""The file of a ledger: Parquet if pyarrow is installed, otherwise CSV."""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_alrc._spikes.atomic_files import written_atomically
from lightning_alrc._spikes.ids import encodable
from lightning_alrc._spikes.ledger import History, is_whole

__all__ = ["COLUMNS", "SUFFIXES", "read_rows", "suffix", "write_ledger"]

SUFFIXES = (".parquet", ".csv")


FLOATS = ("mean", "last", "largest", "variance", "stddevs")
COLUMNS = ("id", "count", *FLOATS, "clipped", "nonfinite")
WHOLE = ("count", "clipped", "nonfinite")
HEADER = ("name", *COLUMNS)


def _columns(name: str, history: History) -> list[list[Any]]:
    """The columns of the file, for the samples of one loss."""
    ids, numbers = history.in_order()
    finite = numbers.finite
    means = numbers.squared_deviation / finite, numbers.stddevs / finite
    floats = torch.stack((numbers.mean, numbers.last, numbers.largest, *means))
    floats = torch.where(finite > 0, floats, math.nan)
    counts = torch.stack((finite + numbers.nonfinite, numbers.clipped, numbers.nonfinite))
    count, *others = counts.long().tolist()
    return [[name] * len(ids), ids, count, *floats.tolist(), *others]


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
    columns: dict[str, list[Any]] = {key: [] for key in HEADER}
    for name, history in histories.items():
        for key, column in zip(HEADER, _columns(name, history), strict=True):
            columns[key] += column
    if not all(map(is_whole, columns["id"])):
        columns["id"] = list(map(encodable, columns["id"]))
    write = _write_parquet if path.suffix == SUFFIXES[0] else _write_csv
    with written_atomically(path, run) as file:
        write(file, columns)


def _write_parquet(file: Any, columns: dict[str, list[Any]]) -> None:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file)


def _write_csv(file: Any, columns: dict[str, list[Any]]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    # Strings are quoted, so that read_rows can tell an id that is a string of digits from a number.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
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
