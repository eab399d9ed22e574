"""The LightningDataModule: crops of micrographs, and partial scans of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .micrographs import Micrograph, in_folder, shipped
from .network import MULTIPLE
from .scans import PATHS, mask, partial_scan

SOURCES = ("shipped", "folder")


class Batch(NamedTuple):
    """Crops and their partial scans; all images are float32 [batch, 1, crop, crop].

    Attributes:
        scan: what the probe read; 0 in pixels that it did not visit.
        mask: 1 in pixels that the probe visited, otherwise 0.
        truth: the crops, from -1 to 1.
        id: ids of the crops: file, and row and column of the corner.
    """

    scan: Tensor
    mask: Tensor
    truth: Tensor
    id: list[str]


def normalised(crop: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a crop to [-1, 1]; a crop of equal pixels becomes 0."""
    low, high = crop.min(), crop.max()
    if not high > low:
        return np.zeros_like(crop)
    return 2 * ((crop - low) / (high - low)) - 1


class Crops(Dataset[Batch]):
    """Crops of micrographs, each with a partial scan.

    Args:
        micrographs: micrographs to cut from.
        path: path of the probe, a key of `scans.PATHS`.
        crop: side of a crop in pixels.
        coverage: the fraction of pixels that the probe visits.
        probe: see `scans.partial_scan`.
        seed: seed of all random numbers. An index always gives the same crop.
        count: number of crops, cut at random places, flipped and rotated at random; None for
            all places side by side, without flips and rotations.
    """

    def __init__(
        self,
        micrographs: list[Micrograph],
        path: str,
        crop: int,
        coverage: float,
        probe: float,
        seed: int,
        count: int | None = None,
    ) -> None:
        self.micrographs = micrographs
        self.path = path
        self.crop = crop
        self.coverage = coverage
        self.probe = probe
        self.seed = seed
        self.count = count
        self.places = [
            (number, row, column)
            for number, (_, image) in enumerate(micrographs)
            for row in range(0, image.shape[0] - crop + 1, crop)
            for column in range(0, image.shape[1] - crop + 1, crop)
        ]

    def __len__(self) -> int:
        return len(self.places) if self.count is None else self.count

    def __getitem__(self, index: int) -> Batch:
        chance = np.random.default_rng([self.seed, index])
        if self.count is None:
            number, row, column = self.places[index]
        else:
            number = int(chance.integers(len(self.micrographs)))
            height, width = self.micrographs[number].image.shape
            row, column = (int(chance.integers(each - self.crop + 1)) for each in (height, width))
        name, image = self.micrographs[number]
        crop = image[row : row + self.crop, column : column + self.crop]
        if self.count is not None:
            crop = np.rot90(crop, chance.integers(4))
            crop = crop[:, ::-1] if chance.integers(2) else crop
        truth = normalised(crop)
        visited = mask(self.path, self.crop, self.coverage, chance)
        images = (partial_scan(truth, visited, self.probe), visited, truth)
        tensors = (
            torch.from_numpy(np.ascontiguousarray(image, np.float32))[None] for image in images
        )
        return Batch(*tensors, f"{Path(name).name}@{row},{column}")


class PartialScans(pl.LightningDataModule):
    """Crops of electron micrographs or of similar images, and a partial scan of each crop.

    Args:
        data: "shipped" takes microscopy and textures that scikit-image ships; "folder" reads root.
        root: a folder of micrographs of any size: TIFF of one or several pages, PNG, NPY, and with
            the extra `micrographs` MRC, DM3, DM4 and EMD.
        pattern: pattern of the names of files to read, like "truth-*".
        test_files: number of files kept for the test, the last by name.
        crop: side of a crop in pixels, a multiple of 32. The authors' is 512.
        crops: number of crops in an epoch of training, each cut, flipped and rotated at random.
            Each epoch has the same crops.
        path: path of the probe: "spiral", "jittered_spiral", "random_walk", or "grid" of single
            pixels.
        coverage: the fraction of pixels that the probe visits, above 0 and up to 0.5.
        probe: standard deviation, in pixels, of the Gaussian that each reading averages over.
        batch_size: crops in a training batch.
        workers: processes that make batches; 0 makes them in the training's process.
        seed: seed of crops and scans.

    Raises:
        ValueError: an argument is out of its range; or, in `setup`, a file is not a usable
            micrograph.
    """

    def __init__(
        self,
        data: Literal["shipped", "folder"] = "shipped",
        root: str | Path = "data",
        pattern: str = "*",
        test_files: int = 1,
        crop: int = 96,
        crops: int = 10_000,
        path: Literal["spiral", "jittered_spiral", "random_walk", "grid"] = "spiral",
        coverage: float = 1 / 20,
        probe: float = 1.0,
        batch_size: int = 1,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if data not in SOURCES:
            raise ValueError(f"data must be one of {list(SOURCES)}, got {data!r}")
        if path not in PATHS:
            raise ValueError(f"path must be one of {list(PATHS)}, got {path!r}")
        if crop < MULTIPLE or crop % MULTIPLE:
            raise ValueError(f"crop must be a multiple of {MULTIPLE}, got {crop!r}")
        if not 0 < coverage <= 0.5:
            raise ValueError(f"coverage must be above 0 and at most 0.5, got {coverage!r}")
        if not 0 <= probe < crop:
            raise ValueError(f"probe must be from 0 to below crop, got {probe!r}")
        for name, least, value in (
            ("test_files", 1, test_files),
            ("batch_size", 1, batch_size),
            ("crops", batch_size, crops),
            ("workers", 0, workers),
            ("seed", 0, seed),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.save_hyperparameters()
        self.data = data
        self.root = Path(root)
        self.pattern = pattern
        self.test_files = test_files
        self.crop = crop
        self.crops = crops
        self.path = path
        self.coverage = coverage
        self.probe = probe
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the micrographs, so that a wrong file raises before training."""
        self._micrographs()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Crops at random places of all files but those of the test."""
        return DataLoader(
            self._crops(train=True),
            self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The test crops. This example chooses nothing by them."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Batch]:
        """Crops side by side of the last files, in a fixed order."""
        return DataLoader(self._crops(train=False), 16)

    def _crops(self, train: bool) -> Crops:
        files = self._micrographs()
        files = files[: -self.test_files] if train else files[-self.test_files :]
        return Crops(
            [each for file in files for each in file],
            self.path,
            self.crop,
            self.coverage,
            self.probe,
            # The test crops do not depend on the training's seed.
            self.seed + 1 if train else 0,
            self.crops if train else None,
        )

    def _micrographs(self) -> list[list[Micrograph]]:
        """The micrographs of each file. Raises if there are none for training or test."""
        if self.data == "shipped":
            files = shipped(self.crop)
        else:
            files = in_folder(self.root, self.pattern, self.crop)
        if len(files) <= self.test_files:
            raise ValueError(
                f"test_files must be less than the {len(files)} files there are, got "
                f"{self.test_files!r}"
            )
        return files
