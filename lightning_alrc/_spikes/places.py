"""Chooses the folder of a training's record of spikes, and finds a written record again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_alrc._trainer.rank_zero import rank_zero_warn

__all__ = ["LEDGERS", "RECORDS", "newest_file", "record_files", "record_folder"]

SUFFIX = "-alrc"
RECORDS = "alrc_spikes*.jsonl"
LEDGERS = "alrc_ledger*.[cp][sa][vr]*"
"""Pattern for ``.csv`` and ``.parquet``, but not for figures like ``.png`` and ``.pdf``."""


def record_folder(trainer: Any) -> Path | None:
    """The folder for a Trainer's record of spikes and batches: the first of these that applies.

    1. The ``log_dir`` of the first logger that has one, as CSVLogger and TensorBoardLogger do.
    2. A folder next to the checkpoints: ``checkpoints-alrc`` next to ``checkpoints``. Other
       programs may list or clear the folder of checkpoints, so the record is written into that
       folder only in two cases. In the first, the folder is outside ``default_root_dir`` and the
       loggers' folders: the user chose that folder and not its parent. In the second, the parent of
       the folder is not writable.
    3. The ``save_dir`` of the first logger that has one.

    Returns:
        The folder, which may not exist yet. ``None`` if the Trainer keeps no files. If the Trainer
        keeps files only in folders that are not local, the result is ``None``, and a warning says
        so.
    """
    if trainer.fast_dev_run:
        return None
    save_dirs = [getattr(logger, "save_dir", None) for logger in trainer.loggers]
    roots = [Path(root) for root in [trainer.default_root_dir, *save_dirs] if _is_local(root)]
    candidates = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    candidates += [_beside(folder, roots) for folder in _checkpoint_folders(trainer)]
    candidates = [each for each in [*candidates, *save_dirs] if isinstance(each, (str, Path))]
    local = next(filter(_is_local, candidates), None)
    if local is not None:
        return Path(local)
    if candidates:
        rank_zero_warn(
            f"the record of spikes is kept in memory: {candidates[0]} is not a local folder"
        )
    return None


def _checkpoint_folders(trainer: Any) -> list[str | Path]:
    folders = []
    for callback in trainer.checkpoint_callbacks:
        saves_none = getattr(callback, "save_top_k", None) == 0
        folder = getattr(callback, "dirpath", None)
        if folder and not (saves_none and not callback.save_last):
            folders.append(folder)
    return folders


def _beside(folder: str | Path, roots: list[Path]) -> str | Path:
    """The folder for a record, given a folder of checkpoints; see :func:`record_folder`."""
    if not _is_local(folder):
        return folder
    path = Path(os.path.realpath(folder))
    is_inside = any(path.is_relative_to(os.path.realpath(root)) for root in roots)
    may_write = not path.parent.exists() or os.access(path.parent, os.W_OK)
    if not is_inside or not may_write or not path.name:
        return folder
    return path.with_name(path.name + SUFFIX)


def _is_local(folder: Any) -> bool:
    return isinstance(folder, (str, Path)) and bool(str(folder)) and "://" not in str(folder)


def newest_file(path: Any, pattern: str, what: str) -> Path:
    """The file that a user names by its path, or by the folder that a training logs to.

    For a folder, it is the newest file of that training.

    Args:
        path: path of the file or folder.
        pattern: pattern of the files to look for in a folder.
        what: name for the file in an error.

    Raises:
        FileNotFoundError: if the folder has no such file.
        TypeError: if ``path`` is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"path must be the path of {what} or of a folder with one, got {path!r:.100} of type "
            f"{type(path).__name__}"
        )
    file = Path(path)
    if not file.is_dir():
        return file
    found = record_files(file, pattern)
    if not found:
        raise FileNotFoundError(f"there is no {pattern} in {file}, nor in a folder beside it")
    return found[-1]


def record_files(folder: Path, pattern: str = RECORDS) -> list[Path]:
    """The records or ledgers of the training that logs to a folder, the newest last.

    These folders are searched in order:

    1. ``folder`` itself,
    2. ``folder-alrc`` beside it, where the record is if ``folder`` is a folder of checkpoints,
    3. ``checkpoints-alrc`` in ``folder``,
    4. ``checkpoints`` in ``folder``, where releases up to 0.1.0 wrote the record.

    Only the first of them that has files counts. The others may have files of an earlier training.
    An empty record counts, too: it is the record of a training without clips.
    """
    beside = Path(os.path.abspath(folder) + SUFFIX)
    for each in (folder, beside, folder / f"checkpoints{SUFFIX}", folder / "checkpoints"):
        found = {path: _written_at(path) for path in each.glob(pattern)}
        if found:
            return sorted(found, key=lambda path: (found[path], len(path.name), path.name))
    return []


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # removed since it was listed
        return 0
