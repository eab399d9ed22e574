"""The figures of a training: what they draw, and where they are shown."""

from __future__ import annotations

import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

import lightning_alrc
from lightning_alrc import ALRCCallback, cartography, plot
from lightning_alrc._telemetry.chart_definitions import CHARTS
from lightning_alrc._telemetry.reading import RECORD, read
from lightning_alrc.plotting import boxcar, draw_charts
from tests._telemetry.test_reading import csv_run, line
from tests.nets import NAMED_NETS, NETS, SETTINGS, callback_of
from tests.scripts.launching import execute
from tests.spikes import spike

Fit = Callable[..., Any]


def rows(count: int = 60, prefix: str = "alrc/", **metrics: Any) -> list[dict[str, Any]]:
    """Logged rows at every tenth step; a metric is a number, or a function of the row's index."""
    metrics = {"loss": lambda row: 2.0 + row % 3, "threshold": 4.5} | metrics
    return [
        {"step": 10 * row}
        | {
            prefix + name: value(row) if callable(value) else value
            for name, value in metrics.items()
        }
        for row in range(count)
    ]


def curves(axes: Axes) -> dict[str, np.ndarray]:
    """The lines by label, [points, 2]."""
    return {str(each.get_label()): np.asarray(each.get_xydata()) for each in axes.get_lines()}


def points(axes: Axes) -> dict[str, list[list[float]]]:
    """The points by label."""
    scattered = (each for each in axes.collections if isinstance(each, PathCollection))
    return {str(each.get_label()): np.asarray(each.get_offsets()).tolist() for each in scattered}


def legend(figure: Figure) -> list[str]:
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


# ---- the boxcar


@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**32 - 1))
def test_boxcar_is_the_mean_of_the_last_values(steps: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=steps)
    values[np.random.default_rng(seed + 1).random(steps) < 0.2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns if all values are NaN
        expected = [np.nanmean(values[max(0, end - width) : end]) for end in range(1, steps + 1)]
    np.testing.assert_allclose(boxcar(values, width), expected)


def test_boxcar_is_exact_after_a_huge_loss_has_left_it() -> None:
    values = np.ones(50)
    values[13] = 1e30
    assert boxcar(values, 5)[18:].tolist() == [1.0] * 32


def test_boxcar_leaves_infinite_losses_out() -> None:
    assert boxcar([1.0, math.inf, 3.0], 2).tolist() == [1.0, 1.0, 3.0]


# ---- what is drawn


def test_a_training_is_drawn_as_it_was_logged(fit: Fit, tmp_path: Path, namespace: str) -> None:
    folder, _ = csv_run(fit, tmp_path, NETS[namespace](), ALRCCallback(**SETTINGS))
    logged = read(folder)["loss"]
    (axes,) = plot(folder, window=1).axes
    drawn = curves(axes)
    assert set(drawn) == {"loss", "loss after clipping", "threshold"}
    for label, metric in zip(drawn, ("loss", "loss_clipped", "threshold"), strict=True):
        np.testing.assert_array_equal(drawn[label].T, logged.series(metric))
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "loss")


def test_the_figure_is_a_picture_that_explains_itself(tmp_path: Path) -> None:
    figure = plot(rows(loss_clipped=2.0, clipped_fraction=0.5), title="A training")
    means = ", mean of 2 logged values"
    assert legend(figure) == [
        "loss",
        "loss" + means,
        "loss after clipping" + means,
        "threshold",
        "contains clipped losses",
    ]
    assert figure.get_suptitle() == "A training"
    figure.savefig(tmp_path / "curves.png")
    assert np.std(imread(tmp_path / "curves.png")[..., :3]) > 0.05


@pytest.mark.parametrize(
    "draw", [functools.partial(plot, title="A training"), draw_charts], ids=["plot", "charts"]
)
def test_charts_and_legend_stay_in_the_figure_and_do_not_overlap(draw: Any) -> None:
    source = [*rows(loss_clipped=1.0, resets=lambda row: row // 30, clipped_fraction=0.5)]
    figure = draw(source, rows(prefix="alrc/discriminator/", clipped_total=1e6))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    for box in boxes:
        assert box is not None
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert box.count_overlaps(boxes) == 1  # with itself alone


def test_each_loss_has_a_panel(fit: Fit, tmp_path: Path, namespace: str) -> None:
    folder, _ = csv_run(fit, tmp_path, NAMED_NETS[namespace]("matrix"))
    panels = plot(folder).axes
    assert [axes.get_ylabel() for axes in panels] == ["loss “first”", "loss “second”"]
    (axes,) = plot(folder, name="second", window=1).axes
    assert axes.get_ylabel() == "loss “second”"
    expected = read(folder)["second"].series("loss")
    np.testing.assert_array_equal(curves(axes)["loss"].T, expected)


def test_the_boxcar_is_as_wide_as_told() -> None:
    source = rows()
    values = [row["alrc/loss"] for row in source]
    drawn = curves(plot(source, window=7).axes[0])
    np.testing.assert_allclose(drawn["loss, mean of 7 logged values"][:, 1], boxcar(values, 7))
    np.testing.assert_array_equal(drawn["loss"][:, 1], values)


def test_by_default_a_long_training_has_a_wide_boxcar_and_a_short_training_has_none() -> None:
    assert "loss, mean of 20 logged values" in curves(plot(rows(600)).axes[0])
    assert set(curves(plot(rows(20)).axes[0])) == {"loss", "threshold"}


def test_a_training_that_clipped_nothing_has_one_curve() -> None:
    loss = {"loss_clipped": lambda row: 2.0 + row % 3, "clipped_fraction": 0.0}
    assert set(curves(plot(rows(20, **loss)).axes[0])) == {"loss", "threshold"}


def test_the_clips_of_a_record_are_points(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(line(25, 90.0) + line(31, 7.0) + line(40, math.nan))
    (axes,) = plot(rows(clipped_fraction=0.5), tmp_path).axes
    assert points(axes) == {"clipped loss": [[25.0, 90.0], [31.0, 7.0]]}
    assert axes.get_ylim()[1] > 90
    (axes,) = plot(rows(clipped_total=1234), tmp_path).axes
    assert list(points(axes)) == ["clipped loss, the 2 worst"]


@pytest.mark.parametrize(
    ("total", "label"), [(2, "clipped loss"), (3, "clipped loss, the 2 worst")]
)
def test_the_legend_says_worst_only_if_the_record_lacks_clips(
    tmp_path: Path, total: int, label: str
) -> None:
    (tmp_path / RECORD).write_text(line(25, 90.0) + line(31, 7.0))
    (axes,) = plot(rows(clipped_total=total), tmp_path).axes
    assert list(points(axes)) == [label]


MOST_POINTS = 3002
"""The two extreme values of each of 1,000 parts, the 1,000 largest values, and the two ends."""


def test_a_long_training_is_drawn_with_some_thousand_points_and_each_spike() -> None:
    count = 30_000
    losses = np.random.default_rng(0).lognormal(0.0, 0.2, count)
    spikes = np.concatenate([np.random.default_rng(1).integers(0, count, 200), [777, 778, 780]])
    losses[spikes] += 10.0 + np.arange(len(spikes))
    source = [
        {"step": step, "alrc/loss": loss, "alrc/threshold": 2.0, "alrc/clipped_fraction": clipped}
        for step, (loss, clipped) in enumerate(zip(losses, losses > 1.2, strict=True))
    ]
    for figure in (plot(source), plot(source, window=1), draw_charts(source)):
        axes = figure.axes[0]
        lines = curves(axes)
        marked = np.array(points(axes)["contains clipped losses"])
        assert max(map(len, [*lines.values(), marked])) <= MOST_POINTS
        drawn = lines.get("loss", marked)
        for shown in (drawn, marked):
            assert set(losses[spikes]) <= set(shown[:, 1])
            assert (np.diff(shown[:, 0]) > 0).all()
        # Between the spikes, the line covers the range of all losses.
        part = losses[5000:5100]
        shown = drawn[(drawn[:, 0] >= 5000) & (drawn[:, 0] < 5100), 1]
        assert (shown.min(), shown.max()) == (part.min(), part.max())
        assert (drawn[0, 0], drawn[-1, 0]) == (0, count - 1)


def test_a_large_record_is_drawn_with_some_thousand_points(tmp_path: Path) -> None:
    lines = [line(step, 3.0 + step % 7 + 90 * (step % 997 == 0)) for step in range(20_000)]
    (tmp_path / RECORD).write_text("".join(lines))
    drawn = np.array(points(plot(tmp_path / RECORD).axes[0])["clipped loss"])
    assert len(drawn) <= MOST_POINTS
    assert (drawn[:, 1] > 90).sum() == len(range(0, 20_000, 997))


def test_a_short_training_is_drawn_with_all_its_points() -> None:
    source = rows(2900)
    (drawn,) = (curves(plot(source, window=1).axes[0])["loss"],)
    np.testing.assert_array_equal(drawn[:, 1], [row["alrc/loss"] for row in source])


def test_rows_with_clips_are_marked_if_there_is_no_record() -> None:
    source = rows(clipped_fraction=lambda row: 0.25 * (row in (4, 11)))
    source[11]["alrc/loss"] = None  # a row without a loss has no mark
    assert points(plot(source).axes[0]) == {"contains clipped losses": [[40.0, 3.0]]}


def test_a_record_alone_is_drawn_as_its_clips_and_their_thresholds(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(line(31, 7.0) + line(25, 9.0))
    (axes,) = plot(tmp_path, window=5).axes
    assert points(axes) == {"clipped loss": [[25.0, 9.0], [31.0, 7.0]]}
    assert {k: v.tolist() for k, v in curves(axes).items()} == {"threshold": [[25, 2], [31, 2]]}


def test_negative_thresholds_of_a_record_are_within_the_axes() -> None:
    clips = {10: (5.0, -2.0), 20: (8.0, -2.5), 30: (6.0, -2.2)}
    source = [spike(step=step, loss=loss, threshold=at) for step, (loss, at) in clips.items()]
    (axes,) = plot(source).axes
    assert axes.get_yscale() == "linear"
    assert curves(axes)["threshold"].tolist() == [[10, -2], [20, -2.5], [30, -2.2]]
    lowest, highest = axes.get_ylim()
    assert lowest < -2.5 < 8 < highest


def scheduled(namespace: str) -> Any:
    """A net that resets its moments before step 4, and lowers its learning rate before step 8."""

    class Scheduled(NETS[namespace]):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 4:
                callback_of(self.trainer).reset()

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Scheduled()


def test_a_training_is_drawn_with_its_resets(fit: Fit, tmp_path: Path, namespace: str) -> None:
    callback = ALRCCallback(**SETTINGS, reset_on_lr_drop=0.5)
    folder, _ = csv_run(fit, tmp_path, scheduled(namespace), callback)
    (axes,) = plot(folder).axes
    lines = [line for line in axes.get_lines() if line.get_label() == "moments reset"]
    # Rows are logged at steps 1, 3, 5...: 5 and 9 are the first after the resets.
    assert [line.get_xdata()[0] for line in lines] == [5, 9]


def test_a_vertical_line_marks_a_reset() -> None:
    resets = curves(plot(rows(resets=lambda row: 3 + (row >= 20))).axes[0])["moments reset"]
    assert resets[:, 0].tolist() == [200.0, 200.0]
    assert "moments reset" not in curves(plot(rows(resets=3)).axes[0])


def test_every_chart_of_a_loss_marks_its_resets_and_one_chart_counts_them() -> None:
    metrics = {name: 1.0 for chart in CHARTS for name in chart.metrics}
    source = rows(**metrics | {"resets": lambda row: row // 20, "clipped_total": 9000.0})
    charts = draw_charts(source, [{**row, "alrc/critic/loss": 2.0} for row in source]).axes
    assert len(charts) == 2 * len(CHARTS)
    of_loss, of_critic = charts[: len(CHARTS)], charts[len(CHARTS) :]
    for axes in of_loss:
        lines = [line for line in axes.get_lines() if line.get_label() == "moments reset"]
        assert [line.get_xdata()[0] for line in lines] == [200, 400]
    assert not any("moments reset" in curves(axes) for axes in of_critic)
    highest = [axes.get_ylim()[1] for axes in of_loss if "resets" in curves(axes)]
    assert highest == [pytest.approx(2, rel=0.2)]


def test_a_count_of_0_is_at_the_bottom_of_its_chart() -> None:
    metrics = {name: 0.0 for chart in CHARTS if chart.unit == "count" for name in chart.metrics}
    charts = draw_charts(rows(**metrics)).axes
    limits = [axes.get_ylim() for axes in charts if axes.get_ylabel() == "count"]
    assert limits == [(0, 1), (0, 1)]


@pytest.mark.parametrize("draw", [plot, draw_charts])
def test_a_single_row_is_visible(draw: Any) -> None:
    def inked(count: int) -> int:
        """The number of coloured pixels within the first axes of a figure of ``count`` rows."""
        figure = draw(rows(count, scale=0.5, mu1=2.0))
        figure.draw_without_rendering()
        box = figure.axes[0].get_window_extent()
        figure.legends.clear()
        canvas = figure.canvas
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=figure.dpi)
        assert canvas is figure.canvas
        picture.seek(0)
        pixels = imread(picture)[..., :3]
        height = pixels.shape[0]
        inside = pixels[height - int(box.y1) + 5 : height - int(box.y0) - 5, int(box.x0) + 5 :]
        return int((np.ptp(inside[:, : int(box.width) - 10], axis=-1) > 0.3).sum())

    assert inked(1) > 10


def test_charts_show_the_first_8_losses_and_say_how_many_there_are() -> None:
    many = [row for name in range(20) for row in rows(5, prefix=f"alrc/loss{name:02}/")]
    figure = draw_charts(many)
    assert len(figure.axes) == 8 * len(CHARTS)
    assert figure.get_suptitle() == "8 of 20 losses"
    assert draw_charts(rows()).get_suptitle() == ""
    assert draw_charts(rows(), count=9).get_suptitle() == "1 of 9 losses"


def test_all_charts_of_a_loss_have_the_same_range_of_steps(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(line(-400, 9.0))  # from before a training was resumed
    charts = draw_charts(rows(), tmp_path / RECORD).axes
    assert len({axes.get_xlim() for axes in charts}) == 1
    assert charts[0].get_xlim()[0] <= -400


def test_a_figure_without_finite_values_says_so() -> None:
    (axes,) = plot(rows(loss=math.nan, threshold=math.nan)).axes
    assert [text.get_text() for text in axes.texts] == ["nothing finite was logged"]
    assert not plot(rows()).axes[0].texts


def test_the_title_has_the_number_of_clips() -> None:
    (axes,) = plot(rows(clipped_total=lambda row: 1000 + row)).axes
    assert axes.get_title(loc="right") == "losses clipped: 1,059"


def test_the_number_of_clips_is_that_of_the_record_if_it_has_more(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("".join(line(step, 9.0) for step in range(7)))
    (axes,) = plot(rows(clipped_total=4), tmp_path / RECORD).axes
    assert axes.get_title(loc="right") == "losses clipped: 7"


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        (lambda row: 1e-3 + row, "log"),
        (lambda row: row - 20.0, "linear"),
        (lambda row: -3.0 + 900 * (row == 30), "symlog"),
        (lambda row: 0.0, "linear"),
    ],
)
@pytest.mark.parametrize("resets", [0, lambda row: row // 30])
def test_every_loss_is_within_the_axes(loss: Any, scale: str, resets: Any) -> None:
    source = rows(loss=loss, threshold=None if scale == "linear" else loss, resets=resets)
    (axes,) = plot(source, window=1).axes
    assert axes.get_yscale() == scale
    lowest, highest = axes.get_ylim()
    values = [row["alrc/loss"] for row in source]
    # A mark on the frame would be cut in half.
    transform = axes.get_yaxis_transform().transform
    heights = [transform((0, y))[1] for y in (lowest, min(values), max(values), highest)]
    margin = 0.02 * (heights[3] - heights[0])
    assert heights[0] + margin < heights[1] <= heights[2] < heights[3] - margin


@pytest.mark.parametrize(("largest", "scale"), [(5.0, "linear"), (50.0, "symlog")])
def test_losses_of_both_signs_have_a_symlog_axis_if_they_differ_much(
    largest: float, scale: str
) -> None:
    source = [{"step": step, "alrc/loss": loss} for step, loss in enumerate([-1.0, 1.0, largest])]
    (axes,) = plot(source).axes
    assert axes.get_yscale() == scale


# ---- where a figure is shown


def test_a_notebook_shows_the_figure() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(plot(rows()))
    assert data["image/png"].startswith(b"\x89PNG")


def test_a_pickled_figure_keeps_its_picture() -> None:
    figure = pickle.loads(pickle.dumps(plot(rows())))
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_training_does_not_import_plotting_and_plot_opens_no_pyplot_figure() -> None:
    execute(
        "import sys, lightning_alrc\n"
        "from lightning_alrc import *\n"
        "assert 'plot' in dir(lightning_alrc)\n"
        "assert not {'lightning_alrc.plotting', 'wandb'} & {*sys.modules}\n"
        "lightning_alrc.plot([{'step': 1, 'alrc/loss': 2.0}])\n"
        "import matplotlib.pyplot\n"
        "assert matplotlib.pyplot.get_fignums() == []\n"
    )


def test_without_matplotlib_plot_says_what_to_install() -> None:
    execute(
        "import pytest, sys\n"
        "from lightning_alrc import *\n"  # first, because torchmetrics may import matplotlib
        "sys.modules['matplotlib'] = None\n"
        "with pytest.raises(ImportError, match=r\"pip install 'lightning-alrc\\[plot\\]'\"):\n"
        "    from lightning_alrc import plot\n"
    )


def test_an_unknown_attribute_of_the_package_raises() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plots'"):
        _ = lightning_alrc.plots


# ---- wrong arguments


def test_an_unknown_name_is_refused() -> None:
    source = [*rows(), *rows(prefix="alrc/critic/")]
    with pytest.raises(ValueError, match=r"name must be .*\['critic', 'loss'\], got 'generator'"):
        plot(source, name="generator")


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_below_1_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be an integer, 1 or more, got {window}"):
        plot(rows(), window=window)


def test_a_window_may_be_a_numpy_integer() -> None:
    (axes,) = plot(rows(), window=np.int64(3)).axes  # type: ignore[arg-type]
    assert "loss, mean of 3 logged values" in [line.get_label() for line in axes.lines]


@pytest.mark.parametrize("window", [2.5, "5", True])
def test_a_window_of_another_type_is_refused(window: Any) -> None:
    with pytest.raises(TypeError, match=f"window must be an integer, 1 or more, got {window!r}"):
        plot(rows(), window=window)


def test_a_record_without_a_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).touch()
    for source in (tmp_path / RECORD, []):  # a file, and callback.spikes
        with pytest.raises(ValueError, match="source must have something to draw, got no rows and"):
            plot(source)


def test_a_log_is_drawn_with_spikes_of_a_training_without_a_clip() -> None:
    assert len(plot(rows(), []).axes) == 1


def test_a_map_has_each_sample_by_its_mean_and_variance() -> None:
    pandas = pytest.importorskip("pandas")
    ledger = pandas.DataFrame(
        {
            "mean": [1.0, 2.0, 9.0, math.nan],
            "variance": [0.0, 0.5, 4.0, math.nan],
            "clipped": [0, 0, 3, 0],
        }
    )
    (axes,) = cartography(ledger, title="a map").axes
    assert points(axes) == {
        "never clipped: 2": [[0.0, 1.0], [0.5, 2.0]],
        "clipped at least once: 1": [[4.0, 9.0]],
    }
    assert (axes.get_xlabel(), axes.get_yscale()) == ("variance of a sample's losses", "log")
    with pytest.raises(ValueError, match="ledger must have a sample with a finite loss, got none"):
        cartography(ledger[3:])
    with pytest.raises(TypeError, match="ledger must be what read_ledger returned, got 3"):
        cartography(3)
