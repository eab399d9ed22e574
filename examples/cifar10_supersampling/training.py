"""One training of the grid: what determines it, and what is measured."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock
from pytorch_lightning import callbacks as lightning_callbacks
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ..comparison import files
from . import results
from .cifar10 import fingerprint
from .command_line import (
    METHODS_FOLDER,
    CommandLine,
    arguments_of,
    experiment_config,
    method_configs,
    method_name,
)
from .module import to_display_range
from .recording import StepRecorder

SHOWN_IMAGES = 8

# The authors' start moments: of the loss and of its square.
AUTHORS_START = {"squared": (10.0, 400.0), "quartic": (25.0, 900.0)}

Source = Literal["photographs", "download", "folder"]


@dataclass(frozen=True)
class Run:
    """Everything that determines one training.

    Attributes:
        experiment: name of a configuration.
        method: names of configurations in `configs/methods`, joined by "+".
        loss: "squared" or "quartic".
        batch_size: images in a batch.
        optimizer: "adam" or "sgd".
        learning_rate: learning rate of the optimizer.
        outlier_kind: what is wrong with an outlier; None without outliers.
        outlier_fraction: probability that a training image is an outlier.
        seed: seed of weights and images.
        width: factor on the network's number of channels.
        steps: number of training steps.
        last_steps: number of last steps over which the training loss is averaged.
        precision: precision of the Trainer.
        average: keep the moving average of the weights, if the experiment has one.
        data: "photographs", "download" or "folder".
        root: directory of "download" and "folder".
        accelerator: accelerator of the Trainer.
        alrc_start: "first_losses" lets ALRC set its moments; "authors" starts from AUTHORS_START.
        every_image: keep each image's loss, beside the mean of each step.
        checkpoint_every: steps between checkpoints.
        wandb: log to Weights & Biases.
    """

    experiment: str
    method: str
    loss: str
    batch_size: int
    optimizer: str
    learning_rate: float
    outlier_kind: str | None
    outlier_fraction: float
    seed: int
    width: float
    steps: int
    last_steps: int
    precision: str
    average: bool
    data: Source
    root: Path
    accelerator: str = "auto"
    alrc_start: str = "first_losses"
    every_image: bool = False
    checkpoint_every: int = 1000
    wandb: bool = False

    @property
    def name(self) -> str:
        """Name of the training's folder, unique in the output."""
        parts = [
            self.experiment,
            *([] if self.experiment == self.loss else [self.loss]),
            f"batch{self.batch_size}",
            f"{self.optimizer}{self.learning_rate:g}",
            *([f"{self.outlier_kind}{self.outlier_fraction:g}"] if self.outlier_kind else []),
            method_name(self.method),
            f"seed{self.seed}",
        ]
        return "-".join(parts)

    @property
    def work(self) -> int:
        """Amount of work, in images."""
        return self.steps * self.batch_size

    @property
    def learning_rate_drop_at(self) -> int | None:
        """The paper's step for batches of 64; None for other sizes, whose rate never drops."""
        return 54_687 if self.batch_size == 64 else None

    @property
    def arguments(self) -> list[str]:
        """The arguments of this training's command line, without the subcommand `fit`."""
        options: dict[str, Any] = {
            "seed_everything": self.seed,
            "trainer.max_steps": self.steps,
            "trainer.precision": self.precision,
            "model.width": self.width,
            "model.loss": self.loss,
            "model.optimizer": self.optimizer,
            "model.learning_rate": self.learning_rate,
            "model.learning_rate_drop_at": self.learning_rate_drop_at,
            "data.batch_size": self.batch_size,
            "data.outlier_fraction": self.outlier_fraction,
            "data.data": self.data,
            "data.root": self.root,
        }
        if self.outlier_kind:
            options["data.outlier_kind"] = self.outlier_kind
        arguments = [f"--config={experiment_config(self.experiment)}"]
        if not self.average:
            arguments += ["--trainer.callbacks=null"]
        for path in method_configs(self.method):
            arguments += [f"--config={path}"]
            if self.alrc_start == "authors" and path.stem.startswith("alrc"):
                mu1, mu2 = AUTHORS_START[self.loss]
                # These are arguments of the callback that was appended last.
                arguments += [f"--trainer.callbacks.mu1_start={mu1}"]
                arguments += [f"--trainer.callbacks.mu2_start={mu2}"]
        return arguments + arguments_of(options)

    @property
    def determinants(self) -> dict[str, Any]:
        """The settings that a training of the same name in the same output must share."""
        free = {"root", "accelerator", "checkpoint_every", "wandb"}
        values = {name: value for name, value in asdict(self).items() if name not in free}
        own = [path for path in method_configs(self.method) if path.parent != METHODS_FOLDER]
        return values | {
            "method": method_name(self.method),
            "own_configurations": [yaml.safe_load(path.read_text()) for path in own],
            # The root itself may differ between machines.
            **({"images": fingerprint(self.root)} if self.data == "folder" else {}),
        }


def check_same(run: Run, output: Path) -> None:
    """Raise ValueError if the output holds another training of the same name."""
    path = output / run.name / files.RUN
    if not path.exists():
        return
    theirs = json.loads(path.read_text())
    for name, ours in run.determinants.items():
        if theirs.get(name, ours) != ours:
            raise ValueError(
                f"output: {path.parent} was made with {name} {theirs[name]!r}, now it is "
                f"{ours!r}; give another output, or remove that folder"
            )


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically.

    Lightning copies a checkpoint from the directory of temporary files. If that directory is on
    another file system, the old checkpoint is lost before the new checkpoint is complete.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Overwrite the checkpoint."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        files.write_whole(Path(path), buffer.getvalue())


class LastCheckpoint(ModelCheckpoint):
    """Overwrites its checkpoint regularly, but not at the end.

    A fit that is resumed from a checkpoint of its last step ends at once. Its callbacks do not run,
    so the weights would not be averaged.

    Args:
        folder: folder of the checkpoint.
        every: steps between checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            dirpath=folder,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            save_top_k=0,
            save_last=True,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save, unless this was the last step."""
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not save the last step."""


def train(run: Run, output: Path, report: Callable[[int], None] | None = None) -> None:
    """Train, test, and save. An interrupted training continues from its last checkpoint.

    The same seed gives the same initial weights and the same images, whatever the method. On a CPU,
    a resumed training gives exactly the results of an uninterrupted one. If another process runs
    this training, this process waits for its end. A finished training is left unchanged.

    Args:
        run: the training.
        output: directory of the training's folder; see `results`.
        report: called at the start and regularly with the number of steps done.
    """
    folder = output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / files.LOCK):
        if not files.is_finished(folder):
            train_in(folder, run, report)


def train_in(folder: Path, run: Run, report: Callable[[int], None] | None) -> None:
    """Train, test, and save in a folder that no other process writes to."""
    files.clear_unfinished(folder)
    files.write_json(folder / files.RUN, run.determinants)
    recorder = StepRecorder(run.steps, report, run.every_image)
    checkpoints = LastCheckpoint(folder, run.checkpoint_every)
    cli = CommandLine(
        args=run.arguments,
        run=False,
        save_config_callback=None,
        trainer_defaults={
            "accelerator": run.accelerator,
            "callbacks": [recorder, checkpoints],
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        # A worker process that exits cannot report the reason.
        parser_kwargs={"exit_on_error": False},
    )
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    # This training chooses nothing by validation.
    trainer.limit_val_batches = 0
    if run.wandb:
        trainer.logger = WandbLogger(name=run.name, save_dir=folder)
        trainer.logger.log_hyperparams(run.determinants)
    last = folder / results.CHECKPOINT
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)

    # The averaged and the last weights are both tested. A log would have the same names for both
    # tests, so the tests are not logged. The row of results has separate names.
    logger, trainer.logger = trainer.logger, None
    averaged = any(is_average(callback) for callback in trainer.callbacks)
    average = test(trainer, module, data) if averaged else {}
    module.load_state_dict(recorder.last_weights)
    row = row_of(run, recorder, test(trainer, module, data), average)
    images = restored_images(module, data)
    results.save(folder, results.Result(row, recorder.history(), images))
    last.unlink(missing_ok=True)
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(row)
        logger.experiment.finish()


def row_of(
    run: Run, recorder: StepRecorder, last: dict[str, float], average: dict[str, float]
) -> dict[str, Any]:
    """A training's row in `results.csv`.

    Args:
        run: the training.
        recorder: record of its steps.
        last: test metrics of the last weights.
        average: test metrics of their moving average; empty if there is none.
    """
    lost = recorder.survived < run.steps
    return {
        "experiment": run.experiment,
        "method": method_name(run.method),
        "loss": run.loss,
        "batch_size": run.batch_size,
        "optimizer": run.optimizer,
        "learning_rate": run.learning_rate,
        "outlier_kind": run.outlier_kind,
        "outlier_fraction": run.outlier_fraction,
        "seed": run.seed,
        "width": run.width,
        "steps": run.steps,
        "last_steps": run.last_steps,
        "precision": run.precision,
        "data": run.data,
        "alrc_start": run.alrc_start,
        "train_loss": None if lost else recorder.mean_loss(run.last_steps),
        **{f"test_{name}": value for name, value in last.items()},
        **{f"ema_test_{name}": average.get(name) for name in last},
        "clipped": recorder.clipped,
        "steps_survived": recorder.survived,
        "seconds": round(recorder.seconds, 1),
    }


def is_average(callback: pl.Callback) -> bool:
    """Whether a callback keeps the moving average of the weights, as WeightAveraging does."""
    averaging = getattr(lightning_callbacks, "WeightAveraging", None)
    return averaging is not None and isinstance(callback, averaging)


def test(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule
) -> dict[str, float]:
    """The module's test metrics by name, without "test/"."""
    (metrics,) = trainer.test(module, data, verbose=False)
    names = ("error", "mse", "psnr", "ssim", "input_error")
    return {name: metrics[f"test/{name}"] for name in names}


@torch.no_grad()
def restored_images(module: Any, data: Any) -> dict[str, np.ndarray]:
    """Restore the first few test images, for display; see `results.Result.images`."""
    batch = next(iter(data.test_dataloader()))
    inputs, truth = batch.input[:SHOWN_IMAGES], batch.target[:SHOWN_IMAGES]
    output = module.eval()(inputs.to(module.device, module.dtype)).float().cpu()
    return {
        name: to_display_range(images, truth).numpy()
        for name, images in {"input": inputs, "output": output, "truth": truth}.items()
    }
