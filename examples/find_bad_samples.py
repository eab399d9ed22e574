"""Which training samples are bad? One pass under ALRC names them.

``python -m examples.find_bad_samples`` corrupts 200 of the images of the supersampling example,
trains its network on all of them once, and counts how many of the 200 are among the worst of
ALRC's record, ``ALRCCallback.spikes``. On the same losses it counts what two other ways find:
Lightning's SpikeDetection, and the largest losses as they are.
"""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from lightning_fabric.utilities.spike import TrainingSpikeException
from pytorch_lightning.callbacks.spike import SpikeDetection
from pytorch_lightning.loggers import CSVLogger
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_alrc import ALRCCallback, plot
from lightning_alrc.spikes import Spike

from .cifar10_supersampling.cifar10 import image_files
from .cifar10_supersampling.datamodule import CIFAR10Supersampling, load_images, whole
from .cifar10_supersampling.module import Supersampling
from .cifar10_supersampling.transformation import (
    add_hot_pixels,
    add_noise,
    halve_resolution,
    replace_targets,
    training_batch,
)

CORRUPTIONS = ("hot pixels", "noise", "wrong target")

# In standard deviations of the image.
HOT_PIXEL_FRACTION, HOT_PIXEL_VALUE = 0.02, 8.0
NOISE_STDDEV = 0.5


class NamedBatch(NamedTuple):
    """Training pairs whose record can be read: the callback finds what a batch has as ``id``.

    Attributes:
        input: float32 [batch, 3, 32, 32], restored from half the resolution.
        target: float32 [batch, 3, 32, 32], at full resolution.
        id: names of the samples, [batch].
    """

    input: Tensor
    target: Tensor
    id: list[str]


def corrupt(
    clean: Tensor, corruption: Tensor, others: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Spoil some pairs of a batch.

    Args:
        clean: float32 [batch, 3, height, width], standardised.
        corruption: int64 [batch], an index of `CORRUPTIONS`, or -1 for none.
        others: uint8 [images, 3, height, width], of which a wrong target is one.
        generator: where chance comes from.

    Returns:
        Inputs and targets, both of the shape of ``clean``.
    """
    hot, noisy, wrong = (corruption == index for index in range(len(CORRUPTIONS)))
    chance = torch.rand(len(clean), 1, *clean.shape[2:], generator=generator)
    images = add_hot_pixels(clean, hot, chance, HOT_PIXEL_FRACTION, HOT_PIXEL_VALUE)
    images = add_noise(images, noisy, chance, NOISE_STDDEV)
    return halve_resolution(images), replace_targets(images, wrong, chance, others)


class CorruptedImages(Dataset[NamedBatch]):
    """Images in memory, some of them corrupted, a third in each way.

    Args:
        images: uint8 [images, 3, height, width].
        names: of the images.
        corrupted: how many are corrupted.
        generator: what chooses them, and transforms all of them.
    """

    def __init__(
        self, images: Tensor, names: Sequence[str], corrupted: int, generator: Generator
    ) -> None:
        self.images, self.names, self.generator = images, names, generator
        order = torch.randperm(len(images), generator=generator)
        self.corruption = torch.full((len(images),), -1)
        self.corruption[order[:corrupted]] = torch.arange(corrupted) % len(CORRUPTIONS)

    @property
    def planted(self) -> dict[str, str]:
        """The names of the corrupted images, and what is wrong with each."""
        chosen = (self.corruption >= 0).nonzero().flatten().tolist()
        return {self.names[each]: CORRUPTIONS[self.corruption[each]] for each in chosen}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NamedBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> NamedBatch:
        """Return a whole batch; a DataLoader asks for one when this method exists."""
        chosen = torch.as_tensor(indices)
        clean = training_batch(self.images[chosen], self.generator).target
        pairs = corrupt(clean, self.corruption[chosen], self.images, self.generator)
        return NamedBatch(*pairs, [self.names[index] for index in indices])


def names_of(data: str, root: Path, count: int) -> list[str]:
    """The files that images are from, or their numbers where they are not from files."""
    if data != "folder":
        return [str(index) for index in range(count)]
    return [str(path.relative_to(root)) for path in image_files(root / "train")]


class LossesNoted(pl.Callback):
    """Keeps every sample's loss as it is before ALRC clips it.

    Attributes:
        losses: of the samples of each batch, [batches] of [batch].
        names: of the samples of each batch.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[list[str]] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: NamedBatch,
        batch_idx: int,
    ) -> None:
        """Note a batch."""
        self.losses.append(outputs["losses"])
        self.names.append(batch.id)

    def largest(self, count: int) -> list[str]:
        """The samples with the largest losses, the largest first."""
        names = [name for of_batch in self.names for name in of_batch]
        return [names[index] for index in torch.cat(self.losses).topk(count).indices.tolist()]

    def of(self, batches: Iterable[int]) -> list[str]:
        """The samples of some batches, each batch once."""
        return [name for batch in sorted(set(batches)) for name in self.names[batch]]


class SpikesNoted(SpikeDetection):
    """Lightning's SpikeDetection, but a spike does not end the training.

    By design it raises at the first spike, for the training to be started again without the two
    batches that it names in ``bad_batches``: the one that spiked, and the one before, which may
    have spoilt the weights. Here the training goes on, and the list grows. It is shown the mean
    loss of each batch as it is before ALRC clips it.
    """

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: NamedBatch,
        batch_idx: int,
    ) -> None:
        """Name the batch, and the one before, if its loss is a spike."""
        loss = outputs["losses"].mean()
        with suppress(TrainingSpikeException):
            super().on_train_batch_end(trainer, pl_module, loss, batch, batch_idx)


def find_bad_samples(
    data: Literal["photographs", "download", "folder"] = "photographs",
    root: Path = Path("data"),
    images: int | None = None,
    corrupted: int = 200,
    seed: int = 0,
    batch_size: int = 8,
    num_stddev: float = 2.0,
    rtol: float = 2.0,
    output: Path = Path("bad_samples"),
) -> None:
    """Corrupt some training images, train on all of them once, and see which the record names.

    A third of the corrupted images have hot pixels, a third noise, a third the target of another
    image. The network is that of examples.cifar10_supersampling at a quarter of its width, with
    squared errors. Prints precision and recall of the worst in ALRC's record, beside those of
    Lightning's SpikeDetection and of the largest losses. Writes bad_samples.csv, the record
    alrc_spikes.jsonl, metrics.csv and curves.png to a new folder in output.

    Args:
        data: "photographs" needs no download; "download" has torchvision download CIFAR-10 into
            root; "folder" reads root/train/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        images: how many of the images are used, chosen at random; all unless given.
        corrupted: how many of them are corrupted. As many, and a quarter more, are named.
        seed: of weights, of the images chosen, of their order and of their transformation.
        batch_size: images in a batch.
        num_stddev: standard deviations above the mean loss at which ALRC clips.
        rtol: of SpikeDetection: how far a spike is above the mean of the last ten batches, in
            parts of it. The default is Lightning's.
        output: directory that the results are written to.
    """
    CIFAR10Supersampling(data=data, root=root).prepare_data()
    dataset = corrupted_images(data, root, images, corrupted, seed)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    most = corrupted + corrupted // 4
    alrc = ALRCCallback(num_stddev=num_stddev, record=most)
    logger = CSVLogger(output, name=None)
    folder = Path(logger.log_dir)
    losses = LossesNoted()
    detection = SpikesNoted(rtol=rtol, exclude_batches_path=folder / "skip_batches.json")

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    pl.seed_everything(seed, verbose=False)
    module = Supersampling(loss="squared", guard=False, per_sample=True, learning_rate=1 / 1280)
    loader = DataLoader(
        dataset, batch_size, shuffle=True, generator=dataset.generator, collate_fn=whole
    )
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[alrc, losses, detection],
        logger=logger,
        log_every_n_steps=min(10, len(loader)),
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(module, loader)

    planted, spiked = dataset.planted, detection.bad_batches
    worst = [str(spike.id) for spike in alrc.spikes]
    found = {
        f"ALRC, {corrupted:,} worst": worst[:corrupted],
        f"ALRC, {most:,} worst": worst,
        f"{corrupted:,} largest losses": losses.largest(corrupted),
        f"{most:,} largest losses": losses.largest(most),
        "SpikeDetection stops": losses.of(spiked[:2]),
        "SpikeDetection goes on": losses.of(spiked),
        "- spiking batches alone": losses.of(spiked[1::2]),
    }
    write_names(folder / "bad_samples.csv", alrc.spikes, planted)
    plot(folder, title=f"{len(dataset):,} images, {corrupted:,} of them corrupted").savefig(
        folder / "curves.png", dpi=150
    )
    console = Console()
    console.print(report(found, planted))
    console.print(
        f"Written to {folder}: bad_samples.csv, alrc_spikes.jsonl, metrics.csv, curves.png",
        soft_wrap=True,
    )


def corrupted_images(
    data: str, root: Path, images: int | None, corrupted: int, seed: int
) -> CorruptedImages:
    """The images of a source, some of them corrupted; see `find_bad_samples`.

    Raises:
        ValueError: if there are not as many images, or not as many to corrupt.
    """
    loaded = load_images(data, root, train=True)
    names = names_of(data, root, len(loaded))
    count = len(loaded) if images is None else images
    if not 2 <= count <= len(loaded):
        raise ValueError(f"images must be from 2 to {len(loaded)}, got {images!r}")
    if not 1 <= corrupted <= count * 4 // 5:
        raise ValueError(
            f"corrupted must be from 1 to {count * 4 // 5}, four fifths of the images, got "
            f"{corrupted!r}"
        )
    generator = Generator().manual_seed(seed)
    chosen = torch.randperm(len(loaded), generator=generator)[:count]
    return CorruptedImages(
        loaded[chosen], [names[index] for index in chosen.tolist()], corrupted, generator
    )


def report(found: Mapping[str, Sequence[str]], planted: Mapping[str, str]) -> Table:
    """The table printed at the end.

    Args:
        found: names of samples, by who found them.
        planted: what is wrong with each corrupted sample, by its name.
    """
    table = Table(
        title=f"{len(planted):,} corrupted samples: who finds them",
        box=box.SIMPLE_HEAD,
        # So that the table fits 80 characters.
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in ("named", "found", "precision", "recall", *CORRUPTIONS):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for finder, names in found.items():
        hits = [planted[name] for name in names if name in planted]
        table.add_row(
            finder,
            f"{len(names):,}",
            f"{len(hits):,}",
            f"{len(hits) / len(names):.1%}" if names else "",
            f"{len(hits) / len(planted):.1%}",
            *(f"{hits.count(corruption):,}" for corruption in CORRUPTIONS),
        )
    totals = [list(planted.values()).count(corruption) for corruption in CORRUPTIONS]
    table.add_section()
    table.add_row("all there are", "", f"{len(planted):,}", "", "", *map(str, totals))
    return table


def write_names(path: Path, spikes: Sequence[Spike], planted: Mapping[str, str]) -> None:
    """Write the samples of a record, the worst first, and what is wrong with each, if known."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "corruption", "loss", "threshold", "scale", "step"])
        for spike in spikes:
            corruption = planted.get(str(spike.id), "")
            row = [spike.id, corruption, spike.loss, spike.threshold, spike.scale, spike.step]
            writer.writerow(row)


if __name__ == "__main__":
    auto_cli(find_bad_samples, as_positional=False, prog="python -m examples.find_bad_samples")
