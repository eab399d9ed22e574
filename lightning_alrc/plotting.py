"""``plot``: draws a training's losses, the threshold, and the losses that were clipped."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import islice
from textwrap import fill
from typing import Any

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("plot needs matplotlib: pip install 'lightning-alrc[plot]'") from error

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from lightning_alrc._moments import arguments
from lightning_alrc._telemetry.chart_definitions import (
    BLUE,
    CHARTS,
    CLIPPED,
    GREEN,
    LOSSES_IN_CHARTS,
    ORANGE,
    VERMILION,
    Chart,
)
from lightning_alrc._telemetry.reading import LoggedLoss, Source, read

__all__ = ["BLUE", "GREEN", "ORANGE", "VERMILION", "boxcar", "cartography", "plot"]

WINDOWS = 30
"""The default width of the boxcar is the number of rows divided by this."""

TICKS = [1, 2, 5, 10]
"""The distance of ticks is one of these, times a power of ten. It may be 100, but not 80."""

BUCKETS = 1000
"""A long curve is split into this many parts. The two extreme values of each part are drawn."""

LARGEST = 1000
"""This many of the largest values of a long curve are drawn, too."""


def plot(
    source: Source,
    *more: Source,
    name: str | None = None,
    window: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the learning curve of a training under ALRC, its threshold, and the clips.

    >>> rows = [{"step": step, "alrc/loss": 10 / (step + 1)} for step in range(50)]
    >>> plot(rows).savefig("curves.png")  # doctest: +SKIP
    >>> plot("lightning_logs/version_0")  # doctest: +SKIP

    Each loss has a panel. The panel shows the logged values as a thin line, their mean over a
    sliding window (a boxcar) as a thick line, the same mean of the losses after clipping, and the
    threshold. Each clip of a record is a point. Without a record, the rows that contain clipped
    losses are marked. A vertical line marks a reset of the moments. Each line has at most about
    3,000 points, which always include the largest losses.

    Args:
        source: where the training was logged. It may be the path of a Lightning CSVLogger's
            ``metrics.csv`` or of its folder, of a W&B run's folder, or of a record of clips
            (``alrc_spikes.jsonl``). It may be rows in memory, each a mapping with a ``"step"`` and
            metrics such as ``"alrc/loss"``. Or it is :attr:`ALRCCallback.spikes`. With a log, the
            newest record of clips beside it is read, too. With a W&B run, its table of clips is
            read, too.
        more: further sources of the same training, drawn into the same figure. If two sources have
            the same metric of the same step, the value of the source given later is used.
        name: the loss to draw; default: all losses. The loss that ``training_step`` returns is
            named ``"loss"``.
        window: width of the sliding window, in logged rows; 1 draws no mean. Default: a thirtieth
            of the rows.
        title: text above the figure; default: none.

    Returns:
        The figure. Save it with ``savefig``. A notebook shows it as the value of a cell.

    Raises:
        FileNotFoundError: if a path does not exist.
        ImportError: if a source is a W&B run and wandb is not installed.
        TypeError: if a source is neither a path, rows nor spikes, or ``window`` is not an integer.
        ValueError: if a source is something else or has no data of ALRC, if there is no loss of
            that name, or ``window`` is less than 1.
    """
    if window is not None:
        window = arguments.count("window", window, "an integer, 1 or more", least=1)
    losses = read(source, *more)
    if not losses:
        raise ValueError("source must have something to draw, got no rows and no clip")
    if name is not None and name not in losses:
        raise ValueError(f"name must be one of the losses logged, {sorted(losses)}, got {name!r}")
    return draw_losses(losses if name is None else {name: losses[name]}, window, title)


def draw_losses(
    losses: Mapping[str, LoggedLoss], window: int | None = None, title: str | None = None
) -> Figure:
    """Draw losses as :func:`plot` does.

    Args:
        losses: the data of each loss, by name.
        window: as for :func:`plot`.
        title: as for :func:`plot`.
    """
    figure = _NotebookFigure(figsize=(9, 1 + 3.5 * len(losses)), layout="constrained")
    panels = figure.subplots(len(losses), sharex=True, squeeze=False)[:, 0]
    for axes, (loss_name, loss) in zip(panels, losses.items(), strict=True):
        _draw_loss(axes, loss, window)
        axes.set_ylabel("loss" if loss_name == "loss" else f"loss “{loss_name}”")
    panels[-1].set_xlabel("training step")
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    finish(figure, panels)
    return figure


def cartography(ledger: Any, *, title: str | None = None) -> Figure:
    """Draw a map of the samples: the mean of each sample's losses against the variance.

    Samples at the bottom left are easy to learn. Samples with a large mean and a small variance are
    hard in every epoch; wrong labels are an example. Samples with a large variance are learned and
    forgotten. The ledger must be of several epochs, because the variance of a single loss is 0.

    >>> cartography(read_ledger("lightning_logs/version_0"))  # doctest: +SKIP

    Args:
        ledger: what :func:`~lightning_alrc.read_ledger` returned. Samples without a finite loss are
            left out.
        title: text above the figure; default: none.

    Raises:
        TypeError: if ``ledger`` is not a DataFrame.
        ValueError: if no sample has a finite loss.

    References:
        Swayamdipta et al., "Dataset cartography: mapping and diagnosing datasets with training
        dynamics" (2020), doi:10.18653/v1/2020.emnlp-main.746. The authors draw the probability of
        the true class instead of the loss.
    """
    if not hasattr(ledger, "columns"):
        raise TypeError(f"ledger must be what read_ledger returned, got {ledger!r:.100}")
    ledger = ledger[np.isfinite(ledger["mean"]) & np.isfinite(ledger["variance"])]
    if len(ledger) == 0:
        raise ValueError("ledger must have a sample with a finite loss, got none")
    figure = _NotebookFigure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    is_clipped = ledger["clipped"] > 0
    for chosen, clipped, label in (
        (~is_clipped, False, "never clipped"),
        (is_clipped, True, "clipped at least once"),
    ):
        part = ledger[chosen]
        if len(part):
            label = f"{label}: {len(part):,}"
            draw_points(axes, part["variance"], part["mean"], label, clipped=clipped)
    _set_scale(axes, np.asarray(ledger["mean"], dtype=np.float64))
    variances = np.asarray(ledger["variance"], dtype=np.float64)
    if (variances > 0).any():
        axes.set_xscale("symlog", linthresh=float(np.median(variances[variances > 0])))
    axes.set_xlabel("variance of a sample's losses")
    axes.set_ylabel("mean of a sample's losses")
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    finish(figure, [axes])
    return figure


def draw_charts(source: Source, *more: Source, count: int = 0) -> Figure:
    """Draw all charts of a training under ALRC.

    Args:
        source: as for :func:`plot`.
        more: as for :func:`plot`.
        count: number of losses in the training, if the sources do not have all of them.

    Returns:
        The figure, with the losses one below the other. The first chart of a loss is at least four
        times as large as each of its other charts. Only the first 8 losses are drawn; the figure
        says so if there are more.
    """
    every = read(source, *more)
    losses = dict(islice(every.items(), LOSSES_IN_CHARTS))
    figure = Figure(figsize=(12, 1 + 7.5 * len(losses)), layout="constrained")
    grid = figure.add_gridspec(3 * len(losses), 12)
    groups = []
    for index, (name, loss) in enumerate(losses.items()):
        top = 3 * index
        places = [grid[top : top + 2, :8], grid[top, 8:], grid[top + 1, 8:]]
        places += [grid[top + 2, column : column + 3] for column in range(0, 12, 3)]
        panels = [figure.add_subplot(place) for place in places]
        _draw_loss(panels[0], loss, None)
        for axes, chart, width in zip(panels, CHARTS, (66, 42, 42, *[26] * 4), strict=True):
            title = chart.title if name == "loss" else f"{chart.title}: {name}"
            axes.set_title(fill(title, width), loc="left", size="medium")
            axes.set_ylabel(chart.unit)
            axes.set_xlabel("training step")
        for axes, chart in zip(panels[1:], CHARTS[1:], strict=True):
            _draw_metrics(axes, loss, chart)
        groups.append(panels)
    count = max(count, len(every))
    if len(losses) < count:
        figure.suptitle(f"{len(losses)} of {count} losses", x=0.01, ha="left")
    finish(figure, [panels[0] for panels in groups])
    for first, *others in groups:
        for axes in others:
            # The record may have clips before the first row. Only the first chart draws them.
            axes.set_xlim(first.get_xlim())
    return figure


def _draw_metrics(axes: Axes, loss: LoggedLoss, chart: Chart) -> None:
    """Draw one chart of a loss as it was logged."""
    for metric, color in zip(chart.metrics, (BLUE, ORANGE, GREEN), strict=False):
        _draw_line(axes, *_thinned(*loss.series(metric)), color=color, label=metric)
    if axes.lines and len(chart.metrics) > 1:
        axes.legend(frameon=False)
    _draw_resets(axes, loss)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    if chart.unit == "count":
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))  # at least 0 to 1, even if all counts are 0


class _NotebookFigure(Figure):
    """A figure that notebooks show although pyplot did not make it."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=100)
        return picture.getvalue()


def boxcar(values: ArrayLike, width: int) -> NDArray[np.float64]:
    """Mean over a sliding window. Values that are not finite are left out.

    Args:
        values: [steps].
        width: number of steps in a window, at least 1.

    Returns:
        [steps]: for each step, the mean over it and up to ``width - 1`` steps before it; NaN where
        no value of the window is finite.
    """
    given = np.asarray(values, dtype=np.float64)
    valid = np.isfinite(given)
    counts = _sliding_sum(valid.astype(np.float64), width)
    sums = _sliding_sum(np.where(valid, given, 0.0), width)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _sliding_sum(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Sum of each value and up to ``width - 1`` values before it, [steps].

    The values are split into blocks of ``width``. A window consists of the end of one block and the
    start of the next block. So its sum is the sum of two cumulative sums, one within each block.
    Differences of one long cumulative sum would lose all precision after a huge loss.
    """
    steps = len(values)
    blocks = np.pad(values, (width, -steps % width)).reshape(-1, width)
    starts = blocks[1:].cumsum(axis=1)
    ends = blocks[:-1, ::-1].cumsum(axis=1)[:, ::-1]
    starts[:, :-1] += ends[:, 1:]
    return starts.ravel()[:steps]


def _thinned(
    step: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most 3,000 points or so of a curve, chosen so that it looks the same.

    The points are the smallest and the largest value of each of 1,000 parts of the curve, the 1,000
    largest of all values, and the first and the last value. So spikes that are close to each other
    are all drawn. ``step``, ``values`` and the two results are [points].
    """
    count = len(values)
    if count <= 2 * BUCKETS + LARGEST:
        return step, values
    starts = np.linspace(0, count, BUCKETS, endpoint=False, dtype=np.int64)
    part = np.repeat(np.arange(BUCKETS), np.diff([*starts, count]))
    order = np.lexsort((values, part))  # sorted by part, then by value
    ends = np.append(starts[1:], count) - 1
    largest = np.argpartition(values, -LARGEST)[-LARGEST:]
    kept = np.unique(np.concatenate([[0, count - 1], order[starts], order[ends], largest]))
    return step[kept], values[kept]


def _draw_line(axes: Axes, step: Any, values: Any, **style: Any) -> None:
    """Draw a line, or a point if there is only one value. ``step`` and ``values`` are [steps]."""
    axes.plot(step, values, marker="o" if len(step) == 1 else None, **style)


def draw_threshold(axes: Axes, step: ArrayLike, threshold: ArrayLike) -> None:
    """Draw a threshold where it is finite. ``step`` and ``threshold`` are [steps]."""
    known = np.isfinite(threshold)
    _draw_line(
        axes,
        np.asarray(step)[known],
        np.asarray(threshold)[known],
        color="black",
        lw=1.2,
        label="threshold",
        zorder=4,
    )


def draw_points(
    axes: Axes, step: ArrayLike, loss: ArrayLike, label: str, *, clipped: bool, size: float = 3
) -> None:
    """Draw points, red if ``clipped`` and grey otherwise. ``step`` and ``loss`` are [points]."""
    axes.scatter(
        step,
        loss,
        s=size,
        color=CLIPPED if clipped else "0.7",
        label=label,
        linewidths=0,
        rasterized=True,
        zorder=3 if clipped else 1,
    )


def finish(figure: Figure, labelled: Any) -> None:
    """Remove the upper and right borders of a figure's axes, and add one legend below the axes.

    Args:
        figure: the figure, with all its axes.
        labelled: the axes whose labels are in the legend, each label once.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    artists = {
        label: artist
        for axes in labelled
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if not artists:
        return
    legend = figure.legend(
        list(artists.values()),
        list(artists),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([40])  # the colours of smaller points could not be told apart


def _draw_loss(axes: Axes, loss: LoggedLoss, window: int | None) -> None:
    """Draw all that was logged of one loss."""
    shown = [loss.series(metric)[1] for metric in ("loss", "loss_clipped")]
    shown += [_threshold(loss)[1], np.array([clip.loss for clip in loss.clips])]
    _set_scale(axes, np.concatenate(shown))
    _draw_curves(axes, loss, window)
    _draw_clips(axes, loss)
    _draw_resets(axes, loss)
    total = _clipped_total(loss)
    if total is not None:
        total = max(total, len(loss.clips))  # clips after the last row are only in the record
        axes.set_title(f"losses clipped: {total:,.0f}", loc="right", size="medium", color="0.3")
    if not (axes.lines or axes.collections):
        axes.text(0.5, 0.5, "nothing finite was logged", ha="center", transform=axes.transAxes)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=TICKS))


def _clipped_total(loss: LoggedLoss) -> float | None:
    """Number of losses clipped up to the last row; ``None`` if it was not logged."""
    _, totals = loss.series("clipped_total")
    return float(totals[-1]) if len(totals) else None


def _draw_resets(axes: Axes, loss: LoggedLoss) -> None:
    """Draw a line where the moments were reset: at the first row after the reset."""
    steps, resets = loss.series("resets")
    for step in steps[1:][np.diff(resets) > 0]:
        axes.axvline(step, color="0.4", lw=0.9, ls=(0, (4, 3)), label="moments reset", zorder=1)


def _draw_curves(axes: Axes, loss: LoggedLoss, window: int | None) -> None:
    """Draw the logged loss and its boxcar, and the loss after clipping if it differs."""
    steps, values = loss.series("loss")
    width = max(1, len(steps) // WINDOWS) if window is None else window
    means = f", mean of {width} logged values" if width > 1 else ""
    if len(steps) and means:
        style = {"color": BLUE, "lw": 0.7, "alpha": 0.45, "label": "loss", "zorder": 2}
        _draw_line(axes, *_thinned(steps, values), **style)
    if len(steps):
        mean = _thinned(steps, boxcar(values, width))
        _draw_line(axes, *mean, color=BLUE, lw=1.8, label=f"loss{means}", zorder=3)
    after_steps, after = loss.series("loss_clipped")
    is_changed = not (np.array_equal(after_steps, steps) and np.array_equal(after, values))
    if len(after) and is_changed:
        mean = _thinned(after_steps, boxcar(after, width))
        label = f"loss after clipping{means}"
        _draw_line(axes, *mean, color=GREEN, lw=1.8, label=label, zorder=3)


def _finite_clips(loss: LoggedLoss) -> NDArray[np.float64]:
    """The clips in order of steps, [clips, 3]: step, loss and threshold."""
    clips = sorted(clip for clip in loss.clips if np.isfinite(clip).all())
    return np.array(clips, dtype=np.float64).reshape(-1, 3)


def _threshold(loss: LoggedLoss) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the threshold as logged. Without a log, those in the record."""
    steps, values = loss.series("threshold")
    if len(steps):
        return steps, values
    clips = _finite_clips(loss)
    return clips[:, 0], clips[:, 2]


def _draw_clips(axes: Axes, loss: LoggedLoss) -> None:
    """Draw the threshold and the clips. Without a record, mark the rows that contain clips."""
    clips, threshold = _finite_clips(loss), _threshold(loss)
    if len(threshold[0]):
        draw_threshold(axes, *_thinned(*threshold))
    if len(clips):
        total = _clipped_total(loss)
        is_incomplete = total is not None and total > len(clips)
        label = f"clipped loss, the {len(clips):,} worst" if is_incomplete else "clipped loss"
        draw_points(axes, *_thinned(clips[:, 0], clips[:, 1]), label, clipped=True, size=6)
        return
    steps, values = loss.series("loss")
    fraction_steps, fraction = loss.series("clipped_fraction")
    marked = np.isin(steps, fraction_steps[fraction > 0])
    if marked.any():
        label = "contains clipped losses"
        points = _thinned(steps[marked], values[marked])
        draw_points(axes, *points, label, clipped=True, size=8)


def _set_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Set the scale of the losses' axis.

    If all losses are positive, the scale is logarithmic. If not all are positive, and the largest
    absolute value is more than ten times the median absolute value (without zeros), the scale is
    linear around 0 and logarithmic beyond. In all other cases the scale is linear.
    """
    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if len(sizes) == 0:
        return
    usual = float(np.median(sizes))
    if len(sizes) == len(values) and values.min() > 0:
        axes.set_yscale("log")
    elif sizes.max() > 10 * usual:
        axes.set_yscale("symlog", linthresh=usual)
