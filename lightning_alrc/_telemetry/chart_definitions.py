"""The charts of a loss. Dashboards, figures and the W&B workspace all show these."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BLUE", "CHARTS", "CLIPPED", "GREEN", "LOSSES_IN_CHARTS", "ORANGE", "VERMILION", "Chart"]

# From Wong's palette for colour-blind readers (Nature Methods 8, 2011, 441).
BLUE, GREEN, ORANGE, VERMILION = "#0072b2", "#009e73", "#e69f00", "#d55e00"
CLIPPED = "#cc3311"

LOSSES_IN_CHARTS = 8
"""Largest number of losses that are drawn. Drawing a loss takes half a second, and the training
waits for it."""


class Chart(NamedTuple):
    """One chart of a loss."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    """names of metrics, without the prefix ``alrc/``"""
    log_scale: bool = False


CHARTS = (
    Chart(
        "Loss and the threshold above which it is clipped",
        "loss",
        ("loss", "threshold", "loss_clipped"),
        log_scale=True,  # on a linear scale one spike flattens all other values
    ),
    Chart("Fraction of the losses that were clipped", "fraction", ("clipped_fraction",)),
    Chart("Mean factor on the gradient, 1 while nothing is clipped", "factor", ("scale",)),
    Chart(
        "Running mean and standard deviation, which set the threshold", "loss", ("mu1", "stddev")
    ),
    Chart(
        "Losses that were clipped, or were NaN or infinite, since the start of training",
        "count",
        ("clipped_total", "nonfinite_total"),
    ),
    Chart(
        "Spike score: share of losses beyond 6 standard deviations, of 1,000 steps and of all",
        "fraction",
        ("spike_score", "spike_score_total"),
    ),
    # A separate chart, because one reset would be invisible beside thousands of clips.
    Chart("Resets of the moments since the start of training", "count", ("resets",)),
)
