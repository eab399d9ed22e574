"""The pictures of docs/dashboards.md, of one real training: ``python -m docs._build.pictures``.

It needs ``pip install -e '.[examples,wandb]' tensorboard mlflow playwright`` and Chromium. W&B has no
server here: its charts and its table are read back from an offline run, and each is drawn as a page
of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import plotly.io
import pytorch_lightning as pl
from playwright.sync_api import Page, sync_playwright
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

from examples.cifar10_supersampling.datamodule import whole
from examples.cifar10_supersampling.module import Supersampling
from examples.find_bad_samples import corrupted_images
from lightning_alrc import ALRCCallback
from lightning_alrc._telemetry import telemetry
from tests import offline_wandb

IMAGES = Path(__file__).parents[1] / "images"
STEPS = 600


def train(folder: Path) -> Path:
    """Train on photographs of which one in twenty is corrupted; returns the W&B run's folder."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    pl.seed_everything(0, verbose=False)
    telemetry.SHORTEST_FIT_WITH_CHARTS = 0.0  # a fast machine trains for less than a minute
    images = corrupted_images("photographs", folder, STEPS * 8, STEPS * 8 // 20, seed=0)
    places = {name: index for index, name in enumerate(images.names)}
    wandb_logger = WandbLogger(save_dir=folder, project="photographs", offline=True)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[
            ALRCCallback(num_stddev=2, render=lambda spike: images.images[places[spike.id]])
        ],
        logger=[
            wandb_logger,
            TensorBoardLogger(folder, name="tensorboard"),
            MLFlowLogger(
                tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "kept")
            ),
        ],
        log_every_n_steps=10,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(
        Supersampling(loss="squared", guard=False, per_sample=True, learning_rate=1 / 1280),
        DataLoader(images, 8, shuffle=True, generator=images.generator, collate_fn=whole),
    )
    run = Path(wandb_logger.experiment.dir).parent
    wandb_logger.experiment.finish()
    return run


@contextmanager
def served(*command: str, url: str) -> Iterator[None]:
    """Run a local server until the with block ends."""
    server = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urlopen(url).close()
                break
            except URLError:
                time.sleep(1)
        yield
    finally:
        server.terminate()
        server.wait()


def draw_charts(page: Page, run: Path) -> None:
    """Draw the interactive charts as they lie in a W&B run, with a pointer over the worst spike."""
    path = max((run / "files/media/plotly/alrc").glob("charts_*"), key=lambda path: path.stat().st_mtime)
    drawn = run / "charts.html"
    plotly.io.from_json(path.read_text()).write_html(drawn, default_height="500px")
    page.goto(drawn.resolve().as_uri())
    page.wait_for_timeout(3000)
    page.evaluate("Plotly.Fx.hover(document.querySelector('.js-plotly-plot'), [{curveNumber: 3, pointNumber: 0}])")
    page.wait_for_timeout(1000)
    page.locator(".js-plotly-plot").screenshot(path=IMAGES / "wandb.png")


def draw_table(page: Page, run: Path) -> None:
    """Draw the first rows of the table of spikes as it lies in a W&B run."""
    files = {
        file["path"]: run.parent.parent / file["local_path"]
        for artifact in offline_wandb.read(run).of("artifact")
        for file in artifact["manifest"]["contents"]
    }
    (path,) = (files[name] for name in files if name.endswith("spikes.table.json"))
    table = json.loads(path.read_text())
    head = "".join(f"<th>{escape(column)}</th>" for column in table["columns"])
    rows = ""
    for row in table["data"][:6]:
        rows += "<tr>"
        for value in row:
            if isinstance(value, dict):
                picture = files[value["path"]].resolve().as_uri()
                rows += f'<td><img src="{picture}" width=64></td>'
            else:
                rows += f"<td>{f'{value:.4g}' if isinstance(value, float) else value}</td>"
        rows += "</tr>"
    drawn = run / "table.html"
    drawn.write_text(
        "<style>body{font:14px sans-serif}td,th{padding:4px 10px;text-align:left}</style>"
        f"<table><tr>{head}</tr>{rows}</table>"
    )
    page.goto(drawn.resolve().as_uri())
    page.locator("table").screenshot(path=IMAGES / "wandb-table.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        run = train(folder)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        draw_charts(page, run)
        draw_table(page, run)
        url = "http://127.0.0.1:6606"
        logs = str(folder / "tensorboard")
        with served("tensorboard.main", "--logdir", logs, "--port", "6606", url=url):
            page.goto(f"{url}/#timeseries&regexInput=version_0&_smoothingWeight=0")
            page.get_by_role("combobox", name="Filter tags (regex)").fill("alrc/(loss|thr|clipped|scale)")
            page.keyboard.press("Escape")  # closes the filter's list of suggestions
            page.get_by_role("button", name="Settings").last.click()  # the pane beside the charts
            page.wait_for_timeout(8000)
            page.screenshot(path=IMAGES / "tensorboard.png")
        url = "http://127.0.0.1:6607"
        store = f"sqlite:///{folder}/mlflow.db"
        with served(
            "mlflow", "server", "--backend-store-uri", store, "--port", "6607", "--workers", "1", url=url
        ):
            import mlflow

            mlflow.set_tracking_uri(store)
            (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
            ids = found.info.experiment_id, found.info.run_id
            page.set_viewport_size({"width": 1280, "height": 1000})
            page.goto(f"{url}/#/experiments/{ids[0]}/runs/{ids[1]}/model-metrics", wait_until="commit")
            page.wait_for_timeout(60_000)  # its pages are large
            # Leave out MLflow's navigation and assistant.
            clip = {"x": 198, "y": 0, "width": 750, "height": 1000}
            page.screenshot(path=IMAGES / "mlflow.png", clip=clip)
        browser.close()


if __name__ == "__main__":
    main()
