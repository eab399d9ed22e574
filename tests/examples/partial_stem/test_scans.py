import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label

from examples.partial_stem.scans import (
    PATHS,
    arm_distance,
    jittered_spiral,
    mask,
    partial_scan,
    random_walk,
)

CURVES = [name for name in PATHS if name != "grid"]


def chance(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("coverage", [0.01, 1 / 20, 0.3, 0.5])
@pytest.mark.parametrize("path", CURVES)
def test_a_path_visits_as_many_pixels_as_the_coverage_says(path, coverage):
    assert mask(path, 96, coverage, chance()).sum() == round(coverage * 96 * 96)


@pytest.mark.parametrize("coverage", [1 / 100, 1 / 20, 1 / 4])
def test_a_grid_visits_single_pixels_at_equal_distances(coverage):
    found = mask("grid", 100, coverage, chance())
    each = round(100 * coverage**0.5)
    assert found.sum() == each**2 == pytest.approx(coverage * 100**2, rel=0.05)
    rows, columns = np.unique(np.argwhere(found)[:, 0]), np.unique(np.argwhere(found)[:, 1])
    assert rows.tolist() == columns.tolist()
    assert np.ptp(np.diff(rows)) <= 1


@pytest.mark.parametrize("path", CURVES)
def test_a_path_skips_no_pixel(path):
    found = mask(path, 64, 1 / 20, chance())
    inner = found[8:-8, 8:-8]  # a spiral leaves the image at its sides, and comes back
    _, parts = label(inner if path != "random_walk" else found, np.ones((3, 3)))
    assert parts <= 3


def test_the_arms_of_a_spiral_are_equally_far_apart():
    found = mask("spiral", 128, 1 / 20, chance())
    pitch = arm_distance(128, 1 / 20)
    for line in (found[64], found[:, 64]):
        arms = np.flatnonzero(line[66:] & ~line[65:-1])
        assert np.diff(arms) == pytest.approx(pitch, abs=1.5)


def test_a_spiral_starts_at_the_centre_and_reaches_the_corners():
    found = mask("spiral", 128, 1 / 20, chance())
    assert found[62:66, 62:66].any()
    for corner in (found[:30, :30], found[:30, -30:], found[-30:, :30], found[-30:, -30:]):
        assert corner.any()


def test_only_random_paths_depend_on_chance():
    for path in PATHS:
        same = (mask(path, 64, 1 / 20, chance(1)) == mask(path, 64, 1 / 20, chance(1))).all()
        other = (mask(path, 64, 1 / 20, chance(1)) == mask(path, 64, 1 / 20, chance(2))).all()
        assert same
        assert other == (path in ("spiral", "grid"))


def test_a_jittered_spiral_stays_near_its_arms():
    pitch = arm_distance(128, 1 / 20)
    points = jittered_spiral(128, 1 / 20, chance()) - 64
    radius = np.hypot(*points.T)
    # The distance between the arms of this spiral without its jitter, from the mean squared radius.
    own = (radius**2).mean() * 2 * np.pi * 8 / len(radius)
    assert 0.85 * pitch < own < 1.05 * pitch
    smooth = np.sqrt(np.arange(len(radius)) / 8 * own / np.pi)
    assert np.std(radius - smooth) == pytest.approx(own / 4, rel=0.15)


def test_a_random_walk_is_reflected_at_the_edges():
    points = random_walk(32, 1 / 2, chance())
    assert points.min() >= 0
    assert points.max() <= 32
    assert np.abs(np.diff(points, axis=0)).max() < 0.2


def test_readings_are_blurred_and_0_where_the_probe_was_not():
    image = chance().standard_normal((64, 64)).astype(np.float32)
    visited = mask("spiral", 64, 1 / 20, chance())
    sharp, blurred = partial_scan(image, visited, 0), partial_scan(image, visited, 1.5)
    assert (sharp[visited] == image[visited]).all()
    assert blurred[visited] == pytest.approx(gaussian_filter(image, 1.5)[visited])
    assert blurred[visited].std() < 0.5 * sharp[visited].std()
    for scan in (sharp, blurred):
        assert (scan[~visited] == 0).all()
        assert scan.dtype == np.float32
