import hashlib
import io
import os
import pickle
import tarfile
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


def write_archive(monkeypatch, root, files):
    """A gzipped tar of these files, which passes for CIFAR-10's download."""
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
    for _ in range(2):  # the second time it is there
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
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


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
