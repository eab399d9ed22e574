import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage import io

from examples.partial_stem import micrographs
from examples.partial_stem.micrographs import SHIPPED, in_folder, shipped

needs_rosettasciio = pytest.mark.skipif(
    find_spec("rsciio") is None, reason="rosettasciio is not installed"
)
needs_mrcfile = pytest.mark.skipif(find_spec("mrcfile") is None, reason="mrcfile is not installed")
REAL = Path(os.environ.get("STEM_MICROGRAPHS", ""))


@pytest.fixture(autouse=True)
def nothing_is_kept():
    in_folder.cache_clear()
    shipped.cache_clear()


def image(dtype=np.float32, shape=(40, 48)):
    values = np.arange(np.prod(shape)).reshape(shape) % 251
    return values.astype(dtype)


def read(folder, pattern="*", smallest=32):
    return in_folder(folder, pattern, smallest)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8"])
def test_tiffs_of_either_byte_order_are_read(tmp_path, dtype, order):
    tifffile.imwrite(tmp_path / "a.tif", image(dtype), byteorder=order)
    (((name, found),),) = read(tmp_path)
    assert name.endswith("a.tif")
    assert found.dtype == np.float32
    assert (found == image()).all()


@pytest.mark.parametrize("kind", ["pages", "imagej", "bigtiff"])
def test_tiffs_of_several_pages_are_read(tmp_path, kind):
    stack = np.stack([image(np.uint16), image(np.uint16) + 1, image(np.uint16) + 2])
    if kind == "pages":
        with tifffile.TiffWriter(tmp_path / "a.TIFF") as file:
            for page in stack:
                file.write(page)
    else:
        tifffile.imwrite(tmp_path / "a.TIFF", stack, **{kind: True})
    ((first, second, third),) = read(tmp_path)
    assert [each.name[-6:] for each in (first, second, third)] == ["TIFF#0", "TIFF#1", "TIFF#2"]
    assert (third.image == stack[2]).all()
    assert (first.image == stack[0]).all()


def test_arrays_and_pictures_are_read(tmp_path):
    np.save(tmp_path / "a.npy", image(np.float64))
    np.save(tmp_path / "b.npy", np.stack([image(np.uint8)] * 5))
    io.imsave(tmp_path / "c.png", image(np.uint8), check_contrast=False)
    io.imsave(tmp_path / "d.png", image(np.uint16), check_contrast=False)
    colour = np.stack([image(np.uint8)] * 3, axis=-1)
    io.imsave(tmp_path / "e.png", colour, check_contrast=False)
    files = read(tmp_path)
    assert [len(each) for each in files] == [1, 5, 1, 1, 1]
    for file in files[:4]:
        assert (file[0].image == image()).all()
    assert np.corrcoef(files[4][0].image.ravel(), image().ravel())[0, 1] == pytest.approx(1)
    assert files[4][0].image.shape == (40, 48)


def test_all_images_of_a_stack_with_one_page_are_read(tmp_path):
    stack = np.stack([image(np.uint16) + each for each in range(5)])
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, truncate=True)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1
    (found,) = read(tmp_path)
    assert [each.image[0, 0] for each in found] == [0, 1, 2, 3, 4]


def test_the_preview_in_a_tiff_is_no_micrograph(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(image())
        file.write(image()[::2, ::2], subfiletype=1)
    ((found,),) = read(tmp_path)
    assert found.image.shape == (40, 48)


@pytest.mark.parametrize(("dtype", "white"), [("u1", 255), ("u2", 65535)])
def test_white_is_high_where_the_tiff_has_white_as_0(tmp_path, dtype, white):
    tifffile.imwrite(tmp_path / "a.tif", image(dtype), photometric="miniswhite")
    ((found,),) = read(tmp_path)
    assert (found.image == white - image()).all()


@needs_mrcfile
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")]
)
def test_each_type_of_numbers_in_an_mrc_file_is_read(tmp_path, mode, dtype, order):
    values = image() - (0 if dtype == "u2" else 125)
    header = np.zeros(256, f"{order}i4")
    header[:4] = 48, 40, 1, mode  # columns, rows, images
    header[7:10] = 48, 40, 1
    header[10:13] = np.array([48, 40, 1], f"{order}f4").view(f"{order}i4")
    header[16:19] = 1, 2, 3  # which axes are columns, rows and images
    header[27] = 20140  # version
    parts = header[:52].tobytes(), b"MAP ", b"DD\0\0" if order == "<" else b"\x11\x11\0\0"
    rest = header[54:].tobytes() + values.astype(f"{order}{dtype}").tobytes()
    (tmp_path / "a.mrc").write_bytes(b"".join(parts) + rest)
    ((found,),) = read(tmp_path)
    assert (found.image == values).all()


@needs_rosettasciio
def test_emd_is_read(tmp_path):
    from rsciio import emd

    axes = [
        {"name": name, "size": size, "scale": 1.0, "offset": 0.0, "units": "nm", "navigate": False}
        for name, size in (("y", 40), ("x", 48))
    ]
    emd.file_writer(
        str(tmp_path / "b.emd"),
        {
            "data": image(),
            "axes": axes,
            "metadata": {"General": {"title": "one"}, "Signal": {}},
            "original_metadata": {},
        },
    )
    (((_, found),),) = read(tmp_path)
    assert np.sort(found.ravel()).tolist() == np.sort(image().ravel()).tolist()
    assert found.shape == (40, 48)


@pytest.mark.skipif(find_spec("rsciio") is not None, reason="rosettasciio is installed")
def test_without_rosettasciio_the_error_says_what_to_install(tmp_path):
    (tmp_path / "a.dm4").write_bytes(b"0")
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install -e '.[micrographs]'")):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_the_error_names_a_folder_without_micrographs(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=rf"root must be a folder with micrographs.*{folder}"):
        read(tmp_path / folder)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.npy"])
def test_the_error_names_a_file_that_is_no_image(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an image at all")
    with pytest.raises(ValueError, match=rf"{name}' cannot be read as a micrograph"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a.mrc", marks=needs_mrcfile),
        *(pytest.param(f"a.{kind}", marks=needs_rosettasciio) for kind in ("dm3", "dm4", "emd")),
    ],
)
def test_the_error_names_a_microscopes_file_that_is_no_image(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an image at all" * 100)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read as a micrograph"):
        read(tmp_path)


def test_the_error_names_a_truncated_file(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", image())
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match=r"a.tif' cannot be read as a micrograph"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (image(shape=(40, 31)), "must be at least 32 x 32 pixels, the size of a crop, got 40 x 31"),
        (
            np.where(image() == 7, np.nan, image()),
            "must have finite pixels, got 8 .* row 0, column 7",
        ),
        (image(np.complex64), "must have images of real numbers, got .* complex64"),
        (image(shape=(48,)), r"must have images of real numbers, got an array \[48\]"),
        (np.zeros((0, 40, 40)), "has no image"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_file(tmp_path, values, message):
    np.save(tmp_path / "good.npy", image())
    np.save(tmp_path / "wrong.npy", values)
    with pytest.raises(ValueError, match=f"wrong.npy' {message}"):
        read(tmp_path)


def test_only_files_that_match_the_pattern_are_read(tmp_path):
    for name in ("truth-2", "truth-1", "mask-1"):
        np.save(tmp_path / f"{name}.npy", image())
    names = [Path(file[0].name).name for file in read(tmp_path, "truth-*")]
    assert names == ["truth-1.npy", "truth-2.npy"]


def test_the_images_of_scikit_image_need_no_download(monkeypatch):
    def no_download(*arguments, **more):
        raise AssertionError("a download")

    monkeypatch.setattr("urllib.request.urlopen", no_download)
    monkeypatch.setattr("socket.socket.connect", no_download)
    files = shipped(512)
    assert len(files) == len(SHIPPED)
    for ((_, found),) in files:
        assert found.dtype == np.float32
        assert found.std() > 0


@pytest.mark.skipif(not REAL.name, reason="STEM_MICROGRAPHS is not set")
def test_real_micrographs_are_read():
    files = in_folder(REAL, "truth-*", 512)
    assert len(files) == 5
    for ((_, found),) in files:
        assert found.shape == (512, 512)
        assert 0 <= found.min() < found.max() <= 1


def test_each_tested_format_is_among_the_suffixes():
    assert {".tif", ".tiff", ".png", ".npy", ".mrc", ".dm3", ".dm4", ".emd"} == set(
        micrographs.SUFFIXES
    )
