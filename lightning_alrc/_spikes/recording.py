"""The record of a Trainer's worst clips: where its losses come from, and where it is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import torch.distributed as dist

from lightning_alrc._moments import distributed
from lightning_alrc._spikes.batches import Batches
from lightning_alrc._spikes.record import Origin, Spike, SpikeRecord, checked_spikes, write_spikes
from lightning_alrc._trainer.namespaces import rank_zero_warn
from lightning_alrc.alrc import ALRC

__all__ = ["FILE", "Recording", "checked_recording"]

FILE = "alrc_spikes.jsonl"
FILES = r"alrc_spikes(-v\d{1,9})?\.jsonl"
READ_AFTER = 1000
"""Steps after which the record is read even where Lightning does not log."""
WRITTEN_EVERY = 10.0
"""Seconds, at least, as a busy disk takes up to a tenth of one; the file is written at the end of a
training in any case."""


class Recording:
    """Keeps a Trainer's record of spikes, in memory and in a file beside its checkpoints.

    Args:
        size: how many of each loss are kept.
        sample_ids: the ids of a batch's samples; ``None`` for the datamodule's ``sample_ids``, or
            else what a batch has under ``"id"`` or ``"ids"``.
        batches: how many batches with the worst of them are kept, on each rank. Where that is not
            0, the record is read after every step.
    """

    def __init__(
        self, size: int, sample_ids: Callable[[Any], Any] | None = None, batches: int = 0
    ) -> None:
        self.record = SpikeRecord(size)
        self.sample_ids = sample_ids
        self.path: Path | None = None
        self.batches = Batches(batches) if batches else None
        self._file: str | None = None
        self._folder: Path | None = None
        """of the last fit; none after a checkpoint was loaded"""
        self._ids_of: Callable[[Any], Any] = _ids_in
        self._knows_batch = True
        self._has_started = False
        self._warned_of_disk = False
        self._written_at = -WRITTEN_EVERY
        self._shared_at = 0

    def start(self, trainer: Any) -> None:
        """A fit starts. Every rank must call it."""
        self.record.rank = trainer.global_rank
        of_datamodule = getattr(trainer.datamodule, "sample_ids", None)
        if not callable(of_datamodule):
            of_datamodule = None
        self._ids_of = self.sample_ids or of_datamodule or _ids_in
        # A step that takes its batches itself has not done so when it begins.
        fetcher = type(trainer.fit_loop._data_fetcher).__name__
        self._knows_batch = fetcher != "_DataLoaderIterDataFetcher"
        folder = _folder(trainer)
        goes_on = trainer.fit_loop.epoch_loop._batches_that_stepped > 0
        if self._has_started and (self._folder not in (None, folder) or not goes_on):
            self._file = None  # another run, of other batches
            self.record.load([])
        self._has_started = True
        self._folder, self.path = folder, None
        if folder is not None and trainer.is_global_zero:
            self._file = self._file or _free_name(folder)
            self.path = folder / self._file
        if self.batches is not None:
            file = trainer.strategy.broadcast(self._file)
            beside = None if folder is None else folder / _folder_of_batches(file)
            self.batches.folder = beside
        self._write()

    def release(self) -> None:
        """A fit has ended: hold on to none of its data."""
        self._ids_of = _ids_in
        if self.batches is not None:
            self.batches.release()

    def begin_step(self, trainer: Any, batch: Any) -> None:
        """The losses that are seen next are those of ``batch``."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        ids = self._ids_of(batch) if self._knows_batch else None
        if ids is not None and not _are_ids(ids):
            raise TypeError(
                "sample_ids must return a list or a tensor of one dimension, or None, got "
                f"{ids!r:.100} of type {type(ids).__name__}"
            )
        self.record.origin = Origin(step, trainer.current_epoch, batch_idx, ids)
        if self.batches is not None:
            self.batches.begin_step(trainer, batch if self._knows_batch else None, batch_idx)

    def end_step(self, batch: Any) -> None:
        """The losses of ``batch`` have been seen; read the record if it is time to."""
        if self.batches is not None:
            spikes = self.record.read()
            name = spikes[0].batch_file if spikes else None
            self.batches.end_step(self.record, batch, name)
        elif self.record.unread >= READ_AFTER:
            self.record.read()

    def share(self, trainer: Any, losses: Mapping[str, ALRC], at_end: bool = False) -> None:
        """Read the record, merge the ranks' and write it. Every rank must call it.

        Args:
            trainer: that of the fit.
            losses: whose counts, the same on every rank, tell whether there is anything to merge.
            at_end: of the fit.
        """
        self.record.read()
        if distributed.is_active():
            clipped_total = sum(int(alrc.clipped_total) for alrc in losses.values())
            if clipped_total != self._shared_at:
                self._merge(trainer.world_size)
            self._shared_at = clipped_total
        else:
            self.record.take_unshared()  # there is nobody to tell
        if at_end or monotonic() - self._written_at >= WRITTEN_EVERY:
            self._write()

    def _merge(self, ranks: int) -> None:
        gathered: list[list[Spike]] = [[] for _ in range(ranks)]
        dist.all_gather_object(gathered, self.record.take_unshared())
        for spikes in gathered:
            self.record.enter(spikes)

    def rescue(self) -> list[Spike]:
        """Write and return what this rank knows, whatever has become of others and the device."""
        with suppress(RuntimeError):
            self.record.read()
        self._write()
        return self.record.worst

    def _write(self) -> None:
        if self.path is None or not self.record.changed:
            return
        try:
            write_spikes(self.path, self.record.worst)
            self.record.changed = False
        except OSError as error:  # a full disk is no reason to stop training
            if not self._warned_of_disk:
                rank_zero_warn(f"the record of spikes {self.path} was not written: {error}")
            self._warned_of_disk = True
        self._written_at = monotonic()  # however long it took

    def state_dict(self) -> dict[str, Any]:
        """The record, and its file's name, as plain numbers and strings."""
        self.record.read()
        return {"file": self._file, "worst": self.record.state_dict()}

    def load(self, file: str | None, spikes: list[Spike]) -> None:
        """Continue from what :func:`checked_recording` found sound."""
        self._file, self._folder = file, None
        self.record.load(spikes)


def checked_recording(state: Any) -> tuple[str | None, list[Spike]]:
    """The file's name and the spikes in what :meth:`Recording.state_dict` returned.

    Raises:
        ValueError: names what is wrong with it, and what is allowed.
    """
    if not isinstance(state, Mapping) or set(state) != {"file", "worst"}:
        raise ValueError(f"a recording's state must have 'file' and 'worst', got {state!r:.300}")
    file = state["file"]
    if file is not None and not (isinstance(file, str) and re.fullmatch(FILES, file)):
        raise ValueError(
            f"a recording's 'file' must be a name like {FILE!r} or None, got {file!r:.100}"
        )
    return file, checked_spikes(state["worst"])


def _ids_in(batch: Any) -> Any:
    """What a batch has under its usual name, if there is one for each sample."""
    for key in ("id", "ids"):
        if isinstance(batch, Mapping):
            ids = batch.get(key)
        else:  # a named tuple's field
            ids = getattr(batch, key, None) if isinstance(batch, tuple) else None
        if _are_ids(ids):
            return ids
    return None


def _are_ids(ids: Any) -> bool:
    # What has more dimensions are token ids, say.
    return getattr(ids, "ndim", 0) == 1 or isinstance(ids, (list, tuple))


def _folder(trainer: Any) -> Path | None:
    """Where the Trainer keeps its checkpoints, or else its logs; ``None`` if it keeps neither."""
    if trainer.fast_dev_run:
        return None
    checkpoints = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
    log_dir = trainer.log_dir if trainer.loggers else None  # every rank must ask for it
    folder = next((each for each in [*checkpoints, log_dir] if each), None)
    if folder is None:
        return None
    if "://" in str(folder):
        rank_zero_warn(f"the record of spikes is kept in memory: {folder} is not a local folder")
        return None
    return Path(folder)


def _folder_of_batches(file: str) -> str:
    return Path(file).stem.replace("spikes", "batches")


def _free_name(folder: Path) -> str:
    """The first name that no earlier run's record has, nor its batches."""
    name, version = FILE, 0
    while (folder / name).exists() or (folder / _folder_of_batches(name)).exists():
        version += 1
        name = f"{Path(FILE).stem}-v{version}.jsonl"
    return name
