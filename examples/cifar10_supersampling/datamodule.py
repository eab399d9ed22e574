"""The LightningDataModule: images in memory, from any of three sources, as training pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from . import cifar10
from .photographs import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, cut_images
from .transformation import OUTLIER_KINDS, Batch, evaluation_batch, training_batch

SOURCES = ("photographs", "download", "folder")
TRAIN_IMAGES, TEST_IMAGES = 6000, 1000

# Number of images that are transformed together. With another number, the same seed would give
# other images.
TRANSFORMED_TOGETHER = 64


@lru_cache(maxsize=2)
def load_images(data: str, root: Path, train: bool) -> Tensor:
    """Read the training or the test images of a source. A process reads them only once.

    Args:
        data: "photographs", "download" or "folder".
        root: directory of "download" and "folder".
        train: read the training images, otherwise the test images.

    Returns:
        uint8 [images, 3, 32, 32]
    """
    if data == "photographs":
        # The seed is fixed, so that every training seed has the same dataset.
        return (
            cut_images(TRAIN_PHOTOGRAPHS, TRAIN_IMAGES, seed=0)
            if train
            else cut_images(TEST_PHOTOGRAPHS, TEST_IMAGES, seed=1)
        )
    if data == "download":
        return cifar10.load_download(root, train)
    return cifar10.load_folder(root / ("train" if train else "test"))


class TransformedImages(Dataset[Batch]):
    """Images in memory that are transformed a whole batch at a time.

    Args:
        images: uint8 [images, 3, height, width].
        transform: from uint8 [batch, 3, height, width] to a `Batch`.
    """

    def __init__(self, images: Tensor, transform: Callable[[Tensor], Batch]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch; a DataLoader calls this method if it exists."""
        return self.transform(self.images[torch.as_tensor(indices)])


def whole(batch: Any) -> Any:
    """Collate nothing: `TransformedImages.__getitems__` already returns a batch."""
    return batch


class TrainingBatches:
    """Shuffled and transformed batches of equal size. Each iteration is the next epoch.

    Transforming a few images takes hardly longer than transforming one. So small batches are made
    in groups. Each group has its own generator, seeded by the seed, the epoch, the rank and the
    group's first image. So a training resumed in mid-epoch starts with the group of its next batch,
    and makes no earlier group.

    Args:
        images: uint8 [images, 3, height, width].
        transform: from uint8 [batch, 3, height, width] and a generator to a `Batch`.
        batch_size: images in a batch.
        seed: seed of the order of the images and of their transformation.
        rank: rank of this process, which gets its own batches.
        ranks: number of processes.
    """

    def __init__(
        self,
        images: Tensor,
        transform: Callable[[Tensor, Generator], Batch],
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images = images
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.batches = 0
        if not len(self):
            raise ValueError(
                f"batch_size must be at most {len(images) // ranks}, the number of training images "
                f"of each process, got {batch_size!r}"
            )

    def __len__(self) -> int:
        return len(self.images) // self.ranks // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches after the last one returned, to the end of the epoch."""
        epoch, done = divmod(self.batches, len(self))
        # All ranks shuffle in the same order, and each rank takes its share.
        order = torch.randperm(len(self.images), generator=generator(self.seed, epoch))
        mine = order[self.rank :: self.ranks]
        together = max(1, TRANSFORMED_TOGETHER // self.batch_size)
        for first in range(done - done % together, len(self), together):
            last = min(first + together, len(self))
            image = first * self.batch_size
            indices = mine[image : last * self.batch_size]
            chance = generator(self.seed, epoch, self.rank, image)
            made = self.transform(self.images[indices], chance)
            for number, batch in enumerate(split(made, self.batch_size), start=first):
                if number >= done:
                    self.batches += 1
                    yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches returned. Lightning saves it in its checkpoints."""
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches that had been returned when the state was saved."""
        self.batches = state_dict["batches"]


def generator(seed: int, *key: int) -> Generator:
    """A generator for a seed and a key of numbers that are not negative."""
    (state,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1)
    return Generator().manual_seed(int(state))


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Split a batch into batches of a size."""
    return map(Batch, *(each.split(size) for each in batch))


class CIFAR10Supersampling(pl.LightningDataModule):
    """Pairs of a 32x32 colour image and the same image, scaled to half its size and back.

    Args:
        data: "photographs" cuts the images from photographs that scikit-image ships; "download"
            has torchvision download CIFAR-10 into root; "folder" reads
            root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        batch_size: images in a training batch.
        outlier_fraction: probability that a training image is an outlier.
        outlier_kind: "hot_pixels" has pixels of one extreme value, "noise" is Gaussian noise all
            over the image, "wrong_target" has another training image as the target.
        hot_pixel_fraction: probability that a pixel of a "hot_pixels" outlier is hot.
        hot_pixel_value: value of a hot pixel, in standard deviations of its image.
        noise_stddev: standard deviation of "noise", in standard deviations of the image. At 3, the
            quartic error of "noise" is about that of "hot_pixels".
        seed: seed of the order of the images and of their transformation.
    """

    def __init__(
        self,
        data: Literal["photographs", "download", "folder"] = "photographs",
        root: str | Path = "data",
        batch_size: int = 8,
        outlier_fraction: float = 0.0,
        outlier_kind: Literal["hot_pixels", "noise", "wrong_target"] = "hot_pixels",
        hot_pixel_fraction: float = 0.05,
        hot_pixel_value: float = 8.0,
        noise_stddev: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if data not in SOURCES:
            raise ValueError(f"data must be one of {list(SOURCES)}, got {data!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        fractions = {
            "outlier_fraction": outlier_fraction,
            "hot_pixel_fraction": hot_pixel_fraction,
        }
        for name, fraction in fractions.items():
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {fraction!r}")
        if outlier_kind not in OUTLIER_KINDS:
            raise ValueError(
                f"outlier_kind must be one of {list(OUTLIER_KINDS)}, got {outlier_kind!r}"
            )
        if not noise_stddev >= 0:
            raise ValueError(f"noise_stddev must not be negative, got {noise_stddev!r}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed!r}")
        self.save_hyperparameters()
        self.data = data
        self.root = Path(root)
        self.batch_size = batch_size
        self.outlier_fraction = outlier_fraction
        self.outlier_kind = outlier_kind
        self.hot_pixel_fraction = hot_pixel_fraction
        self.hot_pixel_value = hot_pixel_value
        self.noise_stddev = noise_stddev
        self.seed = seed

    def prepare_data(self) -> None:
        """Download CIFAR-10 if data is "download"; check the folder if data is "folder"."""
        if self.data == "download":
            cifar10.download(self.root)
        elif self.data == "folder":
            cifar10.require_folder(self.root)

    def train_dataloader(self) -> TrainingBatches:
        """Shuffled, augmented batches of equal size, some of their images outliers."""
        return self._training_batches

    def val_dataloader(self) -> DataLoader[Batch]:
        """The test images in a random order, so that the first few are of all classes.

        This example chooses nothing by the results of validation or test.
        """
        images = self._test_images
        order = torch.randperm(len(images), generator=generator(0)).tolist()
        return DataLoader(images, batch_size=100, sampler=order, collate_fn=whole)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Clean test images in a fixed order."""
        return DataLoader(self._test_images, batch_size=100, collate_fn=whole)

    @property
    def _test_images(self) -> TransformedImages:
        images = load_images(self.data, self.root, train=False)
        return TransformedImages(images, evaluation_batch)

    @cached_property
    def _training_batches(self) -> TrainingBatches:
        images = load_images(self.data, self.root, train=True)
        transform = partial(
            training_batch,
            outlier_fraction=self.outlier_fraction,
            outlier_kind=self.outlier_kind,
            hot_pixel_fraction=self.hot_pixel_fraction,
            hot_pixel_value=self.hot_pixel_value,
            noise_stddev=self.noise_stddev,
            others=images,
        )
        rank, ranks = (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )
        return TrainingBatches(images, transform, self.batch_size, self.seed, rank, ranks)
