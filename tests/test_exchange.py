"""What ranks tell each other without a Trainer: the layer in Fabric, the exchange by itself."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_alrc import ALRC
from tests.nets import SETTINGS
from tests.scripts import fabric_ranks as script
from tests.scripts.launching import launch, reports
from tests.scripts.ranks import moments
from tests.test_distributed import flat, replayed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fabric-1")
    launch(script, folder, 1)
    return reports(folder, "fabric", 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fabric-2")
    launch(script, folder, 2)
    return reports(folder, "fabric", 2)


def test_fabric_with_the_layer(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone["trained"]
    runs = [report["trained"] for report in two]
    assert runs[0]["moments"] == runs[1]["moments"]
    assert flat(runs[0]["moments"]) == pytest.approx(flat(replayed(runs)), rel=1e-12)
    assert flat(runs[0]["moments"]) == pytest.approx(flat(expected["moments"]), rel=1e-9)
    assert runs[0]["final"] == pytest.approx(expected["final"], rel=1e-9)
    assert expected["moments"][-1]["loss"]["clipped_total"] > 0


def test_a_call_does_not_wait_for_a_late_rank_but_its_moments_do(two: list[dict[str, Any]]) -> None:
    waited = two[0]["waited"]
    assert waited["call"] < script.DELAY / 2 < waited["look"]


def test_ranks_agree_on_names_whatever_their_order(two: list[dict[str, Any]]) -> None:
    expected = {name: ALRC(**SETTINGS) for name in "ab"}
    for name, alrc in expected.items():
        for step in range(3):
            alrc(script.losses(*[ord(name) + step] * 2))
    for report in two:
        found = {name: report["exchanged"]["moments"][name] for name in "ab"}
        assert flat([found]) == pytest.approx(flat([moments(expected)]), rel=1e-12)


def test_losses_of_a_late_name_wait_until_ranks_agree_on_it(two: list[dict[str, Any]]) -> None:
    assert [report["exchanged"]["before"] for report in two] == [["a", "b", "late"], ["a", "b"]]
    alrc = ALRC(**SETTINGS)
    alrc(script.losses(5.0, 6.0, 5.0, 6.0))  # those of two steps, learned from at once
    for report in two:
        found = {"late": report["exchanged"]["moments"]["late"]}
        assert flat([found]) == pytest.approx(flat([moments({"late": alrc})]), rel=1e-12)
