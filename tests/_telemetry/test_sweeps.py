"""A sweep's configuration, by which W&B's agent runs real programs."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_alrc._telemetry.sweeps import sweep
from tests.offline_wandb import isolate, read

PROGRAM = """
import sys

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger

from tests.nets import Net

assert not sys.argv[1:]
Trainer(
    accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=2, enable_checkpointing=False,
    enable_progress_bar=False, logger=WandbLogger(save_dir=".", offline=True),
).fit(Net())
"""


def run_by_an_agent(config: dict[str, Any], num_stddev: float) -> None:
    """Run the program for one value of a sweep, as ``wandb agent`` does."""
    from wandb.wandb_agent import Agent

    agent = Agent(api=None, queue=None)
    agent._sweep_command = config["command"]
    (parameter,) = config["parameters"]
    args = {parameter: {"value": num_stddev}}
    agent._command_run({"run_id": "first", "program": config["program"], "args": args})
    assert agent._run_processes["first"].wait(timeout=180) == 0


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of an agent."""
    pytest.importorskip("wandb.wandb_agent")
    isolate(monkeypatch, tmp_path / "wandb-home")
    monkeypatch.delenv("LIGHTNING_ALRC", raising=False)
    monkeypatch.chdir(tmp_path)
    # An agent sets these variables of this process. After the test, monkeypatch restores them.
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="LIGHTNING_ALRC needs a POSIX shell")
def test_an_agent_trains_with_the_num_stddev_of_the_run(
    workplace: Path, wheel: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's metadata, which has the entry point for LIGHTNING_ALRC.
    wheel.extractall(workplace, [name for name in wheel.namelist() if ".dist-info/" in name])
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, str(workplace)]))
    (workplace / "train.py").write_text(PROGRAM)
    config = sweep([sys.executable, "train.py"], "alrc/loss", values=[2, 2.5])
    run_by_an_agent(config, 2.5)
    (folder,) = (path.parent for path in workplace.rglob("run-first.wandb"))
    run = read(folder)
    settings = run.config["alrc"]
    assert settings.get("value", settings)["num_stddev"] == 2.5
    assert any("alrc/loss" in row for row in run.history)
    swept = run.config["num_stddev"]
    assert (swept["value"] if isinstance(swept, dict) else swept) == 2.5


WRITES_ITS_OPTIONS = """
import os, sys

with open("options", "w") as file:
    file.write(f"{sys.argv[1:]} {os.environ.get('LIGHTNING_ALRC')}")
"""


def test_an_agent_gives_a_program_its_option(workplace: Path) -> None:
    (workplace / "train.py").write_text(WRITES_ITS_OPTIONS)
    command = [sys.executable, "train.py"]
    run_by_an_agent(sweep(command, "alrc/loss", values=[2, 2.5], option="num_stddev"), 2.5)
    assert (workplace / "options").read_text() == "['--num_stddev=2.5'] None"


def test_a_sweep_is_valid_by_the_schema_of_weights_and_biases() -> None:
    schema = pytest.importorskip("sweeps.config", reason="the package sweeps is not installed")
    for option in (None, "model.num_stddev"):
        config = sweep(["python", "train.py"], "val_loss", "maximize", option=option)
        assert schema.schema_violations_from_proposed_config(config) == []


def test_values_may_be_an_array_and_words_may_be_paths() -> None:
    expected = sweep(["python", "train.py"], "val_loss", values=[1.0, 2.0])
    for values in (np.linspace(1, 2, 2), torch.tensor([1.0, 2.0]), range(1, 3)):
        assert sweep(["python", Path("train.py")], "val_loss", values=values) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], "loss"), ValueError, r"command must be a list of words, got \[\]"),
        (("python train.py", "loss"), ValueError, "command must be a list of words, got 'python"),
        ((["python", 5], "loss"), ValueError, r"command must be a list of words, got \['pyt.*5"),
        ((Path("train.py"), "loss"), ValueError, "command must be a list of words, got .*Path"),
        ((["train"], ""), ValueError, "metric must be a name, got ''"),
        ((["train"], 5), ValueError, "metric must be a name, got 5"),
        (
            (["train"], "loss", "min"),
            ValueError,
            "goal must be 'minimize' or 'max.*, got 'min'",
        ),
        ((["train"], "loss", "minimize", 2.0), TypeError, "values must be a list of .*, got 2.0"),
        (
            (["train"], "loss", "minimize", [2.0], "--lr"),
            ValueError,
            "option must be a name without leading dashes, got '--lr'",
        ),
        ((["train"], "loss", "minimize", []), ValueError, "values must have one number at least"),
        ((["train"], "loss", "minimize", ["2"]), TypeError, "values must be positive finite"),
        ((["train"], "loss", "minimize", [-1]), ValueError, "values must be positive finite"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(*arguments)
