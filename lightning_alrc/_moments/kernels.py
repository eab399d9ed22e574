"""The Triton kernels of the accelerator path. Importing this module imports Triton.

They compute the same as :mod:`lightning_alrc._moments.tensors`, always in float64: a loss is
converted when it is read, and converted back when it is written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["clip", "learn"]

# Triton passes a float argument as float32, and takes most float literals as float32. So the
# settings and constants are passed in a float64 tensor, at these indices. accelerator._settings
# fills it in the same order.
ABOVE: Any = tl.constexpr(0)
BELOW: Any = tl.constexpr(1)
DECAY: Any = tl.constexpr(2)
MU2_DECAY: Any = tl.constexpr(3)
HORIZON: Any = tl.constexpr(4)
RECENT_WEIGHT: Any = tl.constexpr(5)
BURN_IN: Any = tl.constexpr(6)
EPSILON: Any = tl.constexpr(7)
STUCK: Any = tl.constexpr(8)
PAPERS_LEAST: Any = tl.constexpr(9)
CATCH_UP_NUM_STDDEV: Any = tl.constexpr(10)
LARGEST_DEVIATION: Any = tl.constexpr(11)
RECENT_DECAY: Any = tl.constexpr(12)
SPIKE: Any = tl.constexpr(13)
SPIKED_SHARE: Any = tl.constexpr(14)

# The values of TO: where the sums of a call go.
TO_MOMENTS: Any = tl.constexpr(0)
"""The sums update the moments."""
TO_OUTGOING: Any = tl.constexpr(1)
"""The sums are added to a row of the next all-reduce."""
TO_PARTS: Any = tl.constexpr(2)
"""Each program writes its own sums to ``parts``. :func:`learn` adds up the parts."""


@triton.jit
def _updated(
    mu1,
    variance,
    updates,
    loss_count,
    clipped_recently,
    settings,
    finite_count,
    clipped_count,
    deviation_sum,
    squared_deviation_sum,
    learned_count,
):
    """The updated moments. Computes the same as State.learn and functional.update."""
    is_update = tl.minimum(learned_count, 1.0)
    count = tl.maximum(learned_count, 1.0)
    delta = deviation_sum / count
    batch_variance = tl.maximum(squared_deviation_sum / count - delta * delta, 0.0)
    batch_variance = tl.where(count > 1.0, batch_variance, 0.0)
    # functional.ramped_decay, if there is a horizon.
    horizon = tl.load(settings + HORIZON)
    safe_horizon = tl.maximum(horizon, 1.0)
    ramp = updates / (updates + tl.minimum(tl.maximum(updates / safe_horizon, 1.0), safe_horizon))
    ramp = tl.where(horizon > 0.0, ramp, 1.0)
    # functional.catch_up_decay. If the clipped fraction is not tracked, RECENT_WEIGHT is 0.
    recent_weight = tl.load(settings + RECENT_WEIGHT) * is_update
    is_stuck = (clipped_recently > tl.load(settings + STUCK)) & (recent_weight > 0.0)
    ramp = tl.where(is_stuck, tl.minimum(ramp, tl.load(settings + RECENT_DECAY)), ramp)
    # If there is no loss to learn from, the decays are 1. A mu2_decay that is not set is negative.
    mu2_decay = tl.load(settings + MU2_DECAY)
    decay = tl.where(is_update > 0.0, tl.minimum(ramp, tl.load(settings + DECAY)), 1.0)
    decay2 = tl.where(is_update > 0.0, tl.minimum(ramp, mu2_decay), 1.0)
    weight, weight2 = 1.0 - decay, 1.0 - decay2
    with_one_decay = decay * (variance + weight * delta * delta) + weight * batch_variance
    with_two_decays = decay2 * variance + (weight2 - weight * weight) * delta * delta
    with_two_decays += 2.0 * (weight2 - weight) * mu1 * delta + weight2 * batch_variance
    variance = tl.where(mu2_decay < 0.0, with_one_decay, tl.maximum(with_two_decays, 0.0))
    clipped_recently += recent_weight * (
        clipped_count / tl.maximum(finite_count, 1.0) - clipped_recently
    )
    return (
        mu1 + weight * delta,
        variance,
        updates + is_update,
        loss_count + learned_count,
        clipped_recently,
    )


@triton.jit
def _take_in_reduced(
    state, settings, reduced, HAS_REDUCED: tl.constexpr, ADDS_TO_ROW: tl.constexpr
):
    """The moments; if ``HAS_REDUCED``, updated by all ranks' sums.

    Returns the moments without storing them. The one thing it stores, if ``HAS_REDUCED`` and
    ``ADDS_TO_ROW``: all ranks' sums are added to the sums since the last logged row, which are in
    ``state``. With ``ADDS_TO_ROW``, only one program may run: several programs would add all ranks'
    sums several times.
    """
    mu1, variance = tl.load(state), tl.load(state + 1)
    updates, loss_count = tl.load(state + 2), tl.load(state + 3)
    clipped_recently = tl.load(state + 4)
    if HAS_REDUCED:
        if ADDS_TO_ROW:
            for index in tl.static_range(6):
                place = state + 5 + index
                tl.store(place, tl.load(place) + tl.load(reduced + index))
            tl.store(state + 11, tl.load(state + 11) + tl.load(reduced + 9))
            tl.store(state + 12, tl.load(state + 12) + tl.load(reduced + 10))
        mu1, variance, updates, loss_count, clipped_recently = _updated(
            mu1,
            variance,
            updates,
            loss_count,
            clipped_recently,
            settings,
            tl.load(reduced),
            tl.load(reduced + 2),
            tl.load(reduced + 6),
            tl.load(reduced + 7),
            tl.load(reduced + 8),
        )
    return mu1, variance, updates, loss_count, clipped_recently


@triton.jit
def _learn_or_add(
    state,
    mu1,
    variance,
    updates,
    loss_count,
    clipped_recently,
    settings,
    outgoing,
    call_sums,
    finite_count,
    nonfinite_count,
    clipped_count,
    scale_sum,
    loss_sum,
    loss_clipped_sum,
    deviation_sum,
    squared_deviation_sum,
    spike_count,
    TO: tl.constexpr,
    HAS_REDUCED: tl.constexpr,
    HAS_CALL_SUMS: tl.constexpr,
    SPIKED_CALLS_OFFEND: tl.constexpr,
):
    """Update the moments by a call's sums, or add the sums to a row of the next all-reduce.

    The updated moments are stored. If the call's sums only go to the all-reduce, the moments are
    stored if ``HAS_REDUCED``: :func:`_take_in_reduced` has updated them then, and did not store
    them. If ``HAS_CALL_SUMS``, the call's sums are also written to ``call_sums``.
    """
    offending_count = nonfinite_count
    if SPIKED_CALLS_OFFEND:  # call._with_spiked_call
        share = tl.load(settings + SPIKED_SHARE)
        offending_count = nonfinite_count + tl.where(clipped_count > share * finite_count, 1.0, 0.0)
    if HAS_CALL_SUMS:
        tl.store(call_sums, finite_count)
        tl.store(call_sums + 1, nonfinite_count)
        tl.store(call_sums + 2, clipped_count)
        tl.store(call_sums + 3, scale_sum)
        tl.store(call_sums + 4, loss_sum)
        tl.store(call_sums + 5, loss_clipped_sum)
        tl.store(call_sums + 6, deviation_sum)
        tl.store(call_sums + 7, squared_deviation_sum)
        tl.store(call_sums + 8, finite_count)
        tl.store(call_sums + 9, spike_count)
        tl.store(call_sums + 10, offending_count)
    if TO == TO_OUTGOING:
        target = outgoing
        tl.store(outgoing + 6, tl.load(outgoing + 6) + deviation_sum)
        tl.store(outgoing + 7, tl.load(outgoing + 7) + squared_deviation_sum)
        tl.store(outgoing + 8, tl.load(outgoing + 8) + finite_count)
        tl.store(outgoing + 9, tl.load(outgoing + 9) + spike_count)
        tl.store(outgoing + 10, tl.load(outgoing + 10) + offending_count)
    else:
        target = state + 5
        mu1, variance, updates, loss_count, clipped_recently = _updated(
            mu1,
            variance,
            updates,
            loss_count,
            clipped_recently,
            settings,
            finite_count,
            clipped_count,
            deviation_sum,
            squared_deviation_sum,
            finite_count,
        )
        tl.store(state + 11, tl.load(state + 11) + spike_count)
        tl.store(state + 12, tl.load(state + 12) + offending_count)
    tl.store(target, tl.load(target) + finite_count)
    tl.store(target + 1, tl.load(target + 1) + nonfinite_count)
    tl.store(target + 2, tl.load(target + 2) + clipped_count)
    tl.store(target + 3, tl.load(target + 3) + scale_sum)
    tl.store(target + 4, tl.load(target + 4) + loss_sum)
    tl.store(target + 5, tl.load(target + 5) + loss_clipped_sum)
    if (TO != TO_OUTGOING) or HAS_REDUCED:
        tl.store(state, mu1)
        tl.store(state + 1, variance)
        tl.store(state + 2, updates)
        tl.store(state + 3, loss_count)
        tl.store(state + 4, clipped_recently)


@triton.jit(do_not_specialize=["count", "reduced", "outgoing"])
def clip(
    given_losses,
    count,
    clipped_losses,
    factors,
    seen,
    state,
    settings,
    reduced,
    outgoing,
    call_sums,
    parts,
    TO: tl.constexpr,
    HAS_REDUCED: tl.constexpr,
    HAS_CALL_SUMS: tl.constexpr,
    SPIKED_CALLS_OFFEND: tl.constexpr,
    SEES: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clip losses by the moments, and compute the sums that the moments learn from.

    In place of a tensor that is not used, any tensor may be passed.

    Args:
        given_losses: [count].
        count: number of losses.
        clipped_losses: [count], written.
        factors: the factors on the gradients, [count], written.
        seen: scale, loss before and loss after clipping, [3, count]. Written if ``SEES``.
        state: moments and counts, [13]: LEARNED and ROW of state.py.
        settings: see the indices above.
        reduced: all ranks' sums, in the order of Sums. If ``HAS_REDUCED``, the losses are
            clipped by moments that have learned from these sums.
        outgoing: a row of the next all-reduce, in the order of Sums. If ``TO`` is
            ``TO_OUTGOING``, the sums of this call are added to this row.
        call_sums: the sums of this call, in the order of Sums. Written if ``HAS_CALL_SUMS``,
            unless ``TO`` is ``TO_PARTS``: then :func:`learn` writes them.
        parts: sums of each program, [8, programs]. Written if ``TO`` is ``TO_PARTS``.
        TO: where the sums of the call go.
        SPIKED_CALLS_OFFEND: whether a call that spikes counts as offending.
        LARGEST: the largest number of the losses' dtype.
        IS_NARROW: whether the losses' dtype has 16 bits.
    """
    count = tl.cast(count, tl.int64)  # 2 * count, or the end of the loop, may exceed int32
    mu1, variance, updates, loss_count, clipped_recently = _take_in_reduced(
        state, settings, reduced, HAS_REDUCED, TO != TO_PARTS
    )
    # The bounds, as in bounds.py.
    stddev = tl.sqrt(variance + tl.load(settings + EPSILON))
    above, below = tl.load(settings + ABOVE), tl.load(settings + BELOW)
    least, catch_up = tl.load(settings + PAPERS_LEAST), tl.load(settings + CATCH_UP_NUM_STDDEV)
    is_stuck = clipped_recently > tl.load(settings + STUCK)
    burns_in = (tl.load(settings + HORIZON) > 0.0) & (loss_count < tl.load(settings + BURN_IN))
    upper = mu1 + above * stddev
    lower = mu1 - below * stddev
    learned_upper = mu1 + tl.where(is_stuck & (above < least), catch_up, above) * stddev
    learned_lower = mu1 - tl.where(is_stuck & (below < least), catch_up, below) * stddev
    has_no_threshold = above == float("inf")
    spike_factor = tl.load(settings + SPIKE) - tl.where(has_no_threshold, 0.0, above)
    spike_bound = tl.where(has_no_threshold, mu1, upper) + spike_factor * stddev
    spike_bound = tl.where(burns_in, float("inf"), spike_bound)
    upper = tl.where(burns_in, float("inf"), upper)
    lower = tl.where(burns_in, float("-inf"), lower)
    learned_upper = tl.where(burns_in, float("inf"), learned_upper)
    learned_lower = tl.where(burns_in, float("-inf"), learned_lower)
    limit = tl.load(settings + LARGEST_DEVIATION)

    zeros = tl.full([BLOCK], 0.0, tl.float64)
    nonfinite, clipped, scales, spikes = zeros, zeros, zeros, zeros
    before, after, deviations, squared_deviations = zeros, zeros, zeros, zeros
    stride = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0) * BLOCK, count, stride):
        offsets = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = offsets < count
        given = tl.load(given_losses + offsets, mask=inside, other=0.0)
        if IS_NARROW:  # noqa: SIM108 - Triton compiles only one of the branches
            value = given.to(tl.float32).to(tl.float64)
        else:
            value = given.to(tl.float64)
        is_finite = tl.abs(value) < float("inf")
        value = tl.where(is_finite, value, mu1)
        bounded = tl.minimum(tl.maximum(value, lower), upper)
        is_same = bounded == value
        origin = tl.where(value < lower, mu1, tl.minimum(mu1, 0.0))
        scale = tl.where(is_same, 1.0, bounded - origin) / tl.where(is_same, 1.0, value - origin)
        written = tl.minimum(tl.maximum(bounded, -LARGEST), LARGEST)
        if IS_NARROW:
            written = written.to(tl.float32)
        written = tl.where(is_finite, written.to(given.dtype), given)
        tl.store(clipped_losses + offsets, written, mask=inside)
        tl.store(factors + offsets, scale.to(factors.dtype.element_ty), mask=inside)
        if SEES:
            dtype = seen.dtype.element_ty
            tl.store(seen + offsets, scale.to(dtype), mask=inside)
            tl.store(seen + count + offsets, value.to(dtype), mask=inside)
            tl.store(seen + 2 * count + offsets, bounded.to(dtype), mask=inside)
        learned_value = tl.minimum(tl.maximum(value, learned_lower), learned_upper)
        is_counted = inside & is_finite
        deviation = tl.minimum(tl.maximum(learned_value - mu1, -limit), limit)
        deviation = tl.where(is_counted, deviation, 0.0)
        nonfinite += tl.where(inside & (is_finite == 0), 1.0, 0.0)
        clipped += tl.where(inside & (scale < 1.0), 1.0, 0.0)
        scales += tl.where(inside, scale, 0.0)
        before += tl.where(is_counted, value, 0.0)
        after += tl.where(is_counted, bounded, 0.0)
        deviations += deviation
        squared_deviations += deviation * deviation
        spikes += tl.where(is_counted & (value > spike_bound), 1.0, 0.0)

    nonfinite_sum = tl.sum(nonfinite)
    clipped_sum, scale_sum = tl.sum(clipped), tl.sum(scales)
    before_sum, after_sum = tl.sum(before), tl.sum(after)
    deviation_sum, squared_deviation_sum = tl.sum(deviations), tl.sum(squared_deviations)
    spike_sum = tl.sum(spikes)
    if TO == TO_PARTS:
        program, programs = tl.program_id(0), tl.num_programs(0)
        tl.store(parts + program, nonfinite_sum)
        tl.store(parts + programs + program, clipped_sum)
        tl.store(parts + 2 * programs + program, scale_sum)
        tl.store(parts + 3 * programs + program, before_sum)
        tl.store(parts + 4 * programs + program, after_sum)
        tl.store(parts + 5 * programs + program, deviation_sum)
        tl.store(parts + 6 * programs + program, squared_deviation_sum)
        tl.store(parts + 7 * programs + program, spike_sum)
    else:
        _learn_or_add(
            state,
            mu1,
            variance,
            updates,
            loss_count,
            clipped_recently,
            settings,
            outgoing,
            call_sums,
            count - nonfinite_sum,
            nonfinite_sum,
            clipped_sum,
            scale_sum,
            before_sum,
            after_sum,
            deviation_sum,
            squared_deviation_sum,
            spike_sum,
            TO,
            HAS_REDUCED,
            HAS_CALL_SUMS,
            SPIKED_CALLS_OFFEND,
        )


@triton.jit
def _sum_of_parts(parts, index, programs, PROGRAMS: tl.constexpr):
    offsets = tl.arange(0, PROGRAMS)
    return tl.sum(tl.load(parts + index * programs + offsets, mask=offsets < programs, other=0.0))


@triton.jit(do_not_specialize=["count", "programs", "reduced", "outgoing"])
def learn(
    state,
    settings,
    reduced,
    outgoing,
    call_sums,
    parts,
    programs,
    count,
    TO: tl.constexpr,
    HAS_REDUCED: tl.constexpr,
    HAS_CALL_SUMS: tl.constexpr,
    SPIKED_CALLS_OFFEND: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Learn from all ranks' sums, from the parts of :func:`clip`, or from both.

    If ``TO`` is ``TO_OUTGOING``, the sums of the parts are added to ``outgoing``, and the moments
    do not learn from the parts yet.

    Args:
        programs: number of programs that wrote parts, at most ``PROGRAMS``.
        count: number of losses in the parts.
    """
    mu1, variance, updates, loss_count, clipped_recently = _take_in_reduced(
        state, settings, reduced, HAS_REDUCED, True
    )
    if HAS_PARTS:
        nonfinite = _sum_of_parts(parts, 0, programs, PROGRAMS)
        _learn_or_add(
            state,
            mu1,
            variance,
            updates,
            loss_count,
            clipped_recently,
            settings,
            outgoing,
            call_sums,
            count - nonfinite,
            nonfinite,
            _sum_of_parts(parts, 1, programs, PROGRAMS),
            _sum_of_parts(parts, 2, programs, PROGRAMS),
            _sum_of_parts(parts, 3, programs, PROGRAMS),
            _sum_of_parts(parts, 4, programs, PROGRAMS),
            _sum_of_parts(parts, 5, programs, PROGRAMS),
            _sum_of_parts(parts, 6, programs, PROGRAMS),
            _sum_of_parts(parts, 7, programs, PROGRAMS),
            TO,
            HAS_REDUCED,
            HAS_CALL_SUMS,
            SPIKED_CALLS_OFFEND,
        )
    else:
        tl.store(state, mu1)
        tl.store(state + 1, variance)
        tl.store(state + 2, updates)
        tl.store(state + 3, loss_count)
        tl.store(state + 4, clipped_recently)
