"""The layer in Fabric, on two ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from lightning_alrc import ALRC
from lightning_alrc._trainer.exchange import Exchange
from lightning_alrc._trainer.named_losses import NamedLosses
from tests.nets import SETTINGS
from tests.scripts.ranks import STEPS, Batches, moments

DELAY = 1.5


def losses(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def trained(fabric: Fabric) -> dict[str, Any]:
    """A plain training loop with the layer."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1, dtype=torch.float64)
    net, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), 0.01))
    alrc = ALRC(**SETTINGS)
    report: dict[str, Any] = {"seen": [], "moments": []}
    for x, y, _ in Batches(range(STEPS), fabric.global_rank, fabric.world_size):
        loss = (net(x)[:, 0] - y) ** 2
        report["seen"].append({"loss": loss.tolist()})
        optimizer.zero_grad()
        fabric.backward(alrc(loss).mean())
        optimizer.step()
        report["moments"].append(moments({"loss": alrc}))
    return report | {"final": [v for p in module.parameters() for v in p.flatten().tolist()]}


def waited(fabric: Fabric) -> dict[str, float]:
    """Seconds that a call waits for a late rank, and that a later read of the moments waits."""
    alrc = ALRC(**SETTINGS)
    fabric.barrier()
    if fabric.global_rank:
        time.sleep(DELAY)
    start = time.monotonic()
    alrc(losses(1.0))
    called = time.monotonic()
    alrc.mu1.item()
    return {"call": called - start, "look": time.monotonic() - called}


def exchanged(fabric: Fabric) -> dict[str, Any]:
    """The ranks use two names in different orders; only the first rank uses a third name."""
    of_losses = NamedLosses(dict(SETTINGS))
    exchange = Exchange(of_losses)
    names = ["a", "b"] if fabric.global_rank else ["b", "a"]
    for step in range(3):
        for name in names:
            of_losses.get_or_add(name)
            exchange.clip(name, losses(ord(name) + step))
        if step and not fabric.global_rank:
            of_losses.get_or_add("late")
            exchange.clip("late", losses(5.0, 6.0))
        exchange.send(torch.device("cpu"))
    without = sorted(of_losses)
    exchange.agree_on_late_names()
    exchange.send(torch.device("cpu"))
    return {"before": without, "moments": moments(of_losses)}


def measure(fabric: Fabric, folder: Path) -> None:
    """Write what this rank saw to ``folder``."""
    report = {each.__name__: each(fabric) for each in (trained, waited, exchanged)}
    (folder / f"fabric-{fabric.global_rank}.json").write_text(json.dumps(report))
    fabric.barrier()


def main(folder: Path) -> None:
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(measure, folder)
