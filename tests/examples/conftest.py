import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from examples.cifar10_supersampling import datamodule
from examples.cifar10_supersampling.training import Run
from examples.comparison import backends
from tests.scripts.launching import FORKING


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small networks train faster, and repeatably, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def forked_workers():
    """Fork worker processes, because forked ones start at once.

    A command that a test runs in a subprocess still spawns its workers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "CONTEXT", FORKING)
        yield


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    """Remove pytest's own arguments, because LightningCLI would warn of them."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.fixture
def make_run():
    """Makes the settings of a short training, by default of the outliers experiment."""

    def make(**changes):
        arguments = {
            "experiment": "outliers",
            "method": "none",
            "loss": "quartic",
            "batch_size": 8,
            "optimizer": "adam",
            "learning_rate": 0.1 / 128,
            "outlier_kind": "hot_pixels",
            "outlier_fraction": 0.05,
            "seed": 0,
            "width": 0.05,
            "steps": 20,
            "last_steps": 8,
            "precision": "32-true",
            "average": False,
            "data": "photographs",
            "root": Path("data"),
            "accelerator": "cpu",
        }
        return Run(**(arguments | changes))

    return make


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """A folder of 48 training and 12 test images, cut from photographs.

    Each split has two classes.
    """
    root = tmp_path_factory.mktemp("images")
    for split, names, count in (("train", ["astronaut"], 48), ("test", ["coffee"], 12)):
        images = datamodule.cut_images(names, count, seed=0)
        for number, image in enumerate(images):
            folder = root / split / ("cat" if number % 2 else "ship")
            folder.mkdir(parents=True, exist_ok=True)
            write_png(image.to(torch.uint8), str(folder / f"{number:04}.png"), compression_level=1)
    return root
