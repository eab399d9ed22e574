"""Ranks that train together: real gloo processes, as Lightning starts them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from filelock import FileLock
from packaging.version import Version

from lightning_alrc import ALRC
from lightning_alrc._spikes.batches import load_batch
from lightning_alrc.spikes import read_spikes
from tests.nets import SETTINGS
from tests.scripts import launching
from tests.scripts import ranks as script
from tests.scripts.launching import forked, join, launch

OPTIMIZERS = ["sgd", "fused", "unfused", "scheduled"]
OPTIMIZERS_WITH_SPIKES = ["fused", "scheduled"]
FOR_TWO_AND_FOUR = ["even", "uneven", "accumulating", "manual", "named", "poisoned"]
PAIRS = [f"{each}, {which} bad steps" for each in OPTIMIZERS for which in ("with", "without")]
PAIRS += [
    f"{each}, {which} spikes" for each in OPTIMIZERS_WITH_SPIKES for which in ("with", "without")
]
# With several ranks, torch 2.5 cannot compile a training step that clips: "Found a higher order
# op".
COMPILES = Version(torch.__version__) >= Version("2.6")
SEARCHING = ["searching", "searching in the fit", "searching in the fit, skipping"]
FOR_TWO = [
    *FOR_TWO_AND_FOUR,
    *["compiled"] * COMPILES,
    "late",
    "late, unlogged",
    "late, logged last",
    "late, saving",
    *SEARCHING,
    "many",
    "late, skipping",
    "in a closure, with bad steps",
    "in a closure, without bad steps",
    "in a closure, raising",
    "resetting",
    "raising",
    "late, raising",
    "saving",
    "resuming",
    "judging",
    "judging, resuming",
    "plain",
    "plain, accumulating",
]

SHARDED = ["sharded", "sharded, saving", "sharded, resuming"]
SPREAD = ["spread", "spread, as on an accelerator", "spread, raising"]
# FSDP2 is a prototype in torch 2.5, and not for the CPU.
HAS_FSDP2 = hasattr(torch.distributed.fsdp, "fully_shard")

Reports = Callable[[str], list[dict[str, Any]]]


def reports_of(folder: Path, ranks: int) -> Reports:
    return functools.partial(launching.reports, folder, ranks=ranks)


def alone(folder: Path, *scenarios: str) -> Reports:
    """The reports of fits of these scenarios in this process, the only rank."""
    for scenario in scenarios:
        script.run(folder, "auto", 1, scenario, **script.SCENARIOS[scenario])
    return reports_of(folder, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks, a folder for the reports and checkpoints of their fits.

    All workers of pytest-xdist have the same folders, see `first_in`.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folders = {ranks: base / f"distributed-{ranks}-ranks" for ranks in (1, 2, 4)}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    return folders


@contextlib.contextmanager
def first_in(folder: Path) -> Iterator[bool]:
    """Whether this worker is the first that gets here. The others wait until it is done."""
    with FileLock(folder / "lock"):
        yield not (folder / "done").exists()
        (folder / "done").touch()


@pytest.fixture(scope="module")
def one(folders: dict[int, Path]) -> Reports:
    with first_in(folders[1]) as is_first:
        if is_first:
            alone(folders[1], "even", "accumulating", "manual", "saving", "resetting")
    return reports_of(folders[1], 1)


@pytest.fixture(scope="module")
def two(folders: dict[int, Path], one: Reports) -> Reports:
    folder = folders[2]
    sharded = SHARDED if HAS_FSDP2 else []
    with first_in(folder) as is_first:
        if is_first:
            shutil.copy(folders[1] / "step=4.ckpt", folder / "resumed.ckpt")
            launch(script, folder, "ddp", 2, *["leaving"] * 20, *FOR_TWO, *PAIRS, *sharded, *SPREAD)
    return reports_of(folder, 2)


@pytest.fixture(scope="module")
def four(folders: dict[int, Path], two: Reports) -> Reports:
    folder = folders[4]
    with first_in(folder) as is_first:
        if is_first:
            shutil.copy(folders[2] / "step=4.ckpt", folder / "resumed.ckpt")
            join(forked(script.main, folder, "ddp_fork", 4, *FOR_TWO_AND_FOUR, "resuming"))
    return reports_of(folder, 4)


@pytest.fixture(params=[2, 4], ids="{} ranks".format)
def two_or_four(request: pytest.FixtureRequest) -> Reports:
    reports: Reports = request.getfixturevalue({2: "two", 4: "four"}[request.param])
    return reports


def moments_in_one_process(reports: list[dict[str, Any]]) -> list[dict[str, dict[str, float]]]:
    """The moments after each step of a single process that has all ranks' losses."""
    alrcs: dict[str, ALRC] = {}
    moments = []
    for step in zip(*(report["seen"] for report in reports), strict=True):
        for name in step[0]:
            values = [value for of_rank in step for value in of_rank[name]]
            loss = torch.tensor(values, dtype=torch.float64, requires_grad=True)
            alrcs.setdefault(name, ALRC(**SETTINGS))(loss)
        moments.append(script.moments(alrcs))
    return moments


def flat(moments: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    return {
        f"{step} {loss} {name}": value
        for step, losses in enumerate(moments)
        for loss, values in losses.items()
        for name, value in values.items()
    }


@pytest.mark.parametrize("scenario", FOR_TWO_AND_FOUR)
def test_ranks_have_the_moments_of_one_process_after_every_step(
    two_or_four: Reports, scenario: str
) -> None:
    first, *others = reports = two_or_four(scenario)
    for other in others:
        assert other["moments"] == first["moments"]
    assert len(first["moments"]) == script.STEPS
    assert flat(first["moments"]) == pytest.approx(flat(moments_in_one_process(reports)), rel=1e-12)
    last = first["moments"][-1]
    assert all(0 < each["clipped_total"] < each["losses_total"] for each in last.values())


@pytest.mark.parametrize("scenario", ["even", "uneven", "named", "poisoned"])
def test_callbacks_monitor_the_same_values_on_every_rank(
    two_or_four: Reports, scenario: str
) -> None:
    first, *others = two_or_four(scenario)
    assert any(name.startswith("alrc/") for name in first["monitored"])
    assert all(other["monitored"] == first["monitored"] for other in others)


def test_a_rank_without_a_finite_loss_takes_part_in_the_all_reduce(two_or_four: Reports) -> None:
    reports = two_or_four("poisoned")
    share = script.BATCH // len(reports)
    for report in reports:
        moments = report["moments"][-1]["loss"]
        assert moments["nonfinite_total"] == len(script.NAN_STEPS) * share
        assert moments["losses_total"] == script.STEPS * script.BATCH - 2 * share


@pytest.mark.parametrize("scenario", ["even", "accumulating", "manual"])
def test_ranks_train_the_network_that_one_process_trains(
    two_or_four: Reports, one: Reports, scenario: str
) -> None:
    for report in two_or_four(scenario):
        expected = one(scenario)[0]
        assert report["final"] == pytest.approx(expected["final"], rel=1e-9)
        assert flat(report["moments"]) == pytest.approx(flat(expected["moments"]), rel=1e-9)


@pytest.mark.parametrize(
    ("scenario", "plain"),
    [
        ("even", "plain"),
        ("named", "plain"),
        ("many", "plain"),
        ("accumulating", "plain, accumulating"),
    ],
)
def test_all_losses_of_a_step_share_one_collective(two: Reports, scenario: str, plain: str) -> None:
    for report, without in zip(two(scenario), two(plain), strict=True):
        more = [
            Counter(calls) - Counter(base)
            for calls, base in zip(report["collectives"], without["collectives"], strict=True)
        ]
        # Ranks agree on the names after step 0. They exchange their clips after steps 1, 3 and so
        # on, when Lightning logs. The report counts these collectives with the step that follows.
        assert [each["allreduce_.default"] for each in more[2:]] == [1] * (script.STEPS - 2)
        assert all(each.total() == 1 for each in more[3::2])
        assert all(each.total() <= 3 for each in more[2:])


def test_ranks_share_moments_in_every_step_but_gradients_only_when_an_optimizer_steps(
    two: Reports,
) -> None:
    """While gradients accumulate, DDP all-reduces nothing. ALRC all-reduces its sums each step."""
    for report, without in zip(two("accumulating"), two("plain, accumulating"), strict=True):
        gradients = [calls.count("allreduce_.default") for calls in without["collectives"]]
        losses = [calls.count("allreduce_.default") for calls in report["collectives"]]
        optimizer_steps = [
            (step + 1) % 3 == 0 or step + 1 == script.STEPS for step in range(script.STEPS)
        ]
        assert gradients[2:] == optimizer_steps[2:]
        assert losses[2:] == [1 + count for count in gradients[2:]]


@pytest.mark.skipif(not COMPILES, reason="torch 2.5 cannot compile it with several ranks")
def test_a_compiled_step_trains_like_an_uncompiled_step(two: Reports) -> None:
    for report, expected in zip(two("compiled"), two("named"), strict=True):
        assert report["final"] == pytest.approx(expected["final"], rel=1e-9)
        assert flat(report["moments"]) == pytest.approx(flat(expected["moments"]), rel=1e-9)
        # One graph is of the first step, which adds the names, and one of all later steps.
        assert report["stats"]["unique_graphs"] == 2
        assert not report["graph_break"]


def test_all_ranks_learn_from_a_late_name_of_one_rank(two: Reports) -> None:
    first, second = two("late")
    assert first["moments"][-1] == second["moments"][-1]
    # The name is new in step 3, and agreed on at the next logged step. No loss of it is left out.
    late = [moments.get("late", {}).get("losses_total") for moments in second["moments"]]
    share = script.BATCH // 2
    assert late[:3] == [None] * 3
    assert late[-1] == share * (script.STEPS - 3)
    assert not any("late" in seen for seen in second["seen"])


@pytest.mark.parametrize("scenario", ["late, unlogged", "late, logged last"])
def test_ranks_agree_on_a_late_name_at_the_end_of_an_epoch(two: Reports, scenario: str) -> None:
    for report in two(scenario):
        (moments,) = report["at_end"]
        assert moments["late"]["losses_total"] == script.BATCH // 2 * (script.STEPS - 3)


def test_a_checkpoint_before_ranks_agree_at_a_logged_step_has_a_late_name(
    two: Reports, folders: dict[int, Path]
) -> None:
    checkpoint = torch.load(folders[2] / "late-step=4.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["ALRCCallback"]["losses"]["late"]["state"]
    assert (state["updates"], state["losses"]) == (1, script.BATCH // 2)
    for report in two("late, saving"):
        (moments,) = report["at_end"]
        assert moments["late"]["losses_total"] == script.BATCH // 2 * (script.STEPS - 3)


@pytest.mark.parametrize("scenario", SEARCHING)
def test_a_search_on_ranks_with_different_names_leaves_no_losses_in_the_fit(
    two: Reports, scenario: str
) -> None:
    """The search for a learning rate meets the late name of one rank, too."""
    for report in two(scenario):
        (moments,) = report["at_end"]
        assert {name: of_name["losses_total"] for name, of_name in moments.items()} == {
            "first": script.BATCH * script.STEPS,
            "second": 2 * script.STEPS,
            "late": script.BATCH // 2 * (script.STEPS - 3),
        }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skip_leaves_every_rank_as_without_the_bad_batches(two: Reports, optimizer: str) -> None:
    undisturbed = two(f"{optimizer}, without bad steps")
    for report, expected in zip(two(f"{optimizer}, with bad steps"), undisturbed, strict=True):
        assert report["final"] == expected["final"]
        assert report["weights"][1] == report["weights"][2] != report["weights"][3]


@pytest.mark.parametrize("optimizer", OPTIMIZERS_WITH_SPIKES)
def test_a_spike_of_one_rank_is_skipped_on_every_rank(two: Reports, optimizer: str) -> None:
    undisturbed = two(f"{optimizer}, without spikes")
    for report, expected in zip(two(f"{optimizer}, with spikes"), undisturbed, strict=True):
        assert report["weights"][-1] == expected["weights"][-1]
        assert report["weights"][1] == report["weights"][2] != report["weights"][3]


def test_skip_of_losses_computed_in_a_closure_leaves_ranks_as_without_the_bad_batches(
    two: Reports,
) -> None:
    undisturbed = two("in a closure, without bad steps")
    for report, expected in zip(two("in a closure, with bad steps"), undisturbed, strict=True):
        assert report["final"] == expected["final"]


def test_a_reset_within_a_step_discards_what_the_step_has_learned(
    two: Reports, one: Reports
) -> None:
    (expected,) = one("resetting")
    for report in two("resetting"):
        for found, moments in zip(report["moments"], expected["moments"], strict=True):
            for name in ("mu1", "mu2"):
                assert found["x"][name] == pytest.approx(moments["x"][name], rel=1e-6)


@pytest.mark.parametrize("scenario", ["raising", "in a closure, raising"])
def test_raise_names_the_loss_on_every_rank_before_a_parameter_changes(
    two: Reports, scenario: str
) -> None:
    step = script.NAN_STEPS[0]
    where = f"step {step}, batch_idx {step}"
    for report in two(scenario):
        assert f"'loss' is nan on rank 1 at {where}" in report["error"]
        assert len(report["weights"]) == step
        assert report["final"] == report["weights"][-1]


def test_skip_refuses_the_step_in_which_a_late_name_begins_with_a_bad_loss(two: Reports) -> None:
    for report in two("late, skipping"):
        assert report["weights"][0] == report["weights"][1] != report["weights"][2]
        assert all(map(math.isfinite, report["final"]))


def test_raise_tells_of_a_late_name_that_begins_with_a_bad_loss(two: Reports) -> None:
    for report in two("late, raising"):
        assert "'late' is nan on rank 0 at step 1, batch_idx 1" in report["error"]


def test_two_ranks_resume_the_fit_of_one_rank(two: Reports, one: Reports) -> None:
    assert_continues(two("resuming"), one("even")[0])


def test_four_ranks_resume_the_fit_of_two_ranks(four: Reports, one: Reports) -> None:
    assert_continues(four("resuming"), one("even")[0])


@pytest.mark.usefixtures("two")
def test_one_rank_resumes_the_fit_of_two_ranks(
    folders: dict[int, Path], one: Reports, tmp_path: Path
) -> None:
    shutil.copy(folders[2] / "step=4.ckpt", tmp_path / "resumed.ckpt")
    assert_continues(alone(tmp_path, "resuming")("resuming"), one("even")[0])


def test_two_ranks_record_the_spikes_that_one_process_records(
    two: Reports, folders: dict[int, Path]
) -> None:
    assert two("saving")
    expected = read_spikes(folders[1] / "alrc_spikes.jsonl")
    found = read_spikes(folders[2] / "alrc_spikes.jsonl")
    assert {spike.rank for spike in found} == {0, 1}
    share = script.BATCH // 2
    places = [(each.step, (each.sample or 0) + share * each.rank) for each in found]
    assert places == [(each.step, each.sample) for each in expected]
    values = [value for each in found for value in (each.loss, each.threshold, each.scale)]
    wanted = [value for each in expected for value in (each.loss, each.threshold, each.scale)]
    assert values == pytest.approx(wanted, rel=1e-9)
    assert len(found) > script.STEPS


def test_each_rank_keeps_its_own_batches(two: Reports, folders: dict[int, Path]) -> None:
    assert two("saving")
    kept = {path.name: load_batch(path) for path in (folders[2] / "alrc_batches").iterdir()}
    spikes = read_spikes(folders[2] / "alrc_spikes.jsonl")
    for rank in range(2):
        worst = dict.fromkeys(each.batch_file for each in spikes if each.rank == rank)
        assert {name for name in kept if name.endswith(f"-rank={rank}.pt")} == {*list(worst)[:2]}
    for spike in spikes:
        if spike.batch_file in kept:
            x, _ = script.global_batch(spike.step)
            assert torch.equal(kept[spike.batch_file]["batch"][0], x.chunk(2)[spike.rank])


def test_a_spike_of_another_rank_that_waits_in_a_checkpoint_is_judged_after_the_resume(
    two: Reports, folders: dict[int, Path]
) -> None:
    assert two("judging, resuming")
    spikes = [each for each in read_spikes(folders[2] / "judged") if each.loss > 1e8]
    assert {(each.step, each.rank, each.kind) for each in spikes} == {(28, 1, "data")}


def assert_continues(resumed: list[dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    for report in resumed:
        expected = undisturbed["moments"][4:]
        assert len(report["moments"]) == len(expected) == 4
        assert flat(report["moments"]) == pytest.approx(flat(expected), rel=1e-9)
        assert report["final"] == pytest.approx(undisturbed["final"], rel=1e-9)


def test_spawned_ranks_have_the_moments_of_one_process(tmp_path: Path) -> None:
    join(forked(script.main, tmp_path, "ddp_spawn", 2, "named"))
    reports = reports_of(tmp_path, 2)("named")
    assert all(report["moments"] == reports[0]["moments"] for report in reports)
    assert flat(reports[0]["moments"]) == pytest.approx(
        flat(moments_in_one_process(reports)), rel=1e-12
    )


def test_no_thread_of_gloo_holds_gathered_tensors_after_a_fit(two: Reports) -> None:
    """The module of these fits raises at the end of a fit if a thread holds such a tensor."""
    for report in two("leaving"):
        assert report["moments"]


@pytest.mark.skipif(not HAS_FSDP2, reason="torch 2.5 has no FSDP2 for the CPU")
def test_ranks_with_parameters_sharded_by_fsdp2_train_like_one_process(
    two: Reports, one: Reports
) -> None:
    reports, undisturbed = two("sharded"), one("even")[0]
    assert reports[0]["moments"] == reports[1]["moments"]
    assert flat(reports[0]["moments"]) == pytest.approx(
        flat(moments_in_one_process(reports)), rel=1e-12
    )
    assert reports[0]["final"] == pytest.approx(undisturbed["final"], rel=1e-9)
    assert_continues(two("sharded, resuming"), undisturbed)


def test_ranks_with_losses_spread_by_tensor_parallelism_train_like_one_process(
    two: Reports, one: Reports
) -> None:
    *ways, raising = SPREAD
    (expected,) = one("even")
    wanted = [{name: step["loss"][name] for name in ("mu1", "mu2")} for step in expected["moments"]]
    for way in ways:
        for report in two(way):
            assert report["final"] == pytest.approx(expected["final"], rel=1e-9)
            for step, moments in zip(report["moments"], wanted, strict=True):
                assert {name: step["loss"][name] for name in moments} == pytest.approx(moments)
    for report in two(raising):
        assert f"'loss' is nan on rank 0 at step {script.NAN_STEPS[0]}" in report["error"]


@pytest.mark.parametrize("failing", [0, 1], ids="rank {}".format)
def test_a_rank_that_fails_ends_the_run(tmp_path: Path, failing: int) -> None:
    process = launching.started(script, tmp_path, "ddp", 2, "failing", FAILING_RANK=str(failing))
    status, _ = launching.finished(process)
    assert status != 0
    error = json.loads((tmp_path / f"failing-{failing}.json").read_text())["error"]
    assert error == "RuntimeError: this rank fails"
