#!/usr/bin/env bash
# torch.compile: the gradient is wrong if a running mean is updated in place after the loss has used it.
#
# Seen with: torch 2.14.1, CPU, Python 3.11, 2026-11-28.
# Behaviour: a loss is scaled by a factor of a running mean, then the mean is updated in place. The
# factor is a number that gradients do not pass through. Eager PyTorch differentiates with the mean of
# before the update. With torch.compile, the backward pass computes the factor again, from the mean of
# after the update. The losses and the running mean are right, the gradients are not, and there is no
# error or warning. The same happens for a tensor that the function refers to, for a buffer of a module,
# under no_grad, and with the backends inductor and aot_eager. The backend aot_eager_decomp_partition
# raises "modified by an inplace operation" instead. If the mean is assigned anew, gradients are right.
# For ALRC: this is what loss scaling by running moments does. ALRC's own update is not in place in a
# compiled function.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.2.6
"$folder/venv/bin/python" - > "$folder/found" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch


class Scaled(torch.nn.Module):
    """A loss that is scaled down to twice its running mean."""

    def __init__(self, update):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.tensor(1.0))
        self.update = update

    def forward(self, x):
        loss = (self.weight * x) ** 2
        factor = (2 * self.mean / loss.detach()).clamp(max=1.0)
        clipped = loss * factor
        new = 0.5 * self.mean + 0.5 * clipped.detach().mean()
        if self.update == "in place":
            with torch.no_grad():
                self.mean.copy_(new)
        else:
            self.mean = new
        return clipped.mean()


def results(module, forward):
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(6):
        loss = forward(3 * torch.randn(4, generator=random))
        (gradient,) = torch.autograd.grad(loss, module.weight)
        found.append([loss.item(), gradient.item()])
    return torch.tensor(found)


for update in ("in place", "assigned"):
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        eager, compiled = Scaled(update), Scaled(update)
        expected = results(eager, eager)
        error = results(compiled, torch.compile(compiled, backend=backend)) / expected - 1
        losses, gradients = error.abs().amax(0).tolist()
        same = torch.allclose(eager.mean, compiled.mean)
        print(f"{update}, {backend}: losses differ by {losses:.1%}, gradients by {gradients:.1%}", end="")
        print(f", the mean is {'the same' if same else 'another'}")
PYTHON
cat > "$folder/expected" <<'EXPECTED'
in place, aot_eager: losses differ by 0.0%, gradients by 50.0%, the mean is the same
in place, inductor: losses differ by 0.0%, gradients by 50.0%, the mean is the same
assigned, aot_eager: losses differ by 0.0%, gradients by 0.0%, the mean is the same
assigned, inductor: losses differ by 0.0%, gradients by 0.0%, the mean is the same
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
