"""The states of all random generators are saved and restored."""

from __future__ import annotations

import io
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from lightning_alrc._spikes.generators import (
    checked_states,
    plain_states,
    set_states,
    states,
    unchanged,
)

CPU = torch.device("cpu")


def drawn() -> list[float]:
    """Draw from each generator. NumPy and Python then cache a second normal number."""
    of_torch = [torch.rand(()).item(), torch.randn(()).item()]
    of_numpy = [np.random.rand(), np.random.randn()]
    return [*of_torch, *of_numpy, random.random(), random.gauss(0, 1)]


def written_and_read(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("draws_before", [0, 1, 700])
def test_restored_states_draw_the_same_numbers(draws_before: int) -> None:
    for _ in range(draws_before):
        drawn()
    before = states(CPU)
    first = [drawn() for _ in range(3)]
    checked = checked_states(written_and_read(plain_states(before)))
    assert checked is not None
    set_states(checked, CPU)
    assert [drawn() for _ in range(3)] == first


def test_draws_within_unchanged_have_no_effect() -> None:
    before = states(CPU)
    expected = drawn()
    set_states(plain_states(before), CPU)
    with pytest.raises(KeyError), unchanged(CPU):  # noqa: PT012
        drawn()
        raise KeyError
    assert drawn() == expected


def test_states_of_an_earlier_release_set_only_pytorchs_generator() -> None:
    content = {"cpu_generator": torch.get_rng_state(), "cuda_generator": None}
    expected = torch.rand(()).item()
    checked = checked_states(content)
    assert checked is not None
    others = random.getstate(), np.random.get_state(legacy=False)
    set_states(checked, CPU)
    assert torch.rand(()).item() == expected
    np.testing.assert_equal((random.getstate(), np.random.get_state(legacy=False)), others)


def test_states_of_another_device_are_warned_of() -> None:
    content = {"cpu_generator": torch.get_rng_state(), "cuda_generator": torch.zeros(16)}
    checked = checked_states(content)
    assert checked is not None
    with pytest.warns(UserWarning, match="other random numbers.* type was 'cuda', now it is 'cpu'"):
        set_states(checked, CPU)


def test_states_of_a_cpu_are_warned_of_on_a_gpu() -> None:
    checked = checked_states(plain_states(states(CPU)))
    assert checked is not None
    with pytest.warns(UserWarning, match="other random numbers.* type was 'cpu', now it is 'cuda'"):
        set_states(checked, torch.device("cuda"))  # without a state of the device, none is set


def test_states_of_an_earlier_release_without_a_gpu_are_not_warned_of() -> None:
    checked = checked_states({"cpu_generator": torch.get_rng_state(), "cuda_generator": None})
    assert checked is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_states(checked, torch.device("cuda"))


def test_states_are_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        found = plain_states(states(CPU))
    assert found["python_generator"][1].is_cpu
    assert found["numpy_generator"][1].is_cpu


def test_a_device_without_a_generator_has_no_state() -> None:
    assert states(torch.device("meta"))["device_generator"] is None


@pytest.mark.parametrize(
    "changed",
    [
        {"cpu_generator": None},
        {"device": 1},
        {"device_generator": [1]},
        {"python_generator": "x"},
        {"python_generator": [3, [1, 2], None]},
        {"numpy_generator": ["MT19937", torch.zeros(624), 1, 0]},
        {"numpy_generator": [1, torch.zeros(624), 1, 0, 0.0]},
    ],
    ids=repr,
)
def test_invalid_states_are_refused(changed: dict[str, Any]) -> None:
    assert checked_states(plain_states(states(CPU)) | changed) is None
