"""The record of a Trainer's worst clips: where its losses come from, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning_alrc._moments import distributed
from lightning_alrc._spikes.batches import Batches
from lightning_alrc._spikes.ids import GIVEN, Ids, ids_in, is_list_of_ids
from lightning_alrc._spikes.judging import PATIENCE, Judge, checked_judging
from lightning_alrc._spikes.places import record_files, record_folder
from lightning_alrc._spikes.record import Origin, Spike, SpikeRecord
from lightning_alrc._spikes.record_file import (
    FILE,
    Owned,
    RecordFile,
    checked_owned,
    checked_spikes,
    new_run,
)
from lightning_alrc._trainer.lightning import steps, takes_batches_itself
from lightning_alrc._trainer.namespaces import rank_zero_warn

if TYPE_CHECKING:
    from lightning_alrc.alrc import ALRC

__all__ = ["FILE", "Recording", "checked_recording"]

READ_AFTER = 1000
"""Steps after which the record is read even where Lightning does not log."""
WRITTEN_EVERY = 10.0
"""Seconds, at least, as a busy disk takes up to a tenth of one; the file is written at the end of a
training in any case."""


class Recording:
    """Keeps a Trainer's record of spikes, in memory and in a file.

    :func:`~lightning_alrc._spikes.places.record_folder` says where the file is, and
    :class:`~lightning_alrc._spikes.record_file.RecordFile` which one.

    Args:
        size: how many of each loss are kept.
        sample_ids: the ids of a batch's samples; ``None`` for the datamodule's ``sample_ids``, or
            else what :func:`~lightning_alrc._spikes.ids.ids_in` finds in a batch.
        batches: how many batches with the worst of them are kept, on each rank. Where that is not
            0, the record is read after every step.
    """

    def __init__(
        self, size: int, sample_ids: Callable[[Any], Any] | None = None, batches: int = 0
    ) -> None:
        self.record = SpikeRecord(size)
        self.sample_ids = sample_ids
        self.batches = Batches(batches) if batches else None
        self._file: RecordFile | None = None
        """of rank 0, if the Trainer has a folder for it"""
        self._run: str | None = None
        self._folder: Path | None = None
        """of the last fit"""
        self._resumed: Owned | None = None
        """the file of the run whose checkpoint was loaded since the last fit"""
        self._given_ids: Callable[[Any], Any] | None = None
        self._knows_batch = True
        self._has_started = False
        self._warned_of_disk = False
        self._written_at = -WRITTEN_EVERY
        self._shared_at = 0
        self._shares_until = -1
        """the step up to which ranks may know more of spikes they have told of"""
        self._shares_next = False

    @property
    def path(self) -> Path | None:
        """The record's file, once it is there; on rank 0."""
        return None if self._file is None else self._file.path

    def start(self, trainer: Any) -> None:
        """A fit starts. Every rank must call it."""
        self.record.rank = trainer.global_rank
        of_datamodule = getattr(trainer.datamodule, "sample_ids", None)
        self._given_ids = self.sample_ids or (of_datamodule if callable(of_datamodule) else None)
        # A step that takes its batches itself has not done so when it begins.
        self._knows_batch = not takes_batches_itself(trainer)
        of_first_rank = record_folder(trainer) if trainer.is_global_zero else None
        folder: Path | None = trainer.strategy.broadcast(of_first_rank)
        resumed, self._resumed = self._resumed, None
        goes_on = steps(trainer) > 0
        is_elsewhere = self._folder not in (None, folder)
        if resumed is None and self._has_started and (is_elsewhere or not goes_on):
            self.record.load([])  # another run, of other batches
            self._run = None
        if resumed is not None or self._run is None or folder != self._folder:
            self._begin_run(trainer, folder, resumed)
        self._has_started, self._folder = True, folder
        self._write()

    def _begin_run(self, trainer: Any, folder: Path | None, resumed: Owned | None) -> None:
        """Give the run an id of its own, and find its files."""
        run, self._file, taken_over = new_run(), None, None
        if trainer.is_global_zero and folder is not None:
            self._file = RecordFile(folder, run)
            try:
                if resumed is not None and self._file.take_over(resumed, self.record.worst):
                    taken_over, self.record.changed = resumed.run, False
                elif self.batches is not None or record_files(folder):
                    # So that nobody takes the record of another run for that of this one.
                    self._file.create(with_batches=self.batches is not None)
            except OSError as error:
                self._warn_of_disk(error)
        batches = None if self._file is None else self._file.batches
        told: tuple[str, Path | None, str | None] = (run, batches, taken_over)
        self._run, batches, taken_over = trainer.strategy.broadcast(told)
        if self.batches is not None:
            self.batches.start(batches, self._run, taken_over, trainer.global_rank)

    def release(self) -> None:
        """A fit has ended: hold on to none of its data."""
        self._given_ids = None
        self.record.forget_batch()
        if self.batches is not None:
            self.batches.release()

    def begin_step(self, trainer: Any, batch: Any) -> None:
        """The losses that are seen next are those of ``batch``."""
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        ids = self._ids_of(batch) if self._knows_batch else {}
        self.record.begin_batch(Origin(steps(trainer), trainer.current_epoch, batch_idx, ids))
        if self.batches is not None:
            self.batches.begin_step(trainer, batch if self._knows_batch else None, batch_idx)

    def _ids_of(self, batch: Any) -> Ids:
        """The ids that the user's function returns of a batch, or else those found in it.

        Raises:
            TypeError: if it returns something else.
        """
        if self._given_ids is None:
            return ids_in(batch)
        ids = self._given_ids(batch)
        if ids is not None and not is_list_of_ids(ids):
            raise TypeError(
                "sample_ids must return a list or a tensor of one dimension, or None, got "
                f"{ids!r:.100} of type {type(ids).__name__}"
            )
        return {} if ids is None else {GIVEN: ids}

    def end_step(self, batch: Any) -> None:
        """The losses of ``batch`` have been learned from; read the record if it is time to."""
        self.record.finish_batch()
        if self.batches is not None:
            self.record.read()
            self.batches.end_step(self.record, batch)
        elif self.record.unread >= READ_AFTER:
            self.record.read()

    def share(self, trainer: Any, losses: Mapping[str, ALRC], at_end: bool = False) -> None:
        """Read the record, merge the ranks' and write it. Every rank must call it.

        Args:
            trainer: that of the fit.
            losses: whose counts, the same on every rank, tell whether there is anything to merge.
            at_end: of the fit.
        """
        self.record.read(at_end)
        if distributed.is_active():
            clipped_total, step = sum(int(a.clipped_total) for a in losses.values()), steps(trainer)
            has_changed = clipped_total != self._shared_at
            if has_changed or self._shares_next or at_end or step <= self._shares_until:
                self._merge(trainer.world_size)
            if has_changed:
                self._shares_until = step + 2 * PATIENCE
            self._shared_at, self._shares_next = clipped_total, has_changed
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
            self.record.read(at_end=True)
        self._write()
        return self.record.worst

    def _write(self) -> None:
        if self._file is None or not (self.record.changed or self._file.has_vanished):
            return
        try:
            self._file.write(self.record.worst)
            self.record.changed = False
        except OSError as error:  # a full disk is no reason to stop training
            self._warn_of_disk(error)
        self._written_at = monotonic()  # however long it took

    def _warn_of_disk(self, error: OSError) -> None:
        if not self._warned_of_disk and self._file is not None:
            rank_zero_warn(f"the record of spikes in {self._file.folder} was not written: {error}")
        self._warned_of_disk = True

    def state_dict(self, without_current_batch: bool = False) -> dict[str, Any]:
        """The record, and what tells its file, as plain numbers and strings. Reads the device.

        Args:
            without_current_batch: leave out the spikes of a batch that has not been learned from,
                as the run that resumes will train on it again.
        """
        self.record.read()
        owned = Owned(run=self._run) if self._file is None else self._file.owned
        # Before a fit has started, a search for a learning rate saves and loads what was loaded.
        owned = self._resumed or owned
        return owned._asdict() | {
            "worst": self.record.state_dict(without_current_batch),
            "judging": self.record.dump_judges(without_current_batch),
        }

    def load(self, owned: Owned, spikes: list[Spike], judges: Mapping[str, Judge]) -> None:
        """Continue from what :func:`checked_recording` found sound."""
        self._resumed = owned
        self.record.load(spikes, judges)


def checked_recording(state: Any) -> tuple[Owned, list[Spike], dict[str, Judge]]:
    """The file, the spikes and their judges in what :meth:`Recording.state_dict` returned.

    Raises:
        ValueError: names what is wrong with it, and what is allowed.
    """
    needed, known = {"file", "worst"}, {"worst", "judging", *Owned._fields}
    if not isinstance(state, Mapping) or not needed <= set(state) <= known:
        raise ValueError(f"a recording's state must have 'file' and 'worst', got {state!r:.300}")
    judges = checked_judging(state.get("judging", {}))
    return checked_owned(state), checked_spikes(state["worst"]), judges
