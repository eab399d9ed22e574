"""The watcher finds each kind of event independently. Ordinary losses give no event."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback
from lightning_alrc._telemetry import telemetry
from lightning_alrc._telemetry.watcher import (
    CLIP_AFTER_CALM,
    DATA_EVENT,
    DIVERGENCE_EVENT,
    MANY_CLIPS,
    NONFINITE,
    USUAL,
    Event,
    Watcher,
    clipped_limit,
    event_of_spike,
)
from tests.spikes import spike

Fit = Callable[..., Any]

PERIOD = 50
CALM_ROW, CLIP_ROW, MANY_CLIPS_ROW, NONFINITE_ROW = (
    (0.0, 0, 0),
    (0.02, 1, 0),
    (0.5, 25, 0),
    (0.0, 0, 3),
)


def watched(
    rows: list[tuple[float | None, int, int]], period: int = PERIOD, **settings: Any
) -> list[tuple[int, Event]]:
    """The events that a watcher finds in rows, and their steps.

    Args:
        rows: for each row, the clipped fraction; the number of clips since the previous row; and
            the number of losses since the previous row that are not finite. The fraction is
            ``None`` in a row without a finite loss.
        period: number of steps from row to row.
        **settings: arguments of the watcher.
    """
    watcher, losses = Watcher(**settings), {"loss": ALRC()}
    clipped = nonfinite = 0.0
    found = []
    for index, (fraction, new_clipped, new_nonfinite) in enumerate(rows, 1):
        clipped, nonfinite = clipped + new_clipped, nonfinite + new_nonfinite
        row = {"clipped_total": clipped, "nonfinite_total": nonfinite}
        if fraction is not None:
            row["clipped_fraction"] = fraction
        step = index * period
        found += [(step, event) for event in watcher.events(step, {"loss": row}, losses)]
    return found


def kinds(rows: list[tuple[float | None, int, int]], **settings: Any) -> list[tuple[int, str]]:
    return [(step, event.kind) for step, event in watched(rows, **settings)]


# ---- spikes that were judged


def settled_alrc() -> ALRC:
    """An ALRC with a mean of 1, a standard deviation of 1 and a threshold of 4."""
    return ALRC(mu1_start=1.0, mu2_start=2.0)


def test_the_event_of_a_spike_has_its_sample_and_the_epochs_in_which_it_spiked() -> None:
    known = spike(loss=90.0, threshold=4.0, kind="data", epoch=2, gradient_norm=7.5)
    others = [spike(epoch=0, step=1), spike(epoch=1, id="eight"), spike("other", epoch=1), known]
    event = event_of_spike(known, others, settled_alrc())
    assert event is not None
    assert (event.kind, event.loss) == (DATA_EVENT, "loss")
    assert "fall" not in event.text
    for part in (
        "90 at step 3, epoch 2, batch 3, sample 1, id 'seven'",
        "norm was then 7.5",
        "[0, 2]",
    ):
        assert part in event.text


def test_a_small_spike_of_the_data_is_no_event() -> None:
    assert event_of_spike(spike(loss=6.9, threshold=4.0, kind="data"), [], settled_alrc()) is None
    assert (
        event_of_spike(spike(loss=7.1, threshold=4.0, kind="data"), [], settled_alrc()) is not None
    )


@pytest.mark.parametrize("num_stddev", [3.0, math.inf])
def test_a_spike_below_the_mean_is_an_event_if_it_is_far_below(num_stddev: float) -> None:
    alrc = ALRC(num_stddev, mu1_start=1.0, mu2_start=2.0, num_stddev_below=3.0)
    for loss, is_event in ((-2.1, False), (-4.9, False), (-5.1, True), (-100.0, True)):
        low = spike(loss=loss, threshold=-2.0, kind="data")
        event = event_of_spike(low, [], alrc)
        assert (event is not None) == is_event, loss
        assert event is None or event.text.endswith(
            "The losses after it do not stay high: look at the data. "
            "Losses that fall for good look the same."
        )


def test_a_spike_below_the_mean_of_a_fit_that_had_a_lower_bound_is_an_event() -> None:
    low = spike(loss=-100.0, threshold=-2.0, kind="data")
    assert event_of_spike(low, [], settled_alrc()) is not None


def test_a_divergence_of_any_size_is_an_event() -> None:
    event = event_of_spike(spike(loss=4.1, threshold=4.0, kind="divergence"), [], settled_alrc())
    assert event is not None
    assert event.kind == DIVERGENCE_EVENT
    assert "The losses after it stay above those before it" in event.text


# ---- each kind


def test_a_calm_training_has_no_event() -> None:
    assert watched([CALM_ROW] * 1000) == []


def test_the_first_spike_after_a_long_calm_is_an_event() -> None:
    ((step, event),) = watched([CALM_ROW] * 20 + [CLIP_ROW])
    assert (step, event.kind) == (1050, CLIP_AFTER_CALM)
    assert event.text == "1 clipped up to step 1,050, the first for 1,000 steps or more"
    assert kinds([CALM_ROW] * 19 + [CLIP_ROW]) == []
    assert kinds([CALM_ROW] * 5 + [CLIP_ROW], calm=250) == [(300, CLIP_AFTER_CALM)]
    # Spikes that come often are what ALRC is for.
    assert kinds([CLIP_ROW, *[CALM_ROW] * 9] * 100) == []


@pytest.mark.parametrize(("period", "calm"), [(1000, 1000), (2000, 1000), (50, 20)])
def test_clips_in_each_row_are_no_event_however_rare_the_rows(period: int, calm: int) -> None:
    often = (0.01, period // 10, 0)
    assert kinds([often] * 10, period=period, calm=calm) == []
    rare = [often, CALM_ROW, often, often]
    assert kinds(rare, period=period, calm=calm) == [(3 * period, CLIP_AFTER_CALM)]


def test_each_row_with_a_clip_is_an_event_if_no_calm_is_asked_for() -> None:
    assert kinds([CLIP_ROW, CLIP_ROW], calm=0) == [(50, CLIP_AFTER_CALM), (100, CLIP_AFTER_CALM)]


def test_losses_that_are_not_finite_give_an_event() -> None:
    ((step, event),) = watched([CALM_ROW, NONFINITE_ROW, CALM_ROW])
    assert (step, event.kind, event.loss) == (100, NONFINITE, "loss")
    assert event.text == "3 NaN or infinite up to step 100"


def test_a_clipped_fraction_is_taken_over_enough_steps() -> None:
    assert kinds([CALM_ROW, CALM_ROW, MANY_CLIPS_ROW, MANY_CLIPS_ROW]) == [(200, MANY_CLIPS)]
    assert kinds([CALM_ROW, CALM_ROW, (0.3, 15, 0), CALM_ROW] * 20) == []  # 15 % in 100 steps
    assert kinds([(0.3, 15, 0), CALM_ROW], clipped_fraction=0.1) == [(100, MANY_CLIPS)]
    assert kinds([MANY_CLIPS_ROW] * 10, clipped_fraction=0.6) == []


def test_a_limit_event_has_the_steps_that_it_has_lasted() -> None:
    events = [
        event
        for _, event in watched(
            [CALM_ROW] * 10 + [MANY_CLIPS_ROW] * 10 + [CALM_ROW] * 2 + [MANY_CLIPS_ROW] * 2
        )
    ]
    assert [event.lasted for event in events] == [100, 200, 300, 400, 500, 100]
    assert "50% clipped up to step 1,000, and more than 20% for 500 steps" in events[4].text
    assert "Raise num_stddev" in events[4].text


@pytest.mark.parametrize("period", [1, 3, 50, 400])
def test_limit_events_do_not_depend_on_the_steps_between_rows(period: int) -> None:
    """Every other loss is clipped. A row of one loss has a clipped fraction of 1 or 0."""
    rows = [((index % 2 if period == 1 else 0.5), 1, 0) for index in range(3000 // period)]
    lasted = [event.lasted for _, event in watched(rows, period)]
    assert lasted[0] == math.ceil(100 / period) * period
    assert 2800 <= lasted[-1] <= 3000


# ---- one kind does not hide another


def test_losses_that_are_not_finite_in_every_row_hide_no_other_event() -> None:
    rows = [*[(0.0, 0, 1)] * 20, (0.02, 1, 1), *[(0.5, 25, 1)] * 4]
    found = kinds(rows)
    assert [step for step, kind in found if kind == NONFINITE] == [*range(50, 1300, 50)]
    assert (1050, CLIP_AFTER_CALM) in found
    assert (1200, MANY_CLIPS) in found


def test_rows_without_a_finite_loss_are_not_taken_for_rows_without_a_clip() -> None:
    lost = (None, 0, 1)
    limits = [step for step, kind in kinds([MANY_CLIPS_ROW, lost, lost] * 4) if kind == MANY_CLIPS]
    assert limits == [200, 500]  # rows without a finite loss do not count for the 100 steps
    assert not any(kind == MANY_CLIPS for _, kind in kinds([lost] * 100))


def test_each_loss_is_watched_by_itself() -> None:
    watcher, losses = Watcher(), {"first": ALRC(), "second": ALRC()}
    found = []
    for step in range(100, 1001, 100):
        row = {"clipped_fraction": 0.5, "clipped_total": float(step), "nonfinite_total": 0.0}
        names = ["first"] if step <= 500 else ["first", "second"]
        found += watcher.events(step, dict.fromkeys(names, row), losses)
    lasted = {name: [event.lasted for event in found if event.loss == name] for name in losses}
    assert lasted == {"first": [*range(100, 1001, 100)], "second": [*range(100, 501, 100)]}


def test_losses_counted_before_the_fit_give_no_event() -> None:
    before = {"nonfinite_total": 7.0, "clipped_total": 9.0}
    watcher, losses = Watcher(5000, {"loss": before}), {"loss": ALRC()}
    row = {**before, "clipped_fraction": 0.0}
    assert watcher.events(5050, {"loss": row}, losses) == []
    (event,) = watcher.events(5100, {"loss": {**row, "nonfinite_total": 8.0}}, losses)
    assert event.text == "1 NaN or infinite up to step 5,100"


# ---- the fraction of ordinary losses that is clipped

DRAWS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "gaussian": lambda generator, size: generator.normal(1.0, 0.1, size),
    "lognormal": lambda generator, size: generator.lognormal(0.0, math.sqrt(math.log(2)), size),
    "exponential": lambda generator, size: generator.exponential(1.0, size),
}


def clipped_fraction(kind: str, steps: int = 1500, batch: int = 8, **settings: Any) -> float:
    """The fraction of a distribution's losses that ALRC clips, after the first 500 steps."""
    alrc, weight = ALRC(**settings), torch.ones((), requires_grad=True)
    batches = torch.from_numpy(DRAWS[kind](np.random.default_rng(0), (steps, batch)))
    for losses in batches[:500]:
        alrc(weight * losses)
    before = int(alrc.clipped_total)
    for losses in batches[500:]:
        alrc(weight * losses)
    return (int(alrc.clipped_total) - before) / ((steps - 500) * batch)


@pytest.mark.parametrize("num_stddev", USUAL)
def test_the_usual_fractions_are_as_measured(num_stddev: float) -> None:
    measured = {kind: clipped_fraction(kind, num_stddev=num_stddev) for kind in DRAWS}
    largest, gaussian = USUAL[num_stddev]
    assert max(measured.values()) == pytest.approx(largest, abs=0.02)
    assert measured["gaussian"] == pytest.approx(gaussian, abs=0.03)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(
    ("num_stddev", "below"), [(0.6, None), (1.4, None), (1.5, 1.5), (2.0, 2.0), (3.0, 1.0)]
)
def test_the_limit_is_well_above_the_usual_fraction(
    num_stddev: float, below: float | None, kind: str
) -> None:
    settings = {"num_stddev": num_stddev, "num_stddev_below": below}
    usual, limit = clipped_fraction(kind, 1000, **settings), clipped_limit(num_stddev, below)
    assert usual <= limit - min(usual, 1 - usual) / 3
    assert 0.2 <= limit < 0.9


def test_the_limit_is_20_percent_if_few_losses_are_usually_clipped() -> None:
    assert [clipped_limit(num_stddev) for num_stddev in (2, 2.5, 3, 4, math.inf)] == [0.2] * 5
    assert clipped_limit(3, 3) == clipped_limit(2, 2) == 0.2
    assert clipped_limit(0.1) == clipped_limit(0.5)
    limits = [clipped_limit(0.01 * index) for index in range(50, 400)]
    assert limits == sorted(limits, reverse=True)


# ---- a Trainer


class BatchesOfLosses(LightningModule):
    """Takes batches of losses. The loss of a training step is its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, losses: Tensor, batch_idx: int) -> Tensor:
        return self.weight * losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


START = {"mu1_start": 1.0, "mu2_start": 1.01}


def rising(steps: int) -> Any:
    """Losses, [steps, 1], that rise faster than the threshold."""
    return 1.02 ** np.arange(steps)[:, None]


def warned(fit: Fit, losses: Any, callback: ALRCCallback, **arguments: Any) -> list[str]:
    """The console's warnings that ALRC limits the step size.

    Args:
        fit: fits a module.
        losses: the losses of the fit, [steps, batch].
        callback: the callback of the fit.
        **arguments: arguments of the Trainer.
    """
    batches = DataLoader(torch.as_tensor(losses).float(), batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(BatchesOfLosses(), callback, batches=batches, max_epochs=1, **arguments)
    messages = [str(each.message) for each in caught]
    return [message for message in messages if "limit on the step size" in message]


@pytest.mark.parametrize(
    ("num_stddev", "kind"),
    [(0.5, "exponential"), (1.0, "gaussian"), (1.0, "lognormal"), (1.5, "exponential")],
)
def test_ordinary_losses_give_no_warning(
    fit: Fit, num_stddev: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fewer steps must be limited, the more often there is a warning.
    monkeypatch.setattr(telemetry, "STEPS_BEFORE_WARNING", 300)
    losses = DRAWS[kind](np.random.default_rng(1), (500, 8))
    callback = ALRCCallback(num_stddev=num_stddev)
    assert warned(fit, losses, callback) == []
    assert callback.losses["loss"].clipped_total > 0.05 * losses.size


@pytest.mark.parametrize("num_stddev", [0.5, 3.0])
def test_losses_that_rise_faster_than_the_threshold_give_one_warning(
    fit: Fit, num_stddev: float
) -> None:
    (message,) = warned(fit, rising(1100), ALRCCallback(num_stddev=num_stddev, **START))
    assert "Loss 'loss': " in message
    assert "% clipped up to step 1,049" in message
    assert "Raise num_stddev" in message


def test_limited_steps_of_two_short_fits_do_not_add_up_to_a_warning(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "STEPS_BEFORE_WARNING", 200)
    callback = ALRCCallback(**START)
    # A warning needs 200 limited steps in one fit.
    counts = [len(warned(fit, rising(steps), callback)) for steps in (300, 150, 150, 300)]
    assert counts == [1, 0, 0, 1]
