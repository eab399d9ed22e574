#!/usr/bin/env bash
# ZClip takes a lasting rise of the gradient's norm for an outlier and clips every step from then on.
#
# Seen with: zclip 1.0.0, torch 2.14.1, CPU, Python 3.11.
# Behaviour: norms are about 1 for 1,000 steps, then about 2 for 10,000 steps. Their relative spread
# is 10 %. In the default mode, "zscore", all 10,000 steps are clipped, and the running mean stays
# near 1. The further a norm is above the mean, the nearer to the mean ZClip clips it, and only the
# clipped norm moves mean and variance. So the variance falls to 0. With a spread of 20 %, or in the
# mode "percentile", the mean follows.
# For ALRC: its moments, too, are updated with the losses after clipping. But ALRC clips a loss to n
# standard deviations above the mean, however far above the mean the loss is. With n above 1 the
# variance then grows, and the mean follows.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.2.6 zclip==1.0.0
"$folder/venv/bin/python" - > "$folder/found" <<'PYTHON'
import torch
from torch import nn
from zclip import ZClip


def training(mode, spread):
    torch.manual_seed(0)
    clipper = ZClip(mode=mode, max_grad_norm=None)
    model = nn.Linear(1, 1, bias=False)
    clipped = 0
    for step in range(11_000):
        level = 1.0 if step < 1_000 else 2.0
        norm = level * (1 + spread * torch.randn(1, 1))
        model.weight.grad = norm.clone()
        clipper.step(model)
        clipped += int(step >= 1_000 and model.weight.grad.item() < norm.item())
    part = "all" if clipped == 10_000 else "less than 2 %" if clipped < 200 else clipped
    print(f"{mode}, spread {spread}: clipped {part}, mean about {clipper.mean:.0f}")


training("zscore", 0.1)
training("zscore", 0.2)
training("percentile", 0.1)
PYTHON
cat > "$folder/expected" <<'EXPECTED'
zscore, spread 0.1: clipped all, mean about 1
zscore, spread 0.2: clipped less than 2 %, mean about 2
percentile, spread 0.1: clipped less than 2 %, mean about 2
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
