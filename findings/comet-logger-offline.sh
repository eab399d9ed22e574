#!/usr/bin/env bash
# Lightning's CometLogger(online=False) keeps nothing, where Comet itself writes an archive.
#
# Seen with: pytorch-lightning 2.6.6, comet_ml 3.58.8, torch 2.14.1, Python 3.11.
# Behaviour: the docstring says that the data "will be stored locally in an offline experiment". The
# logger also passes `disabled=True` to Comet's ExperimentConfig. So the experiment is disabled, and a
# fit ends without a file, an error or a warning. comet_ml.start(online=False) alone writes a ZIP file
# that `comet upload` takes. The older argument means its reverse: `offline=True` becomes
# `online=True`.
# For ALRC: rows, figures and tables go to no place with such a logger. To have them, replace
# `_comet_config` before the experiment is made, as tests/third_party/test_loggers.py does.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision numpy==2.2.6 pytorch-lightning==2.6.6 comet_ml==3.58.8
"$folder/venv/bin/python" - "$folder" > "$folder/found" 2> "$folder/errors" <<'PYTHON'
import os
import sys
from pathlib import Path

os.environ["COMET_LOGGING_CONSOLE"] = "CRITICAL"
import comet_ml
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CometLogger
from torch import nn
from torch.utils.data import DataLoader

folder = Path(sys.argv[1])


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def describe(name, experiment):
    files = sorted(path.suffix for path in (folder / name).rglob("*") if path.is_file())
    print(f"{name}: disabled {experiment.disabled}, files {files}")


def config(name):
    return comet_ml.ExperimentConfig(offline_directory=str(folder / name))


alone = comet_ml.start(online=False, experiment_config=config("comet alone"))
alone.log_metric("loss", 1.0, step=0)
alone.end()
describe("comet alone", alone)

name = "in a Trainer"
logger = CometLogger(online=False, offline_directory=str(folder / name))
trainer = pl.Trainer(
    max_epochs=1, log_every_n_steps=1, accelerator="cpu", logger=logger, enable_progress_bar=False,
    enable_checkpointing=False, enable_model_summary=False,
)
trainer.fit(Net(), DataLoader(torch.ones(4, 1)))
logger.experiment.end()
describe(name, logger.experiment)


class Older(CometLogger):
    """Makes no experiment, so that nothing is sent."""

    def _create_experiment(self):
        print(f"offline=True: online is {self._online}")


Older(offline=True)
PYTHON
cat > "$folder/expected" <<'EXPECTED'
comet alone: disabled False, files ['.zip']
in a Trainer: disabled True, files []
offline=True: online is True
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
