import time
from statistics import median

import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.io import write_png

from examples.cifar10_supersampling.datamodule import CIFAR10Supersampling, load_images
from examples.cifar10_supersampling.module import Supersampling


def first_batches(datamodule, count=3):
    batches = iter(datamodule.train_dataloader())
    return [next(batches) for _ in range(count)]


def test_training_batches_are_determined_by_the_seed():
    first, same, other = (
        first_batches(CIFAR10Supersampling(outlier_fraction=0.2, seed=seed)) for seed in (1, 1, 2)
    )
    for a, b, c in zip(first, same, other, strict=True):
        assert a.input.shape == a.target.shape == (8, 3, 32, 32)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a.target, c.target)


def test_thousands_of_images():
    datamodule = CIFAR10Supersampling()
    assert len(datamodule.train_dataloader()) == 6000 // 8
    assert sum(len(batch.input) for batch in datamodule.test_dataloader()) == 1000


def test_test_batches_are_clean():
    batch = next(iter(CIFAR10Supersampling(outlier_fraction=1.0).test_dataloader()))
    assert not batch.outlier.any()


def test_resumed_training_sees_the_batches_it_would_have_seen():
    datamodule = CIFAR10Supersampling()
    first_batches(datamodule)
    state = datamodule.state_dict()
    expected = first_batches(datamodule)
    resumed = CIFAR10Supersampling(seed=7)
    resumed.load_state_dict(state)
    for ours, theirs in zip(first_batches(resumed), expected, strict=True):
        assert torch.equal(ours.target, theirs.target)


@pytest.mark.parametrize("done", [0, 1, 4, 6, 7])
def test_training_resumed_in_mid_epoch_sees_the_very_next_batch(done, few_images):
    # An epoch has 6 batches.
    def batches_of(loader):
        while True:
            yield from loader

    datamodule = CIFAR10Supersampling(batch_size=16, outlier_fraction=0.2)
    loader = datamodule.train_dataloader()
    batches = batches_of(loader)
    for _ in range(done):
        next(batches)
    states = datamodule.state_dict(), loader.state_dict()
    expected = [next(batches) for _ in range(13)]

    resumed = CIFAR10Supersampling(batch_size=16, outlier_fraction=0.2, seed=7)
    loader = resumed.train_dataloader()
    resumed.load_state_dict(states[0])
    loader.load_state_dict(states[1])
    for ours, theirs in zip(batches_of(loader), expected, strict=False):
        assert torch.equal(ours.target, theirs.target)


def test_folder(tmp_path):
    for split, value in (("train", 10), ("test", 20)):
        folder = tmp_path / split / "cat"
        folder.mkdir(parents=True)
        for number in range(3):
            image = torch.full((3, 32, 32), value + number, dtype=torch.uint8)
            write_png(image, str(folder / f"{number}.png"))
    datamodule = CIFAR10Supersampling(data="folder", root=tmp_path, batch_size=2)
    datamodule.prepare_data()
    assert len(datamodule.train_dataloader()) == 1
    values = load_images("folder", tmp_path, False)[:, 0, 0, 0]
    assert values.tolist() == [20, 21, 22]


def test_missing_folder_is_told_before_training(tmp_path):
    datamodule = CIFAR10Supersampling(data="folder", root=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        datamodule.prepare_data()


def test_unreachable_download_is_told_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError, match="There are two other ways"):
        CIFAR10Supersampling(data="download", root=tmp_path).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "cifar"}, r"data must be one of \['photographs', 'download', 'folder'\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"outlier_fraction": 1.5}, "outlier_fraction must be a number from 0 to 1, got 1.5"),
        ({"hot_pixel_fraction": -1}, "hot_pixel_fraction must be a number from 0 to 1, got -1"),
        ({"hot_pixel_fraction": float("nan")}, "hot_pixel_fraction .* got nan"),
        ({"outlier_kind": "rain"}, r"outlier_kind must be one of .*, got 'rain'"),
        ({"noise_stddev": -1.0}, "noise_stddev must not be negative, got -1.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_wrong_arguments_raise_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10Supersampling(**arguments)


def test_input_pipeline_takes_little_of_a_step(monkeypatch):
    batches = iter(CIFAR10Supersampling(outlier_fraction=0.05).train_dataloader())
    module = Supersampling(width=0.25)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    loading, training = [], []
    for _ in range(12):
        start = time.process_time()
        batch = next(batches)
        loaded = time.process_time()
        module.training_step(batch, 0)["loss"].backward()
        loading.append(loaded - start)
        training.append(time.process_time() - loaded)
    # About 2 %; the bound leaves room for a busy machine.
    assert median(loading) < 0.1 * median(training)
