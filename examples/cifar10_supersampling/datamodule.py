"""The LightningDataModule: images in memory, from any of three sources, as training pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from . import cifar10
from .photographs import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, cut_images
from .transformation import Batch, evaluation_batch, training_batch

SOURCES = ("photographs", "download", "folder")
TRAIN_IMAGES, TEST_IMAGES = 6000, 1000


@lru_cache(maxsize=2)
def load_images(data: str, root: Path, train: bool) -> Tensor:
    """Read the training or the test images of a source, once in a process.

    Args:
        data: "photographs", "download" or "folder".
        root: where the latter two are.
        train: the training images, or else the test images.

    Returns:
        uint8 [images, 3, 32, 32]
    """
    if data == "photographs":
        # Their seed is fixed: another seed of training is not another data set.
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
        """Return a whole batch; a DataLoader asks for one when this method exists."""
        return self.transform(self.images[torch.as_tensor(indices)])


def whole(batch: Any) -> Any:
    """Collate nothing: what `TransformedImages.__getitems__` returned is a batch already."""
    return batch


class CIFAR10Supersampling(pl.LightningDataModule):
    """Pairs of a 32x32 colour image and itself restored from half the resolution.

    Args:
        data: "photographs" cuts the images from photographs that scikit-image ships; "download"
            has torchvision download CIFAR-10 into root; "folder" reads
            root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        batch_size: images in a training batch.
        outlier_fraction: probability that a training image has hot pixels.
        hot_pixel_fraction: probability that a pixel of such an image is hot.
        hot_pixel_value: what a hot pixel reads, in standard deviations of its image.
        seed: of the order of the images and of their transformation.
    """

    def __init__(
        self,
        data: Literal["photographs", "download", "folder"] = "photographs",
        root: str | Path = "data",
        batch_size: int = 8,
        outlier_fraction: float = 0.0,
        hot_pixel_fraction: float = 0.05,
        hot_pixel_value: float = 8.0,
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
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed!r}")
        self.save_hyperparameters()
        self.data = data
        self.root = Path(root)
        self.batch_size = batch_size
        self.outlier_fraction = outlier_fraction
        self.hot_pixel_fraction = hot_pixel_fraction
        self.hot_pixel_value = hot_pixel_value
        self.generator = Generator().manual_seed(seed)

    def prepare_data(self) -> None:
        """Download CIFAR-10, or look for the folder, where that is the source."""
        if self.data == "download":
            cifar10.download(self.root)
        elif self.data == "folder":
            cifar10.require_folder(self.root)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, augmented batches of equal size, with hot pixels in some images."""
        dataset = TransformedImages(
            load_images(self.data, self.root, train=True), self._training_batch
        )
        # A generator of the loader's own would leave the order out of the checkpoint.
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=self.generator,
            collate_fn=whole,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same images as for testing: neither chooses anything here."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Batch]:
        """Clean test images in a fixed order."""
        dataset = TransformedImages(
            load_images(self.data, self.root, train=False), evaluation_batch
        )
        return DataLoader(dataset, batch_size=100, collate_fn=whole)

    def state_dict(self) -> dict[str, Any]:
        """Let a resumed training go on with the order and augmentation it would have had."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.generator.set_state(state_dict["generator"])

    def _training_batch(self, images: Tensor) -> Batch:
        return training_batch(
            images,
            self.generator,
            self.outlier_fraction,
            self.hot_pixel_fraction,
            self.hot_pixel_value,
        )
