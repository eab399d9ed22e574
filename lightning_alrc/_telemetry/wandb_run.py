"""What a Weights & Biases run shows beside its rows: settings, summaries, charts, who spiked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from html import escape
from typing import Any

from torch import Tensor

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.alerts import Alert
from lightning_alrc._telemetry.dashboards import FIGURE, Dashboard
from lightning_alrc._trainer.named_losses import metric_name
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["SPIKES", "STEP", "WandbRun"]

STEP = "trainer/global_step"
"""What Lightning's WandbLogger has every metric drawn over."""

SPIKES = "alrc/spikes"
"""What the table of the worst clips is logged as."""

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
}
"""What stands for a whole run, by metric."""


PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Of PIL's images, those that PNG files can hold."""


class WandbRun(Dashboard):
    """The run of Lightning's WandbLogger."""

    draws = True

    def describe(
        self, losses: Mapping[str, ALRC], new: Collection[str], settings: Mapping[str, Any]
    ) -> None:
        """Define the new losses' metrics, and write all settings into the config as ``alrc``."""
        run = self.logger.experiment
        # Lightning's own, which all rows go through.
        prefix = f"{self.logger._prefix}-" if getattr(self.logger, "_prefix", "") else ""
        for name in new:
            for metric, summary in SUMMARIES.items():
                defined = (prefix + metric_name(name, metric)).replace(".", "\\.")  # no nesting
                run.define_metric(defined, step_metric=STEP, summary=summary)
        of_losses = {name: alrc.settings for name, alrc in losses.items()}
        # All of it each time: an update replaces what stands under a key.
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
            spikes: its rows.
            render: returns a spike's picture: a tensor [channels, height, width] or [height,
                width], a NumPy array [height, width, channels], of uint8, of bool or of floats in
                [0, 1], or whatever else ``wandb.Image`` takes; ``None`` for no picture. A spike for
                which it fails has none, and is warned of once.
            step: what the table is logged at.
        """
        import wandb

        columns: list[str | int] = list(Spike._fields)
        rows: list[list[Any]] = []
        for spike in spikes:
            row = spike._asdict()
            # A column has values of one type.
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
    """What is rendered of each spike; ``None`` where that is nothing or fails."""
    images, warned = [], False
    for spike in spikes:
        try:
            picture = render(spike)
            images.append(None if picture is None else _image(picture))
        except Exception as error:  # one missing file is no reason to lose all the others
            images.append(None)
            if not warned:
                rank_zero_warn(f"a spike has no picture, as render failed: {error!r}, for {spike}")
            warned = True
    return images


def _image(picture: Any) -> Any:
    import numpy
    import wandb
    from PIL.Image import Image

    if isinstance(picture, Image) and picture.mode not in PNG_MODES:
        picture = picture.convert("RGB")
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        if picture.is_floating_point():
            picture = picture.float()  # NumPy has no bfloat16
        picture = (picture.movedim(0, -1) if picture.ndim == 3 else picture).numpy()
    if isinstance(picture, numpy.ndarray) and picture.dtype.kind in "fb":
        picture = (picture.clip(0, 1) * 255).round().astype("uint8")  # floats come out black
    return wandb.Image(picture)
