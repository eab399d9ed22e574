import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from examples.cifar10_supersampling import results
from examples.cifar10_supersampling.training import train
from examples.comparison import files
from examples.comparison.backends import MOST_DEATHS, run_locally, run_on_ray, run_on_slurm

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def runs(make_run, folder_of_images):
    """A training that fails, and one that does not."""
    shared = {"data": "folder", "root": folder_of_images, "steps": 12, "batch_size": 4}
    return [
        make_run(**shared, method="norm", precision="of clay"),
        make_run(**shared, method="alrc2"),
    ]


@pytest.fixture
def repository_on_the_path(monkeypatch):
    """Let started processes import the example by its name."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def ended(events):
    """The last event of each training."""
    return {number: event for number, event in events if not isinstance(event, int)}


def check(runs, output, events):
    """One failure is reported, and the other training has the same result as without a backend."""
    failed, other = runs
    assert sorted(events) == [0, 1]
    assert "of clay" in str(events[0])
    assert events[1] is None
    assert not files.is_finished(output / failed.name)
    train(other, output / "here")
    ours, theirs = (results.load(where / other.name) for where in (output, output / "here"))
    # Another number of threads may sum in another order.
    assert ours.row["train_loss"] == pytest.approx(theirs.row["train_loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_local_processes_train(runs, tmp_path):
    check(runs, tmp_path, ended(run_locally(train, runs, tmp_path, 1, {})))


@pytest.mark.filterwarnings("ignore")
def test_slurm_jobs_train_as_processes_of_this_machine(runs, tmp_path, repository_on_the_path):
    pytest.importorskip("submitit")
    events = run_on_slurm(train, runs, tmp_path, 2, {"cluster": "local", "timeout_min": 5})
    check(runs, tmp_path, ended(events))
    assert list((tmp_path / "jobs").glob("*.out"))


@pytest.mark.filterwarnings("ignore")
def test_ray_tasks_train(runs, tmp_path, repository_on_the_path):
    pytest.importorskip("ray")
    arguments = {"include_dashboard": False, "log_to_driver": False}
    check(runs, tmp_path, ended(run_on_ray(train, runs, tmp_path, 2, arguments)))


def test_a_job_whose_time_is_over_is_submitted_again(make_run, tmp_path):
    pytest.importorskip("submitit")
    from examples.comparison.backends import Job

    run = make_run()
    again = Job(train).checkpoint(run, tmp_path)
    assert isinstance(again.function, Job)
    assert again.args == (run, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("deaths", [1, 99], ids=["once", "each time"])
def test_a_killed_worker_stops_no_other_training(make_run, folder_of_images, tmp_path, deaths):
    shared = {"data": "folder", "root": folder_of_images, "batch_size": 4}
    runs = [
        make_run(**shared, steps=250 if deaths == 1 else 4000, checkpoint_every=50, seed=1),
        *(make_run(**shared, steps=12, seed=seed) for seed in (2, 3)),
    ]
    events, killed = {}, set()
    for number, event in run_locally(train, runs, tmp_path, 2, {}):
        if isinstance(event, int):
            if number == 0 and event >= 100 and len(killed) < deaths:
                lock = str((tmp_path / runs[0].name / files.LOCK).resolve())
                holder = holder_of(lock)
                if holder is not None:  # None: the process that sent this event was killed already
                    killed.add(holder)
                    os.kill(holder, signal.SIGKILL)
        else:
            assert number not in events
            events[number] = event
    assert sorted(events) == [0, 1, 2]
    assert events[1] is events[2] is None
    assert len(killed) == min(deaths, MOST_DEATHS)
    if deaths == 1:
        assert events[0] is None
        train(runs[0], tmp_path / "undisturbed")
        found, expected = (
            results.load(where / runs[0].name).row for where in (tmp_path, tmp_path / "undisturbed")
        )
        assert found | {"seconds": 0} == expected | {"seconds": 0}
    else:
        assert isinstance(events[0], BrokenProcessPool)


def holder_of(lock):
    """The process that has a file open, if one has."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.realpath(each) == lock for each in descriptors.iterdir()):
                return int(descriptors.parent.name)
        except OSError:  # the process has ended, or is another user's
            continue
    return None


def test_local_takes_no_cluster(make_run, tmp_path):
    with pytest.raises(ValueError, match=r"cluster must be empty .*got \{'address': 'auto'\}"):
        next(run_locally(train, [make_run()], tmp_path, 1, {"address": "auto"}))
