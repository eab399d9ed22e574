"""Micrographs, from files of many formats or from what scikit-image ships."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage import color, data, io

from ..comparison.extras import imported

SHIPPED = ("brick", "cell", "immunohistochemistry", "moon", "gravel")
"""Microscopy and textures that scikit-image ships; the last is kept for the test."""

READERS = {
    ".mrc": "mrcfile",  # rosettasciio reads signed bytes as unsigned
    ".dm3": "rsciio.digitalmicrograph",
    ".dm4": "rsciio.digitalmicrograph",
    ".emd": "rsciio.emd",
}
"""Modules that read the formats of microscopes, by suffix."""

SUFFIXES = (".tif", ".tiff", ".png", ".npy", *READERS)

COLOURS = (3, 4)
"""Numbers of channels. A dimension of such a size, after height and width, means colour."""


class Micrograph(NamedTuple):
    """One grey image.

    Attributes:
        name: name of its file, and the number of the image if the file has several.
        image: float32 [height, width], finite.
    """

    name: str
    image: NDArray[np.float32]


@lru_cache(maxsize=2)
def shipped(smallest: int) -> list[list[Micrograph]]:
    """The images that scikit-image ships, each in a list of its own; see `in_folder`.

    Nothing is downloaded.
    """
    return [checked(name, [getattr(data, name)()], smallest) for name in SHIPPED]


@lru_cache(maxsize=2)
def in_folder(folder: Path, pattern: str, smallest: int) -> list[list[Micrograph]]:
    """The micrographs of each file of a folder, in order of names.

    Args:
        folder: folder of the files.
        pattern: pattern of the names of files to read, like "truth-*".
        smallest: least height and width, in pixels.

    Raises:
        ValueError: there is no file, or one cannot be read, is too small, or has pixels that are
            not finite.
    """
    paths = files_of(folder, pattern)
    if not paths:
        raise ValueError(
            f"root must be a folder with micrographs ({', '.join(SUFFIXES)}) whose names match "
            f"{pattern!r}, got {str(folder)!r}"
        )
    return [checked(str(path), read(path), smallest) for path in paths]


def files_of(folder: Path, pattern: str) -> list[Path]:
    """The files of micrographs in a folder, in order of names; see `in_folder`."""
    return [path for path in sorted(folder.glob(pattern)) if path.suffix.lower() in SUFFIXES]


def fingerprint(folder: Path, pattern: str) -> str:
    """What tells folders of micrographs apart; see `in_folder`.

    Returns:
        The number of files, and a checksum of their names below the folder and their contents.
    """
    paths, checksum = files_of(folder, pattern), 0
    for path in paths:
        name = path.relative_to(folder).as_posix().encode("utf-8", "surrogatepass")
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(name, checksum))
    return f"{len(paths)} files, checksum {checksum:08x}"


def read(path: Path) -> list[NDArray[Any]]:
    """The images of a file, unchanged.

    Raises:
        ValueError: the file cannot be read.
        ModuleNotFoundError: the package that reads it is not installed.
    """
    suffix = path.suffix.lower()
    reader = imported(READERS[suffix], "micrographs") if suffix in READERS else None
    try:
        if suffix == ".mrc":
            return [_of_mrc(reader, path)]
        if reader is not None:
            signals = reader.file_reader(str(path))
            # A file may have spectra beside the images.
            return [each["data"] for each in signals if np.ndim(each["data"]) >= 2]
        if suffix == ".npy":
            return [np.load(path)]
        if suffix == ".png":
            return [io.imread(path)]
        return _of_tiff(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the readers' exceptions share no class
        raise ValueError(f"{str(path)!r} cannot be read as a micrograph: {error}") from error


def _of_mrc(mrcfile: Any, path: Path) -> NDArray[Any]:
    # Files older than MRC2014 have other headers, but pixels of the same formats.
    with mrcfile.open(path, permissive=True) as file:
        if file.data is None:
            raise ValueError("it has no MRC header, or fewer pixels than its header says")
        return np.array(file.data)


def _of_tiff(path: Path) -> list[NDArray[Any]]:
    with tifffile.TiffFile(path) as file:
        if file.is_imagej:  # a large stack has one page, followed by the pixels of all images
            return [_white_high(each.keyframe, each.asarray()) for each in file.series]
        pages: Iterable[Any] = file.pages
        return [_white_high(each, each.asarray()) for each in pages if not each.is_reduced]


def _white_high(page: Any, array: NDArray[Any]) -> NDArray[Any]:
    """The array of a page, with white as the highest number; in some files white is 0."""
    if page.photometric != tifffile.PHOTOMETRIC.MINISWHITE or array.dtype.kind != "u":
        return array
    inverted: NDArray[Any] = array.dtype.type(2**page.bitspersample - 1) - array
    return inverted


def checked(name: str, arrays: list[NDArray[Any]], smallest: int) -> list[Micrograph]:
    """The images of a file in grey; see `in_folder` for what is checked.

    Args:
        name: name of the file.
        arrays: each [height, width], a stack of those, or a colour image with its channels last.
        smallest: least height and width, in pixels.
    """
    images = [image for array in arrays for image in grey(name, np.asarray(array))]
    if not images:
        raise ValueError(f"{name!r} has no image")
    for image in images:
        if min(image.shape) < smallest:
            height, width = image.shape
            raise ValueError(
                f"{name!r} must be at least {smallest} x {smallest} pixels, the size of a crop, "
                f"got {height} x {width}"
            )
        if not np.isfinite(image).all():
            wrong = np.argwhere(~np.isfinite(image))
            raise ValueError(
                f"{name!r} must have finite pixels, got {len(wrong)} that are not, the first of "
                f"them at row {wrong[0][0]}, column {wrong[0][1]}"
            )
    many = len(images) > 1
    return [
        Micrograph(f"{name}#{number}" if many else name, image)
        for number, image in enumerate(images)
    ]


def grey(name: str, array: NDArray[Any]) -> list[NDArray[np.float32]]:
    """The images of an array, float32 [height, width] each."""
    if array.ndim < 2 or not (np.isrealobj(array) and np.issubdtype(array.dtype, np.number)):
        raise ValueError(
            f"{name!r} must have images of real numbers, got an array {list(array.shape)} of "
            f"{array.dtype}"
        )
    if array.ndim >= 3 and array.shape[-1] in COLOURS:
        array = color.rgb2gray(array[..., :3])
    return list(array.reshape(-1, *array.shape[-2:]).astype(np.float32))
