r"""The equations of adaptive learning rate clipping (ALRC), as pure functions.

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

This module keeps the second moment centred: ``variance`` :math:`= \mu_2 - \mu_1^2`. The result is
the same, but no digits are lost if the standard deviation is far below the mean.

The functions hold no state and do not change their arguments. Functions of moments take Python
floats or 0-d tensors, and return the same kind. Functions of losses take tensors of any shape; each
element is one loss. No function copies a value from a device to the host.

This module is the reference. The package's faster implementations compute the same, and are tested
against this module.
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
"""Added to the variance before the square root, as in the authors' code."""

PAPERS_LEAST = 2.0
"""Smallest ``num_stddev`` in the paper. With this ``num_stddev`` or a larger one, the threshold
follows any lasting rise of the losses."""

STUCK = 0.9
"""A threshold with ``num_stddev`` below 2 is stuck if the recent clipped fraction is above this."""

RECENT = 0.99
"""The recent clipped fraction is a running mean with this decay. While the threshold is stuck, the
decay of the moments is at most this."""

CATCH_UP = 3.0
"""While the threshold is stuck, the moments learn from losses clipped at this ``num_stddev``."""

SPIKE = 6.0
"""A loss more than this many standard deviations above the running mean counts as a spike in the
spike score, whatever ``num_stddev`` is. Value from OLMo-core's stability monitor."""


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
    r"""Threshold: the largest loss that is not clipped, :math:`T = \mu_1 + n \sigma`.

    Args:
        mu1: running mean of the losses; a float or a 0-d tensor.
        variance: running variance of the losses, not negative; of the same kind as ``mu1``.
        num_stddev: :math:`n`. Negative for a bound below the mean, infinite to clip nothing.

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
    r"""The bound on the losses that the moments learn from, if ``num_stddev`` is below 2.

    The moments learn from clipped losses. If the losses rise for good, all of them are clipped.
    Each update then changes the variance :math:`v` by about :math:`w (n^2 - 1) v`, with
    :math:`w = 1 - \beta`. With :math:`n > 1` the threshold grows until it reaches the losses; the
    smaller :math:`n`, the longer this takes. With :math:`n \le 1` it never reaches them: it is
    stuck.

    So while more than 90 % of the recent losses are clipped, the moments learn from losses clipped
    at 3 standard deviations, with a smaller decay (:func:`catch_up_decay`). The losses that are
    differentiated, and their gradients, are still clipped at :math:`n`.

    Args:
        mu1: running mean; a float or a 0-d tensor.
        variance: running variance, not negative; of the same kind as ``mu1``.
        num_stddev: :math:`n`, below 2; negative for the bound below the mean.
        clipped_recently: fraction of the recent losses that were clipped; of the same kind.

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
    """Decay of the moments, for ``num_stddev`` below 2: at most 0.99 while the threshold is stuck.

    If losses rise by 100 standard deviations, a threshold with a decay of 0.999 would take more
    than 1,000 steps to reach them.

    Args:
        decay: the decay while the threshold is not stuck; a float or a 0-d tensor.
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
    """What :func:`clip` returns. Each tensor has the shape of the losses."""

    loss: Tensor
    """The clipped losses, in the losses' dtype. ``scale`` multiplies the gradient of each loss."""
    scale: Tensor
    """The factor on each loss's gradient, in [0, 1]; 1 if not clipped. Of dtype ``dtype``."""
    finite: Tensor
    """Whether each loss is finite (bool). Losses that are not finite are not clipped, and update no
    moment."""
    value: Tensor
    """The losses before clipping, in ``dtype``, detached; ``mu1`` where a loss is not finite."""
    bounded: Tensor
    """The losses after clipping, in ``dtype``, detached; ``mu1`` where a loss is not finite."""


def clip(
    loss: Tensor,
    mu1: Number,
    upper: Number,
    lower: Number | None = None,
    dtype: torch.dtype = torch.float64,
) -> Clipped:
    r"""Clip losses to a threshold, and their gradients by the same factor.

    A loss :math:`L` above ``upper`` is set to ``upper``, which is :math:`T` here, and its gradient
    is multiplied by :math:`T / L`. This factor needs a positive mean. If ``mu1`` is not positive
    (log-likelihoods, critics), the factor is :math:`(T - \mu_1) / (L - \mu_1)` instead. Both
    factors are equal at :math:`\mu_1 = 0`, so there is no jump when the mean passes through zero. A
    loss below ``lower`` has the second factor, with ``lower`` as :math:`T`. The factor is always in
    [0, 1]: no gradient is amplified, and none changes sign.

    Args:
        loss: losses of any shape and floating dtype. If they have a graph, the clipped losses have
            one, too.
        mu1: running mean; a float or a 0-d tensor.
        upper: the threshold, at least ``mu1``, of the same kind. Infinity clips nothing.
        lower: a bound, at most ``mu1``, of the same kind. ``None``, the default, for no
            lower bound.
        dtype: the dtype to compute in; float64 by default.

    Returns:
        The clipped losses, their scales, and the other fields of :class:`Clipped`.

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
    # Without clipping the ratio is 1, or NaN from 0 / 0.
    scale = (bounded - origin).div_(value - origin).nan_to_num_(nan=1.0)
    clipped: Tensor = _Scale.apply(loss, scale, finite, bounded)
    return Clipped(clipped, scale, finite, value, bounded)


class _Scale(torch.autograd.Function):
    """Forward: ``bounded`` where the loss is finite. Backward: ``scale`` times the gradient.

    The product ``loss * scale`` would be right for positive losses only. This function is right for
    any sign. Its backward pass rounds float16 gradients only after the multiplication.
    """

    @staticmethod
    def forward(loss: Tensor, scale: Tensor, finite: Tensor, bounded: Tensor) -> Tensor:
        # A bound learned from losses of a wider dtype may exceed this dtype's range.
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
    r"""Update the running moments by one batch of clipped losses.

    In raw moments this is :math:`\mu_k \leftarrow \beta \mu_k + (1 - \beta) \overline{L^k}`. With
    :math:`w = 1 - \beta` and :math:`\delta = \overline{L} - \mu_1` the same is

    .. math::

        \mu_1 \leftarrow \mu_1 + w \delta, \qquad
        v \leftarrow (1 - w) v + w \, \mathrm{var}(L) + (w - w^2) \delta^2

    Args:
        mu1: running mean; a float or a 0-d tensor. The other numbers are of the same kind.
        variance: running variance :math:`\mu_2 - \mu_1^2`, not negative.
        delta: :math:`\delta`, the mean of the batch's clipped losses minus ``mu1``.
        batch_variance: the population variance of the batch's clipped losses, not negative;
            ``None`` for a batch of one loss.
        decay: :math:`\beta`, in [0, 1].
        mu2_decay: the decay of :math:`\mu_2`, if it has its own, as in the paper. ``None``, the
            default, uses ``decay``. Two decays may drive the variance below 0. The variance is
            clamped to 0 then.

    Returns:
        The new ``(mu1, variance)``.

    >>> update(25.0, 275.0, 5.0 - 25.0, 0.0, decay=0.5)  # mu2: (900 + 5**2) / 2 = 15**2 + 237.5
    (15.0, 237.5)
    """
    weight = 1.0 - decay
    step = weight * delta
    if mu2_decay is None:
        new_variance = decay * (variance + step * delta)
        if batch_variance is not None:
            new_variance = new_variance + weight * batch_variance
        return mu1 + step, new_variance
    weight2 = 1.0 - mu2_decay
    new_variance = (
        mu2_decay * variance
        + (weight2 - weight * weight) * delta * delta
        + 2.0 * (weight2 - weight) * mu1 * delta
    )
    if batch_variance is not None:
        new_variance = new_variance + weight2 * batch_variance
    return mu1 + step, at_least(new_variance, 0.0)


def ramped_decay(decay: float, updates: Number, horizon: float) -> Number:
    r"""Decay of running moments without start values. It rises to its full value.

    .. math::

        \min\left(\beta, \frac{t}{t + s}\right), \qquad s = \min(\max(t / h, 1), h)

    During the first ``horizon`` updates the moments are plain means. Then the decay stays at
    :math:`h / (h + 1)` until update :math:`h^2`, and from there it is :math:`t / (t + h)`, up to
    :math:`\beta`. So the first losses, which fall steeply, are soon forgotten.

    Args:
        decay: :math:`\beta`, the largest value returned.
        updates: :math:`t`, the number of updates so far; a float or a 0-d tensor.
        horizon: :math:`h`, at least 1.

    Returns:
        A number of the same kind as ``updates``.

    >>> [ramped_decay(0.999, t, horizon=9.0) for t in (0.0, 1.0, 9.0, 81.0, 1e6)]
    [0.0, 0.5, 0.9, 0.9, 0.999]
    """
    spread = at_most(at_least(updates / horizon, 1.0), horizon)
    return at_most(updates / (updates + spread), decay)


def estimated_start(loss: float, stddev: float, num_stddev: float) -> tuple[float, float]:
    r"""Start values from an estimate of the first losses, as in the authors' first README.

    The mean starts at three times the estimated threshold, because an overestimate decays to the
    right value: :math:`\mu_1 = 3 (L + n s)`. The second moment :math:`\mu_2` starts at
    :math:`\mu_1^2 + 1`, or at the next float above :math:`\mu_1^2`, whichever is larger.

    Args:
        loss: estimated mean of the first losses.
        stddev: estimated standard deviation of the first losses.
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
    """The larger of a number and a bound. The number is a float or a 0-d tensor."""
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


def at_most(value: Number, bound: float) -> Number:
    """The smaller of a number and a bound. The number is a float or a 0-d tensor."""
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)
