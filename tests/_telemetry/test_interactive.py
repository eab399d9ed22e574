"""The Plotly figure of a training: what it shows, and what W&B keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from lightning_alrc import ALRCCallback
from tests.nets import NAMED_NETS, NETS, SETTINGS
from tests.offline_wandb import OfflineRun, finished
from tests.spikes import spike

pytest.importorskip("plotly", reason="Plotly is not installed")

from lightning_alrc._telemetry.interactive import interactive_charts

Fit = Callable[..., Any]


def rows(prefix: str = "alrc/", sign: float = 1.0) -> list[dict[str, float]]:
    return [
        {"step": step, f"{prefix}loss": sign * (step + 1.0), f"{prefix}threshold": 9.0}
        for step in range(5)
    ]


def shown(figure: Any) -> dict[str, Any]:
    """A figure as the JSON that a dashboard gets."""
    found: dict[str, Any] = json.loads(figure.to_json())
    return found


def test_losses_and_threshold_are_lines_and_spikes_are_points_with_their_ids() -> None:
    spikes = [spike(step=3, id="cat/<7>.jpg", loss=12.0), spike("other", step=2)]
    figure = shown(interactive_charts(rows(), spikes))
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert list(traces) == ["loss", "threshold", "clipped loss"]
    assert traces["loss"]["y"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert traces["threshold"]["mode"] == traces["loss"]["mode"] == "lines"
    points = traces["clipped loss"]
    assert (points["mode"], points["x"], points["y"]) == ("markers", [3], [12.0])
    (text,) = points["text"]
    assert points["hoverinfo"] == "text"
    assert "id: cat/&lt;7&gt;.jpg" in text
    assert "step: 3" in text
    assert figure["layout"]["yaxis"]["type"] == "log"


def test_the_legend_has_each_name_once_whichever_loss_has_it() -> None:
    two = [row for name in ("a", "b") for row in rows(f"alrc/{name}/")]
    spikes = [spike("b", step=3, loss=12.0), spike("b", step=4, loss=13.0)]
    traces = shown(interactive_charts(two, spikes))["data"]
    named = [trace["name"] for trace in traces if trace["showlegend"]]
    assert named == ["loss", "threshold", "clipped loss"]


def test_negative_losses_are_drawn_on_a_linear_scale() -> None:
    figure = shown(interactive_charts(rows(sign=-1.0), []))
    assert figure["layout"]["yaxis"]["type"] == "linear"


def test_only_the_first_of_many_losses_are_drawn_and_the_title_says_so() -> None:
    many = [row for index in range(9) for row in rows(f"alrc/task{index}/")]
    figure = shown(interactive_charts(many, []))
    assert len(figure["data"]) == 8 * 2
    assert figure["layout"]["title"]["text"] == "8 of 9 losses"
    titles = [each["text"] for each in figure["layout"]["annotations"]]
    assert titles[1] == "Loss and the threshold above which it is clipped: task1"


def test_values_that_are_not_finite_are_left_out() -> None:
    lost = [*rows(), {"step": 5, "alrc/loss": math.nan, "alrc/threshold": math.inf}]
    for trace in shown(interactive_charts(lost, []))["data"]:
        assert trace["x"] == [0, 1, 2, 3, 4]


def charts_of(run: OfflineRun) -> dict[str, Any]:
    (row,) = (row for row in run.history if "alrc/charts.path" in row)
    assert row["alrc/charts._type"] == "plotly-file"
    assert row["trainer/global_step"] == 12
    charts: dict[str, Any] = json.loads(
        (run.folder / "files" / row["alrc/charts.path"]).read_text()
    )
    return charts


@pytest.mark.usefixtures("charts_of_short_fits")
def test_weights_and_biases_has_the_figure(fit: Fit, namespace: str, wandb_logger: Any) -> None:
    logger, callback = wandb_logger(namespace), ALRCCallback(**SETTINGS)
    fit(NETS[namespace]("vector"), callback, logger=logger, log_every_n_steps=2)
    run = finished(logger)
    traces = {trace["name"]: trace for trace in charts_of(run)["data"]}
    logged = [row["alrc/loss"] for row in run.history if "alrc/loss" in row]
    assert traces["loss"]["y"] == pytest.approx(logged)
    assert traces["clipped loss"]["y"] == [spike.loss for spike in callback.spikes]


@pytest.mark.usefixtures("charts_of_short_fits")
def test_weights_and_biases_has_the_figure_of_named_losses(fit: Fit, wandb_logger: Any) -> None:
    logger = wandb_logger()
    fit(NAMED_NETS["pytorch_lightning"]("matrix"), logger=logger, log_every_n_steps=2)
    titles = [each["text"] for each in charts_of(finished(logger))["layout"]["annotations"]]
    assert [title.rpartition(": ")[2] for title in titles] == ["first", "second"]
