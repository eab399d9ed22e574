"""Tests on a real device: ``python -m pytest -m gpu``.

``ALRC_GPU_TESTS_ON=cpu python -m pytest -m gpu tests/gpu`` runs the tests that a CPU can run, to
check the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

ON = os.environ.get("ALRC_GPU_TESTS_ON", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """``cuda``, or ``cpu`` if ``ALRC_GPU_TESTS_ON`` is set to it."""
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if ON == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs the compiled kernel: python -m pytest -m gpu")
    return ON


@pytest.fixture
def cuda(device: str) -> str:
    """``cuda``, for tests that a CPU cannot run."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def accelerator(device: str) -> str:
    """The Trainer's name for the device."""
    return "gpu" if device == "cuda" else "cpu"
