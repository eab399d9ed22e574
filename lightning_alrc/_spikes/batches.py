"""Keeps the batches with the worst spikes, in a folder beside the record of spikes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_alrc._spikes.atomic_files import temporary_path, written_atomically
from lightning_alrc._spikes.generators import checked_states, plain_states, states
from lightning_alrc._spikes.record import Spike, SpikeRecord
from lightning_alrc._spikes.snapshot import Snapshot, rebuilt
from lightning_alrc._trainer.namespaces import rank_zero_warn

__all__ = ["Batches", "grad_scaler", "load_batch"]

WHOLE_NUMBERS = ("batch_idx", "epoch", "global_step")

PRECISIONS = ("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true")
"""Precisions that every Trainer takes. Plugins may have others."""

OF_TRAINER: dict[str, Callable[[Any], bool]] = {
    "gradient_clip_val": lambda value: type(value) is float,
    "gradient_clip_algorithm": lambda value: value in ("norm", "value"),
    "precision": lambda value: value in PRECISIONS,
    "loss_scale": lambda value: type(value) is float,
}
"""What changes a step of a Trainer, and whether a value may be in a file. A file may lack each."""


class Batches:
    """Keeps the batches of this rank's worst spikes.

    Args:
        count: how many batches are kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.folder: Path | None = None
        self._run = ""
        self._runs: set[str] = set()
        """ids of this run and of the run that it resumes, if any"""
        self._owned: dict[str, str] = {}
        """names of this rank's files in the folder, each with the id of the run that wrote it"""
        self._module: Any = None
        self._optimizers: list[Any] = []
        self._device = torch.device("cpu")
        self._batch: Any = None
        """batch of the step, from ``begin_step`` until its snapshot is taken"""
        self._snapshot: Snapshot | None = None
        self._knows_batch = False
        self._start_state: dict[str, Any] = {}
        """``batch_idx``, ``epoch`` and ``global_step`` of the step. After ``note_start``, also the
        generator states and learning rates just before ``training_step``"""
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy takes no part in the fit: neither its batch nor its optimizers are copied.
        released: dict[str, Any] = {
            "_batch": None,
            "_snapshot": None,
            "_module": None,
            "_optimizers": [],
            "_start_state": {},
        }
        return self.__dict__ | released

    def start(self, folder: Path | None, run: str, resumed: str | None, rank: int) -> None:
        """Start a run.

        Args:
            folder: folder of the files; ``None`` keeps no batches.
            run: id of the run, written into each file.
            resumed: id of the run whose files are taken over; ``None`` takes over no files.
            rank: rank of this process, which is in the names of its files.
        """
        self.folder, self._run, self._owned = folder, run, {}
        self._runs = {run} if resumed is None else {run, resumed}
        if folder is None or resumed is None:
            return
        for path in folder.glob(f"*-rank={rank}.pt"):
            if _run_of(path) == resumed:
                self._owned[path.name] = resumed
        # The resumed run may have been killed while it wrote. Then it left a temporary file.
        for part in folder.glob(temporary_path(Path(f"*-rank={rank}.pt"), resumed).name):
            part.unlink(missing_ok=True)

    def begin_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step: note its batch and its place in the training.

        Args:
            trainer: the Trainer of the fit.
            batch: batch of the step; ``None`` if the batch is known only at the end of the step.
            batch_idx: index of the batch.
        """
        if self.folder is None:
            return
        self._module, self._optimizers = trainer.lightning_module, trainer.optimizers
        self._device = trainer.strategy.root_device
        self._start_state = {
            "batch_idx": batch_idx,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
        }
        self._knows_batch, self._batch, self._snapshot = batch is not None, batch, None

    def note_start(self) -> None:
        """Note what ``training_step`` starts from: batch, random generators and learning rates.

        The snapshot of the batch is taken only here, because hooks and callbacks may change the
        batch in ``on_train_batch_start``. With LBFGS, for example, one step calls ``training_step``
        several times. Only what holds before the first call is noted.
        """
        if self.folder is not None and "cpu_generator" not in self._start_state:
            if self._knows_batch:
                self._snapshot, self._batch = self._take_snapshot(self._batch), None
            self._start_state |= states(self._device)
            self._start_state["learning_rates"] = [
                [_copied_rate(group.get("lr")) for group in each.param_groups]
                for each in self._optimizers
            ]

    def end_step(self, record: SpikeRecord, batch: Any) -> None:
        """Keep the batch if it has one of the worst spikes.

        Remove the files of batches that no longer have one of the worst spikes.

        Args:
            record: record of spikes; its ``read`` must have been called for this step.
            batch: batch of the step.
        """
        snapshot, self._snapshot, self._batch = self._snapshot, None, None
        if self.folder is None:
            return
        if snapshot is not None and snapshot.has_changed():
            self._warn("training_step changed its tensors in place")
            snapshot = None
        name = record.batch_file
        if name is None:
            return
        if not self._knows_batch:
            snapshot = self._take_snapshot(batch)
        of_rank = (spike.batch_file for spike in record.worst if spike.rank == record.rank)
        # Spikes from before a resume may have their batches in another folder.
        here = self._owned.keys() if snapshot is None else self._owned.keys() | {name}
        # A batch may have several spikes.
        worst = [each for each in dict.fromkeys(of_rank) if each in here][: self.count]
        try:
            if name in worst and snapshot is not None:
                self._write(name, snapshot, _clips(record, name))
            for other in self._owned.keys() - set(worst):
                self._remove(other)
        except Exception as error:  # for example a full disk
            self._warn(repr(error))

    def _take_snapshot(self, batch: Any) -> Snapshot | None:
        """A snapshot of a batch; ``None``, with a warning, if the batch cannot be pickled."""
        try:
            return Snapshot(batch)
        except Exception as error:
            self._warn(f"its type {type(batch).__name__} cannot be pickled: {error!r}")
            return None

    def _write(self, name: str, snapshot: Snapshot, clips: list[list[Any]]) -> None:
        assert self.folder is not None
        path = self.folder / name
        if path.exists() and not self._is_owned(path):
            raise FileExistsError(f"{path} is another run's")
        start_state = plain_states(self._start_state)
        rates = start_state["learning_rates"]
        modules = self._module.named_modules()
        content = {
            **snapshot.take_copy(),
            **start_state,
            # Some optimizers compute their own rates. Their groups have no rate, or None.
            "learning_rates": None
            if any(rate is None for group in rates for rate in group)
            else [[float(rate) for rate in group] for group in rates],
            "eval_modules": [name for name, module in modules if not module.training],
            **_of_trainer(self._module.trainer),
            "clips": clips,
            "run": self._run,
        }
        with written_atomically(path, self._run) as file:
            torch.save(content, file)
        self._owned[name] = self._run

    def _remove(self, name: str) -> None:
        assert self.folder is not None
        path = self.folder / name
        if self._is_owned(path):
            path.unlink(missing_ok=True)
        del self._owned[name]

    def _is_owned(self, path: Path) -> bool:
        """Whether a file is still this rank's. A run that resumed this run may have replaced it."""
        return path.name in self._owned and _run_of(path) == self._owned[path.name]

    def files(self, spikes: Iterable[Spike]) -> list[Path]:
        """The files with the batches of spikes, if they exist. Any rank may have written them.

        Only files of this run, and of the run that this run resumes, are returned.
        """
        if self.folder is None:
            return []
        paths = [self.folder / name for name in dict.fromkeys(each.batch_file for each in spikes)]
        return [path for path in paths if path.exists() and _run_of(path) in self._runs]

    def release(self) -> None:
        """Drop the batch, the module and the optimizers."""
        self._batch = self._snapshot = self._module = None
        self._optimizers = []

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            rank_zero_warn(f"a batch was not kept in {self.folder} for a replay: {reason}")
        self._has_warned = True


def _clips(record: SpikeRecord, name: str) -> list[list[Any]]:
    """Name, call, loss, threshold and scale of each spike in a batch."""
    of_batch = (each for each in record.worst if each.batch_file == name)
    return [[each.name, each.call, each.loss, each.threshold, each.scale] for each in of_batch]


def grad_scaler(trainer: Any) -> GradScaler | None:
    """The GradScaler of a Trainer's precision, if it has one that is enabled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) and scaler.is_enabled() else None


def _of_trainer(trainer: Any) -> dict[str, Any]:
    """The values of :data:`OF_TRAINER`. The scale of a GradScaler is read from the device."""
    limit, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    values = {
        "gradient_clip_val": None if limit is None else float(limit),
        "gradient_clip_algorithm": getattr(algorithm, "value", None),
        "precision": trainer.precision,
    }
    scaler = grad_scaler(trainer)
    if scaler is not None:
        # The step may have raised the scale. If it is too high, the step of a replay overflows.
        values["loss_scale"] = scaler.get_scale() / scaler.get_growth_factor()
    elif trainer.precision == "16-mixed":  # a scaler of another kind, such as DeepSpeed's
        del values["precision"]
    return {key: value for key, value in values.items() if OF_TRAINER[key](value)}


def _copied_rate(rate: Any) -> Any:
    """A copy of a learning rate. If the rate is a tensor, a scheduler may change it in place."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _run_of(path: Path) -> str | None:
    """Id of the run that wrote a file; ``None`` if there is no file, or no id in it."""
    try:
        run = torch.load(str(path), "cpu", weights_only=True, mmap=True).get("run")
    except Exception:  # for example a file of an earlier release, with objects of other classes
        return None
    return run if isinstance(run, str) else None


def load_batch(path: str | Path) -> dict[str, Any]:
    """A batch that :class:`Batches` wrote, and what its step started from.

    Args:
        path: path of the file.

    Returns:
        A dict of:

        - ``batch``
        - ``batch_idx``, ``epoch`` and ``global_step``
        - the states of generators, from
          :func:`~lightning_alrc._spikes.generators.checked_states`
        - ``learning_rates``: by optimizer and group; ``None`` if a group has none, or in a file of
          an earlier release
        - ``eval_modules``: names of modules that were in ``eval()``; ``None`` in a file of an
          earlier release
        - ``clips``: by name and call of the loss, a list of its spikes: loss, threshold and scale
        - ``of_trainer``: the values of :data:`OF_TRAINER` that the file has

    Raises:
        OSError: if there is no such file, or the file cannot be read.
        TypeError: if ``path`` is not a path.
        ValueError: if the file is not one of :class:`Batches`, or has objects of a class that
            neither PyTorch nor ``torch.serialization.safe_globals`` allows.
    """
    if not isinstance(path, (str, os.PathLike)):
        hint = f": its batch_file is {path.batch_file!r}" if isinstance(path, Spike) else ""
        raise TypeError(
            f"path must be the path of a file of save_batches, got {path!r:.200} of type "
            f"{type(path).__name__}{hint}"
        )
    refused = (
        f"path must be a file of save_batches, got {str(path)!r}. If it has classes other than "
        "PyTorch's and you trust them, allow them with torch.serialization.safe_globals"
    )
    if not Path(path).exists():
        raise FileNotFoundError(
            f"there is no {path}: only the batches with the worst spikes are kept, as many as "
            "save_batches says, or an earlier folder of a resumed run has it"
        )
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises errors of many types
            raise ValueError(f"{refused} ({error})") from error
    checked = _checked(content)
    if checked is None:
        raise ValueError(f"path must be a file of save_batches, got {str(path)!r} without its keys")
    if "batch" not in content:
        try:
            checked["batch"] = rebuilt(content)
        except Exception as error:
            raise ValueError(f"{refused} ({error})") from error
    return checked


def _checked(content: Any) -> dict[str, Any] | None:
    """The content of a file under the keys of this release; ``None`` if it is invalid."""
    if not isinstance(content, Mapping):
        return None
    generators = checked_states(content)
    rates, modules = content.get("learning_rates"), content.get("eval_modules")
    of_trainer = {key: content[key] for key in OF_TRAINER if key in content}
    pickled, tensors = content.get("pickled"), content.get("tensors")
    is_pickled = isinstance(pickled, Tensor) and pickled.dtype == torch.uint8
    is_sound = (
        ("batch" in content or (is_pickled and isinstance(tensors, list)))
        and all(type(content.get(key)) is int for key in WHOLE_NUMBERS)
        and (rates is None or _is_nested(rates, float))
        and (modules is None or _is_nested([modules], str))
        and all(OF_TRAINER[key](value) for key, value in of_trainer.items())
    )
    if generators is None or not is_sound:
        return None
    indices = {key: content[key] for key in WHOLE_NUMBERS}
    clips = content.get("clips", [])
    if not (isinstance(clips, list) and all(map(_is_clip, clips))):
        return None
    by_call: dict[tuple[str, int], list[Any]] = {}
    for name, call, *numbers in clips:
        by_call.setdefault((name, call), []).append(numbers)
    of_step = {"learning_rates": rates, "eval_modules": modules, "clips": by_call}
    of_step["of_trainer"] = of_trainer
    return {"batch": content.get("batch"), **indices, **generators, **of_step}


def _is_clip(row: Any) -> bool:
    kinds = [str, int, float, float, float]
    return isinstance(row, list) and list(map(type, row)) == kinds and row[4] < 1.0


def _is_nested(lists: Any, kind: type) -> bool:
    """Whether this is a list of lists of values of one kind."""
    return isinstance(lists, list) and all(
        isinstance(each, list) and all(isinstance(value, kind) for value in each) for each in lists
    )
