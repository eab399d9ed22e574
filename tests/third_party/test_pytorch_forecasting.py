"""pytorch-forecasting's networks, which return dicts and are built by a class method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed")

from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer
from pytorch_forecasting.metrics import MAE

from examples.third_party.pytorch_forecasting import (
    ClippedDeepAR,
    ClippedNBeats,
    ClippedTransformer,
    batches,
    series,
)

CLIPPED = {
    TemporalFusionTransformer: ClippedTransformer,
    DeepAR: ClippedDeepAR,
    NBeats: ClippedNBeats,
}
pytestmark = pytest.mark.parametrize("network", CLIPPED, ids=lambda network: network.__name__)


def test_five_steps(five_steps: Callable[..., None], network: type[Any], way: str) -> None:
    kind = network if way == "callback" else CLIPPED[network]
    five_steps(lambda: kind.from_dataset(series), batches, way)


def test_a_spike_is_clipped(
    clips_a_spike: Callable[..., None],
    with_settings: Callable[..., Any],
    network: type[Any],
    way: str,
) -> None:
    x, (y, weight) = next(iter(batches))

    def make(kind: type[Any]) -> Any:
        # NBeats' default loss is relative to the size of the targets, so it has no such spikes.
        return kind.from_dataset(series, **({"loss": MAE()} if network is NBeats else {}))

    clips_a_spike(
        lambda: make(network),
        lambda: make(with_settings(CLIPPED[network])),
        batches,
        (x, (y * 1e4, weight)),
        way,
    )
