"""Ids of samples are found in batches of any kind, and nothing else counts as ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lightning_alrc._spikes.ids import (
    GIVEN,
    MOST_IDS,
    SampleIds,
    all_ids,
    as_list,
    checked_sample_ids,
    dump_sample_ids,
    ids_in,
)

IDS = ["a", "b", "c"]
X = torch.ones(3, 2)


class Pair(NamedTuple):
    x: Any
    ids: Any


@dataclass
class Labelled:
    x: Any
    meta: Any


class Computed:
    """A batch with an attribute that raises."""

    @property
    def id(self) -> Any:
        raise RuntimeError("no ids here")


@pytest.mark.parametrize(
    ("batch", "where"),
    [
        ({"x": X, "id": IDS}, "id"),
        ({"x": X, "ids": IDS}, "ids"),
        ({"id": X, "ids": IDS}, "ids"),
        (Pair(X, IDS), "ids"),
        (SimpleNamespace(x=X, id=IDS), "id"),
        (Labelled(X, {"id": IDS}), "meta.id"),
        ((X, {"id": IDS}), "1.id"),
        ([X, SimpleNamespace(ids=IDS)], "1.ids"),
        ({"labelled": {"x": X, "id": IDS}, "unlabelled": X}, "labelled.id"),
        ({"labelled": (X, {"id": IDS}), "unlabelled": None}, "labelled.1.id"),
        (({"id": IDS}, 3, "text", None), "0.id"),
    ],
    ids=repr,
)
def test_ids_are_found(batch: Any, where: str) -> None:
    assert ids_in(batch) == {where: IDS}


@pytest.mark.parametrize("ids", [("a", "b"), [1, 2], torch.arange(2), np.arange(2)], ids=repr)
def test_lists_of_any_kind_are_ids(ids: Any) -> None:
    assert ids_in({"id": ids})["id"] is ids


@pytest.mark.parametrize(
    "batch",
    [
        X,
        [X, X],
        {"x": X},
        {"id": X},
        {"id": "name of a data set"},
        {"id": 3},
        {"id": []},
        {"ids": [[1, 2], [3]]},
        {"ids": [torch.arange(2)]},
        {"ids": [{"a": 1}]},
        SimpleNamespace(id=lambda: IDS),
        Computed(),
        [{"id": IDS}] * 17,  # too long to be searched
        {"a": {"b": {"c": {"id": IDS}}}},
        "text",
        None,
    ],
)
def test_other_values_are_not_taken_for_ids(batch: Any) -> None:
    assert ids_in(batch) == {}


def test_each_of_several_batches_has_its_ids() -> None:
    batch = {"labelled": {"id": IDS}, "unlabelled": {"id": [1, 2]}}
    assert ids_in(batch) == {"labelled.id": IDS, "unlabelled.id": [1, 2]}


def chosen(*calls: tuple[dict[str, list[Any]], int]) -> Any:
    """The ids for the losses of the last call."""
    sample_ids = SampleIds()
    for ids, count in calls:
        sample_ids.observe(ids, count)
    return sample_ids.of(*calls[-1])


def lists(**lengths: int) -> dict[str, list[Any]]:
    return {where: [f"{where} {i}" for i in range(length)] for where, length in lengths.items()}


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(lists(a=3), 3)], "a"),
        ([(lists(a=3), 3), (lists(a=2), 2)], "a"),
        ([(lists(a=3), 3), (lists(a=2), 3), (lists(a=3), 3)], None),
        ([(lists(a=3), 4), (lists(a=4), 4)], None),
        ([(lists(a=3, b=4), 4)], "b"),
        ([(lists(a=3, b=3), 3)], None),  # ambiguous
        ([(lists(a=3, b=3), 3), (lists(a=2, b=3), 3)], "b"),
        (
            [(lists(a=4, b=8), 4), (lists(a=2, b=4), 4)],
            None,
        ),  # losses of tasks: neither list has as many ids as losses in both calls
        ([(lists(), 4), (lists(a=4), 4)], "a"),
        ([({GIVEN: IDS}, 4), ({GIVEN: IDS}, 3)], GIVEN),
        ([({GIVEN: IDS}, 4)], None),
    ],
)
def test_ids_belong_to_losses_if_their_numbers_always_agree(calls: Any, expected: Any) -> None:
    assert chosen(*calls) == (None if expected is None else calls[-1][0][expected])


def test_a_mistake_is_reported_once() -> None:
    sample_ids = SampleIds()
    sample_ids.observe(lists(a=3), 3)
    assert sample_ids.of(lists(a=3), 3) is not None
    assert not sample_ids.take_mistake()
    sample_ids.observe(lists(a=2), 3)
    assert [sample_ids.take_mistake() for _ in range(3)] == [True, False, False]


def test_a_list_that_was_never_used_is_no_mistake() -> None:
    sample_ids = SampleIds()
    sample_ids.observe(lists(a=3), 3)
    sample_ids.observe(lists(a=2), 3)
    assert not sample_ids.take_mistake()


def test_a_mistake_is_found_in_a_state_of_an_earlier_run() -> None:
    sample_ids = SampleIds()
    assert dump_sample_ids({"loss": sample_ids}) == {}
    sample_ids.observe(lists(a=3, b=4), 3)
    sample_ids.of(lists(a=3, b=4), 3)
    state = dump_sample_ids({"loss": sample_ids})
    assert state == {"loss": {"agreeing": ["a"], "used": "a"}}
    again = checked_sample_ids(state)["loss"]
    again.observe(lists(a=2, b=3), 3)
    assert again.take_mistake()
    assert again.of(lists(a=2, b=3), 3) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], r"ids must be under the names of losses, got \[\]"),
        ({"a b": {"agreeing": [], "used": None}}, "ids must be under the names of losses"),
        ({"loss": 3}, "the ids of a loss must have 'agreeing', .* got 3"),
        ({"loss": {"agreeing": []}}, "the ids of a loss must have 'agreeing'"),
        ({"loss": {"agreeing": None, "used": None}}, "the ids of a loss must have 'agreeing'"),
        ({"loss": {"agreeing": [1], "used": None}}, "the ids of a loss must have 'agreeing'"),
        ({"loss": {"agreeing": [], "used": 0}}, "the ids of a loss must have 'agreeing'"),
    ],
)
def test_an_invalid_state_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_sample_ids(state)


def test_many_ids_are_not_listed() -> None:
    assert all_ids(lists(a=MOST_IDS)) == lists(a=MOST_IDS)["a"]
    assert all_ids(lists(a=MOST_IDS + 1)) is None
    assert all_ids(lists(a=1, b=MOST_IDS)) is None
    assert all_ids(lists(a=1, b=1)) == ["a 0", "b 0"]
    assert all_ids({}) is None


def test_ids_are_plain() -> None:
    assert as_list(np.array([1, 2])) == [1, 2]
    assert as_list([np.float32(0.5), torch.tensor(2), None, b"x"]) == [0.5, 2, None, "b'x'"]


def test_long_paths_are_kept_whole() -> None:
    paths = [Path("/data", "x" * 198, f"{index}.png") for index in range(2)]
    assert as_list(paths) == [str(each) for each in paths]
