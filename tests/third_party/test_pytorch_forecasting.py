"""pytorch-forecasting's networks, which return dicts and are built by a class method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed")

from pytorch_forecasting import NBeats
from pytorch_forecasting.metrics import MAE

from examples.third_party.pytorch_forecasting import NETWORKS, clipped, series

pytestmark = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


def test_five_steps(five_steps: Callable[..., None], network: type[Any], way: str) -> None:
    kind = network if way == "callback" else clipped(network)
    data = series()
    five_steps(lambda: kind.from_dataset(data), data.to_dataloader(batch_size=16), way)


def test_a_spike_is_clipped(
    clips_a_spike: Callable[..., None],
    with_settings: Callable[..., Any],
    network: type[Any],
    way: str,
) -> None:
    data = series()
    batches = list(data.to_dataloader(batch_size=16))
    x, (y, weight) = batches[0]

    def make(kind: type[Any]) -> Any:
        # By default NBeats' loss is relative to the size of the targets, so it has no such spikes.
        return kind.from_dataset(data, **({"loss": MAE()} if network is NBeats else {}))

    clips_a_spike(
        lambda: make(network),
        lambda: make(with_settings(clipped(network))),
        batches,
        (x, (y * 1e4, weight)),
        way,
    )
