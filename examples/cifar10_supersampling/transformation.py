"""From uint8 images to training pairs: the paper's augmentation, degradation, and hot pixels.

Pure functions on whole batches. Reference: Ede and Beanland, "Adaptive learning rate clipping
stabilizes learning" (2020), section on CIFAR-10 supersampling. Where chance has a part, it is
drawn from the generator given, and always the same number of draws, so that two experiments with
one seed see the same images whatever their arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional


class Batch(NamedTuple):
    """Training pairs, in units of each image's standard deviation.

    Attributes:
        input: float32 [batch, 3, height, width], restored from half the resolution.
        target: float32 [batch, 3, height, width], at full resolution.
        outlier: bool [batch], which of the pairs are damaged by hot pixels.
    """

    input: Tensor
    target: Tensor
    outlier: Tensor


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability one half.

    Args:
        images: [batch, channels, height, width].
        generator: where chance comes from.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def random_brightness(images: Tensor, generator: Generator, max_delta: float = 63.0) -> Tensor:
    """Add to each image one number from [-max_delta, max_delta).

    Args:
        images: float [batch, channels, height, width], 0 to 255.
        generator: where chance comes from.
        max_delta: in the images' units.
    """
    delta = torch.rand(len(images), 1, 1, 1, generator=generator) * 2 - 1
    return images + max_delta * delta


def random_contrast(
    images: Tensor, generator: Generator, lower: float = 0.2, upper: float = 1.8
) -> Tensor:
    """Scale each image about each of its channels' means by one factor from [lower, upper).

    Args:
        images: float [batch, channels, height, width].
        generator: where chance comes from.
        lower: the smallest factor.
        upper: the largest factor.
    """
    factor = lower + (upper - lower) * torch.rand(len(images), 1, 1, 1, generator=generator)
    means = images.mean(dim=(2, 3), keepdim=True)
    return (images - means) * factor + means


def standardise(images: Tensor) -> Tensor:
    """Bring each image to zero mean and unit variance.

    The standard deviation is floored at 1/sqrt(channels*height*width), so that a uniform image
    becomes zero.

    Args:
        images: float [batch, channels, height, width].
    """
    stddev, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / stddev.clamp(min=images[0].numel() ** -0.5)


def halve_resolution(images: Tensor) -> Tensor:
    """Scale images to half their size and back, bilinear with the corners aligned.

    Args:
        images: float [batch, channels, height, width], height and width even.
    """
    size = (images.shape[2], images.shape[3])
    half = functional.interpolate(
        images, (size[0] // 2, size[1] // 2), mode="bilinear", align_corners=True
    )
    return functional.interpolate(half, size, mode="bilinear", align_corners=True)


def add_hot_pixels(
    images: Tensor, chosen: Tensor, generator: Generator, pixel_fraction: float, value: float
) -> Tensor:
    """Set randomly placed pixels of the chosen images to one value in every channel.

    Args:
        images: float [batch, channels, height, width], standardised.
        chosen: bool [batch], the images to damage.
        generator: where chance comes from.
        pixel_fraction: probability that a pixel of a chosen image is hot.
        value: in standard deviations of the image.
    """
    places = torch.rand(len(images), 1, *images.shape[2:], generator=generator)
    hot = (places < pixel_fraction) & chosen.view(-1, 1, 1, 1)
    return images.masked_fill(hot, value)


def training_batch(
    images: Tensor,
    generator: Generator,
    outlier_fraction: float = 0.0,
    hot_pixel_fraction: float = 0.05,
    hot_pixel_value: float = 8.0,
) -> Batch:
    """Augment, standardise, damage and degrade a batch of images.

    Args:
        images: uint8 [batch, 3, height, width].
        generator: where chance comes from.
        outlier_fraction: probability that an image has hot pixels.
        hot_pixel_fraction: probability that a pixel of such an image is hot.
        hot_pixel_value: what they read, in standard deviations of the image.
    """
    augmented = random_flip(images.float(), generator)
    augmented = random_brightness(augmented, generator)
    augmented = random_contrast(augmented, generator)
    clean = standardise(augmented)
    outlier = torch.rand(len(images), generator=generator) < outlier_fraction
    target = add_hot_pixels(clean, outlier, generator, hot_pixel_fraction, hot_pixel_value)
    return Batch(halve_resolution(target), target, outlier)


def evaluation_batch(images: Tensor) -> Batch:
    """Standardise and degrade a batch of images: no chance, no outlier.

    Args:
        images: uint8 [batch, 3, height, width].
    """
    target = standardise(images.float())
    return Batch(halve_resolution(target), target, torch.zeros(len(images), dtype=torch.bool))
