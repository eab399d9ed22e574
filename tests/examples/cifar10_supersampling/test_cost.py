import pytest

from examples.cifar10_supersampling.cost import cost, operations_per_image, seconds_per_step


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_operations_are_those_of_the_papers_layers(width):
    narrow, wide = int(64 * width), int(128 * width)
    first = 25 * 3 * narrow
    layers = [first, 9 * narrow * wide, *[9 * wide * wide] * 6, 9 * wide * narrow, 25 * narrow * 3]
    pixels = 32 * 32
    # Each layer has a forward pass, a gradient of its weights and a gradient of its input. Only the
    # first layer has no gradient of its input, because its input is the image.
    assert operations_per_image(width) == 2 * pixels * (3 * sum(layers) - first)


def test_small_batches_take_the_time_of_the_host():
    gpu = {"operations": 10**9, "peak": 1e12, "utilisation": 0.5, "host_seconds": 0.004}
    assert seconds_per_step(1, **gpu) == 0.004
    assert seconds_per_step(64, **gpu) == pytest.approx(0.128)


def test_the_table_adds_up_all_trainings(capsys):
    cost(utilisation=0.25, host_seconds=0.004, image_seconds=30e-6)
    text = capsys.readouterr().out
    assert "6.39 GFLOP" in text
    assert "all 320" in text
    # Each batch size has 80 trainings of 100,000 steps. Steps take 4.03, 4.12, 4.48 and 5.92 ms.
    assert "41 h" in text


@pytest.mark.parametrize("name", ["utilisation", "host_seconds", "image_seconds"])
def test_wrong_arguments_raise(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0.*, got 0"):
        cost(**{name: 0})


def test_no_gpu_reaches_more_than_its_peak():
    with pytest.raises(ValueError, match="utilisation must be above 0 and at most 1, got 2"):
        cost(utilisation=2)
