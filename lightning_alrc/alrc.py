"""``ALRC``: the running moments of one loss, and the one call that clips by them and moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_alrc import functional
from lightning_alrc._moments import arguments, distributed, paths
from lightning_alrc._moments.bounds import bounds
from lightning_alrc._moments.rules import Setting, Settings, rules_of
from lightning_alrc._moments.state import Moments, State
from lightning_alrc._moments.sums import Sums, new_row

__all__ = ["ALRC"]

CPU = torch.device("cpu")


class ALRC(nn.Module):
    r"""Adaptive learning rate clipping of one loss, as a layer.

    A loss more than ``num_stddev`` standard deviations above its running mean is scaled down to
    that threshold, and its gradient by the same factor. Every element of the tensor given is a loss
    of its own. :mod:`lightning_alrc.functional` has the equations.

    >>> alrc = ALRC(num_stddev=2)
    >>> loss = torch.rand(16, requires_grad=True)    # one loss for each sample of a batch
    >>> alrc(loss).mean().backward()

    The layer holds no parameter and no buffer: its moments are float64 whatever the precision of
    the model (float32 on devices without float64), move to the loss's device by themselves, and
    travel in ``state_dict()`` as extra state. A state dict without them loads strictly, and leaves
    them as they are. In ``eval()`` mode, under ``torch.no_grad()`` and on the meta device a loss
    passes as it is and moves nothing. What a training step gets shares no memory with the loss.

    Every call counts. An optimizer that evaluates its closure several times (LBFGS) has each
    evaluation clipped and learned from. So has a call inside a region of
    ``torch.utils.checkpoint``, which may run twice: clip outside of it.

    ``num_stddev``, ``decay``, ``num_stddev_below``, ``mu2_decay`` and ``synchronize`` may be set
    later, and hold from the next call on. The starts cannot.

    Args:
        num_stddev: number of standard deviations above the mean at which losses are clipped;
            positive, ``math.inf`` to clip nothing and only keep the moments.
        decay: decay of the running moments, in [0, 1).
        mu1_start: start of the running mean of the losses. ``None``, the default, takes both starts
            from the first losses: nothing is clipped before 10 losses have been seen, and the decay
            rises to its full value as :func:`~lightning_alrc.functional.ramped_decay` has it.
        mu2_start: start of the running mean of the squared losses, more than ``mu1_start**2``.
        num_stddev_below: clip losses as many standard deviations below the mean as well, as the
            authors' later code for DLSS-STEM can; ``None`` for no lower bound, which is its default
            too. Their ALRC repository has no lower bound.
        mu2_decay: decay of the second moment if it is to have one of its own.
        synchronize: under ``torch.distributed``, learn from all ranks' losses, by one asynchronous
            all-reduce a call that every rank must take part in; ``False`` for moments by rank. A
            layer in a function that is compiled learns by rank in any case.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range, or one start is given without the other.

    References:
        Ede and Beanland, "Adaptive learning rate clipping stabilizes learning" (2020),
        doi:10.1088/2632-2153/ab81e2, algorithm 1.
    """

    _state: State
    _pending: tuple[distributed.PendingSums, int] | None
    _snapshot: tuple[State, tuple[distributed.PendingSums, int] | None] | None

    def __init__(
        self,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        mu1_start: float | None = None,
        mu2_start: float | None = None,
        *,
        num_stddev_below: float | None = None,
        mu2_decay: float | None = None,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        self._rules = rules_of(
            Settings(
                arguments.positive("num_stddev", num_stddev),
                arguments.decay("decay", decay),
                *arguments.starts(mu1_start, mu2_start),
                arguments.positive_or_none("num_stddev_below", num_stddev_below),
                arguments.decay_or_none("mu2_decay", mu2_decay),
            )
        )
        self.synchronize = synchronize
        self.watcher: Callable[[Tensor], None] | None = None
        """Told of the losses of each call in which some may have been clipped, unless compiled: the
        scale, the loss before and the loss after of each, [3, and the shape of the losses]."""
        self.sums_watcher: Callable[[Sums], None] | None = None
        """Told of the sums of each call, unless compiled."""
        self.skips_spikes = False
        """Whether a call of which more than half of the losses are clipped counts as offending."""
        self.witness: Callable[[Tensor, Tensor, Moments], None] | None = None
        """Told of the losses of each call, before and after clipping, and of the moments that they
        were clipped by, unless compiled."""
        self.forget()

    num_stddev = Setting(arguments.positive)
    decay = Setting(arguments.decay)
    num_stddev_below = Setting(arguments.positive_or_none)
    mu2_decay = Setting(arguments.decay_or_none)
    mu1_start: Setting[float | None] = Setting()
    mu2_start: Setting[float | None] = Setting()

    @property
    def synchronize(self) -> bool:
        """Whether the moments are shared among ranks."""
        return self._synchronize

    @synchronize.setter
    def synchronize(self, value: bool) -> None:
        self._synchronize = arguments.flag("synchronize", value)

    @classmethod
    def from_estimate(
        cls,
        loss: float,
        stddev: float,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        **settings: Any,
    ) -> ALRC:
        """An ALRC whose starts follow the authors' recipe, from an estimate of the first losses.

        The recipe is that of their first README: three times the threshold. Their last one triples
        the mean instead: ``ALRC(mu1_start=3 * mean, mu2_start=3**2 * mean_square)``.

        Args:
            loss: estimated mean of the first losses, not negative: train 10 or more steps without
                ALRC to find it.
            stddev: their estimated standard deviation, not negative.
            num_stddev: as for :class:`ALRC`, but finite.
            decay: as for :class:`ALRC`.
            **settings: the other settings of :class:`ALRC`.

        Raises:
            TypeError: if an argument is not a number.
            ValueError: if ``loss`` or ``stddev`` is negative or not finite, or another is out of
                range.
        """
        arguments.not_negative("loss", loss)
        arguments.not_negative("stddev", stddev)
        if not math.isfinite(arguments.positive("num_stddev", num_stddev)):
            raise ValueError(f"num_stddev must be finite to estimate a start, got {num_stddev!r}")
        mu1_start, mu2_start = functional.estimated_start(loss, stddev, num_stddev)
        if mu2_start > arguments.LARGEST_START**2:
            raise ValueError(
                f"loss + num_stddev * stddev must be at most {arguments.LARGEST_START / 3:g}, got "
                f"loss={loss!r} and stddev={stddev!r}"
            )
        return cls(num_stddev, decay, mu1_start, mu2_start, **settings)

    def forward(self, loss: Tensor) -> Tensor:
        """Clip losses by the moments so far, then move the moments by the clipped losses.

        Args:
            loss: losses of any shape and floating dtype, each element clipped by itself.

        Returns:
            The clipped losses: same shape, dtype and device. Losses that are NaN or infinite pass
            as they are, and count for nothing.

        Raises:
            TypeError: if ``loss`` is not a tensor of a floating dtype.
            ValueError: if it needs no gradient although gradients are enabled in training mode.
        """
        if not self.applies_to(loss):
            return loss
        clipped = self.clip_and_learn(loss)
        return clipped.clone() if clipped is loss else clipped

    def clip_and_learn(self, loss: Tensor) -> Tensor:
        """A call with a loss that :meth:`applies_to` has found to be one."""
        if self.synchronize and distributed.is_active():
            row = new_row(loss.device)
            clipped = self.clip(loss, row)
            self.learn_when_reduced(distributed.PendingSums(row[None]), 0)
            return clipped
        return self.clip(loss)

    def applies_to(self, loss: Tensor) -> bool:
        """Whether a loss is to be clipped, and not to pass as it is.

        Raises:
            TypeError, ValueError: as a call with it would.
        """
        arguments.check_is_loss(loss)
        if not self.training or not torch.is_grad_enabled() or loss.is_meta:
            return False
        if not loss.requires_grad:
            raise ValueError(
                f"loss must require a gradient while training, got a {tuple(loss.shape)} tensor of "
                f"{loss.dtype} with requires_grad=False: pass the loss before it is detached, or "
                "call eval() to pass losses through unclipped"
            )
        return True

    def clip(self, loss: Tensor, row: Tensor | None = None) -> Tensor:
        """Clip losses by the moments so far, and move the moments by the clipped losses.

        Args:
            loss: that :meth:`applies_to` has found to be one.
            row: of a message, to which what the moments are to learn is added; they stay then.

        Returns:
            The clipped losses. A loss that is not clipped may be returned itself.
        """
        if distributed.is_dtensor(loss):
            whole = self.clip(distributed.full(loss), row)
            return distributed.as_dtensor_like(loss, whole)
        path = paths.path_of(loss)
        witness = None if torch.compiler.is_compiling() else self.witness
        if witness is not None:
            self.flush()
            moments = self._state.moments(self._rules.limits.burns_in)
        clipped = path.clip(
            loss,
            self._state,
            self._rules,
            self.watcher,
            self.sums_watcher,
            self.skips_spikes,
            self._take_message(),
            row,
        )
        if witness is not None:
            witness(loss, clipped, moments)
        return clipped

    @property
    def is_flushed(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._pending is None

    def learn_when_reduced(self, reduction: distributed.PendingSums, row: int) -> None:
        """Move the moments, when they are next needed, by all ranks' sums."""
        self.flush()
        self._pending = (reduction, row)

    def flush(self) -> None:
        """Wait for what :meth:`learn_when_reduced` was told to learn, if anything."""
        message = self._take_message()
        if message is not None:
            paths.path_of_message(self._state).learn(self._state, self._rules, message)

    def _take_message(self) -> Tensor | None:
        """The sums of all ranks that the moments are to learn, if any, once they are here."""
        if self._pending is None:
            return None
        reduction, row = self._pending
        self._pending = None
        return reduction[row]

    @property
    def mu1(self) -> Tensor:
        """Running mean of the clipped losses, a 0-d tensor."""
        return self._now("mu1")

    @property
    def mu2(self) -> Tensor:
        """Running mean of the squared clipped losses, a 0-d tensor."""
        return self._now("variance") + self._now("mu1") ** 2

    @property
    def stddev(self) -> Tensor:
        """Running standard deviation of the clipped losses, at least 1e-4, a 0-d tensor."""
        return functional.stddev(self._now("variance"))

    @property
    def threshold(self) -> Tensor:
        """The largest loss the next call leaves alone, a 0-d tensor; infinite while burning in."""
        now = State()
        now.moving = tuple(_as_tensor(each) for each in self._flushed().moving)
        return _as_tensor(bounds(now, self._rules.limits).upper)

    @property
    def updates(self) -> Tensor:
        """Calls that moved the moments since the start or a reset, a 0-d int64 tensor."""
        return self._now("updates").long()

    @property
    def losses_total(self) -> Tensor:
        """Number of finite losses seen, a 0-d int64 tensor."""
        return self._total("losses")

    @property
    def clipped_total(self) -> Tensor:
        """Number of losses clipped, a 0-d int64 tensor."""
        return self._total("clipped")

    @property
    def nonfinite_total(self) -> Tensor:
        """Number of losses that were NaN or infinite, a 0-d int64 tensor."""
        return self._total("nonfinite")

    @property
    def offending_total(self) -> Tensor:
        """Losses that were NaN or infinite, and with :attr:`skips_spikes` calls that spiked."""
        return self._total("offending")

    def reset(self) -> None:
        """Start the moments afresh, after the losses have changed for good; counts go on.

        Reads the device.
        """
        self.flush()
        snapshot = self._snapshot  # of a batch that a resumed run does again
        self._hold(self._state.reset(self._start()))
        self._snapshot = snapshot

    def forget(self) -> None:
        """Be as newly made: moments and counts start afresh. The settings stay."""
        self._hold(self._start())

    def _start(self) -> State:
        if self.mu1_start is None or self.mu2_start is None:
            return State()
        return State(mu1=self.mu1_start, variance=self.mu2_start - self.mu1_start**2)

    def has_row(self) -> bool:
        """Whether there were losses since :meth:`take_row` was last called. Reads the device."""
        state = self._state.on_host()
        return bool(state.row_losses or state.row_nonfinite)

    def take_row(self) -> dict[str, float]:
        """What there is to log since this was last called. Reads the device once.

        Returns:
            ``loss``, ``loss_clipped`` and ``scale``: means over the finite losses since the last
            call; ``clipped_fraction`` of them; ``clipped_total``, ``nonfinite_total`` and
            ``resets`` since the start; the moments now: ``mu1``, ``stddev``, ``threshold``; and
            ``spike_score``, the share of losses more than 6 standard deviations above the mean
            among those of the last 1,000 calls of this object, or some more, up to whole rows, and
            ``spike_score_total``, the share among all. What there is nothing to say of (no finite
            loss since the last call, an infinite threshold) is left out.
        """
        self.flush()
        state = self._state.take_row()
        row: dict[str, float] = {}
        if state.row_losses:
            row |= {
                "loss": state.row_loss / state.row_losses,
                "loss_clipped": state.row_loss_clipped / state.row_losses,
                "scale": (state.row_scale - state.row_nonfinite) / state.row_losses,
                "clipped_fraction": state.row_clipped / state.row_losses,
            }
        row |= {
            "clipped_total": state.total_clipped + state.row_clipped,
            "nonfinite_total": state.total_nonfinite + state.row_nonfinite,
            "resets": state.total_resets,
        }
        if state.updates or self.mu1_start is not None:
            row |= {"mu1": state.mu1, "stddev": functional.stddev(state.variance)}
        upper = bounds(state, self._rules.limits).upper
        if math.isfinite(upper):
            row["threshold"] = upper
        recently, in_all = self._state.scores
        if recently is not None and in_all is not None:
            row |= {"spike_score": recently, "spike_score_total": in_all}
        return row

    @property
    def settings(self) -> dict[str, float | None]:
        """The arguments this was made with, by name."""
        return self._rules.settings._asdict()

    def get_extra_state(self) -> Tensor:
        """Moments and counts in one float64 tensor, for ``state_dict()``.

        A tensor can be saved by safetensors, too.
        """
        return self._flushed().as_tensor()

    def set_extra_state(self, state: Any) -> None:
        """Continue from what :meth:`get_extra_state` returned, with the settings of this object.

        Args:
            state: that tensor, or the dict of plain numbers that release 0.1 returned.

        Raises:
            ValueError: if ``state`` is not such a thing; nothing is changed then.
        """
        self.load(State.from_tensor(state) if isinstance(state, Tensor) else State.read(state))

    def load(self, state: State) -> None:
        """Continue from a state that was checked."""
        self._hold(state)

    def take_snapshot(self) -> None:
        """Keep what :meth:`dump` is to return until the batch that begins now has ended."""
        self._snapshot = self._state.copied(), self._pending

    def dump(
        self, of_snapshot: bool = False, row_logged: bool = False, waits: bool = True
    ) -> dict[str, Any] | None:
        """Settings, moments and counts as plain numbers, for a Trainer's checkpoint.

        Args:
            of_snapshot: as they were when :meth:`take_snapshot` was last called.
            row_logged: whether the row is about to be logged, so that it does not go on.
            waits: whether to wait for an all-reduce that is on its way. Without, its losses are
                left out if it does not come within a second.

        Returns:
            ``None`` for a loss that was first met after the snapshot.
        """
        if of_snapshot and self._snapshot is None:
            return None
        if of_snapshot and self._snapshot is not None:
            state, in_flight = self._snapshot
        else:
            state, in_flight = self._state, self._pending
        state = state.on_host()
        if in_flight is not None:
            reduction, row = in_flight
            if waits or reduction.has_arrived(within=1.0):
                state.learn(Sums(*reduction[row].tolist()), self._rules.decays)
        if row_logged:
            state.take_row()
        return state.dump(self.settings)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A checkpoint from before ALRC was added has no moments, and is none the worse for it.
        absent = prefix + "_extra_state"
        if absent in missing_keys:
            missing_keys.remove(absent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ALRC:
        """Follow ``to()``, ``cuda()`` and the like to the device, but never to another dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.flush()
        device = fn(torch.empty(0, device=_as_tensor(self._state.mu1).device)).device
        if device.type != "meta":
            self._state.to(device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)

    def _hold(self, state: State) -> None:
        """Remember this, and nothing else."""
        # A compiled function that found floats here would be compiled anew for tensors.
        with torch.inference_mode(False):  # losses are to change them in place
            state.to(CPU)
        self._state = state
        self._pending = self._snapshot = None

    def _flushed(self) -> State:
        self.flush()
        return self._state

    def _now(self, name: str) -> Tensor:
        return _as_tensor(getattr(self._flushed(), name)).clone()

    def _total(self, name: str) -> Tensor:
        return (self._now(f"row_{name}") + self._now(f"total_{name}")).long()


def _as_tensor(number: float | Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.tensor(number, dtype=torch.float64, device="cpu")
