"""``Call``: what one call of an ALRC needs besides its losses, and where their sums go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_alrc._moments.rules import Rules
from lightning_alrc._moments.state import State
from lightning_alrc._moments.sums import SPIKED_SHARE, Sums

__all__ = ["Call"]


class Call(NamedTuple):
    """The arguments that every path takes."""

    state: State
    """the moments; the path makes them floats, or tensors on its device, and updates them"""
    rules: Rules
    on_clip: Callable[[Tensor], None] | None = None
    """``on_clip``, ``on_sums`` and ``spiked_calls_offend``: see :class:`~lightning_alrc.ALRC`"""
    on_sums: Callable[[Sums], None] | None = None
    spiked_calls_offend: bool = False
    reduced: Tensor | None = None
    """the result of the previous all-reduce: all ranks' sums, in the order of :class:`Sums`. The
    moments learn from these sums before the losses of this call are clipped. ``None`` if the
    moments have learned from them already, or no other rank takes part."""
    outgoing: Tensor | None = None
    """a row of the next all-reduce: the sums are added to this row, and the moments do not learn
    yet. ``None`` if no other rank takes part."""

    def finish(self, sums: Sums) -> None:
        """Pass the sums of the call to ``on_sums``, and to the moments or the all-reduce."""
        state, rules, _, on_sums, spiked_calls_offend, _, outgoing = self
        if spiked_calls_offend:
            sums = _with_spiked_call(sums)
        if on_sums is not None:
            on_sums(sums)
        if outgoing is None:
            state.learn(sums, rules.decays)
        else:
            outgoing.add_(sums.packed(outgoing.device))


def _with_spiked_call(sums: Sums) -> Sums:
    """The sums, with ``offending`` raised by 1 if more than half of the finite losses are clipped.

    A call with the loss of a whole batch spikes if this loss is clipped. A call with many samples'
    losses does not spike if only one of them is clipped.
    """
    spiked: Any = sums.clipped > SPIKED_SHARE * sums.losses
    if isinstance(spiked, Tensor):
        spiked = spiked.to(sums.losses.dtype)
    return sums._replace(offending=sums.nonfinite + spiked)
