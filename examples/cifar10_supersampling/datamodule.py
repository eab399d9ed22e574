"""The LightningDataModule: images in memory, from any of three sources, as training pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from . import cifar10
from .photographs import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, cut_images
from .transformation import OUTLIER_KINDS, Batch, evaluation_batch, training_batch

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


class ResumableLoader(DataLoader[Batch]):
    """A shuffling loader whose checkpoint in mid-epoch is resumed with the very next batch.

    Everything random must come from its generator, and no worker process may load ahead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch_start = self.generator.get_state()
        self._batches = 0
        self._resuming = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        done = self._batches if self._resuming and self._batches < len(self) else 0
        self._resuming = False
        if done:
            self.generator.set_state(self._epoch_start)
        self._epoch_start = self.generator.get_state()
        # One request more would have the sampler draw for an epoch that is over.
        epoch = islice(super().__iter__(), len(self))
        for self._batches, batch in enumerate(epoch, start=1):
            # What was seen before is drawn once more, which leaves the generator as it was then.
            if self._batches > done:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch's randomness started, and how many of its batches were drawn."""
        return {"epoch_start": self._epoch_start, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches drawn then, when next iterated over."""
        self._epoch_start = state_dict["epoch_start"]
        self._batches = state_dict["batches"]
        self._resuming = True


class CIFAR10Supersampling(pl.LightningDataModule):
    """Pairs of a 32x32 colour image and itself restored from half the resolution.

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
        hot_pixel_value: what a hot pixel reads, in standard deviations of its image.
        noise_stddev: of "noise", in standard deviations of the image. At 3 an outlier's quartic
            error is about that of one with hot pixels.
        seed: of the order of the images and of their transformation.
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
        self.generator = Generator().manual_seed(seed)

    def prepare_data(self) -> None:
        """Download CIFAR-10, or look for the folder, where that is the source."""
        if self.data == "download":
            cifar10.download(self.root)
        elif self.data == "folder":
            cifar10.require_folder(self.root)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, augmented batches of equal size, some of their images outliers."""
        dataset = TransformedImages(
            load_images(self.data, self.root, train=True), self._training_batch
        )
        # A generator of the loader's own would leave the order out of the checkpoint.
        return ResumableLoader(
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
            outlier_fraction=self.outlier_fraction,
            outlier_kind=self.outlier_kind,
            hot_pixel_fraction=self.hot_pixel_fraction,
            hot_pixel_value=self.hot_pixel_value,
            noise_stddev=self.noise_stddev,
            others=load_images(self.data, self.root, train=True),
        )
