"""The two-stage generator and the multi-scale discriminators."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

MULTIPLE = 32
"""The side of an image must be a multiple of this, because it is halved five times."""

INNER_BLOCKS, OUTER_BLOCKS = 6, 3

SLOPE, DISCRIMINATOR_SLOPE = 0.1, 0.2
"""Negative slope of leaky ReLU."""

PATCH = 32
"""Least side of a discriminator's patches, in pixels. The patches of images with a side above 256
have an eighth of that side. The authors' patches of 512 x 512 images are 70 x 70."""

SCALES = (1, 2, 4)
"""Sides of the crops that are resized to patches, in multiples of a patch's side."""


def scaled(channels: int, width: float) -> int:
    """The number of channels at a width, at least 1."""
    return max(1, round(channels * width))


class Convolution(nn.Sequential):
    """A weight-normalised convolution and leaky ReLU.

    Args:
        into: input channels.
        out: output channels.
        kernel_size: kernel size, odd.
        scale: 2 doubles the side of images, 0.5 halves it.
        is_linear: leave out the ReLU.
    """

    def __init__(
        self,
        into: int,
        out: int,
        kernel_size: int = 3,
        scale: float = 1.0,
        is_linear: bool = False,
    ) -> None:
        layer: nn.Conv2d | nn.ConvTranspose2d
        padding = kernel_size // 2
        if scale > 1:
            layer = nn.ConvTranspose2d(into, out, kernel_size, 2, padding, output_padding=1)
            # Each output is a sum over a quarter of the kernel.
            inputs = into * kernel_size**2 / 4
        else:
            layer = nn.Conv2d(into, out, kernel_size, 2 if scale < 1 else 1, padding)
            inputs = into * kernel_size**2
        nn.init.normal_(layer.weight, std=((1 if is_linear else 2) / inputs) ** 0.5)
        nn.init.zeros_(layer.bias)
        layers = [weight_norm(layer, dim=1 if scale > 1 else 0)]
        super().__init__(*layers, *([] if is_linear else [nn.LeakyReLU(SLOPE)]))


class Residual(nn.Module):
    """Three convolutions; their output is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Convolution(channels, channels) for _ in range(3)))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        added: Tensor = features + self.body(features)
        return added


class Completion(NamedTuple):
    """The generator's outputs for a scan.

    Attributes:
        inner: at half the size, [batch, 1, side / 2, side / 2].
        outer: [batch, 1, side, side].
    """

    inner: Tensor
    outer: Tensor


class Generator(nn.Module):
    """Completes partial scans, [batch, 1, side, side], with a side that is a multiple of 32.

    The inner stage makes features of the scan at half its size. A small network, ``trainer``, maps
    these to a completion of that size, so that the inner stage has a loss of its own. The outer
    stage joins the features with the scan at full size.

    Args:
        width: factor on the number of channels; 1 is the authors' network.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        narrow, wide = scaled(32, width), scaled(64, width)
        sizes = [scaled(channels, width) for channels in (64, 128, 256, 512, 768)]
        # The input is scan and mask, because a visited pixel may read 0.
        self.inner = nn.Sequential(
            Convolution(2, sizes[0], 5),
            *(Convolution(*pair, scale=0.5) for pair in pairwise(sizes)),
            *(Residual(sizes[-1]) for _ in range(INNER_BLOCKS)),
            *(
                Convolution(*pair, scale=2)
                for pair in zip(sizes[:0:-1], [*sizes[-2:0:-1], wide], strict=True)
            ),
        )
        self.trainer = nn.Sequential(Convolution(wide, wide), Convolution(wide, 1, is_linear=True))
        self.entry = nn.Sequential(Convolution(2, narrow, 5), Convolution(narrow, wide, scale=0.5))
        self.outer = nn.Sequential(
            *(Residual(wide) for _ in range(OUTER_BLOCKS)),
            Convolution(wide, narrow, scale=2),
            Convolution(narrow, narrow),
            Convolution(narrow, 1, is_linear=True),
        )

    def forward(self, scan: Tensor, mask: Tensor) -> Completion:
        """Complete scans; masks are 1 in visited pixels."""
        given = torch.cat([scan, mask], dim=1)
        features = self.inner(halved(given))
        return Completion(self.trainer(features), self.outer(self.entry(given) + features))


class Discriminators(nn.ModuleList):
    """Three discriminators, one for each scale. Crops of all scales are resized to one patch size.

    Args:
        width: factor on the number of channels; 1 is the authors' network.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        sizes = [1, *(scaled(channels, width) for channels in (64, 128, 256, 512))]
        for _ in SCALES:
            layers: list[nn.Module] = []
            for into, out in pairwise(sizes):
                convolution = nn.Conv2d(into, out, 4, stride=2, padding=1)
                layers += [spectral_norm(convolution), nn.LeakyReLU(DISCRIMINATOR_SLOPE)]
            self.append(nn.Sequential(*layers))

    def forward(self, patches: list[Tensor]) -> list[Tensor]:
        """Each discriminator's sum of features, [batch], for patches [batch, 1, patch, patch]."""
        return [
            discriminator(each).sum(dim=(1, 2, 3))
            for discriminator, each in zip(self, patches, strict=True)
        ]


def patches_of(*images: Tensor) -> list[tuple[Tensor, ...]]:
    """Patches of each scale, cut from all images at the same random place.

    Args:
        images: [batch, 1, side, side] each.

    Returns:
        For each scale, the patches of each of the images, [batch, 1, patch, patch].
    """
    side = images[0].shape[-1]
    patch = max(PATCH, side // 8)
    found = []
    for scale in SCALES:
        size = min(scale * patch, side)
        row, column = torch.randint(side - size + 1, (2,)).tolist()
        cut = (each[..., row : row + size, column : column + size] for each in images)
        found.append(tuple(resized(each, patch) for each in cut))
    return found


def resized(images: Tensor, side: int) -> Tensor:
    """Images [batch, 1, height, width] at another size, each pixel the mean of what it covers."""
    return interpolate(images, size=(side, side), mode="area")


def halved(images: Tensor) -> Tensor:
    """Images at half their size."""
    return resized(images, images.shape[-1] // 2)


def blurred(images: Tensor, stddev: float = 2.5, reach: int = 2) -> Tensor:
    """Images [batch, 1, height, width], blurred by a Gaussian of 5 x 5 pixels."""
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-(offsets**2) / (2 * stddev**2), dim=0)
    padded = pad(images, (reach,) * 4, mode="reflect")
    rows = nn.functional.conv2d(padded, kernel.view(1, 1, -1, 1))
    return nn.functional.conv2d(rows, kernel.view(1, 1, 1, -1))
