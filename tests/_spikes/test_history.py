"""The statistics that a ledger keeps of each sample, and how they are merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_alrc._spikes.history import Numbers, by_sample, merged, padded

finite = st.floats(-1e6, 1e6)
losses = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.one_of(finite, st.sampled_from([np.nan, np.inf, -np.inf])),
        finite,
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


def plain(seen: list[tuple[int, float, float, bool]], sample: int) -> list[float]:
    """:class:`Numbers` of a sample, computed by NumPy."""
    own = [each for each in seen if each[0] == sample]
    good = [each for each in own if np.isfinite(each[1])]
    values = np.array([each[1] for each in good])
    if not good:
        return [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float(len(own))]
    return [
        len(good),
        values.mean(),
        len(good) * values.var(),
        values[-1],
        values.max(),
        sum(each[2] for each in good),
        sum(each[3] for each in good),
        len(own) - len(good),
    ]


def entered(table: torch.Tensor, seen: list[tuple[int, float, float, bool]]) -> torch.Tensor:
    """The table after these losses are entered. Column 0 is unused. Column 1 is of sample 0."""
    samples, values, stddevs, clipped = zip(*seen, strict=True)
    wide = [torch.tensor(each, dtype=torch.float64) for each in (values, stddevs)]
    columns, numbers = by_sample(torch.tensor(samples) + 1, *wide, torch.tensor(clipped))
    return table.index_copy(1, columns, torch.stack(merged(Numbers(*table[:, columns]), numbers)))


@given(losses, st.integers(1, 40))
def test_the_numbers_do_not_depend_on_how_losses_are_split(
    seen: list[tuple[int, float, float, bool]], size: int
) -> None:
    table = torch.zeros(len(Numbers._fields), 6, dtype=torch.float64)
    for start in range(0, len(seen), size):
        table = entered(table, seen[start : start + size])
    for sample in range(5):
        expected = plain(seen, sample)
        np.testing.assert_allclose(table[:, sample + 1], expected, rtol=1e-9, atol=1e-3)
        last, largest = table[3:5, sample + 1].tolist()
        assert (last, largest) == (expected[3], expected[4])


@given(losses, losses)
def test_numbers_of_two_ranks_are_merged(
    first: list[tuple[int, float, float, bool]], then: list[tuple[int, float, float, bool]]
) -> None:
    nothing = torch.zeros(len(Numbers._fields), 6, dtype=torch.float64)
    tables = [Numbers(*entered(nothing, each)) for each in (first, then)]
    together = torch.stack(merged(*tables))
    for sample in range(5):
        expected = plain([*first, *then], sample)
        np.testing.assert_allclose(together[:, sample + 1], expected, rtol=1e-9, atol=1e-3)


def test_a_small_variance_around_a_large_mean_is_not_lost() -> None:
    table = torch.zeros(len(Numbers._fields), 6, dtype=torch.float64)
    values = 1e6 + torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() * 1e-3
    for part in values.split(7):
        table = entered(table, [(2, value, 0.0, False) for value in part.tolist()])
    count, mean, squared_deviation = table[:3, 3].tolist()
    assert mean == pytest.approx(values.mean().item(), rel=1e-14)
    assert squared_deviation / count == pytest.approx(values.var(correction=0).item(), rel=1e-6)


def test_huge_losses_leave_no_infinity_among_the_squares() -> None:
    table = torch.zeros(len(Numbers._fields), 6, dtype=torch.float64)
    table = entered(table, [(0, 1e300, 0.0, True), (0, -1e300, 0.0, True)])
    table = entered(table, [(0, 1.0, 0.0, False)])
    assert table.isfinite().all()


def test_a_table_grows_by_zeros() -> None:
    table = torch.ones(2, 3)
    assert padded(table, 2) is table
    assert padded(table, 5).tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]] * 2
