"""A fit gets the gradient norms that Lightning computes in this fit, and no others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import Precision
from torch import Tensor, nn

from lightning_alrc import ALRCCallback
from lightning_alrc._trainer.gradient_norms import gradient_norm, norms_watched
from tests.nets import Net

Fit = Callable[..., Any]


@pytest.fixture(autouse=True)
def _original_is_put_back() -> Iterator[None]:
    original = nn.utils.clip_grad_norm_
    yield
    left, nn.utils.clip_grad_norm_ = nn.utils.clip_grad_norm_, original
    assert left is original


def clip(norm: float) -> Tensor:
    parameter = nn.Parameter(torch.ones(()))
    parameter.grad = torch.tensor(norm)
    return nn.utils.clip_grad_norm_([parameter], 1.0)


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_that_watch_at_the_same_time_see_their_own_norms(first_out: int) -> None:
    seen: list[list[float]] = [[], []]
    watches = [norms_watched(lambda norm, to=to: to.append(norm.item())) for to in seen]  # type: ignore[misc]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        threads = [one, two]
        for thread, watch in zip(threads, watches, strict=True):
            thread.submit(watch.__enter__).result()
        for thread, norm in ((one, 2.0), (two, 3.0), (one, 4.0)):
            thread.submit(clip, norm).result()
        clip(5.0)  # this thread watches nothing
        last_out = 1 - first_out
        threads[first_out].submit(watches[first_out].__exit__, None, None, None).result()
        threads[first_out].submit(clip, 6.0).result()
        threads[last_out].submit(clip, 7.0).result()
        threads[last_out].submit(watches[last_out].__exit__, None, None, None).result()
    expected = [[2.0, 4.0], [3.0]]
    expected[last_out].append(7.0)
    assert seen == expected


def test_a_fit_inside_another_has_its_own_norms() -> None:
    outer: list[Tensor] = []
    inner: list[Tensor] = []
    with norms_watched(outer.append):
        clip(2.0)
        with norms_watched(inner.append):
            clip(3.0)
        clip(4.0)
    assert (outer, inner) == ([2.0, 4.0], [3.0])


def test_a_wrapper_that_other_code_leaves_in_place_does_not_double_the_norms() -> None:
    original, seen = nn.utils.clip_grad_norm_, []
    with norms_watched(seen.append):
        found = nn.utils.clip_grad_norm_
        nn.utils.clip_grad_norm_ = lambda *args, **kwargs: found(*args, **kwargs)
    with norms_watched(seen.append):
        clip(2.0)
    clip(3.0)
    nn.utils.clip_grad_norm_ = original
    assert seen == [2.0]


def test_two_fits_in_two_threads_have_their_own_norms(fit: Fit) -> None:
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(Precision):
        """Both fits clip their gradients at the same time."""

        def clip_grad_by_norm(self, *args: Any, **kwargs: Any) -> None:
            meeting.wait()
            super().clip_grad_by_norm(*args, **kwargs)
            meeting.wait()

    class Scaled(Net):
        scale = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.scale * super().training_step(batch, batch_idx)

    def norms(scale: float) -> list[float | None]:
        net, callback = Scaled("vector"), ALRCCallback(num_stddev=0.1)
        net.scale = scale
        fit(net, callback, gradient_clip_val=1e-3, plugins=Meeting())
        return [spike.gradient_norm for spike in callback.spikes]

    with ThreadPoolExecutor(2) as threads:
        small, large = threads.map(norms, (1.0, 1e6))
    assert len(small) == len(large) > 0
    assert large == pytest.approx([1e6 * norm for norm in small if norm], rel=1e-3)


def test_a_complex_gradient_counts_with_its_imaginary_part(make_trainer: Fit) -> None:
    of_complex, of_real = (nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.cfloat, None))
    of_complex.grad, of_real.grad = torch.tensor([3.0 + 4.0j]), torch.tensor([12.0])
    norm = gradient_norm(make_trainer(Net()), torch.optim.SGD([of_complex, of_real], 0.1))
    assert norm is not None
    assert norm.item() == 13.0
