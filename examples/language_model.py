"""A small transformer learns the standard library's sources byte by byte, with 1 % noise.

    python -m examples.language_model compare

One sequence in a hundred is replaced by random bytes. ALRC clips the loss of each token, of each
sequence or of the batch, as the method's name says. The optimizer is SGD with momentum. With the
learning rate 0.1, training is calm; with 0.6, losses spike. With Adam, losses do not spike in a
network this small: if Adam's learning rate is too high, training stalls.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .comparison.compare import Comparison
from .comparison.methods import clipped_by, trainer
from .comparison.progress import Report

LENGTH, BATCH_SIZE, WIDTH = 32, 8, 32
NOISE = 0.01
RATES = {"calm": 0.1, "spikes": 0.6}
TEST_SEQUENCES = 2000
ALRC = ("alrc3-token", "alrc3-sequence", "alrc3-batch", "alrc3-sequence+norm")


@cache
def sources() -> Tensor:
    """The standard library's modules, uint8 [bytes]; the last tenth is kept for the test."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, paths))), dtype=torch.uint8)


def sequences(starts: Tensor) -> Tensor:
    """Bytes [B, LENGTH + 1] of the sources from each start [B]."""
    return sources()[starts[:, None] + torch.arange(LENGTH + 1)].long()


class Sources(pl.LightningDataModule, IterableDataset):
    """Endless batches [BATCH_SIZE, LENGTH + 1] from random places in the sources."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.trained_on = len(sources()) * 9 // 10

    def __iter__(self):
        last = self.trained_on - LENGTH - 1
        while True:
            batch = sequences(torch.randint(last, (BATCH_SIZE,), generator=self.generator))
            noise = torch.randint(256, batch.shape, generator=self.generator)
            is_noise = torch.rand(BATCH_SIZE, 1, generator=self.generator) < NOISE
            yield torch.where(is_noise, noise, batch)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self, batch_size=None)

    def test_sequences(self) -> Tensor:
        """Clean sequences [TEST_SEQUENCES, LENGTH + 1], evenly spaced in the last tenth."""
        last = len(sources()) - LENGTH - 1
        return sequences(torch.linspace(self.trained_on, last, TEST_SEQUENCES).long())


class Transformer(pl.LightningModule):
    """Two layers, with normalisation before each part.

    Args:
        rate: learning rate.
        unit: "token", "sequence" or "batch"; `training_step` returns one loss for each.
    """

    def __init__(self, rate: float, unit: str) -> None:
        super().__init__()
        self.rate, self.unit = rate, unit
        self.seen: list[Tensor] = []
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, norm_first=True, batch_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.output = nn.Linear(WIDTH, 256)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def token_losses(self, batch: Tensor) -> Tensor:
        """Cross-entropy in nats [B, LENGTH] of bytes [B, LENGTH + 1]."""
        embedded = self.token(batch[:, :-1]) + self.position
        logits = self.output(self.layers(embedded, mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The losses; each is clipped by itself."""
        losses = self.token_losses(batch)
        self.seen.append(losses.detach().mean(dim=1).median())
        if self.unit == "token":
            return losses.flatten()
        return losses.mean(dim=1) if self.unit == "sequence" else losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


def measure(
    setting: str, method: str, seed: int, steps: int, folder: Path, report: Report | None = None
) -> dict[str, object]:
    """Train, and measure the loss of clean test text.

    Returns:
        "loss"; "peak", the highest loss of a step after the first tenth of the steps; and
        "clipped", the number of clipped losses.
    """
    pl.seed_everything(seed, verbose=False)
    unit = next((each for each in ("token", "sequence") if each in method), "batch")
    data, training = Sources(seed), trainer(method, steps, report=report)
    net = Transformer(RATES[setting], unit)
    training.fit(net, data)
    with torch.no_grad():
        loss = float(net.eval().token_losses(data.test_sequences()).mean())
    # Each step's loss is the median of its sequences, so noise does not count.
    peak = float(torch.stack(net.seen[steps // 10 :]).max())
    return {"loss": loss, "peak": peak, "clipped": clipped_by(training)}


METHODS = ("none", "norm", "zclip", "skip", *ALRC)
SETTINGS = dict.fromkeys(RATES, METHODS)
MEASURES = {"loss": "clean loss", "peak": "highest loss"}
COMPARISON = Comparison("language_model", measure, SETTINGS, MEASURES, 300)

if __name__ == "__main__":
    COMPARISON.main()
