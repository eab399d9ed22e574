"""A run that is killed again and again.

Each life of the run is a fork of the process that calls ``main``. A life continues from the
newest checkpoint that loads. The last life is not killed, and writes its weights, moments and
spikes to ``final.json``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_alrc import ALRCCallback
from lightning_alrc.spikes import Spike, read_spikes
from tests.nets import SETTINGS, Net, callback_of

STEPS = 120
PAUSE = 0.01


class Batches:
    """The batch of a step depends only on the step."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.given < STEPS:
            generator = torch.Generator().manual_seed(self.given)
            self.given += 1
            x = torch.randn(4, 3, generator=generator)
            y = x[:, :2] * (9.0 if self.given % 7 == 0 else 1.0)
            yield x, y

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Diary(Callback):
    """Makes a file after the first step of a life, and pauses so that the life can be killed."""

    def __init__(self, mark: Path, pause: float) -> None:
        self.mark, self.pause = mark, pause

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.mark.touch()
        time.sleep(self.pause)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in paths:
        try:
            torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError):
            continue
        return path
    return None


def records(folder: Path) -> list[list[Spike]]:
    """The records of spikes. There are several if a life ended before its first checkpoint."""
    return [read_spikes(path) for path in folder.glob("alrc_spikes*.jsonl")]


def live(folder: Path, pause: float = 0.0) -> Trainer:
    net = Net("vector")
    net.train_dataloader = Batches  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        log_every_n_steps=2,  # the record of spikes is written at the same steps
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ALRCCallback(**SETTINGS),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True),
            OnExceptionCheckpoint(folder, "exception"),
            Diary(folder / "mark", pause),
        ],
    )
    trainer.fit(net, ckpt_path=newest(folder))
    callback = callback_of(trainer)
    alrc = callback.losses["loss"]
    state = {"weights": [v for p in net.parameters() for v in p.flatten().tolist()]}
    state |= {"moments": alrc.dump()["state"], "steps": trainer.global_step}
    assert callback.spikes in records(folder)
    state |= {"spikes": [(each.loss, each.threshold, each.scale) for each in callback.spikes]}
    (folder / "final.json").write_text(json.dumps(state))
    return trainer


def begun(folder: Path, pause: float) -> int:
    """Start a life in its own process. Returns the process's id."""
    (folder / "mark").unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        live(folder, pause)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main(folder: Path, by: signal.Signals, deaths: int) -> None:
    """Kill ``deaths`` lives by a signal. Write the newest checkpoint's name after each death."""
    newest_at_ends = []
    for _ in range(deaths):
        child = begun(folder, PAUSE)
        while not (folder / "mark").exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.15))
        os.kill(child, by)  # fails if the life has ended by itself
        os.waitpid(child, 0)
        path = newest(folder)
        newest_at_ends.append(path and path.stem)
        records(folder)  # fails if a record is half-written
        assert not (folder / "final.json").exists(), "lived to the end"
    _, status = os.waitpid(begun(folder, 0.0), 0)
    assert status == 0, status
    (folder / "ends.json").write_text(json.dumps(newest_at_ends))
