"""Checks for any package's module: five steps update the moments, and a spike is clipped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._moments.bounds import BURN_IN

SETTINGS = {"num_stddev": 10.0}
"""Settings that clip only the planted spike, so that earlier steps are as without ALRC."""


@pytest.fixture(params=["callback", "mixin"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def five_steps(fit: Callable[..., Any]) -> Callable[..., None]:
    """Check that a module trains for five steps, and that each updates the moments."""

    def check(make: Callable[[], Any], batches: Iterable[Any], way: str) -> None:
        net = seeded(make)
        callbacks = [ALRCCallback()] if way == "callback" else []
        trainer = fit(net, *callbacks, batches=loader(itertools.islice(batches, 5)), max_epochs=1)
        alrc = moments(trainer)
        assert trainer.global_step == 5
        assert alrc.updates == 5
        assert torch.isfinite(alrc.mu1)
        assert alrc.stddev > 0

    return check


@pytest.fixture
def clips_a_spike(fit: Callable[..., Any]) -> Callable[..., None]:
    """Check that only the last batch, a spike, is clipped."""

    def losses(
        make: Callable[[], Any], batches: list[Any], *callbacks: Any
    ) -> tuple[list[float], Any]:
        """The losses of all steps, and the Trainer."""
        seen: list[float] = []
        net = seeded(make)
        net.on_before_backward = lambda loss: seen.append(loss.item())
        return seen, fit(net, *callbacks, batches=loader(batches), max_epochs=1)

    def check(
        plain: Callable[[], Any],
        mixed: Callable[[], Any],
        batches: Iterable[Any],
        spike: Any,
        way: str,
    ) -> None:
        planted = [*itertools.islice(itertools.cycle(list(batches)), BURN_IN + 5), spike]
        if way == "callback":
            clipped, trainer = losses(plain, planted, ALRCCallback(**SETTINGS))
        else:
            clipped, trainer = losses(mixed, planted)
        unclipped, _ = losses(plain, planted)
        assert clipped[:-1] == unclipped[:-1]
        assert clipped[-1] < unclipped[-1] / 10
        assert moments(trainer).clipped_total == 1

    return check


@pytest.fixture
def with_settings() -> Callable[[type[Any]], type[Any]]:
    """Derives a class that clips with ``SETTINGS`` from a class with the mixin."""

    def derive(kind: type[Any]) -> type[Any]:
        return type(
            kind.__name__, (kind,), {"configure_alrc": lambda self: ALRCCallback(**SETTINGS)}
        )

    return derive


def loader(batches: Iterable[Any]) -> DataLoader[Any]:
    """A loader of ready batches, because Lightning takes a bare list for a list of loaders."""
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def moments(trainer: Any) -> ALRC:
    (callback,) = (each for each in trainer.callbacks if isinstance(each, ALRCCallback))
    found: ALRC = callback.losses["loss"]
    return found
