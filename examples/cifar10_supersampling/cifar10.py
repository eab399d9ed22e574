"""CIFAR-10: torchvision's checksummed download, or a folder of images, as in public mirrors."""

from __future__ import annotations

import tarfile
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.utils import download_url
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as vision

SIDE = 32

# The formats of single images that torchvision decodes.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def download(root: Path) -> None:
    """Check CIFAR-10 against torchvision's checksums, and download it if the check fails.

    The archive cannot write files outside ``root``. torchvision unpickles only files whose
    checksums it knows.

    Args:
        root: the directory that holds, or will hold, `cifar-10-batches-py`.

    Raises:
        RuntimeError: the download failed; the message names other ways.
    """
    with suppress(RuntimeError):  # the dataset is missing or incomplete
        CIFAR10(str(root))
        return
    try:
        download_url(CIFAR10.url, str(root), CIFAR10.filename, CIFAR10.tgz_md5)
        # torchvision's own extraction would write outside root if the archive says so.
        with tarfile.open(root / CIFAR10.filename) as archive:
            archive.extractall(root, filter="data")
        CIFAR10(str(root))
    # torchvision reports an unreachable server as URLError (an OSError), and a file that fails its
    # checksum as RuntimeError.
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise RuntimeError(
            f"data='download': CIFAR-10 could not be downloaded from {CIFAR10.url} ({error}). "
            "There are two other ways. data='photographs' needs no download. data='folder' reads "
            "root/train/<class>/*.jpg|png and root/test/<class>/*.jpg|png, as public mirrors of "
            "CIFAR-10 have it, from the folder given as root. On the command line of fit and "
            "test these are --data.data photographs, or --data.data folder --data.root FOLDER; "
            "of compare, --data photographs, or --data folder --root FOLDER."
        ) from error


def load_download(root: Path, train: bool) -> Tensor:
    """Read the downloaded images into memory.

    Args:
        root: as for `download`.
        train: read the 50,000 training images, otherwise the 10,000 test images.

    Returns:
        uint8 [images, 3, 32, 32]
    """
    return torch.from_numpy(CIFAR10(str(root), train=train).data).permute(0, 3, 1, 2).contiguous()


def require_folder(root: Path) -> None:
    """Raise FileNotFoundError unless root holds the folders `train` and `test`."""
    for folder in (root / "train", root / "test"):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data='folder': there is no folder {folder}; root, {str(root)!r}, must hold "
                "train/<class>/*.jpg|png and test/<class>/*.jpg|png"
            )


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in order of class and name.

    Args:
        folder: has a folder of JPEG, PNG or WebP images for each class. Other files, hidden files
            and folders, and folders without an image are ignored.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no image.
    """

    def is_image(path: str) -> bool:
        inside = Path(path).relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        return inside.suffix.lower() in SUFFIXES and not hidden

    files = []
    if folder.is_dir():
        files = ImageFolder(str(folder), is_valid_file=is_image, allow_empty=True).samples
    if not files:
        raise FileNotFoundError(
            f"data='folder': {folder} must hold images in a folder for each class, named "
            f"{', '.join('*' + suffix for suffix in SUFFIXES)}; it holds none"
        )
    return [Path(path) for path, _ in files]


@lru_cache(maxsize=2)
def fingerprint(root: Path) -> str:
    """What tells folders of images apart without reading the images; cached in a process.

    Args:
        root: holds the folders `train` and `test`; see `image_files`.

    Returns:
        The number of images, and a checksum of their names below root and their sizes.
    """
    sizes = [
        f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n"
        for split in ("train", "test")
        for path in image_files(root / split)
    ]
    checksum = zlib.crc32("".join(sizes).encode("utf-8", "surrogatepass"))
    return f"{len(sizes)} images, checksum {checksum:08x}"


def load_folder(folder: Path) -> Tensor:
    """Decode every image of a folder into memory.

    Grey and palette images become colour, transparency is dropped, and 16 bits are scaled to 8.

    Args:
        folder: as for `image_files`.

    Returns:
        uint8 [images, 3, 32, 32], in order of class and name.

    Raises:
        FileNotFoundError: the folder holds no image.
        ValueError: an image cannot be decoded, or is not 32x32; the message names it.
    """
    return torch.stack([load_image(path) for path in image_files(folder)])


def load_image(path: Path) -> Tensor:
    """Decode one image of a folder; see `load_folder`.

    Returns:
        uint8 [3, 32, 32]
    """
    try:
        decoded = decode_image(str(path), ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(f"data='folder': {path} cannot be read as an image ({error})") from error
    if decoded.shape != (3, SIDE, SIDE):
        *_, height, width = decoded.shape
        raise ValueError(
            f"data='folder': {path} is {width}x{height}, must be one image of {SIDE}x{SIDE} pixels"
        )
    return vision.to_dtype(decoded, torch.uint8, scale=True)
