"""One training of the comparison, and its measures.

A stage of training is a number of steps: the discriminators join in the second. The generator's
inner and outer stage are parts of the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_alrc import preview_log

from ..comparison.files import write_arrays
from ..comparison.methods import clipped_by
from ..comparison.progress import Report, Reporter
from .datamodule import Batch, PartialScans
from .module import PartialSTEM, target

SHOWN = "images.npz"
SHOWN_CROPS = 6

LEARNING_RATE = 0.001
"""Learning rate of the generator: over three times the default, because the training is short."""

CURVE = "alrc/mse_outer/loss"
"""Name of the metric with the error of the generator's outer stage, before ALRC clips it."""


def first_stage(steps: int) -> int:
    """The number of steps of the first stage of training, before the discriminators join."""
    return steps * 3 // 4


def protections(method: str) -> dict[str, float | None]:
    """The module's arguments for a method.

    Args:
        method: ``none``, ``norm``, ``alrc`` and a number of standard deviations (``alrc3``), or
            ALRC and norm clipping joined by ``+`` (``alrc3+norm``).

    Raises:
        ValueError: there is no such method.
    """
    found: dict[str, float | None] = {"num_stddev": math.inf, "gradient_clip_val": None}
    for name in method.split("+"):
        alrc = re.fullmatch(r"alrc(\d+(?:\.\d+)?)", name)
        if alrc:
            found["num_stddev"] = float(alrc[1])
        elif name == "norm":
            found["gradient_clip_val"] = 1.0
        elif name != "none":
            raise ValueError(
                f"methods must be none, norm, alrc and a number, or alrc3+norm, got {method!r}"
            )
    return found


def measure(
    setting: str,
    method: str,
    seed: int,
    steps: int,
    folder: Path,
    report: Report | None = None,
    *,
    width: float,
    **options: Any,
) -> dict[str, float | None]:
    """Train in both stages of training, and measure errors on crops that were not trained on.

    Args:
        setting: kind of the discriminators' loss.
        method: see `protections`.
        seed: seed of weights, crops and scans.
        steps: number of batches.
        folder: folder of the log and the completions.
        report: called with the number of steps done.
        width: argument of the module.
        options: arguments of the datamodule.

    Returns:
        A dict of:

        - ``rms``: root mean square error on the test crops at the end, in percent of the range
        - ``rms_errors``: the same error at the end of the first stage of training
        - ``mse_outer`` and ``peak``: mean and largest error of the generator's outer stage in the
          last third of the first stage of training
        - ``spikes``: number of errors of the generator's outer stage that ALRC at 3 standard
          deviations would have clipped
        - ``clipped``: number of clips of all four losses together
    """
    pl.seed_everything(seed, verbose=False)
    first_steps = first_stage(steps)
    data = PartialScans(**options, crops=steps, seed=seed)
    module = PartialSTEM(
        width,
        first_steps,
        setting,  # type: ignore[arg-type]
        LEARNING_RATE,
        **protections(method),  # type: ignore[arg-type]
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        val_check_interval=first_steps,
        num_sanity_val_steps=0,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Reporter(report)],
    )
    trainer.fit(module, data)
    rms_of_first_stage = float(trainer.callback_metrics["val/rms"])
    clipped = clipped_by(trainer) if "alrc" in method else None
    write_arrays(folder / SHOWN, completed(module, data))
    lost = not all(each.isfinite().all() for each in module.parameters())
    (tested,) = trainer.test(module, data, verbose=False)
    outer = preview_log(folder, CURVE)
    # The log leaves out losses that are NaN.
    is_last = (first_steps * 2 // 3 <= outer.steps) & (outer.steps < first_steps)
    last = outer.losses[is_last] if is_last.any() else np.array([math.nan])
    return {
        "rms": math.nan if lost else tested["test/rms"],
        "rms_errors": rms_of_first_stage,
        "mse_outer": float(last.mean()),
        "peak": float(last.max()),
        "spikes": outer.summary.clipped,
        "clipped": clipped,
    }


@torch.no_grad()
def completed(module: PartialSTEM, data: PartialScans) -> dict[str, np.ndarray]:
    """A few test crops, their scans and completions, [crops, 1, side, side]."""
    batch = shown(data)
    completion = module.eval()(batch.scan, batch.mask)
    images = {"truth": target(batch.truth), "scan": batch.scan, "completion": completion}
    arrays = {name: each.numpy() for name, each in images.items()}
    return arrays | {"mask": batch.mask.numpy()}


def shown(data: PartialScans) -> Batch:
    """A few crops, evenly spaced in the test."""
    crops = data.test_dataloader().dataset
    places = np.linspace(0, len(crops) - 1, min(SHOWN_CROPS, len(crops))).round().astype(int)
    return collated([crops[int(place)] for place in places])


def collated(crops: Sequence[Batch]) -> Batch:
    """Crops as one batch."""
    scan, mask, truth, ids = zip(*crops, strict=True)
    return Batch(torch.stack(scan), torch.stack(mask), torch.stack(truth), list(ids))
