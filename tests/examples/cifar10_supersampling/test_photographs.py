import socket

import pytest
import torch

from examples.cifar10_supersampling import photographs


def test_every_photograph_is_in_the_wheel(monkeypatch):
    def refuse(*args):
        raise AssertionError("a photograph was to be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in photographs.TRAIN_PHOTOGRAPHS + photographs.TEST_PHOTOGRAPHS:
        for view in photographs.load_photograph(name):
            assert view.dtype == torch.uint8
            assert view.shape[0] == 3
            assert min(view.shape[1:]) >= 300


def test_stereo_pair_is_two_views_without_its_disparity():
    left, right = photographs.load_photograph("stereo_motorcycle")
    assert left.shape == right.shape == (3, 500, 741)


def test_train_and_test_share_no_photograph():
    assert not set(photographs.TRAIN_PHOTOGRAPHS) & set(photographs.TEST_PHOTOGRAPHS)


def test_windows_are_unchanged_parts_of_the_photograph():
    generator = torch.Generator().manual_seed(0)
    (coffee,) = photographs.load_photograph("coffee")
    small = coffee[:, 100:140, 100:150]
    found = photographs.cut_windows(small, 40, 3, generator)
    places = small.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    for window in found:
        assert (places == window).flatten(1).all(dim=1).any()


def test_flat_windows_are_left_out():
    generator = torch.Generator().manual_seed(0)
    (rocket,) = photographs.load_photograph("rocket")
    windows = photographs.cut_windows(rocket, 256, 200, generator)
    assert len(windows) == 200
    assert (windows.float().std(dim=(1, 2, 3)) > photographs.MINIMUM_STDDEV).all()


def test_images_are_determined_by_the_seed():
    first = photographs.cut_images(["chelsea"], 50, seed=1)
    assert first.shape == (50, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first, photographs.cut_images(["chelsea"], 50, seed=1))
    assert not torch.equal(first, photographs.cut_images(["chelsea"], 50, seed=2))


@pytest.mark.parametrize("count", [1, 7, 100])
def test_any_number_of_images_can_be_cut(count):
    assert len(photographs.cut_images(["chelsea", "coffee"], count, seed=0)) == count
