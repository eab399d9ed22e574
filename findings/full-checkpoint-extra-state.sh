#!/usr/bin/env bash
# A full checkpoint of Lightning's ModelParallelStrategy is loaded without extra state.
#
# Seen with: lightning 2.6.6, torch 2.14.1, CPU, gloo, one rank, Python 3.11, 2026-11-29.
# Behaviour: with save_distributed_checkpoint=False the file has what each module returns from
# get_extra_state. If a module is sharded by fully_shard, fit(ckpt_path=...) loads parameters and
# buffers one by one, and never calls set_extra_state. There is no warning. A sharded checkpoint of
# the same module is loaded with the extra state. If the optimizer has no state, such as SGD without
# momentum, a full checkpoint cannot be resumed: an IndexError.
# For ALRC: the moments of an ALRC layer start afresh; those of ALRCCallback continue.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.2.6 lightning==2.6.6
cat > "$folder/program.py" <<'PYTHON'
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader


class Counter(nn.Module):
    """Counts its calls, and keeps the count as extra state."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class Counted(LightningModule):
    optimizer = torch.optim.Adam

    def __init__(self):
        super().__init__()
        self.layer, self.counter = nn.Linear(2, 1), Counter()

    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.counter(self.layer(batch)).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), 0.01)


def fit(sharded, epochs, path=None):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ModelParallelStrategy(save_distributed_checkpoint=sharded),
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Counted()
    trainer.fit(module, DataLoader(torch.ones(4, 2), batch_size=1), ckpt_path=path)
    return trainer, module


kind, path = sys.argv[1:]
trainer, module = fit(kind == "sharded", 1)
trainer.save_checkpoint(path)
if kind == "full":
    print("in the file:", torch.load(path, weights_only=True)["state_dict"]["counter._extra_state"])
print(kind, "after 4 steps:", module.counter.calls)
print(kind, "after 4 more:", fit(kind == "sharded", 2, path)[1].counter.calls)
if kind == "full":
    Counted.optimizer = torch.optim.SGD
    fit(False, 1)[0].save_checkpoint(path)
    try:
        fit(False, 2, path)
    except IndexError as error:
        print("SGD without momentum:", error)
PYTHON
export OMP_NUM_THREADS=1
for kind in full sharded; do
    "$folder/venv/bin/python" "$folder/program.py" $kind "$folder/$kind.ckpt" \
        2> "$folder/log" >> "$folder/found" || { cat "$folder/log"; exit 1; }
done
cat > "$folder/expected" <<'EXPECTED'
in the file: {'calls': 4}
full after 4 steps: 4
full after 4 more: 4
SGD without momentum: list index out of range
sharded after 4 steps: 4
sharded after 4 more: 8
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
