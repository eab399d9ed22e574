"""chemprop's MPNN, whose batches are named tuples of graphs, clipped and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chemprop", reason="chemprop is not installed")

from chemprop.models import MPNN

from examples.third_party.chemprop import ClippedMPNN, batches, mpnn


def test_five_steps(five_steps: Callable[..., None], way: str) -> None:
    kind = MPNN if way == "callback" else ClippedMPNN
    five_steps(lambda: mpnn(kind), batches, way)


def test_a_spike_is_clipped(
    clips_a_spike: Callable[..., None], with_settings: Callable[..., Any], way: str
) -> None:
    first = next(iter(batches))
    clips_a_spike(
        lambda: mpnn(MPNN),
        lambda: mpnn(with_settings(ClippedMPNN)),
        batches,
        first._replace(Y=first.Y * 1e4),
        way,
    )


def test_chemprops_load_from_checkpoint_accepts_moments(
    fit: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = fit(mpnn(ClippedMPNN), batches=batches, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "mpnn.ckpt")
    assert isinstance(ClippedMPNN.load_from_checkpoint(tmp_path / "mpnn.ckpt"), ClippedMPNN)
