"""What a Weights & Biases run shows besides its rows: settings, summaries, charts and spikes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from html import escape
from pathlib import Path
from typing import Any

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.alerts import Alert
from lightning_alrc._telemetry.dashboards import FIGURE, SPIKES, Dashboard, is_of_plotly, table_of
from lightning_alrc._telemetry.pictures import Renderer
from lightning_alrc._trainer.named_losses import metric_name
from lightning_alrc.alrc import ALRC

__all__ = ["SPIKES", "STEP", "WandbRun", "artifact_name", "prefixed"]

STEP = "trainer/global_step"
"""Name under which WandbLogger logs the training step, which is the x axis of all metrics."""

SUMMARIES = {
    "loss": "max,mean,last",
    "loss_clipped": "max,mean,last",
    "scale": "min,mean",
    "clipped_fraction": "max,mean,last",
    "mu1": "last",
    "stddev": "last",
    "threshold": "last",
    "clipped_total": "last",
    "nonfinite_total": "last",
    "resets": "last",
    "spike_score": "max,last",
    "spike_score_total": "last",
}
"""By metric, the summaries of a whole run."""


def prefixed(prefix: str, metric: str) -> str:
    """The name of a metric in a run whose WandbLogger has a prefix.

    >>> prefixed("exp", "alrc/loss"), prefixed("", "alrc/loss")
    ('exp-alrc/loss', 'alrc/loss')
    """
    return f"{prefix}-{metric}" if prefix else metric


def artifact_name(run: str) -> str:
    """The name of the artifact that a run's record and batches are kept in.

    >>> artifact_name("1a2b3c4d")
    'alrc-spikes-1a2b3c4d'

    W&B allows only some characters in it, and at most 128:

    >>> artifact_name("fold=0 seed+1")
    'alrc-spikes-fold-0-seed-1'

    Args:
        run: id of the run.
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"alrc-spikes-{run}")[:128]


class WandbRun(Dashboard):
    """The run of Lightning's WandbLogger."""

    figures = ("plotly", "matplotlib")

    def describe(
        self, losses: Mapping[str, ALRC], new: Collection[str], settings: Mapping[str, Any]
    ) -> None:
        """Define the new losses' metrics, and write all settings into the config as ``alrc``."""
        run = self.logger.experiment
        prefix = getattr(self.logger, "_prefix", "")
        for name in new:
            for metric, summary in SUMMARIES.items():
                full = prefixed(prefix, metric_name(name, metric))
                # For W&B, a dot without a backslash separates the parts of a nested metric's path.
                run.define_metric(full.replace(".", "\\."), step_metric=STEP, summary=summary)
        of_losses = {name: alrc.settings for name, alrc in losses.items()}
        # Each update has the settings of all losses, because it replaces everything below its key.
        config = {"alrc": {**settings, "losses": of_losses}}
        run.config.update(config, allow_val_change=True)

    def show_message(self, tag: str, message: str, step: int) -> None:
        import wandb

        self._log({tag: wandb.Html(f"<p>Step {step:,}: {escape(message)}</p>")}, step)

    def alert(self, alert: Alert) -> None:
        self.logger.experiment.alert(alert.title, alert.text, level=alert.level)

    def draw(self, figure: Any, step: int) -> None:
        import wandb

        shown = wandb.Plotly(figure) if is_of_plotly(figure) else wandb.Image(figure)
        self._log({FIGURE: shown}, step)

    def show_spikes(self, spikes: list[Spike], renderer: Renderer | None, step: int) -> None:
        """Log spikes as a table. W&B shows the last table."""
        import wandb

        columns, rows = table_of(spikes)
        if renderer is not None:
            columns = [*columns, "image"]
            images = renderer.images(spikes, wandb.Image)
            rows = [[*row, image] for row, image in zip(rows, images, strict=True)]
        self._log({SPIKES: wandb.Table(list(columns), rows)}, step)

    def keep_files(self, files: Callable[[], Mapping[str, Path]]) -> None:
        """Log files as one artifact."""
        import wandb

        found, run = files(), self.logger.experiment
        if not found:
            return
        artifact = wandb.Artifact(
            artifact_name(run.id), "alrc-spikes", "The worst clips of ALRC, and their batches"
        )
        for name, path in found.items():
            artifact.add_file(str(path), name)
        run.log_artifact(artifact)

    def _log(self, media: Mapping[str, Any], step: int) -> None:
        self.logger.experiment.log({**media, STEP: step})
