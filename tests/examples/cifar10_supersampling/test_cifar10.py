import os
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.io import write_jpeg, write_png

from examples.cifar10_supersampling import cifar10

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


def test_unreachable_download_names_both_other_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError) as caught:
        cifar10.download(tmp_path)
    message = str(caught.value)
    assert "could not be downloaded from http://127.0.0.1:9/" in message
    assert "data='photographs'" in message
    assert "--data photographs" in message
    assert "--data folder --root FOLDER" in message
    assert "root/train/<class>/*.jpg|png" in message


def test_folder_is_read_in_order_of_class_and_name(tmp_path):
    written = write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    images = cifar10.load_folder(tmp_path / "train")
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], written["train", "cat"])
    assert torch.equal(images[2], written["train", "ship"])


def test_folder_of_grey_images_is_read_as_colour(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    grey = torch.arange(1024, dtype=torch.int32).remainder(256).to(torch.uint8).view(1, 32, 32)
    write_png(grey, str(folder / "grey.png"))
    assert torch.equal(cifar10.load_folder(tmp_path)[0], grey.expand(3, 32, 32))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; root, .* must hold train/<"):
        cifar10.require_folder(tmp_path)
    write_folder(tmp_path)
    cifar10.require_folder(tmp_path)


def test_image_of_another_size_is_named(tmp_path):
    write_folder(tmp_path, side=40)
    with pytest.raises(ValueError, match=r"0001\.png is 40x40, must be 32x32 pixels"):
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
