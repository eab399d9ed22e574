import matplotlib.figure
import numpy as np
import pytest

from examples.comparison.figures import draw_curves, draw_images, label, styles

PEERS = ("norm", "value", "zclip", "autoclip", "autoclip10", "agc")


def test_a_method_has_a_name():
    assert label("alrc2+norm") == "ALRC 2 + gradient clipping"
    assert label("gentle") == "gentle"


def test_no_two_methods_look_alike():
    others = ("none", *PEERS, "huber")
    protected = [f"{alrc}{n}" for alrc in ("alrc", "published") for n in (2, 3, 4)]
    methods = [*others, *protected, *(f"alrc2+{peer}" for peer in PEERS)]
    style = styles(methods)
    assert len({str(each) for each in style.values()}) == len(methods)
    # Points have no line styles, so their colours must differ.
    assert len({style[method]["color"] for method in others}) == len(others)


def test_the_curves_of_many_methods_look_different():
    axes = matplotlib.figure.Figure().add_subplot()
    draw_curves(axes, {name: [np.ones(9)] for name in ("none", *PEERS, "huber")}, window=2)
    looks = {(line.get_color(), line._unscaled_dash_pattern) for line in axes.lines}
    assert len(looks) == 8


def test_a_mean_ends_where_the_shortest_training_ends():
    axes = matplotlib.figure.Figure().add_subplot()
    draw_curves(axes, {"none": [np.full(9, 1.0), np.full(5, 3.0)]}, window=2)
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert lines["unprotected"].tolist() == [2.0] * 5
    assert len(axes.lines) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_drawn_row_by_row(channels):
    rows = {name: np.full((4, channels, 8, 8), value) for name, value in (("a", 0.25), ("b", 2.0))}
    rows["b"][0, 0, 0, 0] = np.nan
    (axes,) = draw_images(rows).axes
    (drawn,) = axes.images
    pixels = drawn.get_array()
    assert pixels.shape == (2 + 2 * 10, 2 + 4 * 10, 3)
    assert (pixels[2:10, 2:10] == 0.25).all()
    assert pixels[12, 2, 0] == 0
    assert (pixels[13:20, 3:10] == 1).all()
    assert [each.get_text() for each in axes.get_yticklabels()] == ["a", "b"]
