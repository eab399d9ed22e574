"""The files of a training of this example, beside those of `comparison.files`.

OUTPUT/<name>/history.npz   see `StepRecorder.history`
OUTPUT/<name>/images.npz    "input", "output", "truth": float32 [8, 3, 32, 32], 0 to 1
OUTPUT/<name>/last.ckpt     of a training that is not finished
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..comparison.files import RESULT, read_arrays, write_arrays, write_json

HISTORY = "history.npz"
IMAGES = "images.npz"
CHECKPOINT = "last.ckpt"


@dataclass
class Result:
    """The results of a training.

    Attributes:
        row: content of `result.json`. A value is None if it could not be measured, for example
            because the weights were lost.
        history: see `StepRecorder.history`.
        images: float32 [8, 3, 32, 32] each, 0 to 1: "input", "output" and "truth".
    """

    row: dict[str, Any]
    history: dict[str, np.ndarray] = field(repr=False)
    images: dict[str, np.ndarray] = field(repr=False)


def save(folder: Path, result: Result) -> None:
    """Save a finished training. Its row is written last, and shows that all files are complete."""
    write_arrays(folder / HISTORY, result.history)
    write_arrays(folder / IMAGES, result.images)
    write_json(folder / RESULT, result.row)


def load(folder: Path) -> Result:
    """Read a finished training."""
    return Result(
        row=json.loads((folder / RESULT).read_text()),
        history=read_arrays(folder / HISTORY),
        images=read_arrays(folder / IMAGES),
    )
