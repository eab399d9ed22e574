from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from torchvision.io import decode_image

from examples.cifar10_supersampling import figures
from examples.cifar10_supersampling.training import METHODS, Result, Run


def made_up(method, seed=0, steps=50):
    generator = np.random.default_rng(seed)
    outlier = generator.random((steps, 4)) < 0.1
    images = generator.random((8, 3, 32, 32), dtype=np.float32)
    return Result(
        run=Run("outliers", method, seed, steps, 0.1, 2.0, "photographs", Path("data")),
        train_loss=1.0,
        test={"error": 1.0},
        clips=0,
        survived=steps,
        seconds=1.0,
        history={
            "loss": generator.lognormal(size=(steps, 4)).astype(np.float32) + 1000 * outlier,
            "outlier": outlier,
            "threshold": np.r_[np.full(10, np.inf), np.full(steps - 10, 5.0)],
            "clipped": np.zeros(steps, dtype=np.int64),
        },
        images={"input": images, "output": images, "truth": images},
    )


def test_clean_losses_leave_outliers_out():
    result = made_up("alrc")
    losses = figures.clean_losses(result)
    assert np.nanmax(losses) < 500
    result.history["outlier"][3] = True
    assert np.isnan(figures.clean_losses(result)[3])


@pytest.mark.parametrize("methods", [["none"], ["alrc"], list(METHODS)])
def test_figures_are_written(methods, tmp_path):
    results = [made_up(method, seed) for seed in (0, 1) for method in methods]
    figures.save_curves(results, tmp_path / "curves.png")
    figures.save_images(results, tmp_path / "images.png")
    for name in ("curves.png", "images.png"):
        picture = decode_image(str(tmp_path / name))
        assert min(picture.shape[1:]) > 100
        assert picture.float().std() > 1


def test_curves_have_axes_with_names_and_a_logarithmic_scale():
    axes = Figure().add_subplot()
    results = [made_up(method, seed) for seed in (0, 1) for method in METHODS]
    figures.draw_learning_curves(axes, results)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [method.label for method in METHODS.values()]


def test_losses_above_the_threshold_are_marked():
    axes = Figure().add_subplot()
    result = made_up("alrc")
    figures.draw_clips(axes, result)
    marked = axes.collections[1]
    assert marked.get_label() == "clipped by ALRC"
    above = result.history["loss"] >= result.history["threshold"][:, None]
    assert len(marked.get_offsets()) == above.sum() > 0


def test_a_training_that_lost_its_weights_is_drawn(tmp_path):
    short = made_up("none", seed=0, steps=20)
    short.history["loss"][-1] = np.nan
    short.images["output"] = np.full((8, 3, 32, 32), np.nan, dtype=np.float32)
    results = [short, made_up("none", seed=1), made_up("alrc")]
    figures.save_curves(results, tmp_path / "curves.png")
    figures.save_images(results, tmp_path / "images.png")
