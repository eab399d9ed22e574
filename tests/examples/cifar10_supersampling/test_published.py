import numpy as np
import pytest
import torch

from examples.cifar10_supersampling import results
from examples.cifar10_supersampling.published import PublishedALRC
from examples.cifar10_supersampling.training import train


class CapperFn:
    """`capper_fn` of the authors' squared/training_squared/cifar10.py, word for word in NumPy.

    The same function is in unstable_learning_rates/adam/cifar10-6/cifar10.py and
    unstable_learning_rates/sgd/cifar10-7/cifar10.py; commit e5bf1d7 of Jeffrey-Ede/ALRC.
    """

    def __init__(self, num_stddev):
        self.num_stddev = num_stddev
        self.mu = np.float64(10)
        self.mu2 = np.float64(20**2)

    def __call__(self, x):
        """The capped losses, and the factors on their gradients."""
        mu, mu2 = self.mu, self.mu2

        def cap(x):
            sigma = np.sqrt(mu2 - mu**2 + 0.001)
            # tf.stop_gradient makes the divisor a constant.
            divisor = x / (mu + self.num_stddev * sigma)
            below = x < mu + self.num_stddev * sigma
            return np.where(below, x, x / divisor), np.where(below, 1.0, 1.0 / divisor)

        capped_x, factor = cap(x)
        mean = np.mean(capped_x)
        mean2 = np.mean(capped_x**2)
        self.mu = 0.997 * mu + 0.001 * mean
        self.mu2 = 0.997 * mu2 + 0.001 * mean2
        return capped_x, factor


@pytest.mark.parametrize(("num_stddev", "batch"), [(2.0, 1), (3.0, 4), (4.0, 1)])
def test_every_step_equals_the_authors(num_stddev, batch):
    generator = np.random.default_rng(0)
    # After 3,000 steps the moments have settled at a third of the true ones.
    steps = generator.lognormal(0.5, 1.0, (3000, batch))
    theirs, ours = CapperFn(num_stddev), PublishedALRC(num_stddev)
    found, expected = [], []
    for losses in steps:
        given = torch.tensor(losses, requires_grad=True)
        capped = ours.clip(given)
        (factor,) = torch.autograd.grad(capped.sum(), given)
        found.append([*capped.tolist(), *factor.tolist(), float(ours.mu1), float(ours.mu2)])
        expected_losses, expected_factor = theirs(losses)
        expected.append([*expected_losses, *expected_factor, theirs.mu, theirs.mu2])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    clipped = (np.array(expected)[:, batch : 2 * batch] < 1.0).sum()
    assert int(ours.clipped) == clipped > 0.02 * steps.size
    assert float(ours.mu1) < 0.5 * steps.mean()


@pytest.mark.usefixtures("few_images")
def test_published_alrc_clips_a_training_with_guarded_losses(make_run, tmp_path):
    run = make_run(method="published2", steps=60, every_image=True)
    train(run, tmp_path)
    result = results.load(tmp_path / run.name)
    losses, threshold = result.history["image_loss"], result.history["threshold"]
    theirs = CapperFn(2.0)
    expected = []
    for step in losses:
        sigma = np.sqrt(theirs.mu2 - theirs.mu**2 + 0.001)
        expected.append(theirs.mu + 2.0 * sigma)
        theirs(step.astype(np.float64))
    np.testing.assert_allclose(threshold, expected, rtol=1e-6)
    assert result.row["clipped"] == (losses >= threshold[:, None]).sum() > 0
    # Hot pixels give quartic errors of thousands; the guard takes their square root.
    assert 50.0 < losses[result.history["outlier"]].max() < 1000.0


@pytest.mark.usefixtures("few_images")
def test_an_interrupted_training_continues_with_the_moments(make_run, tmp_path):
    class CutError(Exception):
        pass

    def cut(step):
        if step == 50:
            raise CutError

    run = make_run(method="published3", steps=80, checkpoint_every=20)
    train(run, tmp_path / "whole")
    with pytest.raises(CutError):
        train(run, tmp_path / "cut", cut)
    train(run, tmp_path / "cut")
    whole, resumed = (results.load(tmp_path / name / run.name) for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole.history["threshold"], resumed.history["threshold"])
    np.testing.assert_array_equal(whole.history["loss"], resumed.history["loss"])
    assert whole.row["clipped"] == resumed.row["clipped"]
