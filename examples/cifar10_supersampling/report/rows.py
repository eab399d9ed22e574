"""The rows of a grid: one training each, read from its folder of results or from one CSV file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ...comparison.files import RESULT, read_arrays
from ..results import HISTORY, IMAGES

SETTING = [
    "experiment",
    "loss",
    "batch_size",
    "optimizer",
    "learning_rate",
    "outlier_kind",
    "outlier_fraction",
    "width",
    "steps",
    "last_steps",
    "precision",
    "data",
    "alrc_start",
]
"""Columns that trainings must share to be compared: all but the method and the seed."""

TEST_METRICS = ["error", "mse", "psnr", "ssim", "input_error"]

MEASURED = [
    "train_loss",
    *(f"test_{metric}" for metric in TEST_METRICS),
    *(f"ema_test_{metric}" for metric in TEST_METRICS),
    "clipped",
    "steps_survived",
    "seconds",
]
"""Columns of measures, all numbers."""

COLUMNS = [*SETTING, "method", "seed", *MEASURED]


def read_rows(results: Path) -> pd.DataFrame:
    """Read the rows of a grid.

    Args:
        results: a folder with `<run name>/result.json` for each training, or a CSV file with the
            same columns and one row for each training.

    Returns:
        `COLUMNS`, and `folder`: the training's folder, which may have a history.npz and an
        images.npz; None for rows of a CSV file. Without outliers, `outlier_kind` is "" and
        `outlier_fraction` is 0. `train_loss` and the test errors are NaN if a training lost its
        weights.

    Raises:
        FileNotFoundError: there is no such file, or no result in that folder.
        ValueError: a column is missing; a row has no setting, method or seed; two rows have the
            same setting, method and seed; or a loss or an error is not positive.
    """
    if not results.exists():
        raise FileNotFoundError(f"results: there is no file or folder {results}")
    if results.is_dir():
        paths = sorted(results.glob(f"*/{RESULT}"))
        if not paths:
            raise FileNotFoundError(f"results: the folder {results} has no <run name>/{RESULT}")
        rows = pd.DataFrame([json.loads(path.read_text()) for path in paths])
        folders = [path.parent for path in paths]
    else:
        # A method may be named "None" or "null". Only an empty field or NaN is a missing value.
        rows = pd.read_csv(
            results,
            keep_default_na=False,
            na_values=["", "nan", "NaN"],
            float_precision="round_trip",
        )
        folders = [None] * len(rows)
    missing = [column for column in COLUMNS if column not in rows]
    if missing:
        raise ValueError(f"results: {results} must have the columns {COLUMNS}, lacks {missing}")
    rows = rows[COLUMNS].assign(folder=folders)
    rows["outlier_kind"] = rows["outlier_kind"].fillna("")
    rows["outlier_fraction"] = (
        rows["outlier_fraction"].fillna(0.0).where(rows["outlier_kind"] != "", 0.0)
    )
    rows[MEASURED] = rows[MEASURED].astype(float).replace([np.inf, -np.inf], np.nan)
    _check(rows, results)
    return rows


def _check(rows: pd.DataFrame, results: Path) -> None:
    """Raise ValueError if rows cannot be compared; see `read_rows`."""
    for column in ("train_loss", "test_error", "ema_test_error"):
        wrong = rows[rows[column] <= 0]
        if len(wrong):
            raise ValueError(
                f"results: {column} must be above 0, got {wrong[column].iloc[0]} in {results}, "
                f"method {wrong['method'].iloc[0]}, seed {wrong['seed'].iloc[0]}"
            )
    identity = [*SETTING, "method", "seed"]
    empty = [column for column in identity if rows[column].isna().any()]
    if empty:
        raise ValueError(f"results: every row of {results} must have a value for {empty}")
    repeated = rows[rows.duplicated(identity)]
    if len(repeated):
        raise ValueError(
            f"results: {results} must have one row for each setting, method and seed, got several "
            f"for {repeated[identity].iloc[0].to_dict()}"
        )


def histories(rows: pd.DataFrame) -> dict[int, dict[str, np.ndarray]]:
    """The step-by-step records of trainings, if any, by index of the row."""
    return _arrays(rows, HISTORY)


def images(rows: pd.DataFrame) -> dict[int, dict[str, np.ndarray]]:
    """The restored images of trainings, if any, by index of the row."""
    return _arrays(rows, IMAGES)


def _arrays(rows: pd.DataFrame, name: str) -> dict[int, dict[str, np.ndarray]]:
    """The arrays of each row whose folder has a file of that name."""
    folders = rows["folder"].dropna()
    return {
        index: read_arrays(folder / name)
        for index, folder in folders.items()
        if (folder / name).exists()
    }
