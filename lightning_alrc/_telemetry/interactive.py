"""The charts of a training as a Plotly figure: losses, thresholds, and each spike by its id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from itertools import islice
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.chart_definitions import (
    BLUE,
    CHARTS,
    CLIPPED,
    GREEN,
    LOSSES_IN_CHARTS,
)
from lightning_alrc._telemetry.reading import LoggedLoss, read

__all__ = ["interactive_charts"]

LINES = {
    "loss": ("loss", BLUE, 1.0),
    "loss_clipped": ("loss after clipping", GREEN, 1.0),
    "threshold": ("threshold", "black", 1.5),
}
"""By metric: label, colour and width of the line."""


def interactive_charts(
    rows: Iterable[Mapping[str, Any]], spikes: Iterable[Spike], count: int = 0
) -> go.Figure:
    """Draw each loss with its threshold, and its spikes as points.

    The axis of a loss is logarithmic if all its values are positive. Only the metrics in
    :data:`LINES` are drawn, because dashboards that show Plotly's figures draw a line of every
    logged metric by themselves.

    Args:
        rows: rows as logged.
        spikes: the worst clips. Each point has a text that says where the spike comes from.
        count: number of losses in the training, if the rows do not have all of them.

    Returns:
        A figure with one chart for each of the first 8 losses, one below the other. If there are
        more losses, the title says so.
    """
    every = read(rows)
    losses = dict(islice(every.items(), LOSSES_IN_CHARTS))
    by_name: dict[str, list[Spike]] = {}
    for spike in spikes:
        by_name.setdefault(spike.name, []).append(spike)
    title = CHARTS[0].title
    titles = [title if name == "loss" else f"{title}: {escape(name)}" for name in losses]
    figure = make_subplots(rows=len(losses), cols=1, shared_xaxes=True, subplot_titles=titles)
    in_legend: set[str] = set()
    for row, (name, loss) in enumerate(losses.items(), 1):
        traces = [*_loss_lines(loss), *_spike_points(by_name.get(name, []))]
        for trace in traces:
            trace.showlegend = trace.name not in in_legend
            in_legend.add(trace.name)
            figure.add_trace(trace, row, 1)
        scale = "log" if all(np.min(trace.y) > 0 for trace in traces) else "linear"
        figure.update_yaxes(title=CHARTS[0].unit, type=scale, row=row, col=1)
    figure.update_xaxes(title="training step", row=len(losses), col=1)
    count = max(count, len(every))
    figure.update_layout(
        title=f"{len(losses)} of {count} losses" if len(losses) < count else None,
        height=100 + 400 * len(losses),
        template="plotly_white",
        hovermode="closest",
    )
    return figure


def _loss_lines(loss: LoggedLoss) -> list[go.Scatter]:
    found = []
    for metric, (label, color, width) in LINES.items():
        steps, values = loss.series(metric)
        if len(steps):
            trace = go.Scatter(
                x=steps.tolist(),
                y=values.tolist(),
                mode="lines" if len(steps) > 1 else "markers",
                line={"color": color, "width": width},
                marker={"color": color},
                name=label,
            )
            found.append(trace)
    return found


def _spike_points(spikes: list[Spike]) -> list[go.Scatter]:
    if not spikes:
        return []
    return [
        go.Scatter(
            x=[spike.step for spike in spikes],
            y=[spike.loss for spike in spikes],
            mode="markers",
            marker={"color": CLIPPED, "size": 7},
            name="clipped loss",
            text=[_hover_text(spike) for spike in spikes],
            hoverinfo="text",
        )
    ]


def _hover_text(spike: Spike) -> str:
    """The text at a spike, one field on each line."""
    fields = {
        "id": spike.id,
        "sample": spike.sample,
        "step": spike.step,
        "epoch": spike.epoch,
        "batch": spike.batch_idx,
        "loss": f"{spike.loss:.4g}",
        "threshold": f"{spike.threshold:.4g}",
        "kind": spike.kind,
    }
    return "<br>".join(
        f"{name}: {escape(str(value)):.200}" for name, value in fields.items() if value is not None
    )
