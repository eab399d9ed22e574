"""Thousands of 32x32 colour images cut from the photographs inside scikit-image's wheel.

They replace CIFAR-10 if nothing may be downloaded. Every photograph is a file of the installed
package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from skimage import data
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as vision

# The split is by photograph, so that no test image shares a pixel with a training image. The
# motorcycle's two views show one scene and stay on one side.
TRAIN_PHOTOGRAPHS = (
    "astronaut",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
TEST_PHOTOGRAPHS = ("chelsea", "coffee")

SIDE = 32

# Shorter sides, in pixels, of the reduced copies that windows are cut from. The copies are reduced
# because CIFAR-10's images are whole photographs scaled down.
SHORTER_SIDES = (64, 96, 128, 192, 256)

# The deep field's stars are points that are lost at half the resolution: this photograph's
# quartic error is a hundred times that of the others. So this photograph is enlarged, not reduced.
# Its own shorter side has 872 pixels.
ENLARGED_SHORTER_SIDES = {"hubble_deep_field": (1744, 2180, 2616)}

# A window of bare sky has only noise. Standardisation would amplify it to a target that no network
# can restore. In CIFAR-10 no test image has a standard deviation below 10 of 255.
MINIMUM_STDDEV = 10.0


def load_photograph(name: str) -> list[Tensor]:
    """Read one of scikit-image's photographs.

    Args:
        name: a function of `skimage.data`, for instance "astronaut".

    Returns:
        Its views, each uint8 [3, height, width]: two for the stereo pair, else one.
    """
    loaded = getattr(data, name)()
    # The stereo pair comes with its disparity map, which is no photograph.
    views = loaded[:2] if isinstance(loaded, tuple) else (loaded,)
    return [torch.from_numpy(view).permute(2, 0, 1).contiguous() for view in views]


def cut_windows(photograph: Tensor, shorter_side: int, count: int, generator: Generator) -> Tensor:
    """Scale a photograph and cut 32x32 windows at random places, except flat ones.

    Args:
        photograph: uint8 [3, height, width].
        shorter_side: its shorter side after scaling, in pixels.
        count: how many windows.
        generator: source of random numbers.

    Returns:
        uint8 [count, 3, 32, 32]
    """
    scaled = vision.resize(photograph, [shorter_side], antialias=True)
    # A view of all windows: [rows, columns, 3, 32, 32].
    windows = scaled.unfold(1, SIDE, 1).unfold(2, SIDE, 1).permute(1, 2, 0, 3, 4)
    found = torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8)
    while len(found) < count:
        rows = torch.randint(windows.shape[0], (count,), generator=generator)
        columns = torch.randint(windows.shape[1], (count,), generator=generator)
        candidates = windows[rows, columns]
        found = torch.cat(
            [found, candidates[candidates.float().std(dim=(1, 2, 3)) > MINIMUM_STDDEV]]
        )
    return found[:count]


def cut_images(names: Sequence[str], count: int, seed: int) -> Tensor:
    """Cut images at random from photographs, the same number from each view and scale.

    Args:
        names: functions of `skimage.data`.
        count: how many images.
        seed: the same seed gives the same images.

    Returns:
        uint8 [count, 3, 32, 32], in random order.
    """
    generator = Generator().manual_seed(seed)
    scaled_views = [
        (view, shorter_side)
        for name in names
        for view in load_photograph(name)
        for shorter_side in ENLARGED_SHORTER_SIDES.get(name, SHORTER_SIDES)
    ]
    share = -(-count // len(scaled_views))
    images = torch.cat([cut_windows(*scaled, share, generator) for scaled in scaled_views])
    return images[torch.randperm(len(images), generator=generator)[:count]]
