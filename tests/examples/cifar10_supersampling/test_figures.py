import numpy as np
import pytest
from matplotlib.figure import Figure
from torchvision.io import decode_image

from examples.cifar10_supersampling import figures
from examples.cifar10_supersampling.results import Result
from examples.comparison.figures import label

METHODS = ("none", "norm", "alrc2", "alrc2+norm")


def made_up(method, seed=0, steps=50, survived=None):
    generator = np.random.default_rng(seed)
    outlier = generator.random((steps, 4)) < 0.1
    losses = generator.lognormal(size=(steps, 4)).astype(np.float32)
    images = generator.random((8, 3, 32, 32), dtype=np.float32)
    return Result(
        row={
            "method": method,
            "seed": seed,
            "last_steps": steps // 2,
            "clipped": 5 if "alrc" in method else None,
            "steps_survived": steps if survived is None else survived,
        },
        history={
            "loss": losses.mean(axis=1),
            "image_loss": losses + 1000 * outlier,
            "outlier": outlier,
            "threshold": np.r_[np.full(10, np.inf), np.full(steps - 10, 5.0)],
        },
        images={"input": images, "output": images, "truth": images},
    )


@pytest.mark.parametrize("methods", [["none"], ["alrc3", "agc", "norm+alrc2"], list(METHODS)])
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
    assert labels == [label(method) for method in METHODS]


def test_losses_above_the_threshold_are_marked():
    axes = Figure().add_subplot()
    result = made_up("alrc2")
    figures.draw_clips(axes, result)
    marked = axes.collections[1]
    assert marked.get_label() == "clipped by ALRC"
    above = result.history["image_loss"] >= result.history["threshold"][:, None]
    assert len(marked.get_offsets()) == above.sum() > 0


def test_a_training_is_drawn_with_each_of_its_clips():
    result = made_up("alrc2")
    (axes,) = figures.draw_training(result).axes
    losses, threshold = result.history["image_loss"], result.history["threshold"]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), losses.astype(float).mean(axis=1))
    step, image = np.nonzero(losses >= threshold[:, None])
    drawn = axes.collections[0].get_offsets()
    # Within a step the smaller loss is drawn first.
    expected = sorted(zip(step.tolist(), losses[step, image].tolist(), strict=True))
    np.testing.assert_allclose(drawn, expected)
    assert axes.get_title(loc="right") == f"losses clipped: {len(step)}"


def test_a_training_that_lost_its_weights_is_drawn(tmp_path):
    short = made_up("none", seed=0, survived=20)
    short.history["loss"][20:] = np.nan
    short.history["image_loss"] = short.history["image_loss"][:40]
    short.history["image_loss"][20:] = np.nan
    short.images["output"] = np.full((8, 3, 32, 32), np.nan, dtype=np.float32)
    finished = [short, made_up("none", seed=1), made_up("alrc2")]
    figures.save_curves(finished, tmp_path / "curves.png")
    figures.save_images(finished, tmp_path / "images.png")
