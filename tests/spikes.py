"""Spikes made up for tests."""

from __future__ import annotations

from typing import Any

from lightning_alrc.spikes import Spike

NAME = "alrc_spikes.jsonl"
FOLDER = "alrc_batches"


def spike(name: str = "loss", step: int = 3, **fields: Any) -> Spike:
    """A valid spike. ``fields`` replace its default values."""
    defaults: dict[str, Any] = {
        "name": name,
        "step": step,
        "epoch": 0,
        "batch_idx": step,
        "sample": 1,
        "id": "seven",
        "loss": 9.0,
        "threshold": 3.0,
        "scale": 1 / 3,
        "rank": 0,
    }
    return Spike(**(defaults | fields))
