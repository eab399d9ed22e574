"""torchgeo's regression task, whose learning rate depends on a validation loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchgeo", reason="torchgeo is not installed")

from torchgeo.trainers import RegressionTask

from examples.third_party.torchgeo import ClippedTask, batches


@pytest.fixture
def validated() -> Callable[..., Callable[[], Any]]:
    """Makes tasks with the validation data that their scheduler needs."""

    def with_validation(kind: type[Any]) -> Callable[[], Any]:
        def make() -> Any:
            net = kind("resnet18")
            net.val_dataloader = lambda: batches
            return net

        return make

    return with_validation


def test_five_steps(
    five_steps: Callable[..., None], validated: Callable[..., Any], way: str
) -> None:
    five_steps(validated(RegressionTask if way == "callback" else ClippedTask), batches, way)


def test_a_spike_is_clipped(
    clips_a_spike: Callable[..., None],
    validated: Callable[..., Any],
    with_settings: Callable[..., Any],
    way: str,
) -> None:
    first = next(iter(batches))
    clips_a_spike(
        validated(RegressionTask),
        validated(with_settings(ClippedTask)),
        batches,
        first | {"label": first["label"] * 1e4},
        way,
    )
