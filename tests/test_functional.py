"""Each function of the mathematics by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_alrc import functional

pytestmark = pytest.mark.quick

moderate = st.floats(-100, 100)
decays = st.floats(0, 1)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def losses(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def test_stddev_is_the_root_of_the_variance_and_epsilon() -> None:
    assert functional.stddev(3.0) == pytest.approx(math.sqrt(3.0 + 1e-8), rel=1e-12)
    assert functional.stddev(0.0) == pytest.approx(1e-4)


def test_threshold_lies_num_stddev_above_the_mean() -> None:
    assert functional.threshold(25.0, 275.0, 3.0) == pytest.approx(25 + 3 * math.sqrt(275.00000001))


def test_threshold_lies_below_the_mean_for_a_negative_number() -> None:
    assert functional.threshold(25.0, 275.0, -1.0) == pytest.approx(25 - math.sqrt(275.00000001))


def test_threshold_of_infinitely_many_stddevs_is_infinite() -> None:
    assert functional.threshold(scalar(1.0), scalar(0.0), math.inf).item() == math.inf


@pytest.mark.parametrize(
    "function",
    [
        lambda f: functional.stddev(f(2.0)),
        lambda f: functional.threshold(f(2.0), f(3.0), 2.0),
        lambda f: functional.update(f(2.0), f(3.0), f(4.0), f(5.0), 0.75)[0],
        lambda f: functional.update(f(2.0), f(3.0), f(4.0), f(5.0), 0.75)[1],
        lambda f: functional.update(f(2.0), f(3.0), f(4.0), f(5.0), 0.75, 0.5)[1],
        lambda f: functional.ramped_decay(0.9, f(5.0), 4.0),
    ],
    ids=["stddev", "threshold", "mu1", "variance", "two decays", "ramped_decay"],
)
def test_functions_of_moments_return_the_kind_they_are_given(function: object) -> None:
    of_floats, of_tensors = function(float), function(scalar)  # type: ignore[operator]
    assert isinstance(of_floats, float)
    assert isinstance(of_tensors, torch.Tensor)
    assert of_tensors.shape == ()
    assert of_tensors.item() == pytest.approx(of_floats, rel=1e-15)


def test_clip_scales_loss_and_gradient_down_to_the_threshold() -> None:
    loss = losses(1.0, 4.0, 8.0)
    clipped = functional.clip(loss, scalar(1.0), scalar(4.0))
    clipped.loss.sum().backward()
    assert clipped.loss.tolist() == [1.0, 4.0, 4.0]
    assert clipped.scale.tolist() == [1.0, 1.0, 0.5]
    assert loss.grad is not None
    assert loss.grad.tolist() == [1.0, 1.0, 0.5]


def test_clip_multiplies_the_gradient_that_reaches_it() -> None:
    loss = losses(8.0)
    (3.0 * functional.clip(loss, scalar(1.0), scalar(2.0)).loss).sum().backward()
    assert loss.grad is not None
    assert loss.grad.tolist() == [0.75]


def test_clip_scales_the_distance_from_the_mean_if_the_threshold_is_not_positive() -> None:
    clipped = functional.clip(losses(-1.0, 2.0), scalar(-5.0), scalar(-3.0))
    assert clipped.loss.tolist() == [-3.0, -3.0]
    assert clipped.scale.tolist() == pytest.approx([2 / 4, 2 / 7])


def test_clip_scales_the_distance_from_the_mean_if_the_threshold_is_zero() -> None:
    assert functional.clip(losses(2.0), -1.0, 0.0).scale.tolist() == pytest.approx([1 / 3])


def test_clip_raises_losses_to_the_lower_bound() -> None:
    clipped = functional.clip(losses(0.0, 4.0, 20.0), scalar(5.0), scalar(10.0), scalar(3.0))
    assert clipped.loss.tolist() == [3.0, 4.0, 10.0]
    assert clipped.scale.tolist() == pytest.approx([2 / 5, 1.0, 0.5])


def test_clip_clips_nothing_at_an_infinite_threshold() -> None:
    clipped = functional.clip(losses(-1e300, 1e300), scalar(0.0), scalar(math.inf))
    assert clipped.loss.tolist() == [-1e300, 1e300]
    assert clipped.scale.tolist() == [1.0, 1.0]


def test_clip_returns_losses_that_are_not_finite_as_they_are() -> None:
    clipped = functional.clip(losses(math.nan, math.inf, -math.inf), scalar(0.0), scalar(1.0))
    assert math.isnan(clipped.loss[0])
    assert clipped.loss[1:].tolist() == [math.inf, -math.inf]
    assert clipped.scale.tolist() == [1.0, 1.0, 1.0]
    assert clipped.finite.tolist() == [False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_clip_keeps_dtype_of_losses_and_gradients(dtype: torch.dtype) -> None:
    loss = losses(1.0, 8.0, dtype=dtype)
    clipped = functional.clip(loss, scalar(1.0), scalar(4.0)).loss
    clipped.sum().backward()
    assert clipped.dtype == dtype
    assert loss.grad is not None
    assert loss.grad.dtype == dtype
    assert loss.grad.tolist() == [1.0, 0.5]


def test_clip_multiplies_a_float16_gradient_before_rounding_it() -> None:
    loss = losses(60000.0, dtype=torch.float16)
    clipped = functional.clip(loss, scalar(0.0), scalar(6e-4)).loss
    (clipped * 60000.0).sum().backward()  # in float16, 1e-8 is 0, and 6e-4 is not
    assert loss.grad is not None
    assert loss.grad.item() == pytest.approx(6e-4, rel=1e-3)


def test_clip_changes_none_of_its_arguments() -> None:
    arguments = losses(0.0, 8.0), scalar(1.0), scalar(2.0), scalar(0.5)
    before = [each.detach().clone() for each in arguments]
    functional.clip(*arguments).loss.sum().backward()
    for each, old in zip(arguments, before, strict=True):
        assert torch.equal(each, old)


@given(moderate, st.floats(0, 100), st.lists(moderate, min_size=1, max_size=8), decays)
def test_update_is_the_average_of_raw_moments(
    mu1: float, variance: float, batch: list[float], decay: float
) -> None:
    mu2 = variance + mu1**2
    mean = sum(batch) / len(batch)
    mean_of_squares = sum(x * x for x in batch) / len(batch)
    spread = sum((x - mean) ** 2 for x in batch) / len(batch)
    new_mu1, new_variance = functional.update(mu1, variance, mean - mu1, spread, decay)
    assert new_mu1 == pytest.approx(decay * mu1 + (1 - decay) * mean, abs=1e-9)
    expected_mu2 = decay * mu2 + (1 - decay) * mean_of_squares
    assert new_variance + new_mu1**2 == pytest.approx(expected_mu2, abs=1e-8)
    assert new_variance >= 0


@given(moderate, st.floats(0, 100), moderate, st.floats(0, 100), decays, decays)
def test_update_with_two_decays_averages_each_raw_moment_by_its_own_decay(
    mu1: float, variance: float, mean: float, spread: float, decay: float, mu2_decay: float
) -> None:
    mu2 = mu2_decay * (variance + mu1**2) + (1 - mu2_decay) * (spread + mean**2)
    new_mu1, new_variance = functional.update(mu1, variance, mean - mu1, spread, decay, mu2_decay)
    assert new_mu1 == pytest.approx(decay * mu1 + (1 - decay) * mean, abs=1e-9)
    assert new_variance == pytest.approx(max(mu2 - new_mu1**2, 0.0), abs=1e-7)


def test_update_of_a_constant_loss_leaves_no_variance() -> None:
    assert functional.update(0.1, 0.0, 0.0, 0.0, 0.999) == (0.1, 0.0)


def test_ramped_decay_at_first_gives_a_plain_mean() -> None:
    ramp = [functional.ramped_decay(0.999, float(t), 9.0) for t in range(10)]
    assert ramp == pytest.approx([t / (t + 1) for t in range(10)])


def test_ramped_decay_rises_from_zero_to_the_decay() -> None:
    ramp = [functional.ramped_decay(0.9, float(t), 3.0) for t in range(100)]
    assert ramp[0] == 0.0
    assert ramp[3] == ramp[9] == 0.75
    assert ramp == sorted(ramp)
    assert ramp[-1] == 0.9


def test_estimated_start_is_that_of_the_authors_readme() -> None:
    mu1_start, mu2_start = functional.estimated_start(2.0, 0.5, 3.0)
    assert mu1_start == 3 * (2 + 3 * 0.5)
    assert mu2_start == mu1_start**2 + 1
