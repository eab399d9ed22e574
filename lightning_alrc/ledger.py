"""``read_ledger``: reads a ledger that a training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_alrc._spikes.ledger_file import COLUMNS, read_rows
from lightning_alrc._spikes.places import LEDGERS, newest_file

__all__ = ["read_ledger"]


def read_ledger(path: str | Path, name: str | None = None) -> Any:
    """The history of every sample, as ``ALRCCallback(ledger=True)`` recorded it.

    >>> ledger = read_ledger("lightning_logs/version_0")  # doctest: +SKIP
    >>> ledger.nlargest(100, "mean")  # doctest: +SKIP

    Args:
        path: path of ``alrc_ledger.parquet`` or ``.csv``, or of the folder of the training's logs.
        name: name of the loss; ``None``, the default, if there is only one.

    Returns:
        A pandas DataFrame with one row for each sample. Ids that are whole numbers are sorted;
        strings are in the order of their first losses. The columns:

        - ``id``
        - ``count``: number of losses
        - ``mean``, ``last``, ``largest``: of the losses before clipping
        - ``variance``: of the losses before clipping; 0 for a single loss
        - ``stddevs``: mean distance of the losses above the running mean of all losses, in standard
          deviations. Losses fall while a model learns; this distance does not.
        - ``clipped``: number of losses clipped
        - ``nonfinite``: number of losses that were NaN or infinite. Of the other columns, only
          ``count`` includes these losses. The statistics (``mean`` to ``stddevs``) are NaN if there
          was no finite loss.

    Raises:
        FileNotFoundError: if there is no such file, or no ledger in the folder.
        ImportError: if pandas is not installed, or if the file is a Parquet file and pyarrow is not
            installed.
        TypeError: if ``path`` is not a path.
        ValueError: if the file is not a ledger or has no loss ``name``, or if ``name`` is ``None``
            and the file has several losses.
    """
    path = newest_file(path, LEDGERS, "a ledger")
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
