"""Lightning's two packages, imported in any order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.scripts.launching import execute

Run = Callable[[str], None]

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib, sys, torch
from torch.utils.data import DataLoader, TensorDataset
{imports}

def fit(L, bases):
    class Net(*bases):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean(1)
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = L.Trainer(
        callbacks=[] if ALRCMixin in bases else [ALRCCallback()], max_epochs=1, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2))
    (found,) = [each for each in trainer.callbacks if isinstance(each, ALRCCallback)]
    return found.losses["loss"].updates.item()

imported = []
for name in {packages!r}:
    L = importlib.import_module(name)
    assert fit(L, (L.LightningModule,)) == fit(L, (ALRCMixin, L.LightningModule)) == 4
    assert isinstance(ALRCCallback(), L.Callback)
    imported.append([name for name in {tops!r} if sys.modules.get(name)])
assert imported == {imported!r}, imported
"""

ALRC_IMPORTS = "from lightning_alrc import ALRCCallback, ALRCMixin"


BOTH = ["lightning", "pytorch_lightning"]


def program(imports: str, packages: list[str], imported: list[list[str]]) -> str:
    """A program that fits with each package in turn, and checks what is imported after each fit."""
    return PROGRAM.format(imports=imports, packages=packages, tops=BOTH, imported=imported)


FORKING = """
import os, sys, torch, torchmetrics
assert not {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_alrc"} & {*sys.modules}
for line in sys.stdin:
    if os.fork() == 0:
        exec(eval(line), {})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""Runs each program in a process that has imported nothing of Lightning, only what takes longest to
import."""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], None]]:
    """Runs programs that must succeed."""
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, statuses = process.stdin, process.stdout

        def run(text: str) -> None:
            print(repr(text), file=requests, flush=True)
            assert statuses.readline() == "0\n"

        yield run
        requests.close()
    assert process.returncode == 0


@pytest.mark.parametrize("first", ["pytorch_lightning", "lightning.pytorch"])
def test_a_program_works_in_one_namespace_without_the_other_and_then_in_both(
    run: Run, first: str
) -> None:
    (later,) = {"pytorch_lightning", "lightning.pytorch"} - {first}
    imported = [[first.partition(".")[0]], BOTH, BOTH]
    text = program(f"import {first}\n{ALRC_IMPORTS}", [first, later, first], imported)
    # A forked process starts with pytorch_lightning imported. A program that imports
    # lightning.pytorch first needs another process.
    (execute if first == "pytorch_lightning" else run)(text)


def test_a_program_that_imports_alrc_first_works_in_both_namespaces(run: Run) -> None:
    run(program(ALRC_IMPORTS, ["pytorch_lightning", "lightning.pytorch"], [BOTH, BOTH]))


def test_alrc_works_if_only_pytorch_lightning_is_installed(run: Run) -> None:
    hidden = "sys.modules['lightning'] = None"
    only = ["pytorch_lightning"]
    run(program(f"{hidden}\n{ALRC_IMPORTS}", only, [only]))


def test_the_callback_is_a_callback_of_both_namespaces() -> None:
    import lightning.pytorch
    import pytorch_lightning

    from lightning_alrc import ALRCCallback

    assert issubclass(ALRCCallback, lightning.pytorch.Callback)
    assert issubclass(ALRCCallback, pytorch_lightning.Callback)
