"""What a Weights & Biases run shows beside its rows: settings, summaries, charts, the spikes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from html import escape
from typing import Any

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.alerts import Alert
from lightning_alrc._telemetry.dashboards import FIGURE, Dashboard
from lightning_alrc._telemetry.pictures import displayable
from lightning_alrc._trainer.named_losses import metric_name
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["SPIKES", "STEP", "WandbRun", "prefixed"]

STEP = "trainer/global_step"
"""The metric that Lightning's WandbLogger logs the step as. It is the x axis of all others."""

SPIKES = "alrc/spikes"
"""The name under which the table of the worst clips is logged."""

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


class WandbRun(Dashboard):
    """The run of Lightning's WandbLogger."""

    draws = True

    def describe(
        self, losses: Mapping[str, ALRC], new: Collection[str], settings: Mapping[str, Any]
    ) -> None:
        """Define the new losses' metrics, and write all settings into the config as ``alrc``."""
        run = self.logger.experiment
        prefix = getattr(self.logger, "_prefix", "")
        for name in new:
            for metric, summary in SUMMARIES.items():
                full = prefixed(prefix, metric_name(name, metric))
                # A dot would mean a metric nested in another.
                run.define_metric(full.replace(".", "\\."), step_metric=STEP, summary=summary)
        of_losses = {name: alrc.settings for name, alrc in losses.items()}
        # All settings each time: an update replaces everything below a key.
        config = {"alrc": {**settings, "losses": of_losses}}
        run.config.update(config, allow_val_change=True)

    def tell(self, tag: str, message: str, step: int) -> None:
        import wandb

        self._log({tag: wandb.Html(f"<p>Step {step:,}: {escape(message)}</p>")}, step)

    def alert(self, alert: Alert) -> None:
        self.logger.experiment.alert(alert.title, alert.text, level="WARN")

    def draw(self, figure: Any, step: int) -> None:
        import wandb

        self._log({FIGURE: wandb.Image(figure)}, step)

    def show_spikes(
        self, spikes: list[Spike], render: Callable[[Spike], Any] | None, step: int
    ) -> None:
        """Log spikes as one table.

        Args:
            spikes: the rows of the table.
            render: returns a spike's picture, in a form that
                :func:`~lightning_alrc._telemetry.pictures.displayable` takes; ``None`` for no
                picture. A spike for which it fails has no picture, and the first one is warned of.
            step: the step at which the table is logged.
        """
        import wandb

        columns: list[str | int] = list(Spike._fields)
        rows: list[list[Any]] = []
        for spike in spikes:
            row = spike._asdict()
            # All values of a column must be of one type.
            row["id"] = None if spike.id is None else str(spike.id)
            rows.append(list(row.values()))
        if render is not None:
            columns.append("image")
            for row_of_spike, image in zip(rows, _images(spikes, render), strict=True):
                row_of_spike.append(image)
        self._log({SPIKES: wandb.Table(columns, rows)}, step)

    def _log(self, media: Mapping[str, Any], step: int) -> None:
        self.logger.experiment.log({**media, STEP: step})


def _images(spikes: list[Spike], render: Callable[[Spike], Any]) -> list[Any]:
    """The picture of each spike; ``None`` where ``render`` returns none or fails."""
    import wandb

    images, warned = [], False
    for spike in spikes:
        try:
            picture = render(spike)
            images.append(None if picture is None else wandb.Image(displayable(picture)))
        except Exception as error:  # one missing file must not cost the other pictures
            images.append(None)
            if not warned:
                rank_zero_warn(f"a spike has no picture, as render failed: {error!r}, for {spike}")
            warned = True
    return images
