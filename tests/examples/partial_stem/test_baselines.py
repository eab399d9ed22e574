import numpy as np
import pytest

from examples.partial_stem.baselines import biharmonic, error, nearest, table
from examples.partial_stem.datamodule import PartialScans
from examples.partial_stem.scans import mask, partial_scan


def scan_of(image, path="grid"):
    visited = mask(path, len(image), 1 / 16, np.random.default_rng(0))
    return partial_scan(image, visited, 0), visited.astype(np.float32)


def test_each_pixel_gets_the_value_of_its_nearest_neighbour():
    image = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    scan, visited = scan_of(image)
    found = nearest(scan, visited)
    assert found[visited > 0].tolist() == image[visited > 0].tolist()
    assert set(found.ravel()) == set(image[visited > 0])
    assert found[1, 1] == image[2, 2]  # the grid is at 2, 6, 10 and 14
    assert found[15, 0] == image[14, 2]


def test_the_biharmonic_completion_of_a_plane_is_the_plane():
    rows, columns = np.indices((32, 32))
    plane = (rows + 2 * columns).astype(np.float32) / 96
    scan, visited = scan_of(plane)
    found = biharmonic(scan, visited)
    assert np.abs(found - plane)[4:-4, 4:-4].max() < 0.05
    assert np.abs(nearest(scan, visited) - plane).max() > 0.05


def test_errors_are_in_percent_of_the_range(folder_of_micrographs):
    data = PartialScans("folder", folder_of_micrographs, crop=32)
    perfect_but_for = 0.02

    def complete(scan, visited):
        return truths.pop(0) + perfect_but_for

    from examples.partial_stem.module import target

    (batch,) = data.test_dataloader()
    truths = list(target(batch.truth)[:, 0].numpy())
    assert error(complete, data) == pytest.approx(50 * perfect_but_for, rel=1e-3)
    rows = {row[0].text: float(row[1].text) for row in table(data).rows}
    assert 0 < rows["biharmonic"] < rows["nearest neighbour"] < 50
