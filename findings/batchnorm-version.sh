#!/usr/bin/env bash
# BatchNorm changes its running statistics without autograd's version counter.
#
# Seen with: torch 2.14.1, CPU, Python 3.11.
# Behaviour: a tensor's `_version` rises with each change in place, and backward() raises if a
# saved tensor has changed since it was used. BatchNorm's training step changes `running_mean` and
# `running_var` in place, and their `_version` stays. InstanceNorm's rises. So if a forward pass
# comes between a loss that uses running statistics and its backward(), the gradient is computed
# from the changed statistics, and nothing raises. The same change made by hand raises.
# For ALRC: nonfinite="skip" puts BatchNorm's statistics back after a batch with a NaN. It cannot
# see by the version that they have changed, and looks for BatchNorm by class.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.2.6
"$folder/venv/bin/python" - > "$folder/found" <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)


def versions(module, inputs):
    buffer = module.running_mean
    before, values = buffer._version, buffer.clone()
    module(inputs)
    return f"changed {not torch.equal(buffer, values)}, version rose by {buffer._version - before}"


print("BatchNorm1d:", versions(nn.BatchNorm1d(3), torch.randn(8, 3)))
instance = nn.InstanceNorm1d(3, track_running_stats=True)
print("InstanceNorm1d:", versions(instance, torch.randn(8, 3, 5)))

norm, weight = nn.BatchNorm1d(3), torch.ones(3, requires_grad=True)
with torch.no_grad():
    norm.running_mean.fill_(7.0)
loss = (weight * norm.running_mean).sum()  # its gradient is 7
norm(torch.zeros(8, 3))
loss.backward()
print("gradient after a forward pass:", [round(each, 4) for each in weight.grad.tolist()])

norm, weight = nn.BatchNorm1d(3), torch.ones(3, requires_grad=True)
loss = (weight * norm.running_mean).sum()
norm.running_mean.mul_(0.9)
try:
    loss.backward()
    print("by hand: no error")
except RuntimeError as error:
    print("by hand:", "modified by an inplace operation" in str(error))
PYTHON
cat > "$folder/expected" <<'EXPECTED'
BatchNorm1d: changed True, version rose by 0
InstanceNorm1d: changed True, version rose by 1
gradient after a forward pass: [6.3, 6.3, 6.3]
by hand: True
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
