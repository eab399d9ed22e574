"""Lightning's two packages, imported in any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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

for name in {packages!r}:
    L = importlib.import_module(name)
    print(fit(L, (L.LightningModule,)), fit(L, (ALRCMixin, L.LightningModule)))
print(sorted({{"lightning", "pytorch_lightning"}} & {{n for n in sys.modules if sys.modules[n]}}))
"""

ALRC_IMPORTS = "from lightning_alrc import ALRCCallback, ALRCMixin"


def run(imports: str, *packages: str) -> list[str]:
    """By line: the updates of callback and mixin in each package, and the packages imported."""
    program = PROGRAM.format(imports=imports, packages=packages)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_program_in_one_namespace_works_without_importing_the_other(package: str) -> None:
    imported = [package.partition(".")[0]]
    assert run(f"import {package}\n{ALRC_IMPORTS}", package) == ["4 4", str(imported)]


def test_a_program_that_imports_alrc_first_works_in_both_namespaces() -> None:
    both = ["pytorch_lightning", "lightning.pytorch"]
    assert run(ALRC_IMPORTS, *both)[:2] == ["4 4", "4 4"]


@pytest.mark.parametrize("first", ["pytorch_lightning", "lightning.pytorch"])
def test_a_program_that_imports_alrc_between_the_packages_works_in_both_namespaces(
    first: str,
) -> None:
    both = ["pytorch_lightning", "lightning.pytorch"]
    (later,) = {*both} - {first}
    imports = f"import {first}\n{ALRC_IMPORTS}\nfrom {later} import Callback"
    check = "assert isinstance(ALRCCallback(), Callback)"
    assert run(f"{imports}\n{check}", later, first)[:2] == ["4 4", "4 4"]


def test_alrc_works_if_only_pytorch_lightning_is_installed() -> None:
    hidden = "sys.modules['lightning'] = None"
    assert run(f"{hidden}\n{ALRC_IMPORTS}", "pytorch_lightning") == ["4 4", "['pytorch_lightning']"]


def test_the_callback_is_a_callback_of_both_namespaces() -> None:
    import lightning.pytorch
    import pytorch_lightning

    from lightning_alrc import ALRCCallback

    assert issubclass(ALRCCallback, lightning.pytorch.Callback)
    assert issubclass(ALRCCallback, pytorch_lightning.Callback)
