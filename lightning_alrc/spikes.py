"""A record of spikes, read back: :class:`Spike` and :func:`read_spikes`."""

from __future__ import annotations

from lightning_alrc._spikes.record import Spike
from lightning_alrc._spikes.record_file import read_spikes

__all__ = ["Spike", "read_spikes"]
