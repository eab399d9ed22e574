"""What a Weights & Biases run is told beside its rows: settings, summaries, and who spiked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from lightning_alrc.alrc import ALRC
from lightning_alrc.named_losses import metric_name
from lightning_alrc.spikes import Spike

__all__ = ["describe", "log_spikes", "wandb_runs"]

STEP = "trainer/global_step"
"""What Lightning's WandbLogger has every metric drawn over."""

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


def wandb_runs(trainer: Any) -> list[Any]:
    """The runs of a Trainer's WandbLoggers, of either of Lightning's packages."""
    return [
        logger.experiment
        for logger in trainer.loggers
        if any(base.__name__ == "WandbLogger" for base in type(logger).__mro__)
    ]


def describe(run: Any, losses: Mapping[str, ALRC], nonfinite: str) -> None:
    """Define the metrics of all losses, and write their settings into the config as ``alrc``."""
    for name in losses:
        for metric, summary in SUMMARIES.items():
            run.define_metric(metric_name(name, metric), step_metric=STEP, summary=summary)
    settings = {name: alrc.settings for name, alrc in losses.items()}
    # All of it each time: an update replaces what stands under a key.
    run.config.update({"alrc": {"nonfinite": nonfinite, "losses": settings}}, allow_val_change=True)


def log_spikes(
    run: Any, spikes: Iterable[Spike], render: Callable[[Spike], Any] | None, step: int
) -> None:
    """Log spikes as one table, ``alrc/spikes``.

    Args:
        run: of Weights & Biases.
        spikes: its rows.
        render: returns a spike's picture: a tensor [channels, height, width] or [height, width], a
            NumPy array [height, width, channels], of uint8 or of floats in [0, 1], or whatever else
            ``wandb.Image`` takes; ``None`` for no picture.
        step: what the table is logged at.
    """
    import wandb

    columns: list[str | int] = [field.name for field in fields(Spike)]
    rows = []
    for spike in spikes:
        row = asdict(spike)
        # A column has values of one type.
        row["id"] = None if spike.id is None else str(spike.id)
        picture = None if render is None else render(spike)
        image = [] if render is None else [None if picture is None else _image(picture)]
        rows.append([*row.values(), *image])
    table = wandb.Table(columns + ["image"] * (render is not None), rows)
    run.log({"alrc/spikes": table, STEP: step})


def _image(picture: Any) -> Any:
    import numpy
    import wandb

    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        picture = (picture.movedim(0, -1) if picture.ndim == 3 else picture).numpy()
    if isinstance(picture, numpy.ndarray) and picture.dtype.kind == "f":
        picture = (picture.clip(0, 1) * 255).round().astype("uint8")  # floats come out black
    return wandb.Image(picture)
