"""Marks that several of these tests have."""

import pytest
from pytorch_lightning import callbacks

needs_weight_averaging = pytest.mark.skipif(
    not hasattr(callbacks, "EMAWeightAveraging"),
    reason="the configuration averages weights, which Lightning does since 2.6",
)
