"""A record of spikes, read back: :class:`Spike` and :func:`read_spikes`."""

from __future__ import annotations

from pathlib import Path

from lightning_alrc._spikes import record_file
from lightning_alrc._spikes.places import RECORDS, newest_file
from lightning_alrc._spikes.record import Spike

__all__ = ["Spike", "read_spikes"]


def read_spikes(path: str | Path) -> list[Spike]:
    """The spikes that :class:`~lightning_alrc.ALRCCallback` recorded, the worst first.

    >>> read_spikes("lightning_logs/version_0")  # doctest: +SKIP

    Args:
        path: path of ``alrc_spikes.jsonl``, or of the folder of the training's logs.

    Raises:
        FileNotFoundError: if there is no such file, or no record in the folder.
        TypeError: if ``path`` is not a path.
        ValueError: if the file is not a record of spikes.
    """
    return record_file.read_spikes(newest_file(path, RECORDS, "a record of spikes"))
