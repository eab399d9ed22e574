"""Which package draws for which dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_alrc import ALRCCallback
from lightning_alrc._telemetry import drawing
from lightning_alrc._telemetry.dashboards import Dashboard
from lightning_alrc._telemetry.drawing import Drawing
from lightning_alrc._telemetry.other_dashboards import MLflow, TensorBoard
from lightning_alrc._telemetry.wandb_dashboard import WandbRun
from tests.nets import NETS, SETTINGS
from tests.offline_wandb import finished

ROWS = [{"step": 1.0, "alrc/loss": 2.0}, {"step": 2.0, "alrc/loss": 3.0}]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes ``Drawing`` find only these packages."""

    def only(*packages: str) -> None:
        monkeypatch.setattr(drawing, "find_spec", lambda name: name in packages or None)

    return only


def drawn_by(dashboard: Dashboard) -> str | None:
    """The package that draws for a dashboard."""
    found = list(Drawing(True).figures([dashboard], ROWS, [], 1))
    assert bool(found) is Drawing(True).can_draw_for(dashboard)
    return type(found[0][0]).__module__.partition(".")[0] if found else None


def test_weights_and_biases_gets_the_interactive_figure_if_plotly_is_installed(
    installed: Callable[..., None],
) -> None:
    pytest.importorskip("plotly")
    installed("plotly", "matplotlib")
    assert drawn_by(WandbRun(None)) == "plotly"
    assert drawn_by(TensorBoard(None)) == "matplotlib"
    installed("plotly")
    assert drawn_by(WandbRun(None)) == "plotly"
    assert drawn_by(TensorBoard(None)) is None


def test_without_plotly_weights_and_biases_gets_an_image(installed: Callable[..., None]) -> None:
    installed("matplotlib")
    assert drawn_by(WandbRun(None)) == "matplotlib"
    installed()
    assert drawn_by(WandbRun(None)) is None


def test_a_figure_is_drawn_once_for_all_that_show_it(installed: Callable[..., None]) -> None:
    installed("matplotlib")
    shown = [TensorBoard(None), Dashboard(None), WandbRun(None)]
    ((_, dashboards),) = Drawing(True).figures(shown, ROWS, [], 1)
    assert dashboards == [shown[0], shown[2]]


def test_nothing_is_drawn_if_charts_are_off() -> None:
    shown = [TensorBoard(None), WandbRun(None), MLflow(None)]
    assert not any(Drawing(False).can_draw_for(each) for each in shown)
    assert list(Drawing(False).figures(shown, ROWS, [], 1)) == []


@pytest.mark.usefixtures("charts_of_short_fits")
def test_the_image_in_a_real_run(
    fit: Any, tmp_path: Any, wandb_logger: Any, installed: Callable[..., None]
) -> None:
    installed("matplotlib")
    logger, tensorboard = wandb_logger(), TensorBoardLogger(tmp_path)
    callback = ALRCCallback(**SETTINGS)
    fit(NETS["pytorch_lightning"](), callback, logger=[logger, tensorboard], log_every_n_steps=2)
    run = finished(logger)
    (row,) = (row for row in run.history if "alrc/charts.path" in row)
    assert row["trainer/global_step"] == 12
    assert row["alrc/charts._type"] == "image-file"
    assert (run.folder / "files" / row["alrc/charts.path"]).stat().st_size > 10_000
