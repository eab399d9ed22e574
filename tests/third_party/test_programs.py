"""Programs of other packages, to which the environment variable LIGHTNING_ALRC adds ALRC."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SETTINGS = '{"num_stddev": 2}'
WITHOUT = [None, "0"]


def run(program: str, *arguments: str, folder: Path, alrc: str | None) -> None:
    """Run a console script of this environment in a folder."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # chemprop 2.2 reads its own checkpoint as torch did before 2.6.
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    environment.pop("LIGHTNING_ALRC", None)
    if alrc is not None:
        environment["LIGHTNING_ALRC"] = alrc
    command = [str(Path(sys.executable).parent / program), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def alrc_in(checkpoint: Path) -> dict[str, Any] | None:
    callbacks = torch.load(checkpoint, weights_only=False)["callbacks"]
    return callbacks.get("ALRCCallback")  # type: ignore[no-any-return]


def train_chemprop(folder: Path, alrc: str | None) -> Path:
    """``lightning.pytorch``: molecules with one wrong label."""
    random = np.random.default_rng(0)
    rows = [f"{'C' * random.integers(1, 9)}O,{random.normal():.4f}" for _ in range(60)]
    rows[40] = "CCO,10000"
    (folder / "molecules.csv").write_text("\n".join(["smiles,y", *rows]))
    arguments = "--task-type regression --epochs 3 --batch-size 8 --accelerator cpu --num-workers 0"
    run(
        "chemprop",
        *["train", "--data-path", "molecules.csv", *arguments.split(), "-o", "out"],
        folder=folder,
        alrc=alrc,
    )
    return folder / "out" / "model_0" / "checkpoints" / "last.ckpt"


def train_lightly(folder: Path, alrc: str | None) -> Path:
    """``pytorch_lightning``: a folder of images without labels."""
    from PIL import Image

    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(16):
        pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    arguments = "trainer.max_epochs=2 trainer.gpus=0 loader.batch_size=4 loader.num_workers=0"
    run(
        "lightly-ssl-train",
        *["input_dir=images", *arguments.split(), "collate.input_size=32"],
        folder=folder,
        alrc=alrc,
    )
    return folder / "last.ckpt"


@pytest.mark.parametrize("alrc", [SETTINGS, *WITHOUT])
@pytest.mark.parametrize("package", ["chemprop", "lightly"])
def test_the_variable_adds_alrc_to_a_program(
    package: str, alrc: str | None, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    train = {"chemprop": train_chemprop, "lightly": train_lightly}[package]
    state = alrc_in(train(tmp_path, alrc))
    if alrc in WITHOUT:
        assert state is None
    else:
        assert state is not None
        (loss,) = state["losses"].values()
        assert loss["state"]["losses"] > 0
