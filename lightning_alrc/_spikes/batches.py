"""The batches that spiked, kept in files beside the record of spikes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_alrc._spikes.files import written_whole
from lightning_alrc._spikes.record import SpikeRecord
from lightning_alrc._trainer.namespaces import rank_zero_warn

__all__ = ["Batches", "load_batch"]

WHOLE_NUMBERS = ("batch_idx", "epoch", "global_step")


class Batches:
    """Keeps the batches of this rank's worst spikes.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.folder: Path | None = None
        self._batch: Any = None
        self._versions: list[int] = []
        self._before: dict[str, Any] = {}
        self._device = torch.device("cpu")
        self._failed = False

    def begin_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        """Take note of what a training step starts from.

        Args:
            trainer: that of the fit.
            batch: of the step; ``None`` if it is known at the end only.
            batch_idx: its index.
        """
        self._device = trainer.strategy.root_device
        try:
            # The step may take things out of a dict, or put them in.
            self._batch = apply_to_collection(batch, Tensor, lambda each: each)
            self._versions = _versions(self._batch)
        except Exception as error:  # of a class that cannot be copied; at its end it is tried again
            self._warn(error)
        self._before = {
            "batch_idx": batch_idx,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
        }

    def note_generators(self) -> None:
        """Called last before ``training_step``."""
        self._before["cpu_generator"] = torch.get_rng_state()
        on_cuda = self._device.type == "cuda"
        self._before["cuda_generator"] = torch.cuda.get_rng_state(self._device) if on_cuda else None

    def end_step(self, record: SpikeRecord, batch: Any, name: str | None) -> None:
        """Keep the batch if it has one of the worst spikes, and let go of what no longer has.

        Args:
            record: of spikes, all of them read.
            batch: of the step.
            name: of the file that it is kept in, as :attr:`Spike.batch_file`; ``None`` if it has no
                spike.
        """
        begun, self._batch = self._batch, None
        if self.folder is None or name is None:
            return
        of_rank = (spike.batch_file for spike in record.worst if spike.rank == record.rank)
        worst = list(dict.fromkeys(of_rank))[: self.count]  # a batch may have several
        try:
            if name in worst:
                if _versions(begun) != self._versions:
                    raise RuntimeError("training_step changed its tensors in place")
                batch = batch if begun is None else begun
                with written_whole(self.folder / name) as file:
                    torch.save({"batch": _copied(batch), **self._before}, file)
            # Also one that a killed training has left half-written.
            for path in self.folder.glob(f"*-rank={record.rank}.pt*"):
                if path.name not in worst:
                    path.unlink(missing_ok=True)
        except Exception as error:  # a full disk, a batch that cannot be pickled
            self._warn(error)

    def release(self) -> None:
        """Hold on to no batch."""
        self._batch = None

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            rank_zero_warn(f"a batch that spiked was not kept in {self.folder}: {error!r}")
        self._failed = True


def _versions(batch: Any) -> list[int]:
    """How often each of its tensors has been changed in place."""
    versions: list[int] = []
    apply_to_collection(batch, Tensor, lambda each: versions.append(each._version))
    return versions


def _copied(batch: Any) -> Any:
    # A view of a data set in memory would be written with all of the set.
    return apply_to_collection(batch, Tensor, lambda each: each.detach().to("cpu", copy=True))


def load_batch(path: str | Path) -> dict[str, Any]:
    """What :class:`Batches` wrote: a batch, its place in the training, and generators' states.

    Args:
        path: of the file.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not one of those, or has objects of classes that neither PyTorch
            allows nor ``torch.serialization.safe_globals``.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(
                "path must be a file of save_batches, and other classes than PyTorch's must be "
                "allowed by torch.serialization.safe_globals if you trust them, got "
                f"{str(path)!r}: {error}"
            ) from error
    if (
        not isinstance(content, Mapping)
        or "batch" not in content
        or not all(type(content.get(key)) is int for key in WHOLE_NUMBERS)
        or not isinstance(content.get("cpu_generator"), Tensor)
        or not isinstance(content.get("cuda_generator"), (Tensor, type(None)))
    ):
        raise ValueError(f"path must be a file of save_batches, got {str(path)!r} without its keys")
    return dict(content)
