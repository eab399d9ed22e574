"""The model of an all-reduce, against sums by hand and general properties."""

from __future__ import annotations

import pytest

from tests.benchmarks.collectives import (
    ALGORITHMS,
    Algorithm,
    Network,
    added_seconds,
    all_reduce_seconds,
)

UNIT = Network(
    start=100.0,
    within=1.0,
    between=10.0,
    within_ring=2.0,
    between_ring=5.0,
    bytes_per_second=8.0,
    ranks_in_node=4,
)


@pytest.mark.parametrize(
    ("algorithm", "ranks", "expected"),
    [
        ("ring", 4, 100 + 6 * 1 + 16 * 2 * 3 / 4 / 8),
        ("ring", 16, 100 + 22 * 2 + 8 * 5 + 16 * 2 * 15 / 16 / 8),
        ("tree", 4, 100 + 2 * 3 * 1),
        ("tree", 16, 100 + 2 * (3 * 1 + 2 * 10) + 16 * 4 / 8),
        ("recursive doubling", 4, 100 + 2 * 1),
        ("recursive doubling", 16, 100 + 2 * 1 + 2 * 10 + 16 * 2 / 8),
        ("recursive doubling", 17, 100 + 2 * 1 + 3 * 10 + 16 * 3 / 8),
    ],
)
def test_the_model_equals_sums_by_hand(algorithm: Algorithm, ranks: int, expected: float) -> None:
    assert all_reduce_seconds(ranks, 16, algorithm, UNIT) == pytest.approx(expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_rank_takes_no_time_and_more_ranks_never_take_less(algorithm: Algorithm) -> None:
    times = [all_reduce_seconds(ranks, 176, algorithm) for ranks in range(1, 2000)]
    assert times[0] == 0
    assert times == sorted(times)


def test_an_all_reduce_adds_only_the_time_after_it_is_needed() -> None:
    takes = all_reduce_seconds(10_000, 176, "tree")
    assert added_seconds(10_000, 176, until_needed=takes) == 0
    assert added_seconds(10_000, 176, until_needed=takes / 4) == pytest.approx(0.75 * takes)


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_wrong_number_of_ranks_raises(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks must be positive, got {ranks}"):
        all_reduce_seconds(ranks, 8, "ring")


def test_an_unknown_algorithm_raises() -> None:
    with pytest.raises(ValueError, match=r"algorithm must be one of .*ring.*, got 'star'"):
        all_reduce_seconds(2, 8, "star")  # type: ignore[arg-type]
