r"""The mathematics of adaptive learning rate clipping (ALRC), to be read beside the paper.

J. M. Ede and R. Beanland, "Adaptive learning rate clipping stabilizes learning",
Machine Learning: Science and Technology 1, 015011 (2020), doi:10.1088/2632-2153/ab81e2.

With running moments :math:`\mu_1, \mu_2` of the clipped losses, ``num_stddev`` :math:`n` and
``decay`` :math:`\beta`, a loss :math:`L` becomes

.. math::

    \sigma &= \sqrt{\mu_2 - \mu_1^2 + \epsilon}, \qquad T = \mu_1 + n \sigma \\
    L_\mathrm{clip} &= \begin{cases} L & L < T \\ L \cdot \mathrm{stop\_gradient}(T / L) &
    \text{otherwise} \end{cases} \\
    \mu_1 &\leftarrow \beta \mu_1 + (1 - \beta) \, \overline{L_\mathrm{clip}}, \qquad
    \mu_2 \leftarrow \beta \mu_2 + (1 - \beta) \, \overline{L_\mathrm{clip}^2}

The second moment is kept centred here, as ``variance`` :math:`= \mu_2 - \mu_1^2`: the algebra is
the same, but nothing cancels, however small the spread of the losses is beside their mean.

The functions are pure: they hold no state and change none of their arguments. Those on moments take
Python floats as well as 0-d tensors and return what they were given; those on losses take tensors
of any shape, each element a loss of its own. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "EPSILON",
    "Clipped",
    "at_least",
    "at_most",
    "catch_up_decay",
    "clip",
    "estimated_start",
    "learned_threshold",
    "ramped_decay",
    "stddev",
    "threshold",
    "update",
]

Number = TypeVar("Number", float, Tensor)

EPSILON = 1e-8
"""What the authors' code adds to the variance before its square root."""

PAPERS_LEAST = 2.0
"""The smallest ``num_stddev`` of the paper. From there on the threshold follows any rise."""

STUCK = 0.9
"""Recent clipped fraction above which a smaller ``num_stddev`` is stuck below its losses."""

RECENT = 0.99
"""Decay of the recent clipped fraction, and of the moments while the threshold is stuck."""

CATCH_UP = 3.0
"""``num_stddev`` of the losses that the moments learn from while the threshold is stuck."""

SPIKE = 6.0
"""Standard deviations above the running mean beyond which a loss is scored as a spike, whatever
``num_stddev`` is; as in OLMo-core's stability monitor."""


def stddev(variance: Number) -> Number:
    r"""Standard deviation :math:`\sigma = \sqrt{\mu_2 - \mu_1^2 + \epsilon}` of the running losses.

    Args:
        variance: :math:`\mu_2 - \mu_1^2`, not negative; a float or a 0-d tensor.

    Returns:
        A positive number of the same kind.

    >>> stddev(0.0)
    0.0001
    """
    root: Number = (variance + EPSILON) ** 0.5
    return root


def threshold(mu1: Number, variance: Number, num_stddev: float) -> Number:
    r"""Largest loss that is left alone, :math:`T = \mu_1 + n \sigma`.

    Args:
        mu1: running mean of the losses; a float or a 0-d tensor.
        variance: their running variance, not negative; of the same kind.
        num_stddev: :math:`n`; negative for the lower bound of the paper's two-sided form, infinite
            to clip nothing.

    Returns:
        A number of the same kind.

    >>> threshold(25.0, 275.0 - 1e-8, 2.0) == 25.0 + 2.0 * 275.0 ** 0.5
    True
    >>> threshold(25.0, 275.0, float("inf"))
    inf
    """
    return mu1 + num_stddev * stddev(variance)


def learned_threshold(
    mu1: Number, variance: Number, num_stddev: float, clipped_recently: Number
) -> Number:
    r"""Bound on the losses that the moments learn from, where ``num_stddev`` is below 2.

    The moments learn from clipped losses. If all losses rise for good, each update adds
    :math:`w (n^2 - 1)` of the variance: for :math:`n = 2` the threshold grows until it meets them,
    for :math:`n \le 1` it never does. So while more than nine in ten of the recent losses are
    clipped, the moments learn from losses clipped at 3 standard deviations, and faster
    (:func:`catch_up_decay`). The losses themselves, and their gradients, are still clipped at
    :math:`n`.

    Args:
        mu1: running mean; a float or a 0-d tensor, as the others.
        variance: running variance, not negative.
        num_stddev: :math:`n`, below 2; negative for the bound below the mean.
        clipped_recently: fraction of the recent losses that were clipped.

    Returns:
        A number of the same kind.

    >>> learned_threshold(1.0, 1.0 - 1e-8, 1.0, clipped_recently=0.3)
    2.0
    >>> learned_threshold(1.0, 1.0 - 1e-8, 1.0, clipped_recently=0.95)
    4.0
    """
    usual = threshold(mu1, variance, num_stddev)
    wide = threshold(mu1, variance, math.copysign(CATCH_UP, num_stddev))
    stuck: Any = clipped_recently > STUCK
    if isinstance(usual, Tensor):
        return torch.where(stuck, wide, usual)
    return wide if stuck else usual


def catch_up_decay(decay: Number, clipped_recently: Number) -> Number:
    """Decay of the running moments, where ``num_stddev`` is below 2: at most 0.99 while stuck.

    With 0.999 the mean alone, of losses that have risen by 100 standard deviations, would take
    more than 1,000 steps to bring a low threshold back among them.

    Args:
        decay: otherwise; a float or a 0-d tensor.
        clipped_recently: fraction of the recent losses that were clipped, of the same kind.

    Returns:
        A number of the same kind.

    >>> catch_up_decay(0.999, clipped_recently=0.3), catch_up_decay(0.999, clipped_recently=0.95)
    (0.999, 0.99)
    """
    fast = at_most(decay, RECENT)
    stuck: Any = clipped_recently > STUCK
    if isinstance(decay, Tensor):
        return torch.where(stuck, fast, decay)
    return fast if stuck else decay


class Clipped(NamedTuple):
    """What :func:`clip` returns; each of the shape of the losses."""

    loss: Tensor
    """The clipped losses, of their dtype; the gradient reaching each is multiplied by its scale."""
    scale: Tensor
    """The factor on each loss's gradient, in [0, 1], of the dtype computed in; 1 if not clipped."""
    finite: Tensor
    """Whether each loss is finite (bool); one that is not passes unclipped and moves no moment."""
    value: Tensor
    """The losses before, of the dtype computed in, without a graph; ``mu1`` where not finite."""
    bounded: Tensor
    """The losses after, likewise."""


def clip(
    loss: Tensor,
    mu1: Number,
    upper: Number,
    lower: Number | None = None,
    dtype: torch.dtype = torch.float64,
) -> Clipped:
    r"""Clip losses to a threshold, and their gradients by the same factor.

    A loss above ``upper`` takes its value, and its gradient the factor :math:`T / L`. That factor
    measures from zero, so it needs a positive mean. Where ``mu1`` is not positive (log-likelihoods,
    critics), and for a loss under ``lower``, the factor is the same ratio measured from the mean,
    :math:`(T - \mu_1) / (L - \mu_1)`. The two agree at :math:`\mu_1 = 0`, so the factor does not
    jump when the mean passes through zero. It always lies in [0, 1]: no gradient is amplified, and
    none changes sign.

    Args:
        loss: losses of any shape and floating dtype; with a graph, the result is differentiable.
        mu1: running mean, a float or a 0-d tensor.
        upper: the threshold, not below ``mu1``, of the same kind; infinity clips nothing.
        lower: a bound not above ``mu1``, of the same kind; ``None`` clips nothing there.
        dtype: what is computed in.

    Returns:
        The clipped losses, their scales, and which of the losses are finite.

    References:
        Ede and Beanland (2020), section 2 and algorithm 1.

    >>> loss = torch.tensor([1.0, 8.0, float("inf")], requires_grad=True)
    >>> clipped = clip(loss, mu1=1.0, upper=2.0)
    >>> clipped.loss.tolist(), clipped.scale.tolist()
    ([1.0, 2.0, inf], [1.0, 0.25, 1.0])
    """
    given = loss.detach().to(dtype)
    finite = given.abs() < math.inf
    value = torch.where(finite, given, mu1)
    bounded = value.clamp(lower, upper)
    from_mean: Any = mu1 <= 0
    if lower is not None:
        from_mean = ((value < lower) | from_mean).to(dtype)
    origin = mu1 * from_mean
    # A loss that is not clipped is divided by itself, which is 1, or not a number where it is 0.
    scale = (bounded - origin).div_(value - origin).nan_to_num_(nan=1.0)
    clipped: Tensor = _Scale.apply(loss, scale, finite, bounded)
    return Clipped(clipped, scale, finite, value, bounded)


class _Scale(torch.autograd.Function):
    """``bounded`` forwards where the loss is finite, ``scale`` times the gradient backwards.

    ``loss * scale`` would do while every loss is positive; this does for any sign, in one launch
    backwards, and multiplies float16 gradients before it rounds them.
    """

    @staticmethod
    def forward(loss: Tensor, scale: Tensor, finite: Tensor, bounded: Tensor) -> Tensor:
        # Moments that losses of a wider dtype have made may put it beyond all of a narrow one.
        largest = torch.finfo(loss.dtype).max
        return torch.where(finite, bounded.clamp(-largest, largest).to(loss.dtype), loss)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (gradient * scale).to(gradient.dtype), None, None, None


def update(
    mu1: Number,
    variance: Number,
    delta: Number,
    batch_variance: Number | None,
    decay: Number,
    mu2_decay: Number | None = None,
) -> tuple[Number, Number]:
    r"""Move the running moments by one batch of clipped losses.

    In raw moments this is :math:`\mu_k \leftarrow \beta \mu_k + (1 - \beta) \overline{L^k}`. With
    :math:`w = 1 - \beta` and :math:`\delta = \overline{L} - \mu_1` the same is

    .. math::

        \mu_1 \leftarrow \mu_1 + w \delta, \qquad
        v \leftarrow (1 - w) v + w \, \mathrm{var}(L) + (w - w^2) \delta^2

    Args:
        mu1: running mean; a float or a 0-d tensor, as all the others.
        variance: running variance :math:`\mu_2 - \mu_1^2`, not negative.
        delta: :math:`\delta`, the mean of the batch's clipped losses less ``mu1``.
        batch_variance: their variance (dividing by their number), not negative; ``None`` for one
            loss, which has none.
        decay: :math:`\beta` in [0, 1].
        mu2_decay: a :math:`\beta` of its own for :math:`\mu_2`, as in the paper; ``None`` for one
            decay for both. The variance, which two decays may drive below zero, is held there.

    Returns:
        The new ``(mu1, variance)``.

    >>> update(25.0, 275.0, 5.0 - 25.0, 0.0, decay=0.5)  # mu2: (900 + 5**2) / 2 = 15**2 + 237.5
    (15.0, 237.5)
    """
    weight = 1.0 - decay
    step = weight * delta
    if mu2_decay is None:
        spread = decay * (variance + step * delta)
        if batch_variance is not None:
            spread = spread + weight * batch_variance
        return mu1 + step, spread
    weight2 = 1.0 - mu2_decay
    spread = (
        mu2_decay * variance
        + (weight2 - weight * weight) * delta * delta
        + 2.0 * (weight2 - weight) * mu1 * delta
    )
    if batch_variance is not None:
        spread = spread + weight2 * batch_variance
    return mu1 + step, at_least(spread, 0.0)


def ramped_decay(decay: float, updates: Number, horizon: float) -> Number:
    r"""Decay of a running moment that needs no start value.

    .. math::

        \min\left(\beta, \frac{t}{t + s}\right), \qquad s = \min(\max(t / h, 1), h)

    The first ``horizon`` updates give the plain mean of all losses so far. From then on the decay
    is that of about ``horizon + 1`` losses, until :math:`t / (t + h)` exceeds it, which approaches
    :math:`\beta`: the first, steep part of a training is forgotten soon.

    Args:
        decay: :math:`\beta`, approached from below.
        updates: :math:`t`, the number of updates made before this one; a float or a 0-d tensor.
        horizon: :math:`h`, at least 1.

    Returns:
        A number of the kind of ``updates``.

    >>> [ramped_decay(0.999, t, horizon=9.0) for t in (0.0, 1.0, 9.0, 81.0, 1e6)]
    [0.0, 0.5, 0.9, 0.9, 0.999]
    """
    spread = at_most(at_least(updates / horizon, 1.0), horizon)
    return at_most(updates / (updates + spread), decay)


def estimated_start(loss: float, stddev: float, num_stddev: float) -> tuple[float, float]:
    r"""The authors' recipe for start values from an estimate of the first losses.

    Overestimates decay to the right values, so they take three times the threshold:
    :math:`\mu_1 = 3 (L + n s)` and :math:`\mu_2 = \mu_1^2 + 1`, or the next larger float.

    Args:
        loss: estimated mean of the first losses.
        stddev: their estimated standard deviation.
        num_stddev: :math:`n`, finite.

    Returns:
        ``(mu1_start, mu2_start)``.

    >>> estimated_start(1.0, 0.5, num_stddev=2.0)
    (6.0, 37.0)
    """
    mu1_start = 3.0 * (loss + num_stddev * stddev)
    square = mu1_start * mu1_start
    return mu1_start, max(square + 1.0, math.nextafter(square, math.inf))


def at_least(value: Number, bound: float) -> Number:
    """The larger of a float or 0-d tensor and a bound."""
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


def at_most(value: Number, bound: float) -> Number:
    """The smaller of a float or 0-d tensor and a bound."""
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)
