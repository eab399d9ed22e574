#!/usr/bin/env bash
# ema-pytorch's averaged model keeps the first values of integer and boolean buffers for ever.
#
# Seen with: ema-pytorch 0.8.3, timm 1.0.31, torch 2.14.1, CPU, Python 3.11, 2026-11-28.
# Behaviour: EMA averages the buffers of floating point, and leaves all others out: they are neither
# averaged nor copied. torch's AveragedModel and timm's ModelEmaV3 copy them. The model below finds
# during training which inputs to use, and keeps them in a boolean buffer. Its average by ema-pytorch
# has the trained weights, but uses no input, so that all its predictions are the bias. Its count of
# batches, and that of BatchNorm, stay 0. There is no warning.
# For ALRC: ALRC's state is in no buffer of the model, and its callback's state is not averaged.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.2.6 \
    ema-pytorch==0.8.3 timm==1.0.31
"$folder/venv/bin/python" - > "$folder/found" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch
from ema_pytorch import EMA
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Model(nn.Module):
    """Uses the inputs that have varied in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("used", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("batches", torch.tensor(0))
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs):
        if self.training:
            self.batches += 1
            self.used |= inputs.std(0) > 0
        return self.layer(self.norm(inputs) * self.used)


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
ema = EMA(model, beta=0.99)
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
timm = ModelEmaV3(model, decay=0.99)
for _ in range(2_000):
    inputs = torch.randn(32, 4)
    inputs[:, 3] = 0
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update()
    averaged.update_parameters(model)
    timm.update(model)

inputs = torch.randn(1_000, 4)
inputs[:, 3] = 0
for name, each in {
    "the model": model,
    "ema-pytorch": ema.ema_model,
    "torch's AveragedModel": averaged.module,
    "timm's ModelEmaV3": timm.module,
}.items():
    each.eval()
    error = (each(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    print(
        f"{name}: error below 0.1 {bool(error < 0.1)}, used {each.used.tolist()}, "
        f"batches {each.batches}, of BatchNorm {each.norm.num_batches_tracked}"
    )
PYTHON
cat > "$folder/expected" <<'EXPECTED'
the model: error below 0.1 True, used [True, True, True, False], batches 2000, of BatchNorm 2000
ema-pytorch: error below 0.1 False, used [False, False, False, False], batches 0, of BatchNorm 0
torch's AveragedModel: error below 0.1 True, used [True, True, True, False], batches 2000, of BatchNorm 2000
timm's ModelEmaV3: error below 0.1 True, used [True, True, True, False], batches 2000, of BatchNorm 2000
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
