#!/usr/bin/env bash
# Weights that are unfrozen late move too far where an optimizer counts the steps of their group.
#
# Seen with: pytorch_optimizer 4.1.0, torch-optimi 0.3.3, torch 2.14.1, CPU, Python 3.11, 2026-11-28.
# Behaviour: Adam divides its two means by corrections that depend on the number of steps. torch
# counts the steps of each parameter, and so do the AdamP and the AdaBelief of their authors (adamp
# 0.3.0, adabelief_pytorch 0.2.1). The optimizers below count the steps of the parameter group. A
# layer that is frozen by `requires_grad` has no gradient. If it is unfrozen after 1,000 steps, its
# means start at 0, and the corrections are those of step 1,001. So in its first 15 steps the layer
# moves 4.7 times as far as a new layer, with betas of 0.9 and 0.999. In the training below, the loss
# then rises to 26, and with torch to 2.6 (seed 1: to 40 and 6.5). There is no warning. If the unfrozen
# layer is added by `add_param_group`, as Lightning's BaseFinetuning does, its count starts at 1.
# For ALRC: the rise comes from the size of the steps, and not from an outlier. ALRC scales gradients,
# and the size of Adam's steps does not depend on the scale of the gradients. So ALRC does not prevent
# the rise.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.2.6 \
    packaging==25.0 pytorch_optimizer==4.1.0 torch-optimi==0.3.3
"$folder/venv/bin/python" - > "$folder/found" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import optimi
import pytorch_optimizer
import torch
from torch import nn

torch.set_num_threads(1)
BETAS = (0.9, 0.999)


def distance(make, frozen, own_group=False):
    """How far a weight moves in its first 15 steps, in learning rates, after steps without it."""
    other, late = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = make([other] if own_group else [other, late], 0.001)
    generator = torch.Generator().manual_seed(0)
    for step in range(frozen + 15):
        if step == frozen and own_group:
            optimizer.add_param_group({"params": [late]})
        other.grad = 1 + 0.1 * torch.randn(4, 4, generator=generator)
        late.grad = None if step < frozen else other.grad.clone()
        optimizer.step()
    return (late - 1).abs().mean().item() / 0.001


def rise(make):
    """The greatest loss in the 60 steps after the first layers are unfrozen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    model[:4].requires_grad_(False)
    optimizer = make(model.parameters(), 0.01)
    direction = torch.randn(16, 1)
    losses = []
    for step in range(1_060):
        if step == 1_000:
            model.requires_grad_(True)
        inputs = torch.randn(256, 16)
        loss = (model(inputs) - (inputs @ direction).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[999] < 0.5
    return max(losses[1_000:])


def optimizer(kind, **settings):
    return lambda parameters, lr: kind(parameters, lr=lr, betas=BETAS, **settings)


OPTIMIZERS = {
    "torch AdamW": optimizer(torch.optim.AdamW),
    "optimi AdamW": optimizer(optimi.AdamW),
    "pytorch_optimizer AdamP": optimizer(pytorch_optimizer.AdamP),
    "pytorch_optimizer AdaBelief": optimizer(pytorch_optimizer.AdaBelief),
}
for name, make in OPTIMIZERS.items():
    early, late = distance(make, 0), distance(make, 1_000)
    group = distance(make, 1_000, own_group=True)
    print(f"{name}: {late / early:.1f} times as far, {group / early:.1f} with a group of its own")
usual = rise(OPTIMIZERS["torch AdamW"])
for name in list(OPTIMIZERS)[1:]:
    print(f"{name}: loss over 5 times torch's: {rise(OPTIMIZERS[name]) > 5 * usual}")
PYTHON
cat > "$folder/expected" <<'EXPECTED'
torch AdamW: 1.0 times as far, 1.0 with a group of its own
optimi AdamW: 4.6 times as far, 1.0 with a group of its own
pytorch_optimizer AdamP: 4.7 times as far, 1.0 with a group of its own
pytorch_optimizer AdaBelief: 4.8 times as far, 1.0 with a group of its own
optimi AdamW: loss over 5 times torch's: True
pytorch_optimizer AdamP: loss over 5 times torch's: True
pytorch_optimizer AdaBelief: loss over 5 times torch's: True
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
