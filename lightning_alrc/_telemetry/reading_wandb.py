"""Reads the rows of a Weights & Biases run, with wandb's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_alrc._telemetry.wandb_dashboard import SPIKES, STEP

__all__ = ["rows_of_wandb"]


def rows_of_wandb(path: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows that a WandbLogger logged, and the rows of its table of clips.

    The run may not have ended yet.

    Args:
        path: path of the file ``run-<id>.wandb``.

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if wandb's reader fails.
    """
    # If wandb is not installed, ``find_spec`` may find the folder "wandb" of its runs.
    package = find_spec("wandb")
    if package is None or package.origin is None:
        raise ImportError(f"{path} is read by wandb: pip install 'lightning-alrc[wandb]'")
    reader = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        capture_output=True,
        encoding="utf-8",
    )
    if reader.returncode != 0:
        raise ValueError(
            f"source {str(path)!r} cannot be read by `wandb leet inspect --json`, which comes with "
            f"wandb 0.31 and later: {reader.stderr.strip() or reader.stdout.strip()}"
        )
    # A text in the run may have other line separators than "\n", at which splitlines() would split.
    lines = filter(None, reader.stdout.split("\n"))
    try:
        rows = [json.loads(line).get("history", {}).get("item", {}) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"source {str(path)!r} cannot be read: `wandb leet inspect` printed a line that is not "
            f"JSON: {error}"
        ) from error
    # Each table replaces the one before it, so only the last table is read.
    tables = [row[f"{SPIKES}.path"] for row in rows if f"{SPIKES}.path" in row]
    clips = list(_table(path.parent / "files" / tables[-1])) if tables else []
    # The training step replaces any metric "step" that the user has logged.
    return [row | {"step": row[STEP]} if STEP in row else row for row in rows], clips


def _table(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a table that was logged, if the file still exists."""
    if path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
        for row in table["data"]:
            yield dict(zip(table["columns"], row, strict=True))
