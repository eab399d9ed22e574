"""Which training samples are bad? One pass under ALRC names them.

``python -m examples.find_bad_samples`` corrupts 200 images of the supersampling example, and trains
its network on all images once. Then it counts how many of the 200 are among the worst samples of
ALRC's record (``ALRCCallback.spikes``) and of ALRC's ledger (``read_ledger``). From the same
losses, it also counts how many of the 200 are found by Lightning's SpikeDetection, and how many are
among the samples with the largest losses.
``--retrain true`` trains again without the worst of the ledger, and tests on clean images.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
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

from lightning_alrc import ALRCCallback, plot, read_ledger, without_spikes
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
from .comparison.files import write_whole

CORRUPTIONS = ("hot pixels", "noise", "wrong target")

# The value and the noise are in standard deviations of the image.
HOT_PIXEL_FRACTION, HOT_PIXEL_VALUE = 0.02, 8.0
NOISE_STDDEV = 0.5


class NamedBatch(NamedTuple):
    """Training pairs with names, which the callback finds under ``id``.

    Attributes:
        input: float32 [batch, 3, 32, 32], scaled to half the size and back.
        target: float32 [batch, 3, 32, 32], at full resolution.
        id: names of the samples, [batch].
    """

    input: Tensor
    target: Tensor
    id: list[str]


def corrupt(
    clean: Tensor, corruption: Tensor, others: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Corrupt some pairs of a batch.

    Args:
        clean: float32 [batch, 3, height, width], standardised.
        corruption: int64 [batch], an index of `CORRUPTIONS`, or -1 for none.
        others: uint8 [images, 3, height, width], from which a wrong target is chosen.
        generator: source of random numbers.

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
        names: names of the images.
        corrupted: number of images to corrupt.
        generator: source of random numbers for the choice and all transformations.
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
        """Return a whole batch; a DataLoader calls this method if it exists."""
        chosen = torch.as_tensor(indices)
        clean = training_batch(self.images[chosen], self.generator).target
        pairs = corrupt(clean, self.corruption[chosen], self.images, self.generator)
        return NamedBatch(*pairs, [self.names[index] for index in indices])


def names_of(data: str, root: Path, count: int) -> list[str]:
    """The files of the images, or their indices if they are not from files."""
    if data != "folder":
        return [str(index) for index in range(count)]
    return [str(path.relative_to(root)) for path in image_files(root / "train")]


class LossesNoted(pl.Callback):
    """Keeps every sample's loss before clipping.

    Attributes:
        losses: losses of each batch, a list of [batch].
        names: names of the samples of each batch.
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
        self.losses.append(outputs["losses"])
        self.names.append(batch.id)

    def largest(self, count: int) -> list[str]:
        """The samples with the largest losses, each once, the largest first."""
        names = [name for of_batch in self.names for name in of_batch]
        order = torch.cat(self.losses).argsort(descending=True).tolist()
        return list(dict.fromkeys(names[index] for index in order))[:count]

    def samples_of(self, batches: Iterable[int]) -> list[str]:
        """The samples of some batches, each once, even if several of the batches have it."""
        names = (name for batch in sorted(set(batches)) for name in self.names[batch])
        return list(dict.fromkeys(names))


class SpikesNoted(SpikeDetection):
    """Lightning's SpikeDetection, without ending the training at a spike.

    SpikeDetection adds two batches to ``bad_batches`` and raises at the first spike. The two are
    the batch that spiked, and the batch before it, which may have damaged the weights. The user
    then starts the training again without them. Here the training continues, and each further spike
    adds two batches. SpikeDetection gets the mean loss of each batch before clipping.
    """

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: NamedBatch,
        batch_idx: int,
    ) -> None:
        """If the batch's loss is a spike, add two batches to ``bad_batches``."""
        loss = outputs["losses"].mean()
        with suppress(TrainingSpikeException):
            number = trainer.fit_loop.total_batch_idx  # counted through all epochs
            super().on_train_batch_end(trainer, pl_module, loss, batch, number)


def find_bad_samples(
    data: Literal["photographs", "download", "folder"] = "photographs",
    root: Path = Path("data"),
    images: int | None = None,
    corrupted: int = 200,
    seed: int = 0,
    batch_size: int = 8,
    num_stddev: float = 2.0,
    rtol: float = 2.0,
    epochs: int = 1,
    retrain: bool = False,
    output: Path = Path("bad_samples"),
) -> None:
    """Corrupt some training images, train on all images once, and see which are named.

    A third of the corrupted images have hot pixels, a third noise, a third the target of another
    image. The network is from examples.cifar10_supersampling, at a quarter of its width, with
    squared errors. Prints precision and recall of the worst in ALRC's record and ledger, of
    Lightning's SpikeDetection and of the largest losses. Writes bad_samples.csv, the record
    alrc_spikes.jsonl, the ledger, metrics.csv and curves.png to a new folder in output.

    Args:
        data: "photographs" needs no download; "download" has torchvision download CIFAR-10 into
            root; "folder" reads root/train/<class>/*.jpg|png, and to retrain also
            root/test/<class>/*.jpg|png.
        root: directory of "download" and "folder".
        images: number of images to use, chosen at random; default: all.
        corrupted: number of images to corrupt. Some rows of the table name this many of the worst
            samples, and others a quarter more.
        seed: seed of weights, of the images chosen, of their order and of their transformation.
        batch_size: images in a batch.
        num_stddev: standard deviations above the mean loss at which ALRC clips.
        rtol: SpikeDetection's argument: a batch is a spike if its loss exceeds the mean of the
            last ten batches by at least rtol times that mean. The default is Lightning's.
        epochs: number of epochs.
        retrain: train again, with and without ALRC, on three sets: all images, all but the worst of
            the ledger, and all but the corrupted images. Prints the error on clean
            test images, and writes it to retrained.csv.
        output: directory of the results.
    """
    if data == "download":
        CIFAR10Supersampling(data=data, root=root).prepare_data()
    dataset = corrupted_images(data, root, images, corrupted, seed)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs!r}")
    most = corrupted + corrupted // 4
    if retrain:
        if most >= len(dataset):
            raise ValueError(
                f"corrupted must be below four fifths of the {len(dataset)} images to retrain "
                f"without the {most} worst, got {corrupted!r}"
            )
        load_images(data, root, train=False)  # raises if they cannot be read
    alrc = ALRCCallback(num_stddev=num_stddev, record=most * epochs, ledger=True)
    logger = CSVLogger(output, name=None)
    folder = Path(logger.log_dir)
    losses = LossesNoted()
    detection = SpikesNoted(rtol=rtol, exclude_batches_path=folder / "skip_batches.json")

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    generator = dataset.generator
    module = train(
        dataset, generator, seed, batch_size, epochs, [alrc, losses, detection], logger=logger
    )
    planted, bad_batches = dataset.planted, detection.bad_batches
    worst = list(dict.fromkeys(str(spike.id) for spike in alrc.spikes))
    ledger = read_ledger(folder)
    ledger["id"] = ledger["id"].astype(str)

    def ranked(by: str, count: int) -> list[str]:
        names = ledger.sort_values([by, "mean"], ascending=False)["id"]
        return list(names[:count])

    named_by = {
        f"ALRC, {corrupted:,} worst": worst[:corrupted],
        f"ALRC, {most:,} worst": worst[:most],
        f"ledger, {corrupted:,} by stddevs": ranked("stddevs", corrupted),
        f"ledger, {most:,} by stddevs": ranked("stddevs", most),
        f"ledger, {most:,} by clipped": ranked("clipped", most),
        f"ledger, {most:,} by mean": ranked("mean", most),
        f"{corrupted:,} largest losses": losses.largest(corrupted),
        f"{most:,} largest losses": losses.largest(most),
        "SpikeDetection stops": losses.samples_of(bad_batches[:2]),
        "SpikeDetection goes on": losses.samples_of(bad_batches),
        "- spiking batches alone": losses.samples_of(bad_batches[1::2]),
    }
    console = Console()
    console.print(report(named_by, planted))
    write_names(folder / "bad_samples.csv", alrc.spikes, planted)
    plot(folder, title=f"{len(dataset):,} images, {corrupted:,} of them corrupted").savefig(
        folder / "curves.png", dpi=150
    )
    if retrain:
        rows = [("ALRC", "nothing", test(module, data, root))]
        for clipper, left_out in product(("ALRC", "none"), ("nothing", "worst", "corrupted")):
            if (clipper, left_out) == ("ALRC", "nothing"):
                continue  # the training above
            again = corrupted_images(data, root, images, corrupted, seed)
            some: Dataset[NamedBatch] = again
            if left_out == "worst":
                some = without_spikes(again, ledger, worst=most, by="stddevs", ids=again.names)
            if left_out == "corrupted":
                some = without_spikes(again, list(planted), ids=again.names)
            callbacks = [ALRCCallback(num_stddev=num_stddev)] if clipper == "ALRC" else []
            module = train(some, again.generator, seed, batch_size, epochs, callbacks)
            rows.append((clipper, left_out, test(module, data, root)))
        write_errors(folder / "retrained.csv", rows)
        for clipper, left_out, error in rows:
            console.print(f"{clipper:>5}, left out: {left_out:<10} clean test error {error:.4f}")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"Written to {folder}: {names}", soft_wrap=True)


def train(
    dataset: Dataset[NamedBatch],
    generator: Generator,
    seed: int,
    batch_size: int,
    epochs: int,
    callbacks: Sequence[pl.Callback],
    logger: CSVLogger | None = None,
) -> Supersampling:
    """Train a new network; see `find_bad_samples`.

    Args:
        dataset: dataset whose `__getitems__` returns a whole batch.
        generator: source of random numbers for the order of the samples.
        seed: seed of the weights.
        batch_size: images in a batch.
        epochs: number of epochs.
        callbacks: callbacks of the Trainer.
        logger: logger of the Trainer; None for none.
    """
    pl.seed_everything(seed, verbose=False)
    per_sample = any(isinstance(callback, ALRCCallback) for callback in callbacks)
    module = Supersampling(
        loss="squared", guard=False, per_sample=per_sample, learning_rate=1 / 1280
    )
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=generator, collate_fn=whole)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=logger or False,
        log_every_n_steps=min(10, len(loader)),
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return module


def test(module: Supersampling, data: Any, root: Path) -> float:
    """The mean squared error × 25 on clean test images."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    (metrics,) = trainer.test(module, CIFAR10Supersampling(data=data, root=root), verbose=False)
    return metrics["test/error"]


def write_errors(path: Path, rows: Iterable[tuple[str, str, float]]) -> None:
    """Write each network's clipper, what its training left out, and its error on clean images."""
    write_rows(path, [("clipper", "left_out", "test_error"), *rows])


def corrupted_images(
    data: str, root: Path, images: int | None, corrupted: int, seed: int
) -> CorruptedImages:
    """The images of a source, some of them corrupted; see `find_bad_samples`.

    Raises:
        ValueError: if ``images`` is below 2 or above the number of images there are, or
            ``corrupted`` is below 1 or above four fifths of the images.
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


def report(named_by: Mapping[str, Sequence[str]], planted: Mapping[str, str]) -> Table:
    """The table printed at the end.

    Args:
        named_by: by method, the samples that the method names.
        planted: what is wrong with each corrupted sample, by its name.
    """
    table = Table(
        title=f"{len(planted):,} corrupted samples: who finds them",
        box=box.SIMPLE_HEAD,
        # The table must fit 80 characters.
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in ("named", "found", "precision", "recall", *CORRUPTIONS):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for finder, names in named_by.items():
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
    """Write the samples of a record, the worst first, and the corruption of each, if any."""
    rows: list[Sequence[object]] = [("name", "corruption", "loss", "threshold", "scale", "step")]
    for spike in spikes:
        corruption = planted.get(str(spike.id), "")
        rows.append((spike.id, corruption, spike.loss, spike.threshold, spike.scale, spike.step))
    write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file in UTF-8. A name that is not UTF-8 is written with escapes."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    # On Windows, the encoding of stdout in a file or pipe lacks characters that names may have.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    auto_cli(find_bad_samples, as_positional=False, prog="python -m examples.find_bad_samples")
