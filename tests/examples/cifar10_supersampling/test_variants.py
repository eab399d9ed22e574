import math

import pytest
import torch

from examples.cifar10_supersampling.command_line import CONFIGS
from examples.cifar10_supersampling.training import train
from examples.cifar10_supersampling.variants import LogALRC, QuantileALRC


def gradients(callback, losses):
    """The factor on each loss's gradient, in successive calls."""
    scales = []
    for loss in losses:
        loss = torch.tensor(loss, dtype=torch.float64, requires_grad=True)
        clipped = callback.clip(loss)
        (scale,) = torch.autograd.grad(clipped.sum(), loss)
        torch.testing.assert_close(clipped.detach(), loss.detach() * scale)
        scales.append(scale.tolist())
    return scales


def test_logarithms_bound_a_loss_by_their_deviations():
    usual = torch.linspace(-1, 1, 10).exp().tolist()
    callback = LogALRC(num_stddev=2.0)
    *_, last = gradients(callback, [usual, [1.0, 50.0]])
    threshold = math.exp(2.0 * math.sqrt(torch.linspace(-1, 1, 10).double().var(correction=0)))
    assert last == pytest.approx([1.0, threshold / 50.0], rel=1e-6)
    assert callback.clipped == 1


def test_a_loss_of_0_is_not_clipped():
    assert gradients(LogALRC(), [[1.0] * 10, [0.0]])[-1] == [1.0]


def test_a_quantile_bounds_a_loss_from_the_eleventh_on():
    callback = QuantileALRC(quantile=0.5, history_length=12)
    scales = gradients(callback, [[1.0, 100.0], *([float(loss)] for loss in range(2, 10)), [20.0]])
    assert scales[:-1] == [[1.0, 1.0], *[[1.0]] * 8]
    assert scales[-1] == pytest.approx([5.5 / 20.0])  # the median of 1 to 9 and 100
    assert gradients(callback, [[30.0], [40.0], [14.0]])[-1] == pytest.approx([7.5 / 14.0])


@pytest.mark.parametrize("variant", [LogALRC, QuantileALRC])
def test_a_nan_loss_changes_nothing(variant):
    callback, other = variant(), variant()
    losses = [[1.0, 3.0]] * 6
    assert gradients(other, losses) == gradients(callback, losses)
    loss = torch.tensor([math.nan, math.inf, 2.0], requires_grad=True)
    clipped = callback.clip(loss)
    other.clip(torch.tensor([2.0], requires_grad=True))
    assert not clipped[:2].isfinite().any()
    [theirs], [ours] = gradients(other, [[9.0]]), gradients(callback, [[9.0]])
    assert ours == pytest.approx(theirs)
    assert ours[0] < 1.0


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "variants").glob("*.yaml")), ids=lambda path: path.stem
)
@pytest.mark.usefixtures("few_images")
def test_a_variant_can_be_chosen_as_a_method(path, make_run, tmp_path):
    run = make_run(method=f"{path}+norm", steps=12, batch_size=2)
    train(run, tmp_path)
    assert (tmp_path / run.name / "result.json").exists()
    assert f"-{path.stem}+norm-" in run.name
