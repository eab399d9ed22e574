"""Connects the record of spikes to a Trainer: batches and ids in, files and checkpoints out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_alrc._moments.distributed import gathered
from lightning_alrc._moments.state import Moments
from lightning_alrc._spikes.batches import Batches
from lightning_alrc._spikes.ids import (
    GIVEN,
    Ids,
    SampleIds,
    checked_sample_ids,
    ids_in,
    is_list_of_ids,
    number_of_samples,
)
from lightning_alrc._spikes.judging import WINDOW, Judge, checked_judging
from lightning_alrc._spikes.ledger import History, Ledger, checked_histories
from lightning_alrc._spikes.places import record_files, record_folder
from lightning_alrc._spikes.record import Origin, Spike, SpikeRecord
from lightning_alrc._spikes.record_file import (
    BATCHES,
    FILE,
    OwnedFile,
    RecordFile,
    checked_owned_file,
    checked_spikes,
    new_run,
)
from lightning_alrc._trainer.exchange import has_other_ranks
from lightning_alrc._trainer.lightning import steps, takes_batches_itself
from lightning_alrc._trainer.namespaces import rank_zero_warn

if TYPE_CHECKING:
    from lightning_alrc.alrc import ALRC

__all__ = ["FILE", "Recording", "checked_recording"]

READ_AFTER = 1000
"""The host reads the record from the device when the record holds this many calls of one loss, even
if Lightning does not log."""
WRITTEN_EVERY = 10.0
"""Least number of seconds between two writes during a fit, because a write may take 0.1 s on a busy
disk. At the start and at the end of a fit, a changed record is always written."""


class Recording:
    """Keeps a Trainer's record of spikes, in memory and in a file.

    :func:`~lightning_alrc._spikes.places.record_folder` chooses the folder of the file, and
    :class:`~lightning_alrc._spikes.record_file.RecordFile` its name.

    Args:
        size: how many spikes of each loss are kept.
        sample_ids: function that returns the ids of a batch's samples. ``None`` takes the
            datamodule's ``sample_ids``, or :func:`~lightning_alrc._spikes.ids.ids_in` if the
            datamodule has none.
        batches: how many batches with the worst spikes each rank keeps. Above 0, the record is read
            after every step.
        ledger: every sample's history; ``None`` if it is not kept.
    """

    def __init__(
        self,
        size: int,
        sample_ids: Callable[[Any], Any] | None = None,
        batches: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.record = SpikeRecord(size)
        self.sample_ids = sample_ids
        self.batches = Batches(batches) if batches else None
        self.ledger = ledger
        self._file: RecordFile | None = None
        """the file, on rank 0, if the Trainer has a folder for it"""
        self._run: str | None = None
        self._folder: Path | None = None
        """folder of the fit that was started last"""
        self._resumed: OwnedFile | None = None
        """file that a loaded checkpoint names, until the next fit starts and takes it over"""
        self._read_given_ids: Callable[[Any], Any] | None = None
        self._knows_batch = True
        self._batch: Any = None
        """batch of the step, from ``begin_step`` until its ids are read"""
        self._has_started = False
        self._warned_of_disk = self._warned_of_ids = False
        self._written_at = -WRITTEN_EVERY
        self._clipped_at_share = 0
        """number of clipped losses when ``share`` was last called"""
        self._has_other_ranks = False
        self._merges_until = -1
        """Until this step, every ``share`` merges the spikes of all ranks. A spike may be judged
        after it was merged, and must then be merged again, with its kind."""
        self._merges_next = False
        """Whether the next ``share`` merges, even after the step ``_merges_until``. Set if the last
        ``share`` had new clips: their kinds may be known only at the next ``share``."""

    def __getstate__(self) -> dict[str, Any]:
        # The function may be a method of the datamodule, which leads to the Trainer.
        return self.__dict__ | {"_read_given_ids": None, "_batch": None}

    @property
    def _has_companions(self) -> bool:
        """Whether batches or a ledger are written beside the record."""
        return self.batches is not None or self.ledger is not None

    def files(self) -> dict[str, Path]:
        """The files of this run's record and batches, by the relative path to store a copy under.

        Only rank 0 returns files. They include batches of other ranks if all ranks share the
        folder.
        """
        record = None if self._file is None else self._file.path
        if record is None or not record.exists():
            return {}
        batches = [] if self.batches is None else self.batches.files(self.record.worst)
        return {FILE: record} | {f"{BATCHES}/{each.name}": each for each in batches}

    def start(self, trainer: Any) -> None:
        """Start a fit. Every rank must call this method."""
        self.record.rank = trainer.global_rank
        self._has_other_ranks = has_other_ranks(trainer)
        of_datamodule = getattr(trainer.datamodule, "sample_ids", None)
        self._read_given_ids = self.sample_ids or (
            of_datamodule if callable(of_datamodule) else None
        )
        # If training_step draws its batches itself, there is no batch yet when a step begins.
        self._knows_batch = not takes_batches_itself(trainer)
        of_first_rank = record_folder(trainer) if trainer.is_global_zero else None
        folder: Path | None = trainer.strategy.broadcast(of_first_rank)
        resumed, self._resumed = self._resumed, None
        goes_on = steps(trainer) > 0
        is_elsewhere = self._folder not in (None, folder)
        if resumed is None and self._has_started and (is_elsewhere or not goes_on):
            self.forget()  # another run, with other batches
        if resumed is not None or self._run is None or folder != self._folder:
            self._begin_run(trainer, folder, resumed)
        self._has_started, self._folder = True, folder
        self._write()
        if self.ledger is not None:
            self.ledger.start(number_of_samples(trainer.train_dataloader))
            self._write_ledger()

    def forget(self) -> None:
        """Drop all spikes and histories: the next fit is another run. Files stay as they are."""
        self.record.load([])
        if self.ledger is not None:
            self.ledger.load({})
        self._file = self._run = self._resumed = None
        self._clipped_at_share = 0

    def _begin_run(self, trainer: Any, folder: Path | None, resumed: OwnedFile | None) -> None:
        """Give the run a new id, and find or create its files."""
        run, self._file, taken_over = new_run(), None, None
        if trainer.is_global_zero and folder is not None:
            self._file = RecordFile(folder, run)
            try:
                if resumed is not None and self._file.take_over(resumed, self.record.worst):
                    taken_over, self.record.changed = resumed.run, False
                # Usually, the first write creates the file. It is created now if batches or a
                # ledger are kept, because they are named after it. It is also created now if the
                # folder has the record of another run, which a reader would take for this run's.
                elif self._has_companions or record_files(folder):
                    self._file.create(with_batches=self.batches is not None)
            except OSError as error:
                self._warn_of_disk(error)
        batches = None if self._file is None else self._file.batches
        of_rank_zero: tuple[str, Path | None, str | None] = (run, batches, taken_over)
        self._run, batches, taken_over = trainer.strategy.broadcast(of_rank_zero)
        if self.batches is not None:
            self.batches.start(batches, self._run, taken_over, trainer.global_rank)

    def release(self) -> None:
        """End a fit: let go of its last batch, ids and module. Spikes and histories stay."""
        self._read_given_ids = self._batch = None
        self.record.release_ids()
        if self.ledger is not None:
            self.ledger.forget_batch()
        if self.batches is not None:
            self.batches.release()

    def begin_step(self, trainer: Any, batch: Any) -> None:
        """Begin a step: the losses observed next are from ``batch``."""
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        ids: Ids | None = None if self._knows_batch else {}
        self._batch = batch if self._knows_batch else None
        self.record.begin_batch(Origin(steps(trainer), trainer.current_epoch, batch_idx, ids))
        if self.ledger is not None:
            self.ledger.forget_batch()
        if self.batches is not None:
            self.batches.begin_step(trainer, batch if self._knows_batch else None, batch_idx)

    def note_start(self) -> None:
        """Note what ``training_step`` starts from. Call this right before it.

        Ids are read only now, because hooks and callbacks may change the batch in
        ``on_train_batch_start``. In a search for a learning rate within a fit there is no batch,
        because ``begin_step`` is not called.
        """
        if self.record.origin.ids is None and self._batch is not None:
            ids, self._batch = self._ids_of(self._batch), None
            self.record.origin = self.record.origin._replace(ids=ids)
        if self.batches is not None:
            self.batches.note_start()

    def observe_all(self, name: str, loss: Tensor, clipped: Tensor, moments: Moments) -> None:
        """Add losses to the ledger, whether or not any is clipped.

        Args:
            name: name of the loss.
            loss: losses before clipping.
            clipped: losses after clipping.
            moments: moments that gave the threshold.
        """
        if self.ledger is not None:
            self.ledger.observe(name, self.record.origin.ids or {}, loss, clipped, moments)

    def _ids_of(self, batch: Any) -> Ids:
        """The ids from the user's function, or the ids found in the batch if there is none.

        Raises:
            TypeError: if the function returns something that is not ids.
        """
        if self._read_given_ids is None:
            return ids_in(batch)
        ids = self._read_given_ids(batch)
        if ids is not None and not is_list_of_ids(ids):
            raise TypeError(
                "sample_ids must return a list or a tensor of one dimension, or None, got "
                f"{ids!r:.100} of type {type(ids).__name__}"
            )
        return {} if ids is None else {GIVEN: ids}

    def end_step(self, batch: Any) -> None:
        """End a step: ``batch`` was trained on. Read new spikes from the device if that is due."""
        self.record.finish_batch()
        if self.ledger is not None:
            self.ledger.finish_batch()
        if self.batches is not None:
            self.record.read()
            self.batches.end_step(self.record, batch)
        elif self.record.calls_held >= READ_AFTER:
            self.record.read()

    def share(self, trainer: Any, losses: Mapping[str, ALRC], at_end: bool = False) -> None:
        """Read new spikes from the device, merge them across ranks, and write the file if due.

        Every rank must call this method.

        Args:
            trainer: the Trainer of the fit.
            losses: the ALRC of each loss, by name. Their numbers of clips are equal on every rank,
                and tell whether there is anything to merge.
            at_end: whether the fit has ended.
        """
        self.record.read(at_end)
        if self._has_other_ranks:
            clipped_total, step = sum(int(a.clipped_total) for a in losses.values()), steps(trainer)
            has_changed = clipped_total != self._clipped_at_share
            if has_changed or self._merges_next or at_end or step <= self._merges_until:
                for spikes in gathered(self.record.take_unshared()):
                    self.record.enter(spikes)
            if has_changed:
                self._merges_until = step + 2 * WINDOW
            self._clipped_at_share, self._merges_next = clipped_total, has_changed
        else:
            self.record.take_unshared()  # there is no other rank
        if at_end or monotonic() - self._written_at >= WRITTEN_EVERY:
            self._write()

    def share_ledger(self) -> None:
        """Read new losses from the device, merge them across ranks, and write the ledger's file.

        Every rank must call this method.
        """
        if self.ledger is None:
            return
        self._collect_ledger(with_ranks=self._has_other_ranks)
        if self.ledger.outside and not self._warned_of_ids:
            self._warned_of_ids = True
            rank_zero_warn(
                f"ALRC: {self.ledger.outside:,} losses are not in the ledger: it has no place for "
                "their ids. Whole numbers in a tensor must be below "
                f"{self.ledger.size or 0:,}: give ALRCCallback(ledger=SIZE), with SIZE one more "
                "than the largest id, or ids that are strings"
            )
        if self.ledger.lacks_samples and not self._warned_of_ids:
            self._warned_of_ids = True
            rank_zero_warn(
                "ALRC: the ledger is empty. It needs one loss for each sample, returned as a "
                "vector, and ids of the samples: ALRCCallback(sample_ids=...), the datamodule's "
                "sample_ids(batch), or the batch's 'id'"
            )
        self._write_ledger()

    def _collect_ledger(self, with_ranks: bool) -> None:
        """Add the losses observed since the last call to the histories. Reads the device.

        Args:
            with_ranks: whether to add the losses of all ranks. If so, every rank must call this
                method.
        """
        assert self.ledger is not None
        own = self.ledger.take_unshared()
        self.ledger.enter(gathered(own) if with_ranks else [own])

    def _write_ledger(self) -> None:
        if self.ledger is None or self._file is None or not self.ledger.changed:
            return
        try:
            self._file.write_ledger(self.ledger.histories, self.record.worst)
            self.ledger.changed = False
        except Exception as error:  # for example a full disk, or a pyarrow that is broken
            self._warn_of_disk(error, "the ledger")

    def rescue(self, without_current_batch: bool = False) -> list[Spike]:
        """Write this rank's record and ledger, and return the record's spikes.

        Other ranks and the device may have failed. Nothing that fails here hides the exception that
        ended the fit.

        Args:
            without_current_batch: leave an unfinished batch out of the ledger.
        """
        with suppress(Exception):
            self.record.read(at_end=True)
        self._write()
        if self.ledger is not None:
            with suppress(Exception):
                if not without_current_batch:
                    self.ledger.finish_batch()
                self._collect_ledger(with_ranks=False)
            self._write_ledger()
        return self.record.worst

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            if not (self.record.changed or self._file.has_vanished):
                return
            self._file.write(self.record.worst)
            self.record.changed = False
        except OSError as error:  # a full disk is no reason to stop training
            self._warn_of_disk(error)
        self._written_at = monotonic()

    def _warn_of_disk(self, error: Exception, what: str = "the record of spikes") -> None:
        if not self._warned_of_disk and self._file is not None:
            rank_zero_warn(f"{what} in {self._file.folder} was not written: {error}")
        self._warned_of_disk = True

    def state_dict(
        self, without_current_batch: bool = False, was_interrupted: bool = False
    ) -> dict[str, Any]:
        """The record and its file, as plain numbers and strings. Reads the device.

        Args:
            without_current_batch: leave out the spikes of an unfinished batch, because the run that
                resumes will train on this batch again.
            was_interrupted: whether an exception has ended the fit.
        """
        self.record.read()
        owned = OwnedFile(run=self._run) if self._file is None else self._file.owned
        # A learning rate finder saves and loads a checkpoint before the fit has started. The file
        # is then still that of the resumed run.
        owned = self._resumed or owned
        state = owned._asdict() | {
            "worst": self.record.state_dict(without_current_batch),
            "judging": self.record.dump_judges(without_current_batch),
            "sample_ids": self.record.dump_sample_ids(),
        }
        if self.ledger is None:
            return state
        # Another callback may save a checkpoint after the batch, but before ``end_step``.
        if not without_current_batch:
            self.ledger.finish_batch()
        # The other ranks do not necessarily call this method now. Losses that this rank collects
        # alone never reach those ranks. So with several ranks, only ``shared_state``, which all
        # ranks call, collects losses. After an exception, the other ranks may never answer, so
        # this rank collects alone.
        if not self._has_other_ranks or was_interrupted:
            self._collect_ledger(with_ranks=False)
        return state | self._ledger_state()

    def shared_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of a state that are of all ranks: the judges of each rank, and the ledger.

        Every rank must call this method.

        Args:
            state: what :meth:`state_dict` returned on this rank.
        """
        judging = {"judging": gathered(state["judging"])}
        if self.ledger is None:
            return judging
        self._collect_ledger(with_ranks=True)
        return judging | self._ledger_state()

    def _ledger_state(self) -> dict[str, Any]:
        assert self.ledger is not None
        return {
            "ledger": self.ledger.state_dict(),
            "ledger_sample_ids": self.ledger.dump_sample_ids(),
        }

    def load(
        self,
        rank: int,
        owned: OwnedFile,
        spikes: list[Spike],
        judges: list[dict[str, Judge]],
        sample_ids: dict[str, SampleIds],
        histories: dict[str, History] | None,
        ledger_sample_ids: dict[str, SampleIds],
    ) -> None:
        """Continue from a state that :func:`checked_recording` accepted.

        ``rank`` is this rank. If the state has the judges of fewer ranks, several ranks continue
        from the same judges.
        """
        self._resumed = owned
        self.record.load(spikes, judges[rank % len(judges)], sample_ids)
        if self.ledger is not None:
            self.ledger.load(histories or {}, ledger_sample_ids)


def checked_recording(state: Any) -> tuple[Any, ...]:
    """The arguments of :meth:`Recording.load` but its first, from :meth:`Recording.state_dict`.

    Raises:
        ValueError: if the state is invalid. The error says what is allowed.
    """
    needed, optional = {"file", "worst"}, {"judging", "sample_ids", "ledger", "ledger_sample_ids"}
    known = {*needed, *optional, *OwnedFile._fields}
    if not isinstance(state, Mapping) or not needed <= set(state) <= known:
        raise ValueError(f"a recording's state must have 'file' and 'worst', got {state!r:.300}")
    ledger, judging = state.get("ledger"), state.get("judging", {})
    # A checkpoint of an exception, of one rank or of an earlier release has one rank's judges.
    of_ranks = judging if isinstance(judging, list) and judging else [judging]
    return (
        checked_owned_file(state),
        checked_spikes(state["worst"]),
        [checked_judging(each) for each in of_ranks],
        checked_sample_ids(state.get("sample_ids", {})),
        None if ledger is None else checked_histories(ledger),
        checked_sample_ids(state.get("ledger_sample_ids", {})),
    )
