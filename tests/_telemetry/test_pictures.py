"""Each form of a grey picture is converted to the same grey, with 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from lightning_alrc._telemetry.pictures import displayable  # noqa: E402


def ramp(dtype: Any, largest: float) -> Any:
    """[4, 5], from 0 towards the largest value."""
    return np.linspace(0, largest, 21)[:20].reshape(4, 5).astype(dtype)


BITS_8 = np.floor(np.linspace(0, 255, 21)[:20] + 0.5).reshape(4, 5).astype(np.uint8)
"""What each ramp is converted to."""

RAMPS: dict[str, Callable[[], Any]] = {
    "array of bytes": lambda: BITS_8,
    "array of float64": lambda: ramp(np.float64, 1),
    "array of float16": lambda: ramp(np.float16, 1),
    "array of 16 bits": lambda: ramp(np.uint16, 65535),
    "array of 16 bits in 32": lambda: ramp(np.int32, 65535),
    "array of bytes in 64 bits": lambda: BITS_8.astype(np.int64),
    "array in a batch of one": lambda: ramp(np.float32, 1)[None, ..., None],
    "array of one object": lambda: _as_object(torch.from_numpy(ramp(np.float32, 1))),
    "lists": lambda: ramp(np.float64, 1).tolist(),
    "list of tensors": lambda: list(torch.from_numpy(ramp(np.float32, 1))),
    "tensor of bytes": lambda: torch.from_numpy(BITS_8),
    "tensor of floats": lambda: torch.from_numpy(ramp(np.float32, 1)),
    "tensor of channels": lambda: torch.from_numpy(ramp(np.float32, 1)).expand(3, 4, 5),
    "tensor in a batch of one": lambda: torch.from_numpy(ramp(np.float32, 1)).expand(1, 3, 4, 5),
    "tensor of 16 bits": lambda: torch.from_numpy(ramp(np.uint16, 65535)),
    "tensor with a gradient": lambda: torch.from_numpy(ramp(np.float32, 1)).requires_grad_(),
    "PIL of bytes": lambda: Image.fromarray(BITS_8),
    "PIL of floats": lambda: Image.fromarray(ramp(np.float32, 1)),
    "PIL of 16 bits": lambda: Image.fromarray(ramp(np.uint16, 65535)),
    "PIL of 16 bits in 32": lambda: Image.fromarray(ramp(np.int32, 65535)),
    "PIL in colour": lambda: Image.fromarray(BITS_8).convert("RGB"),
}


def _as_object(value: Any) -> Any:
    array = np.empty((), object)
    array[()] = value
    return array


@pytest.mark.parametrize("form", RAMPS)
def test_each_form_of_a_picture_is_shown_alike(form: str) -> None:
    shown = np.asarray(displayable(RAMPS[form]()))
    assert shown.dtype == np.uint8
    grey = shown if shown.ndim == 2 else shown.max(-1)
    assert grey.shape == (4, 5)
    np.testing.assert_allclose(grey, BITS_8, atol=1)


def test_a_tensor_has_its_channels_first_and_an_array_has_them_last() -> None:
    colours = torch.rand(3, 4, 5)
    first, last = displayable(colours), displayable(colours.permute(1, 2, 0).numpy())
    assert first.shape == (4, 5, 3)
    np.testing.assert_array_equal(first, last)


def test_values_out_of_range_are_clamped() -> None:
    shown = displayable(np.array([[-0.5, 0.0, 0.5, 1.0, 7.0, np.inf, -np.inf, np.nan]]))
    assert shown.tolist() == [[0, 0, 128, 255, 255, 255, 0, 0]]
    assert displayable(np.array([[-3, 0, 9]])).tolist() == [[0, 0, 9]]
    assert displayable(np.array([[0, 2**20, 2**21]])).tolist() == [[0, 128, 255]]


def test_a_mask_is_black_and_white() -> None:
    assert displayable(torch.tensor([[True, False]])).tolist() == [[255, 0]]


def test_a_picture_for_print_is_shown_in_colour() -> None:
    shown = displayable(Image.new("CMYK", (5, 4), (127, 127, 127, 0)))
    assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", (128, 128, 128))


@pytest.mark.parametrize("other", ["photo.png", 3, {"image": 1}])
def test_anything_else_is_returned_unchanged(other: Any) -> None:
    assert displayable(other) is other


HALVES: list[Any] = [
    torch.full((3, 4, 5), 0.5),
    np.full((4, 5, 3), 128, np.uint8),
    torch.full((1, 3, 4, 5), 0.5, dtype=torch.bfloat16),
    Image.new("RGB", (5, 4), (128, 128, 128)),
    Image.fromarray(np.full((4, 5), 0.5, np.float32)),
    np.full((4, 5), 32896, np.uint16),
    [[0.5] * 5] * 4,
]
"""The same grey in several forms, [4, 5]."""
