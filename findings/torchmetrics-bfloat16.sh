#!/usr/bin/env bash
# A metric's sums become bfloat16 under Lightning's bf16-true, and stop at 256.
#
# Seen with: torchmetrics 1.9.0, lightning 2.6.6, torch 2.14.1, CPU, Python 3.11.
# Behaviour: torchmetrics keeps a metric's sums in their dtype where a module is cast by bfloat16(),
# half() and the like: only set_dtype() is to change it. A cast by to(torch.bfloat16) does change it,
# and precision "bf16-true" casts so. bfloat16 cannot add 1 to 256. So the mean of 250 batches of 1
# and 250 batches of 3 is logged as 4 in place of 2, without a warning. "bf16-mixed" casts nothing.
# For ALRC: the test errors of examples/cifar10_supersampling are sums over more than 256 batches.
# Its module puts the metrics back to float32 before validation and test.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    torch==2.14.1 numpy==2.2.6 lightning==2.6.6 torchmetrics==1.9.0
"$folder/venv/bin/python" - > "$folder/found" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric


class Measured(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.mean = MeanMetric()

    def test_step(self, batch, batch_idx):
        self.mean(batch)
        self.log("mean", self.mean)


print("bfloat16():", Measured().bfloat16().mean.mean_value.dtype)
print("to(torch.bfloat16):", Measured().to(torch.bfloat16).mean.mean_value.dtype)
values = DataLoader(torch.tensor([1.0] * 250 + [3.0] * 250))
for precision in ("32-true", "bf16-mixed", "bf16-true"):
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (tested,) = trainer.test(Measured(), values, verbose=False)
    print(f"{precision}: {tested['mean']}")
PYTHON
cat > "$folder/expected" <<'EXPECTED'
bfloat16(): torch.float32
to(torch.bfloat16): torch.bfloat16
32-true: 2.0
bf16-mixed: 2.0
bf16-true: 4.0
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
