import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.io import write_png

from examples.cifar10_supersampling.datamodule import (
    CIFAR10Supersampling,
    TrainingBatches,
    load_images,
)
from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.transformation import OUTLIER_KINDS, Batch, training_batch


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


def test_there_are_thousands_of_images():
    datamodule = CIFAR10Supersampling()
    assert len(datamodule.train_dataloader()) == 6000 // 8
    assert sum(len(batch.input) for batch in datamodule.test_dataloader()) == 1000


def test_test_batches_are_clean():
    batch = next(iter(CIFAR10Supersampling(outlier_fraction=1.0).test_dataloader()))
    assert not batch.outlier.any()


@pytest.mark.parametrize("batches", [0, 1, 8, 11, 12, 13, 25])
def test_a_resumed_training_continues_with_the_next_batch(batches):
    # An epoch has 12 batches, and 8 are made at a time.
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8)
    undisturbed, disturbed = (TrainingBatches(images, training_batch, 8, seed=1) for _ in range(2))
    expected = list(islice(epochs(undisturbed), batches, batches + 20))
    list(islice(epochs(disturbed), batches))
    resumed = TrainingBatches(images, training_batch, 8, seed=1)
    resumed.load_state_dict(disturbed.state_dict())
    for ours, theirs in zip(islice(epochs(resumed), 20), expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def epochs(batches):
    while True:
        yield from batches


def numbers(batch, chance):
    """A transformation that returns each image's constant value."""
    return Batch(*[batch[:, 0, 0, 0]] * 3)


def test_each_epoch_has_every_image_once_in_another_order():
    images = torch.arange(70, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    batches = TrainingBatches(images, numbers, 2, seed=0)
    first, second = (torch.cat([batch.input for batch in batches]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second


def test_an_incomplete_batch_is_left_out():
    images = torch.zeros(70, 3, 32, 32, dtype=torch.uint8)
    batches = TrainingBatches(images, numbers, 16, seed=0)
    assert [len(batch.input) for batch in batches] == [16] * len(batches) == [16] * 4


def test_ranks_divide_the_images():
    images = torch.arange(70, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    ranks = [TrainingBatches(images, numbers, 4, seed=0, rank=rank, ranks=2) for rank in (0, 1)]
    seen = [number for rank in ranks for batch in rank for number in batch.input.tolist()]
    assert len(seen) == len(set(seen)) == 2 * 8 * 4


def test_ranks_of_a_trainer_have_batches_of_their_own():
    datamodule = CIFAR10Supersampling()
    datamodule.trainer = SimpleNamespace(global_rank=1, world_size=2)
    loader = datamodule.train_dataloader()
    assert (loader.rank, loader.ranks) == (1, 2)


def test_ranks_transform_differently():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(70, -1, -1, -1)
    ranks = [
        TrainingBatches(images, training_batch, 4, seed=0, rank=rank, ranks=2) for rank in (0, 1)
    ]
    assert not torch.equal(*(next(iter(rank)).target for rank in ranks))


@pytest.mark.parametrize("batch_size", [4, 16, 64])
def test_the_size_of_a_batch_does_not_change_the_images(batch_size):
    one, other = (
        torch.cat([batch.target for batch in first_batches(datamodule, 128 // size)])
        for size in (1, batch_size)
        for datamodule in [CIFAR10Supersampling(batch_size=size, outlier_fraction=0.1)]
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", OUTLIER_KINDS)
def test_outliers_do_not_change_the_other_images(kind):
    damaged = CIFAR10Supersampling(outlier_fraction=0.02, outlier_kind=kind)
    outliers = 0
    for ours, clean in zip(
        first_batches(damaged, 40), first_batches(CIFAR10Supersampling(), 40), strict=True
    ):
        assert not clean.outlier.any()
        assert torch.equal(ours.target[~ours.outlier], clean.target[~ours.outlier])
        outliers += int(ours.outlier.sum())
    assert outliers >= 3


def outliers(**arguments):
    """The targets of a batch of outliers only."""
    datamodule = CIFAR10Supersampling(outlier_fraction=1.0, batch_size=64, **arguments)
    return first_batches(datamodule, 1)[0].target


def test_arguments_decide_the_outliers():
    hot = outliers(hot_pixel_fraction=0.5, hot_pixel_value=3.0)
    assert (hot == 3.0).all(dim=1).float().mean() == pytest.approx(0.5, abs=0.02)
    for stddev in (0.0, 10.0):
        noisy = outliers(outlier_kind="noise", noise_stddev=stddev)
        assert noisy.std() == pytest.approx((1 + stddev**2) ** 0.5, rel=0.05)


def test_a_wrong_target_is_one_of_all_images():
    target = outliers(outlier_kind="wrong_target")
    assert (
        len(target.flatten(1).unique(dim=0)) > 55
    )  # targets from the batch alone would give about 40


def test_a_batch_of_more_images_than_there_are_raises():
    images = torch.zeros(70, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"batch_size must be at most 35, .* got 36"):
        TrainingBatches(images, training_batch, 36, seed=0, ranks=2)


def test_batches_move_as_a_whole():
    batch = first_batches(CIFAR10Supersampling(), 1)[0]
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert all(each.is_meta for each in moved)


def test_the_datamodule_reads_a_folder(tmp_path):
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


def test_the_first_validation_images_have_all_classes(folder_of_images):
    data = CIFAR10Supersampling(data="folder", root=folder_of_images)
    (tested,) = data.test_dataloader()
    for _ in range(2):
        (validated,) = data.val_dataloader()
        where = [
            [torch.equal(target, each) for each in tested.target].index(True)
            for target in validated.target
        ]
        assert sorted(where) == list(range(12))
        assert (
            0 < sum(place < 6 for place in where[:6]) < 6
        )  # the folder's images are sorted by class


def test_a_missing_folder_raises_before_training(tmp_path):
    datamodule = CIFAR10Supersampling(data="folder", root=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        datamodule.prepare_data()


def test_an_unreachable_download_raises_before_training(monkeypatch, tmp_path):
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


def test_input_pipeline_takes_little_of_a_step():
    batches = iter(CIFAR10Supersampling(outlier_fraction=0.05).train_dataloader())
    module = Supersampling(width=0.25)
    loading, training = 0.0, 0.0
    for _ in range(16):  # 128 images in 16 batches; 64 images are made at a time
        start = time.process_time()
        batch = next(batches)
        loaded = time.process_time()
        module.training_step(batch, 0)["loss"].backward()
        loading += loaded - start
        training += time.process_time() - loaded
    # About 1 %; the bound leaves room for a busy machine.
    assert loading < 0.05 * training
