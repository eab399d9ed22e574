import numpy as np
import pytest
import torch

from examples.partial_stem.datamodule import PartialScans, normalised


@pytest.fixture
def folder(tmp_path):
    """Three micrographs; each pixel of the last is brighter than all pixels of the others."""
    random = np.random.default_rng(0)
    for number, shape in enumerate([(80, 100), (64, 64), (70, 130)]):
        image = random.random(shape) + 10 * (number == 2)
        np.save(tmp_path / f"truth-{number}.npy", image.astype(np.float32))
    np.save(tmp_path / "mask.npy", np.zeros((64, 64), np.float32))
    return tmp_path


def scans(folder, **changes):
    arguments = {"data": "folder", "root": folder, "pattern": "truth-*", "crop": 32, "crops": 40}
    return PartialScans(**(arguments | changes))


def test_a_training_batch_has_scans_masks_crops_and_ids(folder):
    batch = next(iter(scans(folder, batch_size=4).train_dataloader()))
    for images in (batch.scan, batch.mask, batch.truth):
        assert images.shape == (4, 1, 32, 32)
        assert images.dtype == torch.float32
    assert batch.truth.amin(dim=(1, 2, 3)).tolist() == [-1] * 4
    assert batch.truth.amax(dim=(1, 2, 3)).tolist() == [1] * 4
    assert batch.mask.mean().item() == pytest.approx(1 / 20, abs=0.001)
    assert (batch.scan[batch.mask == 0] == 0).all()
    assert (batch.scan[batch.mask == 1] != 0).all()
    assert all(name.startswith(("truth-0.npy@", "truth-1.npy@")) for name in batch.id)


def test_training_crops_are_at_random_places_flipped_and_rotated(folder):
    crops = scans(folder).train_dataloader().dataset
    origin = {name: np.load(folder / f"{name}.npy") for name in ("truth-0", "truth-1")}
    ways = set()
    for index in range(40):
        crop = crops[index]
        name, place = crop.id.split(".npy@")
        row, column = map(int, place.split(","))
        whole = normalised(origin[name][row : row + 32, column : column + 32])
        turned = [np.rot90(whole, turns) for turns in range(4)]
        all_ways = [*turned, *(each[:, ::-1] for each in turned)]
        (way,) = (
            number for number, each in enumerate(all_ways) if (each == crop.truth[0].numpy()).all()
        )
        ways.add(way)
    assert len(ways) == 8
    assert len({crops[index].id for index in range(40)}) > 30


def test_the_test_has_all_unchanged_crops_of_the_last_file(folder):
    data = scans(folder)
    (batch,) = data.test_dataloader()
    places = [(row, column) for row in (0, 32) for column in (0, 32, 64, 96)]
    assert list(batch.id) == [f"truth-2.npy@{row},{column}" for row, column in places]
    whole = np.load(folder / "truth-2.npy")
    for crop, row, column in ((0, 0, 0), (7, 32, 96)):
        expected = normalised(whole[row : row + 32, column : column + 32])
        assert (batch.truth[crop, 0].numpy() == expected).all()


def test_the_seed_decides_the_training_crops_but_not_the_test_crops(folder):
    def both(seed):
        data = scans(folder, seed=seed, path="random_walk")
        return data.train_dataloader().dataset[3].scan, data.test_dataloader().dataset[3].scan

    (one, tested), (same, again), (other, also) = both(0), both(0), both(1)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(tested, again)
    assert torch.equal(tested, also)


@pytest.mark.parametrize("path", ["spiral", "jittered_spiral", "random_walk", "grid"])
def test_each_path_gives_scans(folder, path):
    crop = scans(folder, path=path, coverage=0.1, crop=64).train_dataloader().dataset[0]
    assert crop.mask.mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_flat_crop_becomes_0():
    assert (normalised(np.full((4, 4), 7, np.float32)) == 0).all()


def test_the_default_needs_no_files():
    batch = next(iter(PartialScans().train_dataloader()))
    assert batch.scan.shape == (1, 1, 96, 96)


def test_bad_files_raise_before_training(folder):
    np.save(folder / "truth-1.npy", np.zeros((31, 80), np.float32))
    with pytest.raises(ValueError, match=r"truth-1.npy' must be at least 32 x 32 pixels"):
        scans(folder).setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "web"}, r"data must be one of \['shipped', 'folder'\], got 'web'"),
        ({"path": "line"}, "path must be one of .*, got 'line'"),
        ({"crop": 48}, "crop must be a multiple of 32, got 48"),
        ({"crop": 0}, "crop must be a multiple of 32, got 0"),
        ({"coverage": 0}, "coverage must be above 0 and at most 0.5, got 0"),
        ({"coverage": 0.6}, "coverage must be above 0 and at most 0.5, got 0.6"),
        ({"probe": -1}, "probe must be from 0 to below crop, got -1"),
        ({"test_files": 0}, "test_files must be at least 1, got 0"),
        ({"batch_size": 8, "crops": 7}, "crops must be at least 8, got 7"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_the_error_names_the_wrong_argument(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        scans(folder, **changes)


def test_more_test_files_than_there_are_raise(folder):
    with pytest.raises(
        ValueError, match="test_files must be less than the 3 files there are, got 3"
    ):
        scans(folder, test_files=3).setup("fit")
