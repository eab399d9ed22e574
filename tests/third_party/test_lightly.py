"""lightly's linear classifier, which is a module of ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("lightly", reason="lightly is not installed")

from lightly.utils.benchmarking import LinearClassifier

from examples.third_party.lightly import ClippedClassifier, batches, classifier


def test_five_steps(five_steps: Callable[..., None], way: str) -> None:
    kind = LinearClassifier if way == "callback" else ClippedClassifier
    five_steps(lambda: classifier(kind), batches, way)


def test_a_spike_is_clipped(
    clips_a_spike: Callable[..., None], with_settings: Callable[..., Any], way: str
) -> None:
    images, labels = next(iter(batches))
    clips_a_spike(
        lambda: classifier(LinearClassifier),
        lambda: classifier(with_settings(ClippedClassifier)),
        batches,
        (images * 1e4, labels.flip(0)),
        way,
    )
