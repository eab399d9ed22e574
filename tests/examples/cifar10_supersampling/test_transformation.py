import numpy as np
import pytest
import torch

from examples.cifar10_supersampling import transformation
from examples.cifar10_supersampling.photographs import cut_images


@pytest.fixture(scope="module")
def images():
    return cut_images(["coffee", "chelsea"], 64, seed=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bilinear_aligned(image, size):
    """Bilinear interpolation of [height, width], corner on corner, in NumPy float64."""
    length = image.shape[0]
    where = np.linspace(0, length - 1, size)
    # Row i says with what weight each pixel of a line enters pixel i of the new line.
    weights = np.stack([np.interp(where, np.arange(length), one) for one in np.eye(length)], 1)
    return weights @ image @ weights.T


def test_flip_mirrors_half_of_the_images(images):
    flipped = transformation.random_flip(images, generator())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    kept = (flipped == images).flatten(1).all(dim=1)
    assert (mirrored | kept).all()
    assert 16 < mirrored.sum() < 48


def test_brightness_adds_one_number_to_an_image(images):
    added = transformation.random_brightness(images.double(), generator()) - images
    spread = added.flatten(1).amax(dim=1) - added.flatten(1).amin(dim=1)
    assert (spread < 1e-9).all()
    delta = added[:, 0, 0, 0]
    assert delta.abs().max() <= 63
    assert delta.min() < -45
    assert delta.max() > 45


def test_contrast_scales_about_the_mean_of_each_channel(images):
    before = images.double()
    after = transformation.random_contrast(before, generator())
    assert torch.allclose(after.mean(dim=(2, 3)), before.mean(dim=(2, 3)))
    factors = after.std(dim=(2, 3)) / before.std(dim=(2, 3))
    assert torch.allclose(factors, factors[:, :1].expand(-1, 3))
    assert 0.2 <= factors.min() < 0.4
    assert 1.6 < factors.max() <= 1.8


def test_standardised_images_have_zero_mean_and_unit_variance(images):
    ours = transformation.standardise(images.float()).numpy()
    values = images.numpy().astype(np.float64)
    axes = {"axis": (1, 2, 3), "keepdims": True}
    theirs = (values - values.mean(**axes)) / values.std(**axes)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_standard_deviation_is_floored():
    nearly_flat = torch.full((1, 3, 32, 32), 7.0)
    assert torch.equal(transformation.standardise(nearly_flat), torch.zeros(1, 3, 32, 32))
    nearly_flat[0, 0, 0, 0] += 0.01
    standardised = transformation.standardise(nearly_flat)
    expected = 0.01 * (1 - 1 / 3072) * 3072**0.5
    assert standardised[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-3)


def test_half_resolution_agrees_with_numpy(images):
    ours = transformation.halve_resolution(images[:2].float()).numpy()
    for image, restored in zip(images[:2].numpy(), ours, strict=True):
        for channel, restored_channel in zip(image, restored, strict=True):
            theirs = bilinear_aligned(bilinear_aligned(channel.astype(np.float64), 16), 32)
            np.testing.assert_allclose(restored_channel, theirs, atol=1e-3)


@pytest.fixture
def clean():
    return torch.randn(40, 3, 32, 32, generator=generator())


@pytest.fixture
def chosen():
    return torch.arange(40) % 2 == 0


@pytest.fixture
def chance():
    return torch.rand(40, 1, 32, 32, generator=generator(1))


def test_hot_pixels_are_in_the_chosen_images_only(clean, chosen, chance):
    damaged = transformation.add_hot_pixels(clean, chosen, chance, 0.05, 8.0)
    assert torch.equal(damaged[~chosen], clean[~chosen])
    hot = (damaged[chosen] == 8.0).all(dim=1)
    changed = (damaged[chosen] != clean[chosen]).any(dim=1)
    assert torch.equal(hot, changed)
    assert hot.float().mean().item() == pytest.approx(0.05, abs=0.01)


def test_noise_is_gaussian_and_in_the_chosen_images_only(clean, chosen, chance):
    damaged = transformation.add_noise(clean, chosen, chance, 3.0)
    assert torch.equal(damaged[~chosen], clean[~chosen])
    noise = (damaged - clean)[chosen]
    assert torch.allclose(noise, noise[:, :1].expand(-1, 3, -1, -1), atol=1e-5)
    values = noise[:, 0].flatten().double()
    assert values.mean().item() == pytest.approx(0, abs=0.1)
    assert values.std().item() == pytest.approx(3, abs=0.1)
    assert (values / 3).pow(4).mean().item() == pytest.approx(3, abs=0.3)


def test_noise_is_finite_for_a_random_number_of_0(clean, chosen):
    noise = transformation.add_noise(clean, chosen, torch.zeros(40, 1, 32, 32), 3.0)
    assert noise.isfinite().all()


def test_wrong_targets_are_other_images(images, clean, chosen, chance):
    targets = transformation.replace_targets(clean, chosen, chance, images)
    assert torch.equal(targets[~chosen], clean[~chosen])
    known = transformation.standardise(images.float())
    for target in targets[chosen]:
        assert (target == known).flatten(1).all(dim=1).any()
    assert len(torch.unique(targets[chosen], dim=0)) > 10


def test_a_wrong_target_does_not_change_the_input(images):
    clean = transformation.training_batch(images, generator())
    wrong = transformation.training_batch(
        images, generator(), outlier_fraction=0.3, outlier_kind="wrong_target"
    )
    assert torch.equal(wrong.input, clean.input)
    changed = (wrong.target != clean.target).flatten(1).any(dim=1)
    assert torch.equal(changed, wrong.outlier)


@pytest.mark.parametrize("kind", transformation.OUTLIER_KINDS)
def test_all_kinds_of_outliers_have_the_same_clean_images(images, kind):
    damaged = transformation.training_batch(
        images, generator(), outlier_fraction=0.3, outlier_kind=kind
    )
    without = transformation.training_batch(images, generator())
    hot_pixels = transformation.training_batch(images, generator(), outlier_fraction=0.3)
    assert torch.equal(damaged.outlier, hot_pixels.outlier)
    clean = ~damaged.outlier
    assert torch.equal(damaged.target[clean], without.target[clean])
    assert not torch.equal(damaged.target, without.target)


def test_every_kind_allows_a_batch_without_outliers(images):
    for kind in transformation.OUTLIER_KINDS:
        batch = transformation.training_batch(images[:2], generator(), outlier_kind=kind)
        assert not batch.outlier.any()


def test_a_training_batch_marks_its_outliers(images):
    batch = transformation.training_batch(images, generator(), outlier_fraction=0.25)
    assert batch.outlier.shape == (64,)
    assert 6 <= batch.outlier.sum() <= 26
    # About 51 pixels of an outlier have the value 8. In other images hardly any pixel has it.
    hot = (batch.target == 8.0).all(dim=1).sum(dim=(1, 2))
    assert torch.equal(hot > 20, batch.outlier)
    assert torch.equal(batch.input, transformation.halve_resolution(batch.target))
    clean = batch.target[~batch.outlier]
    assert torch.allclose(clean.mean(dim=(1, 2, 3)), torch.zeros(len(clean)), atol=1e-5)


def test_an_evaluation_batch_is_clean_and_always_the_same(images):
    first, second = transformation.evaluation_batch(images), transformation.evaluation_batch(images)
    assert torch.equal(first.input, second.input)
    assert not first.outlier.any()
    assert torch.equal(first.target, transformation.standardise(images.float()))
