"""From uint8 images to training pairs: the paper's augmentation, degradation, and outliers.

All functions are pure, and take whole batches. Reference: Ede and Beanland, "Adaptive learning rate
clipping stabilizes learning" (2020), section on CIFAR-10 supersampling. Random numbers come from
the generator given. Each batch has its own generator, and outliers draw from it last. So two
experiments with the same seed have the same clean images, whatever their outlier settings.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

OUTLIER_KINDS = ("hot_pixels", "noise", "wrong_target")


class Batch(NamedTuple):
    """Training pairs, in units of each image's standard deviation.

    Attributes:
        input: float32 [batch, 3, height, width], scaled to half the size and back.
        target: float32 [batch, 3, height, width], at full resolution.
        outlier: bool [batch], whether each pair is an outlier.
    """

    input: Tensor
    target: Tensor
    outlier: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """The batch on another device. Lightning would otherwise search it for tensors."""
        return Batch(*(each.to(*args, **kwargs) for each in self))


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability one half.

    Args:
        images: [batch, channels, height, width].
        generator: source of random numbers.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def random_brightness(images: Tensor, generator: Generator, max_delta: float = 63.0) -> Tensor:
    """Add to each image one number from [-max_delta, max_delta).

    Args:
        images: float [batch, channels, height, width], 0 to 255.
        generator: source of random numbers.
        max_delta: largest number, in the images' units.
    """
    delta = torch.rand(len(images), 1, 1, 1, generator=generator) * 2 - 1
    return images + max_delta * delta


def random_contrast(
    images: Tensor, generator: Generator, lower: float = 0.2, upper: float = 1.8
) -> Tensor:
    """Scale each image about its channels' means by one factor from [lower, upper).

    Args:
        images: float [batch, channels, height, width].
        generator: source of random numbers.
        lower: the smallest factor.
        upper: the largest factor.
    """
    factor = lower + (upper - lower) * torch.rand(len(images), 1, 1, 1, generator=generator)
    means = images.mean(dim=(2, 3), keepdim=True)
    return (images - means).mul_(factor).add_(means)


def standardise(images: Tensor) -> Tensor:
    """Bring each image to zero mean and unit variance.

    The standard deviation is floored at 1/sqrt(channels*height*width), so that a uniform image
    becomes zero.

    Args:
        images: float [batch, channels, height, width].
    """
    # This is several times as fast as torch.std_mean on a CPU.
    centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
    size = images.shape[1:].numel() ** 0.5
    stddev = torch.linalg.vector_norm(centred, dim=(1, 2, 3), keepdim=True) / size
    return centred.div_(stddev.clamp(min=1 / size))


def halve_resolution(images: Tensor) -> Tensor:
    """Scale images to half their size and back, bilinear with the corners aligned.

    Args:
        images: float [batch, channels, height, width], height and width even.
    """
    rows, columns = (halved_and_restored(side).to(images) for side in images.shape[2:])
    return rows @ images @ columns.T


@lru_cache
def halved_and_restored(side: int) -> Tensor:
    """The matrix by which `halve_resolution` maps a line of pixels.

    Args:
        side: pixels in the line.

    Returns:
        float64 [side, side]; row i has the weight of each old pixel in the new pixel i.
    """
    lines = torch.eye(side, dtype=torch.float64)[:, None]
    half = functional.interpolate(lines, side // 2, mode="linear", align_corners=True)
    return functional.interpolate(half, side, mode="linear", align_corners=True)[:, 0].T


def add_hot_pixels(
    images: Tensor, chosen: Tensor, chance: Tensor, fraction: float, value: float
) -> Tensor:
    """Set randomly placed pixels of the chosen images to one value in every channel.

    Args:
        images: float [batch, channels, height, width], standardised.
        chosen: bool [batch], the images to damage.
        chance: [batch, 1, height, width], uniform in [0, 1).
        fraction: probability that a pixel of a chosen image is hot.
        value: value of a hot pixel, in standard deviations of the image.
    """
    return images.masked_fill((chance < fraction) & chosen.view(-1, 1, 1, 1), value)


def add_noise(images: Tensor, chosen: Tensor, chance: Tensor, stddev: float) -> Tensor:
    """Add Gaussian noise to the chosen images. All channels of a pixel get the same noise.

    Args:
        images: float [batch, channels, height, width], standardised.
        chosen: bool [batch], the images to damage.
        chance: [batch, 1, height, width], uniform in [0, 1).
        stddev: standard deviation of the noise, in standard deviations of the image.
    """
    # A random number of exactly 0 would give noise of minus infinity.
    normal = torch.special.ndtri(chance.clamp(min=2.0**-25))
    return torch.where(chosen.view(-1, 1, 1, 1), images + stddev * normal, images)


def replace_targets(targets: Tensor, chosen: Tensor, chance: Tensor, images: Tensor) -> Tensor:
    """Replace the chosen targets by other images, standardised.

    Args:
        targets: float [batch, channels, height, width].
        chosen: bool [batch], the targets to replace.
        chance: [batch, 1, height, width], uniform in [0, 1).
        images: uint8 [images, channels, height, width], to choose from.
    """
    others = (chance[chosen, 0, 0, 0] * len(images)).long()
    replaced = targets.clone()
    replaced[chosen] = standardise(images[others].float())
    return replaced


def training_batch(
    images: Tensor,
    generator: Generator,
    outlier_fraction: float = 0.0,
    outlier_kind: str = "hot_pixels",
    hot_pixel_fraction: float = 0.05,
    hot_pixel_value: float = 8.0,
    noise_stddev: float = 3.0,
    others: Tensor | None = None,
) -> Batch:
    """Augment, standardise, damage and degrade a batch of images.

    Args:
        images: uint8 [batch, 3, height, width].
        generator: source of random numbers, for this batch only.
        outlier_fraction: probability that an image is an outlier.
        outlier_kind: "hot_pixels" and "noise" damage the image before its resolution is halved;
            "wrong_target" leaves the image unchanged and replaces the target by another image.
        hot_pixel_fraction: probability that a pixel of a "hot_pixels" outlier is hot.
        hot_pixel_value: value of a hot pixel, in standard deviations of the image.
        noise_stddev: standard deviation of "noise", in standard deviations of the image.
        others: uint8 [images, 3, height, width], from which a "wrong_target" is chosen; default:
            the batch's own images.
    """
    augmented = random_flip(images, generator).float()
    augmented = random_brightness(augmented, generator)
    augmented = random_contrast(augmented, generator)
    clean = standardise(augmented)
    outlier = torch.rand(len(images), generator=generator) < outlier_fraction
    if not outlier.any():
        return Batch(halve_resolution(clean), clean, outlier)
    chance = torch.rand(len(images), 1, *images.shape[2:], generator=generator)
    if outlier_kind == "wrong_target":
        target = replace_targets(clean, outlier, chance, images if others is None else others)
        return Batch(halve_resolution(clean), target, outlier)
    if outlier_kind == "noise":
        target = add_noise(clean, outlier, chance, noise_stddev)
    else:
        target = add_hot_pixels(clean, outlier, chance, hot_pixel_fraction, hot_pixel_value)
    return Batch(halve_resolution(target), target, outlier)


def evaluation_batch(images: Tensor) -> Batch:
    """Standardise and degrade a batch of images, without random numbers and outliers.

    Args:
        images: uint8 [batch, 3, height, width].
    """
    target = standardise(images.float())
    return Batch(halve_resolution(target), target, torch.zeros(len(images), dtype=torch.bool))
