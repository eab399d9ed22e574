"""A ledger, read back: :func:`read_ledger`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_alrc._spikes.ledger_file import COLUMNS, read_rows
from lightning_alrc._spikes.places import LEDGERS, record_files

__all__ = ["read_ledger"]


def read_ledger(path: str | Path, name: str | None = None) -> Any:
    """The history of every sample, which ``ALRCCallback(ledger=True)`` kept.

    >>> ledger = read_ledger("lightning_logs/version_0")  # doctest: +SKIP
    >>> ledger.nlargest(100, "mean")  # doctest: +SKIP

    Args:
        path: of ``alrc_ledger.parquet`` or ``.csv``, or the folder of the training's logs.
        name: of the loss; ``None``, the default, for the only one.

    Returns:
        A pandas DataFrame with a row for each sample: whole numbers from the smallest, or strings
        as they were first met. The columns:

        - ``id``
        - ``count``: losses seen
        - ``mean``, ``last``, ``largest``: of the losses before clipping
        - ``variance``: of the same, over all times it was seen; 0 if it was seen once
        - ``stddevs``: how many standard deviations above the running mean of all losses it lay, on
          average. Losses fall while a model learns; this does not fall with them.
        - ``clipped``: how many were clipped
        - ``nonfinite``: how many were NaN or infinite. The other columns but ``count`` leave these
          out, and are NaN if there are no others.

    Raises:
        FileNotFoundError: if there is no such file, or no ledger in the folder.
        ImportError: if pandas is not installed, or pyarrow for a Parquet file.
        ValueError: if it is not one of those, or has several losses and none is named.
    """
    path = Path(path)
    if path.is_dir():
        found = record_files(path, LEDGERS)
        if not found:
            raise FileNotFoundError(f"there is no {LEDGERS} in {path}, nor in a folder beside it")
        path = found[-1]
    try:
        rows = read_rows(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"read_ledger needs pandas and pyarrow: pip install 'lightning-alrc[ledger]' ({error})"
        ) from error
    names = sorted(rows["name"].unique())
    if name is None and len(names) > 1:
        raise ValueError(f"name must be one of the losses in {path}, {names}, got None")
    if name is not None and name not in names:
        raise ValueError(f"name must be one of the losses in {path}, {names}, got {name!r}")
    if name is not None:
        rows = rows[rows["name"] == name]
    return rows[list(COLUMNS)].reset_index(drop=True)
