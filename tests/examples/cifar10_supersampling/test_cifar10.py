import hashlib
import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.io import write_jpeg, write_png

from examples.cifar10_supersampling import cifar10
from examples.cifar10_supersampling.cifar10 import SIDE

REAL_FOLDER = "CIFAR10_FOLDER"


def write_folder(root, side=32):
    """Two classes of two images each, for training and for testing; returns the PNGs."""
    images = {}
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in ("cat", "ship"):
            folder = root / split / name
            folder.mkdir(parents=True)
            image = torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)
            write_png(image, str(folder / "0001.png"))
            write_jpeg(image, str(folder / "0002.jpg"), quality=95)
            images[split, name] = image
    return images


def test_the_error_of_an_unreachable_download_names_both_other_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError) as caught:
        cifar10.download(tmp_path)
    message = str(caught.value)
    assert "could not be downloaded from http://127.0.0.1:9/" in message
    assert "data='photographs'" in message
    assert "--data photographs" in message
    assert "--data folder --root FOLDER" in message
    assert "root/train/<class>/*.jpg|png" in message


def write_archive(monkeypatch, root, files):
    """A gzipped tar of these files in place of CIFAR-10's download."""
    root.mkdir()
    path = root / CIFAR10.filename
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())


def batch(images):
    """A file of the download: pickled arrays, as torchvision reads it."""
    labels = [0] * len(images)
    return pickle.dumps({"data": images.flatten(1).numpy(), "labels": labels}, protocol=2)


def test_a_download_is_checked_extracted_and_read(monkeypatch, tmp_path):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    files = {"data_batch_1": batch(images), "test_batch": batch(images[:2])}
    files["batches.meta"] = pickle.dumps({"label_names": ["cat"]}, protocol=2)
    checksums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    names = {f"{CIFAR10.base_folder}/{name}": content for name, content in files.items()}
    write_archive(monkeypatch, tmp_path / "data", names)
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", checksums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksums["batches.meta"]})
    for _ in range(2):  # the second time, the dataset is there already
        cifar10.download(tmp_path / "data")
        (tmp_path / "data" / CIFAR10.filename).unlink(missing_ok=True)
    assert torch.equal(cifar10.load_download(tmp_path / "data", train=True), images)
    assert torch.equal(cifar10.load_download(tmp_path / "data", train=False), images[:2])


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_an_archive_is_kept_inside_its_folder(monkeypatch, tmp_path, name):
    write_archive(monkeypatch, tmp_path / "data", {name.replace("/tmp", str(tmp_path)): b"hostile"})
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        cifar10.download(tmp_path / "data")
    assert not (tmp_path / "outside").exists()


def test_files_of_another_checksum_are_not_unpickled(monkeypatch, tmp_path):
    harm = pickle.dumps(Harm(tmp_path / "harmed"))
    files = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + ["batches.meta"]
    names = {f"{CIFAR10.base_folder}/{name}": harm for name in files}
    write_archive(monkeypatch, tmp_path / "data", names)
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        cifar10.download(tmp_path / "data")
    assert (tmp_path / "data" / CIFAR10.base_folder / "data_batch_1").exists()
    assert not (tmp_path / "harmed").exists()


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_folder_is_read_in_order_of_class_and_name(tmp_path):
    written = write_folder(tmp_path)
    images = cifar10.load_folder(tmp_path / "train")
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], written["train", "cat"])
    assert torch.equal(images[2], written["train", "ship"])


COLOURS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def in_mode(mode):
    """A picture in one of Pillow's modes: 1 and L are grey, P has a palette, A is alpha."""
    picture = Image.fromarray(COLOURS)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(COLOURS[..., 0]))
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "L", "LA", "P"])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
def test_every_kind_of_image_becomes_colour(mode, suffix, tmp_path):
    (tmp_path / "class").mkdir()
    picture = in_mode(mode)
    path = tmp_path / "class" / f"picture{suffix}"
    picture.save(path, lossless=True, exact=True)  # PNG ignores both options
    (read,) = cifar10.load_folder(tmp_path)
    np.testing.assert_array_equal(read.permute(1, 2, 0), picture.convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_every_kind_of_jpeg_becomes_colour(mode, tmp_path):
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / "picture.jpeg"
    in_mode(mode).save(path)
    (read,) = cifar10.load_folder(tmp_path)
    expected = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    np.testing.assert_allclose(read.permute(1, 2, 0), expected, atol=2)


def test_a_palette_with_transparency_becomes_colour(tmp_path):
    (tmp_path / "class").mkdir()
    picture = in_mode("P")
    picture.save(tmp_path / "class" / "picture.png", transparency=3)
    (read,) = cifar10.load_folder(tmp_path)
    np.testing.assert_array_equal(read.permute(1, 2, 0), picture.convert("RGB"))


def write_png_of_16_bits(path, values):
    """Write a PNG that Pillow cannot write: uint16 [32, 32, channels].

    The second of two channels, or the fourth of four, is alpha.
    """

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, kind, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_to_8(channels, tmp_path):
    (tmp_path / "class").mkdir()
    values = np.linspace(0, 65535, SIDE * SIDE * channels).astype(np.uint16)
    values = values.reshape(SIDE, SIDE, channels)
    write_png_of_16_bits(tmp_path / "class" / "deep.png", values)
    (read,) = cifar10.load_folder(tmp_path)
    assert read.dtype == torch.uint8
    colours = values[..., : 3 if channels > 2 else 1] / 257
    expected = np.broadcast_to(colours, (SIDE, SIDE, 3))
    np.testing.assert_allclose(read.permute(1, 2, 0), expected, atol=1)


def test_files_that_are_no_images_of_a_class_are_ignored(tmp_path):
    written = write_folder(tmp_path)
    folder = tmp_path / "train"
    expected = cifar10.load_folder(folder)
    for name in (
        "notes.txt",
        ".DS_Store",
        "cat/Thumbs.db",
        "cat/._0001.png",
        "cat/.ipynb_checkpoints/0001.png",
        "cat/moving.gif",
        "cat/scan.tif",
        "cat/picture.bmp",
        ".ipynb_checkpoints/0001.png",
        "empty/notes.txt",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no image of a class")
    (folder / "cat" / "folder.png").mkdir()
    found = cifar10.load_folder(folder)
    assert torch.equal(found, expected)
    assert torch.equal(found[2], written["train", "ship"])
    names = [str(path.relative_to(folder)) for path in cifar10.image_files(folder)]
    assert names == ["cat/0001.png", "cat/0002.jpg", "ship/0001.png", "ship/0002.jpg"]


def test_a_folder_inside_a_hidden_folder_is_read(tmp_path):
    write_folder(tmp_path / ".cache")
    assert len(cifar10.load_folder(tmp_path / ".cache" / "train")) == 4


def test_the_error_names_a_folder_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "scan.tif").write_text("passed over")
    message = rf"{tmp_path} must hold images .* \*\.jpg, \*\.jpeg, \*\.png, \*\.webp; it holds none"
    with pytest.raises(FileNotFoundError, match=message):
        cifar10.load_folder(tmp_path)


@pytest.mark.parametrize("name", ["0001.png", "0002.jpg"])
@pytest.mark.parametrize("damage", ["empty", "cut off", "no image"])
def test_the_error_names_an_image_that_cannot_be_read(name, damage, tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "test" / "ship" / name
    content = path.read_bytes()
    damaged = {"empty": b"", "cut off": content[: len(content) // 2], "no image": b"<html>"}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=rf"data='folder': {path} cannot be read as an image \(.+"):
        cifar10.load_folder(tmp_path / "test")


def test_the_error_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; root, .* must hold train/<"):
        cifar10.require_folder(tmp_path)
    write_folder(tmp_path)
    cifar10.require_folder(tmp_path)


def test_the_error_names_an_image_of_another_size(tmp_path):
    write_folder(tmp_path, side=40)
    with pytest.raises(ValueError, match=r"0001\.png is 40x40, must be one image of 32x32 pixels"):
        cifar10.load_folder(tmp_path / "test")


@pytest.mark.skipif(
    REAL_FOLDER not in os.environ,
    reason=f"the environment variable {REAL_FOLDER} names no folder of CIFAR-10's images",
)
def test_real_cifar10():
    root = Path(os.environ[REAL_FOLDER])
    cifar10.require_folder(root)
    images = cifar10.load_folder(root / "test")
    assert images.shape == (10_000, 3, 32, 32)
    means = images.float().mean(dim=(0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.494, 0.485, 0.450], abs=0.005)
