"""``plot``: a training's losses, the threshold over them, and the losses that were clipped."""

from __future__ import annotations

import io
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

from lightning_alrc._telemetry.charts import CHARTS, LOSSES_IN_CHARTS, Chart
from lightning_alrc._telemetry.logs import LoggedLoss, Source, read

__all__ = ["BLUE", "GREEN", "ORANGE", "VERMILION", "boxcar", "plot"]

# Of Wong's palette, told apart by colour-blind readers too (Nature Methods 8, 2011, 441).
BLUE, GREEN, ORANGE, VERMILION = "#0072b2", "#009e73", "#e69f00", "#d55e00"
CLIPPED = "#cc3311"

WINDOWS = 30
"""Unless told, the boxcar is so short that this many lie side by side in a figure."""

TICKS = [1, 2, 5, 10]
"""Steps are told by round numbers: of 100 rather than of 80."""


def plot(
    source: Source,
    *more: Source,
    name: str | None = None,
    window: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the learning curve of a training under ALRC, its threshold, and what was clipped.

    >>> rows = [{"step": step, "alrc/loss": 10 / (step + 1)} for step in range(50)]
    >>> plot(rows).savefig("curves.png")  # doctest: +SKIP
    >>> plot("lightning_logs/version_0")  # doctest: +SKIP

    Each loss has a panel of its own, as a function of the training step: its logged values, thin;
    their boxcar, the mean over a sliding window, thick; the boxcar of the losses after clipping;
    and the threshold. Each clip of a record is a point; without a record, those rows are marked in
    which losses were clipped. A vertical line is where the moments were reset.

    Args:
        source: where the training was logged: the path of a Lightning CSVLogger's ``metrics.csv``
            or of its folder, of a W&B run's folder, or of a record of clips
            (``alrc_spikes.jsonl``); or rows in memory, each a mapping with a ``"step"`` and metrics
            such as ``"alrc/loss"``; or :attr:`ALRCCallback.spikes`. A record of clips in a folder,
            or in its ``checkpoints``, is found without being named, and so is the table of them in
            a W&B run.
        more: further sources of the same training, drawn into the same figure. Where two have the
            same metric of the same step, the last is right.
        name: the loss to draw; all of them unless given. The one that training_step returns is
            named ``"loss"``.
        window: of the boxcar, in logged rows; 1 draws none. A thirtieth of the rows unless given.
        title: above the figure.

    Returns:
        The figure, to be saved with ``savefig``. As the value of a notebook's cell it is shown.

    Raises:
        FileNotFoundError: if a path does not exist.
        ImportError: if wandb is not installed, and a W&B run is to be read.
        TypeError: if a source is no path, rows or spikes, or ``window`` is not an integer.
        ValueError: if a source is of another form or has nothing of ALRC's, if there is no loss
            of that name, or ``window`` is less than 1.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be an integer, 1 or more, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be an integer, 1 or more, got {window!r}")
    losses = read(source, *more)
    if not losses:
        raise ValueError("source must have something to draw, got a record without a clip")
    if name is not None and name not in losses:
        raise ValueError(f"name must be one of the losses logged, {sorted(losses)}, got {name!r}")
    shown = losses if name is None else {name: losses[name]}

    figure = _NotebookFigure(figsize=(9, 1 + 3.5 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (loss_name, loss) in zip(panels, shown.items(), strict=True):
        _draw(axes, loss, window)
        axes.set_ylabel("loss" if loss_name == "loss" else f"loss “{loss_name}”")
    panels[-1].set_xlabel("training step")
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    finish(figure, panels)
    return figure


def draw_charts(source: Source, *more: Source, count: int = 0) -> Figure:
    """Draw all that is logged of a training under ALRC, the charts of each loss below another's.

    Args:
        source: as for :func:`plot`, and ``more`` as well.
        more: see there.
        count: of losses, where the sources do not have all.

    Returns:
        The figure. The first chart of a loss is four times as large as the others, which are beside
        and below it. Of more than 8 losses it has the first 8, and says so.
    """
    every = read(source, *more)
    losses = dict(islice(every.items(), LOSSES_IN_CHARTS))
    figure = Figure(figsize=(12, 1 + 7.5 * len(losses)), layout="constrained")
    grid = figure.add_gridspec(3 * len(losses), 3)
    groups = []
    for index, (name, loss) in enumerate(losses.items()):
        top = 3 * index
        places = [grid[top : top + 2, :2], grid[top, 2], grid[top + 1, 2]]
        places += [grid[top + 2, column] for column in range(3)]
        panels = [figure.add_subplot(place) for place in places]
        _draw(panels[0], loss, None)
        for axes, chart in zip(panels, CHARTS, strict=True):
            title = chart.title if name == "loss" else f"{chart.title}: {name}"
            width = 66 if axes is panels[0] else 42
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
            axes.set_xlim(first.get_xlim())  # the record may go further back than the rows
    return figure


def _draw_metrics(axes: Axes, loss: LoggedLoss, chart: Chart) -> None:
    """Draw one chart of a loss as it was logged."""
    for metric, color in zip(chart.metrics, (BLUE, ORANGE, GREEN), strict=False):
        _draw_line(axes, *loss.series(metric), color=color, label=metric)
    if axes.lines and len(chart.metrics) > 1:
        axes.legend(frameon=False)
    _draw_resets(axes, loss)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    if chart.unit == "count":
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))  # where there are none, too


class _NotebookFigure(Figure):
    """A figure that notebooks show though pyplot, which would see to it, never heard of it."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=100)
        return picture.getvalue()


def boxcar(values: ArrayLike, width: int) -> NDArray[np.float64]:
    """Mean over a sliding window; what is not finite is left out.

    Args:
        values: [steps]
        width: steps in a window, at least 1.

    Returns:
        [steps], each the mean of that step and up to width-1 steps before it; NaN where none of
        them is finite.
    """
    given = np.asarray(values, dtype=np.float64)
    valid = np.isfinite(given)
    counts = _sliding_sum(valid.astype(np.float64), width)
    sums = _sliding_sum(np.where(valid, given, 0.0), width)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _sliding_sum(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Sum of each value and up to width-1 before it, [steps].

    Each window is the end of one block of ``width`` values and the start of the next. Differences
    of one long cumulative sum would lose all digits of the losses that come after a huge one.
    """
    steps = len(values)
    blocks = np.pad(values, (width, -steps % width)).reshape(-1, width)
    starts = blocks[1:].cumsum(axis=1)
    ends = blocks[:-1, ::-1].cumsum(axis=1)[:, ::-1]
    starts[:, :-1] += ends[:, 1:]
    return starts.ravel()[:steps]


def _draw_line(axes: Axes, step: Any, values: Any, **style: Any) -> None:
    """Draw a line, or a point where there is but one; both are [steps]."""
    axes.plot(step, values, marker="o" if len(step) == 1 else None, **style)


def draw_threshold(axes: Axes, step: ArrayLike, threshold: ArrayLike) -> None:
    """Draw a threshold where it is finite; both are [steps]."""
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
    """Draw losses as points, red if they were clipped and grey if not; both are [points]."""
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
    """Clear the frames of a figure's axes, and explain once below what several of them show.

    Args:
        figure: with all its axes.
        labelled: the axes whose artists the legend has, one for each label.
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
            handle.set_sizes([40])  # points as small as they are drawn could not be told apart


def _draw(axes: Axes, loss: LoggedLoss, window: int | None) -> None:
    """Draw all that was logged of one loss."""
    shown = [loss.series(metric)[1] for metric in ("loss", "loss_clipped", "threshold")]
    _set_scale(axes, np.concatenate([*shown, [clip.loss for clip in loss.clips]]))
    _draw_curves(axes, loss, window)
    _draw_clips(axes, loss)
    _draw_resets(axes, loss)
    _, totals = loss.series("clipped_total")
    if totals:
        total = max(totals[-1], len(loss.clips))  # the record may go further than the rows
        axes.set_title(f"losses clipped: {total:,.0f}", loc="right", size="medium", color="0.3")
    if not (axes.lines or axes.collections):
        axes.text(0.5, 0.5, "nothing finite was logged", ha="center", transform=axes.transAxes)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=TICKS))


def _draw_resets(axes: Axes, loss: LoggedLoss) -> None:
    """Draw a line where the moments were reset: at the first row that tells of it."""
    steps, resets = loss.series("resets")
    for step in np.asarray(steps[1:])[np.diff(resets) > 0]:
        axes.axvline(step, color="0.4", lw=0.9, ls=(0, (4, 3)), label="moments reset", zorder=1)


def _draw_curves(axes: Axes, loss: LoggedLoss, window: int | None) -> None:
    """Draw the loss as it was logged, its boxcar, and after clipping where that changed it."""
    steps, values = loss.series("loss")
    width = max(1, len(steps) // WINDOWS) if window is None else window
    means = f", mean of {width} logged values" if width > 1 else ""
    if steps and means:
        _draw_line(axes, steps, values, color=BLUE, lw=0.7, alpha=0.45, label="loss", zorder=2)
    if steps:
        mean = boxcar(values, width)
        _draw_line(axes, steps, mean, color=BLUE, lw=1.8, label=f"loss{means}", zorder=3)
    after = loss.series("loss_clipped")
    if after[0] and after != (steps, values):
        mean, label = boxcar(after[1], width), f"loss after clipping{means}"
        _draw_line(axes, after[0], mean, color=GREEN, lw=1.8, label=label, zorder=3)


def _draw_clips(axes: Axes, loss: LoggedLoss) -> None:
    """Draw the threshold, and what was above it: by the record, or else by the rows."""
    clips = sorted(clip for clip in loss.clips if np.isfinite(clip).all())
    # Without a log, the record has the threshold at each clip.
    threshold = loss.series("threshold")
    if not threshold[0]:
        threshold = [clip.step for clip in clips], [clip.threshold for clip in clips]
    if threshold[0]:
        draw_threshold(axes, *threshold)
    if clips:
        points = [clip.step for clip in clips], [clip.loss for clip in clips]
        _, totals = loss.series("clipped_total")
        part = bool(totals) and totals[-1] > len(clips)
        label = f"clipped loss, the {len(clips):,} worst" if part else "clipped loss"
        draw_points(axes, *points, label, clipped=True, size=6)
        return
    fraction = dict(zip(*loss.series("clipped_fraction"), strict=True))
    marked = {s: v for s, v in zip(*loss.series("loss"), strict=True) if fraction.get(s, 0) > 0}
    if marked:
        label = "contains clipped losses"
        draw_points(axes, list(marked), list(marked.values()), label, clipped=True, size=8)


def _set_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Make the losses' axis logarithmic if that can be; else, if they differ much, nearly so."""
    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if len(sizes) == 0:
        return
    usual = float(np.median(sizes))
    if len(sizes) == len(values) and values.min() > 0:
        axes.set_yscale("log")
    elif sizes.max() > 10 * usual:
        axes.set_yscale("symlog", linthresh=usual)
