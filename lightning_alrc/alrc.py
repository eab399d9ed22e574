"""``ALRC``: the running moments of one loss. A call clips the loss and updates the moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_alrc import functional
from lightning_alrc._moments import accelerator, arguments, distributed, paths
from lightning_alrc._moments.bounds import bounds
from lightning_alrc._moments.call import Call
from lightning_alrc._moments.rules import Setting, Settings, rules_of
from lightning_alrc._moments.state import Moments, State
from lightning_alrc._moments.sums import Sums, zero_sums

__all__ = ["ALRC"]

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""whether :func:`torch.export.export` is running; unknown before torch 2.7"""


class ALRC(nn.Module):
    r"""Adaptive learning rate clipping of one loss, as a layer.

    A loss more than ``num_stddev`` standard deviations above its running mean is scaled down to
    that threshold, and its gradient by the same factor. Each element of a tensor is one loss.
    :mod:`lightning_alrc.functional` has the equations.

    >>> alrc = ALRC(num_stddev=2)
    >>> loss = torch.rand(16, requires_grad=True)    # one loss for each sample of a batch
    >>> alrc(loss).mean().backward()

    The layer has no parameter and no buffer. Its moments are float64, whatever the precision of the
    model. On devices without float64 they are float32. The moments move to the loss's device
    automatically. ``state_dict()`` has the moments as extra state. A state dict without this extra
    state loads with ``strict=True``, too, and does not change the moments. In ``eval()`` mode,
    under ``torch.no_grad()`` and on the meta device a loss is returned as it is and updates
    nothing. In training the result shares no memory with the loss.

    Every call in training updates the moments. If an optimizer evaluates its closure several times
    (LBFGS), the loss of each evaluation is clipped and updates the moments. A region of
    ``torch.utils.checkpoint`` may run twice: clip outside of such a region.

    ``num_stddev``, ``decay``, ``num_stddev_below``, ``mu2_decay`` and ``synchronize`` may be set
    later, and take effect at the next call. ``mu1_start`` and ``mu2_start`` cannot be set later.

    Args:
        num_stddev: number of standard deviations above the mean at which losses are clipped;
            positive, 3 by default. ``math.inf`` clips nothing and only updates the moments.
        decay: decay of the running moments, in [0, 1), 0.999 by default.
        mu1_start: start of the running mean of the losses, for example 25.0. ``None``, the default,
            finds both starts from the first losses: the first 10 losses are not clipped, and the
            decay rises to its full value by :func:`~lightning_alrc.functional.ramped_decay`.
        mu2_start: start of the running mean of the squared losses, above ``mu1_start**2``, for
            example 900.0. Give both starts or neither.
        num_stddev_below: number of standard deviations below the mean at which losses are clipped
            as well. ``None``, the default, for no lower bound. The authors' later code for
            DLSS-STEM has this option, off by default; their ALRC repository does not have it.
        mu2_decay: decay of the second moment, in [0, 1). ``None``, the default, uses ``decay``.
        synchronize: whether ranks share moments under ``torch.distributed``; ``True`` by default.
            Each call then starts one asynchronous all-reduce, in which every rank must take part.
            Inside a compiled function each rank always has its own moments.

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
        self.on_clip: Callable[[Tensor], None] | None = None
        """Hook after a call. It is not called if the host knows already that nothing was clipped.
        If the host does not know, the hook is called even if nothing was clipped. Takes a tensor
        [3, *shape of the losses]: scales, losses before clipping, losses after clipping. A compiled
        function does not call ``on_clip``, ``on_sums`` or ``on_call``."""
        self.on_sums: Callable[[Sums], None] | None = None
        """Hook after each call with a loss, whether or not it clipped. Takes the sums of the call.
        """
        self.on_call: Callable[[Tensor, Tensor, Moments], None] | None = None
        """Hook after each call, whether or not it clipped. Takes the losses before and after
        clipping, and the moments before the call."""
        self.spiked_calls_offend = False
        """Whether calls that spike are counted in :attr:`offending_total`. A call spikes if more
        than half of its finite losses are clipped. The spike score of :meth:`take_row` counts
        single losses, by another limit."""
        self._state = State()
        self.forget()

    num_stddev = Setting(arguments.positive)
    decay = Setting(arguments.decay)
    num_stddev_below = Setting(arguments.positive_or_none)
    mu2_decay = Setting(arguments.decay_or_none)
    mu1_start: Setting[float | None] = Setting()
    mu2_start: Setting[float | None] = Setting()

    @property
    def synchronize(self) -> bool:
        """Whether ranks share moments."""
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
        """An ALRC that starts from an estimate of the first losses.

        The estimated threshold is ``loss + num_stddev * stddev``. The mean starts at three times
        this threshold, as in the first version of the authors' README. The last version triples the
        estimated mean instead of the threshold:
        ``ALRC(mu1_start=3 * mean, mu2_start=3**2 * mean_square)``.

        Args:
            loss: estimated mean of the first losses, not negative. Train 10 or more steps without
                ALRC to find it.
            stddev: estimated standard deviation of the first losses, not negative.
            num_stddev: as for :class:`ALRC`, but finite.
            decay: as for :class:`ALRC`.
            **settings: the other settings of :class:`ALRC`.

        Raises:
            TypeError: if an argument is not a number.
            ValueError: if ``loss`` or ``stddev`` is negative or not finite, or another
                argument is out of its range.
        """
        loss = arguments.not_negative("loss", loss)
        stddev = arguments.not_negative("stddev", stddev)
        num_stddev = arguments.positive("num_stddev", num_stddev)
        if not math.isfinite(num_stddev):
            raise ValueError(f"num_stddev must be finite to estimate a start, got {num_stddev!r}")
        mu1_start, mu2_start = functional.estimated_start(loss, stddev, num_stddev)
        if mu2_start > arguments.LARGEST_START**2:
            raise ValueError(
                f"loss + num_stddev * stddev must be at most {arguments.LARGEST_START / 3:g}, got "
                f"loss={loss!r} and stddev={stddev!r}"
            )
        return cls(num_stddev, decay, mu1_start, mu2_start, **settings)

    def forward(self, loss: Tensor) -> Tensor:
        """Clip losses by the moments, then update the moments by the clipped losses.

        Args:
            loss: losses of any shape and floating dtype. Each element is clipped separately.

        Returns:
            The clipped losses: same shape, dtype and device. Losses that are NaN or infinite are
            returned as they are, and update no moment.

        Raises:
            TypeError: if ``loss`` is not a tensor of a floating dtype.
            ValueError: if ``loss`` does not require a gradient while training.
            RuntimeError: if :func:`torch.export.export` exports the call while training.
        """
        if not self.applies_to(loss):
            return loss
        clipped = self.clip_and_learn(loss)
        return clipped.clone() if clipped is loss else clipped

    def clip_and_learn(self, loss: Tensor) -> Tensor:
        """Clip losses that :meth:`applies_to` has checked, and update the moments.

        With :attr:`synchronize` the moments learn from the losses of all ranks, else from this
        rank's losses.

        Raises:
            RuntimeError: if a CUDA graph captures the call, and an all-reduce is pending.
        """
        if not (self.synchronize and distributed.is_active()):
            return self.clip(loss)
        is_captured = accelerator.is_capturing(loss.device)
        if is_captured and not self.is_flushed:
            raise RuntimeError(
                "the all-reduce of the last call is pending, and a CUDA graph cannot capture that: "
                "call flush() of this ALRC before the capture"
            )
        sums = zero_sums(loss.device)
        clipped = self.clip(loss, sums)
        self.learn_when_reduced(distributed.PendingSums(sums[None]), 0)
        if is_captured:  # a replay runs no Python, so the graph must have the update, too
            self.flush()
        return clipped

    def applies_to(self, loss: Tensor) -> bool:
        """Whether a loss is clipped. If not, :meth:`forward` returns the loss as it is.

        Raises:
            TypeError, ValueError: see :meth:`forward`.
        """
        arguments.check_is_loss(loss)
        if not self.training or not torch.is_grad_enabled() or loss.is_meta:
            return False
        if _is_exporting():
            raise RuntimeError(
                "torch.export would freeze the current threshold in the exported program, and "
                "replace this ALRC's moments by fake tensors: call eval() on the module before the "
                "export"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"loss must require a gradient while training, got a {tuple(loss.shape)} tensor of "
                f"{loss.dtype} with requires_grad=False: pass the loss before it is detached, or "
                "call eval() to pass losses through unclipped"
            )
        return True

    def clip(self, loss: Tensor, sums: Tensor | None = None) -> Tensor:
        """Clip losses by the moments, then update the moments by the clipped losses.

        Args:
            loss: checked by :meth:`applies_to`.
            sums: sums for the next all-reduce, to which the sums of this call are added. The
                moments do not learn yet: the caller must pass the all-reduce to
                :meth:`learn_when_reduced`. ``None``, the default, if no other rank takes part: the
                moments learn at once.

        Returns:
            The clipped losses. If nothing is clipped, this may be ``loss`` itself.
        """
        if distributed.is_dtensor(loss):
            whole = self.clip(distributed.full(loss), sums)
            return distributed.as_dtensor_like(loss, whole)
        path = paths.path_of(loss)
        on_sums, on_call = self.on_sums, self.on_call
        if torch.compiler.is_compiling():
            on_sums = on_call = None
        elif loss.numel() == 0:
            on_sums = None
        if on_call is not None:
            self.flush()
            moments = self._state.moments(self._rules.limits.burns_in)
        call = Call(
            self._state,
            self._rules,
            self.on_clip,
            on_sums,
            self.spiked_calls_offend,
            None if self._pending is None else self._take_reduced(),
            sums,
        )
        clipped = path.clip(loss, call)
        if on_call is not None:
            on_call(loss, clipped, moments)
        return clipped

    @property
    def is_flushed(self) -> bool:
        """Whether no all-reduce is pending."""
        return self._pending is None

    def learn_when_reduced(self, reduction: distributed.PendingSums, index: int) -> None:
        """Keep a pending all-reduce, and learn from it when the moments are next needed.

        Args:
            reduction: the all-reduce.
            index: which of its rows has the sums of this ALRC.
        """
        self.flush()
        self._pending = (reduction, index)

    def flush(self) -> None:
        """Wait for the pending all-reduce, if any, and learn from its sums.

        There is one only if several ranks train. Call this before a CUDA graph captures calls of
        this ALRC.
        """
        reduced = self._take_reduced()
        if reduced is not None:
            # A validation may call this in inference mode. Later calls change the moments in place,
            # which inference tensors do not allow.
            with torch.inference_mode(False):
                paths.path_of_state(self._state).learn(self._state, self._rules, reduced)

    def _take_reduced(self) -> Tensor | None:
        """Wait for the pending all-reduce and return its sums; ``None`` if none is pending."""
        if self._pending is None:
            return None
        reduction, index = self._pending
        self._pending = None
        return reduction[index]

    @property
    def mu1(self) -> Tensor:
        """Running mean of the clipped losses, a 0-d tensor."""
        return self._copy_of("mu1")

    @property
    def mu2(self) -> Tensor:
        """Running mean of the squared clipped losses, a 0-d tensor."""
        return self._copy_of("variance") + self._copy_of("mu1") ** 2

    @property
    def stddev(self) -> Tensor:
        """Running standard deviation of the clipped losses, at least 1e-4, a 0-d tensor."""
        return functional.stddev(self._copy_of("variance"))

    @property
    def threshold(self) -> Tensor:
        """Largest loss that the next call does not clip, a 0-d tensor; infinite during burn-in."""
        now = State()
        now.values = tuple(_as_tensor(each) for each in self._flushed().values)
        return _as_tensor(bounds(now, self._rules.limits).upper)

    @property
    def updates(self) -> Tensor:
        """Number of updates of the moments since the start or last reset, a 0-d int64 tensor."""
        return self._copy_of("updates").long()

    @property
    def losses_total(self) -> Tensor:
        """Number of finite losses seen, a 0-d int64 tensor."""
        return self._count_of("losses")

    @property
    def clipped_total(self) -> Tensor:
        """Number of losses clipped, a 0-d int64 tensor."""
        return self._count_of("clipped")

    @property
    def nonfinite_total(self) -> Tensor:
        """Number of losses that were NaN or infinite, a 0-d int64 tensor."""
        return self._count_of("nonfinite")

    @property
    def offending_total(self) -> Tensor:
        """Number of losses that were NaN or infinite. With :attr:`spiked_calls_offend`, the number
        of calls that spiked is added."""
        return self._count_of("offending")

    def reset(self) -> None:
        """Restart the moments. Call this when the losses have changed for good. Counts continue.

        Reads the device.
        """
        self.flush()
        # The snapshot is the state before the current batch. It must outlive the reset, but
        # _replace_state drops it.
        snapshot = self._snapshot
        self._replace_state(self._state.after_reset(self._start()))
        self._snapshot = snapshot

    def forget(self) -> None:
        """Restart moments and counts. The settings stay."""
        self._replace_state(self._start())

    def _start(self) -> State:
        if self.mu1_start is None or self.mu2_start is None:
            return State()
        return State(mu1=self.mu1_start, variance=self.mu2_start - self.mu1_start**2)

    def has_row(self) -> bool:
        """Whether there were losses since the last call of :meth:`take_row`. Reads the device."""
        state = self._state.copied_as_floats()
        return bool(state.row_losses or state.row_nonfinite)

    def take_row(self) -> dict[str, float]:
        """Make the row to log, from the losses since the last row. Reads the device once.

        Returns:
            ``loss``, ``loss_clipped``, ``scale``, ``clipped_fraction``: means over the finite
            losses since the last row. Left out if there are none.
            ``clipped_total``, ``nonfinite_total``, ``resets``: counts since the start.
            ``mu1``, ``stddev``: the current values. Left out if the moments have neither start
            values nor an update.
            ``threshold``: the current value. Left out while it is infinite.
            ``spike_score``: share of losses more than 6 standard deviations above the mean, over
            the latest rows. As many rows are used as it takes to cover 1,000 calls. Left out if
            these rows have no finite loss.
            ``spike_score_total``: the same share over all rows. Left out if ``spike_score`` is left
            out.
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
        score, score_in_all = self._state.scores
        if score is not None and score_in_all is not None:
            row |= {"spike_score": score, "spike_score_total": score_in_all}
        return row

    @property
    def settings(self) -> dict[str, float | None]:
        """The settings by name."""
        return self._rules.settings._asdict()

    def get_extra_state(self) -> Tensor:
        """Moments and counts in one float64 tensor, for ``state_dict()`` and safetensors."""
        return self._flushed().as_tensor()

    def set_extra_state(self, state: Any) -> None:
        """Continue from what :meth:`get_extra_state` returned, with the settings of this object.

        Args:
            state: the tensor, or the dict of plain numbers that release 0.1 returned.

        Raises:
            ValueError: if ``state`` is not valid. Nothing is changed then.
        """
        # torch's set_model_state_dict gives this placeholder if the checkpoint has no moments.
        if type(state).__name__ == "_EXTRA_STATE":
            return
        # Lightning's FSDP strategies give an object that is not a Tensor. It reads its tensor from
        # the file when a function of torch is called with it.
        if hasattr(state, "__torch_function__"):
            state = torch.clone(state)
        self.load(State.from_tensor(state) if isinstance(state, Tensor) else State.read(state))

    def load(self, state: State) -> None:
        """Continue from a state, with the settings of this object."""
        self._replace_state(state)

    def take_snapshot(self) -> None:
        """Keep a snapshot of the state before the current batch, for :meth:`dump`."""
        self._snapshot = self._state.copied(), self._pending

    def dump(
        self, of_snapshot: bool = False, logs_row: bool = False, waits: bool = True
    ) -> dict[str, Any] | None:
        """Settings, moments and counts as plain numbers, for a Trainer's checkpoint.

        Args:
            of_snapshot: whether to return the last snapshot instead of the current state.
            logs_row: whether the current row is about to be logged. If so, the returned state
                begins a new row, and its totals include the counts of the current row.
            waits: whether to wait for a pending all-reduce without a time limit. If not, the sums
                of the all-reduce are left out unless it finishes within one second.

        Returns:
            ``None`` if the snapshot is asked for and there is none.
        """
        kept = self._snapshot if of_snapshot else (self._state, self._pending)
        if kept is None:
            return None
        state, pending = kept[0].copied_as_floats(), kept[1]
        if pending is not None:
            reduction, index = pending
            if waits or reduction.finishes(within=1.0):
                state.learn(Sums(*reduction[index].tolist()), self._rules.decays)
        if logs_row:
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
        # A checkpoint from before ALRC was added has no moments. That is no error.
        absent = prefix + "_extra_state"
        if absent in missing_keys:
            missing_keys.remove(absent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ALRC:
        """Let ``to()``, ``cuda()`` and others change the moments' device, but not their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.flush()
        device = fn(torch.empty(0, device=_as_tensor(self._state.mu1).device)).device
        if device.type != "meta":
            with torch.inference_mode(False):  # later calls change the moments in place
                self._state.move_to(device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)

    def _replace_state(self, state: State) -> None:
        """Set the state. Drop the pending all-reduce and the snapshot."""
        # The values are made tensors. If they were floats, the first call of a compiled function
        # would make them tensors, and the second call would compile the function again. The tensors
        # are made outside of inference mode, because later calls change them in place.
        with torch.inference_mode(False):
            state.take_tensors_of(self._state)
        self._state = state
        self._pending = self._snapshot = None

    def _flushed(self) -> State:
        self.flush()
        return self._state

    def _copy_of(self, name: str) -> Tensor:
        return _as_tensor(getattr(self._flushed(), name)).clone()

    def _count_of(self, name: str) -> Tensor:
        # Each is an integer before they are added: a total on the CPU is float64, and MPS has none.
        state = self._flushed()
        row, total = (getattr(state, f"{part}_{name}") for part in ("row", "total"))
        return _as_tensor(row).long() + _as_tensor(total).long()


def _as_tensor(number: float | Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.tensor(number, dtype=torch.float64, device="cpu")
