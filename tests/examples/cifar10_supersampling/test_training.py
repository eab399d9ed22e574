from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.cifar10_supersampling import datamodule, training
from examples.cifar10_supersampling.training import METHODS, Run, clean_mean, train

RUN = Run(
    scenario="outliers",
    method="none",
    seed=0,
    steps=20,
    width=0.05,
    num_stddev=2.0,
    data="photographs",
    root=Path("data"),
)


@pytest.fixture(scope="module", autouse=True)
def few_test_images():
    datamodule.load_images.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "TEST_IMAGES", 50)
        yield
    datamodule.load_images.cache_clear()


@pytest.fixture(scope="module")
def results(few_test_images):
    return {method: train(replace(RUN, method=method)) for method in METHODS}


def test_all_methods_start_from_the_same_weights_and_see_the_same_images(results):
    first = results["none"]
    for result in results.values():
        np.testing.assert_array_equal(result.history["loss"][0], first.history["loss"][0])
        np.testing.assert_array_equal(result.history["outlier"], first.history["outlier"])
        assert not np.array_equal(result.history["loss"], first.history["loss"]) or result is first


def test_training_is_repeatable(results):
    again = train(replace(RUN, method="both"))
    np.testing.assert_array_equal(again.history["loss"], results["both"].history["loss"])
    assert again.test == results["both"].test


def test_only_alrc_clips(results):
    for method, result in results.items():
        assert (result.clips > 0) == METHODS[method].alrc


def test_train_loss_is_that_of_clean_images(results):
    history = results["norm"].history
    clean = [
        loss
        for losses, outliers in list(zip(history["loss"], history["outlier"], strict=True))[-8:]
        for loss, outlier in zip(losses, outliers, strict=True)
        if not outlier
    ]
    assert results["norm"].train_loss == pytest.approx(np.mean(clean), rel=1e-5)


def test_images_to_show(results):
    for images in results["alrc"].images.values():
        assert images.shape == (training.SHOWN_IMAGES, 3, 32, 32)
        assert images.min() >= 0
        assert images.max() <= 1


def test_lost_weights_are_reported(monkeypatch):
    unbearable = replace(training.SCENARIOS["unstable"], learning_rate=1e30)
    monkeypatch.setitem(training.SCENARIOS, "unstable", unbearable)
    result = train(replace(RUN, scenario="unstable"))
    assert result.survived < 20
    assert np.isnan(result.train_loss)
    assert np.isnan(result.test["error"])


@pytest.mark.parametrize(
    ("steps", "last_steps"), [(2000, 1000), (5000, 1000), (1999, 799), (10, 4), (1, 1)]
)
def test_last_steps(steps, last_steps):
    assert replace(RUN, steps=steps).last_steps == last_steps


def test_clean_mean():
    values = np.array([[9.0, 9.0], [1.0, 9.0], [2.0, 3.0]])
    outlier = np.array([[False, False], [False, True], [False, False]])
    assert clean_mean(values, outlier, 2) == 2.0
