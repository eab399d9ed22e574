"""Tiny networks in both of Lightning's namespaces, their data, and a plain training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRC, ALRCCallback, ALRCMixin

SETTINGS: dict[str, float] = {
    "num_stddev": 0.5,
    "decay": 0.9,
    "mu1_start": 10.0,
    "mu2_start": 150.0,
}
"""Settings that clip some losses of these networks, whatever the losses' shape."""

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}
BATCHES_IN_EPOCH = 6


def dataset() -> TensorDataset:
    """24 samples, every seventh a spike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator)
    y = x @ torch.randn(3, 2, generator=generator)
    y[::7] *= 6.0
    return TensorDataset(x, y)


def loader() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=4)


class ResumableLoader:
    """Batches in an order that continues from a checkpoint."""

    def __init__(self) -> None:
        self.batches = list(loader())
        self.given = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.given %= len(self.batches)
        while self.given < len(self.batches):
            self.given += 1
            yield self.batches[self.given - 1]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Core(nn.Module):
    """A plain PyTorch module with one linear layer, and losses of a given shape."""

    def __init__(
        self, shape: str = "scalar", returns: str = "tensor", manual: bool = False
    ) -> None:
        super().__init__()
        self.shape, self.returns, self.manual = shape, returns, manual
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        error = (self.layer(x) - y) ** 2
        if self.shape == "scalar":
            return error.mean()
        if self.shape == "vector":
            return error.mean(1)
        if self.shape == "matrix":
            return error
        return error[:, None, :, None]

    def skips(self, batch_idx: int) -> bool:
        return self.returns == "none" and batch_idx % 3 == 1

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Steps(Core):
    """The methods of a LightningModule. The module keeps the losses that its steps computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = not self.manual
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.losses(batch)
        self.seen.append(loss.detach().clone())
        if self.manual:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        if self.skips(batch_idx):
            return None
        return {"loss": loss, "batch": batch_idx} if self.returns == "dict" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer()

    def train_dataloader(self) -> Any:
        return loader()


class WithALRC(ALRCMixin):
    """The mixin, with settings that clip."""

    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**SETTINGS)


class Net(Steps, pytorch_lightning.LightningModule):
    pass


class UnifiedNet(Steps, lightning.pytorch.LightningModule):
    pass


class MixinNet(WithALRC, Net):
    pass


class UnifiedMixinNet(WithALRC, UnifiedNet):
    pass


class NamedLosses:
    """Two losses, each clipped by its own name, then weighted."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)  # type: ignore[attr-defined]
        first = self.alrc(losses[..., 0], "first")  # type: ignore[attr-defined]
        second = self.alrc(losses[..., 1], "second")  # type: ignore[attr-defined]
        return first.mean() + 0.5 * second.mean()


class NamedNet(NamedLosses, MixinNet):
    pass


class UnifiedNamedNet(NamedLosses, UnifiedMixinNet):
    pass


NETS: dict[str, type[Any]] = {"pytorch_lightning": Net, "lightning.pytorch": UnifiedNet}
MIXIN_NETS: dict[str, type[Any]] = {
    "pytorch_lightning": MixinNet,
    "lightning.pytorch": UnifiedMixinNet,
}
NAMED_NETS: dict[str, type[Any]] = {
    "pytorch_lightning": NamedNet,
    "lightning.pytorch": UnifiedNamedNet,
}


def train_by_hand(
    net: Core,
    alrc: ALRC | None,
    epochs: int = 2,
    accumulate: int = 1,
    gradient_clip_val: float | None = None,
    autocast: bool = False,
    batches: Iterable[Any] | None = None,
) -> None:
    """Train with ALRC in a plain PyTorch loop."""
    optimizer = net.optimizer()
    for _ in range(epochs):
        optimizer.zero_grad()
        for index, batch in enumerate(loader() if batches is None else batches):
            if net.skips(index):
                continue
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = net.losses(batch)
            if alrc is not None:
                loss = alrc(loss)
            loss = loss.mean() if loss.ndim else loss
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == BATCHES_IN_EPOCH:
                if gradient_clip_val is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), gradient_clip_val)
                optimizer.step()
                optimizer.zero_grad()


def callback_of(trainer: Any) -> ALRCCallback:
    """The only ALRCCallback of a Trainer, whether from the user or from a mixin."""
    (found,) = (each for each in trainer.callbacks if isinstance(each, ALRCCallback))
    return found


def state_of(alrc: ALRC) -> dict[str, float]:
    """The public state of an ALRC, as numbers."""
    names = ("mu1", "mu2", "stddev", "threshold", "updates", "losses_total", "clipped_total")
    return {name: getattr(alrc, name).item() for name in names}


def weights_of(net: nn.Module) -> list[float]:
    return [value for each in net.parameters() for value in each.detach().flatten().tolist()]
