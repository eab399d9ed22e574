import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from examples.cifar10_supersampling import grid as grid_module
from examples.cifar10_supersampling.duration import expected_seconds, seconds_a_step
from examples.cifar10_supersampling.grid import check, grid, main, overview, run_all
from examples.cifar10_supersampling.together import CUT_OFF_TABLE
from examples.cifar10_supersampling.training import train
from examples.comparison import files
from tests.examples.cifar10_supersampling.marks import needs_weight_averaging

REPOSITORY = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "examples.cifar10_supersampling.grid"]


def shell(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}
    return subprocess.Popen([*PROGRAM, *arguments], env=environment, text=True, **options)


def processes():
    """The parent of each process of the machine, except zombies."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in listed.splitlines()]
    return {int(pid): int(parent) for pid, parent, state, *_ in lines if not state.startswith("Z")}


def descendants(ancestor):
    """All descendants of a process."""
    parents = processes()
    found, more = set(), {ancestor}
    while more:
        found |= more
        more = {pid for pid, parent in parents.items() if parent in found} - found
    return found - {ancestor}


def wait_until(condition, seconds=600):
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError
        time.sleep(0.02)


def rows(output):
    """The rows in order of their trainings' names, without the time, which differs between runs."""
    return [row | {"seconds": None} for row in files.read_rows(output)]


def test_a_grid_killed_twice_ends_with_the_rows_of_an_uninterrupted_grid(
    folder_of_images, make_run, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "grid"
    arguments = [
        "--experiments=[outliers]",
        "--methods=[none,alrc2,alrc2+norm]",
        "--repeats=2",
        "--batch_sizes=[2]",
        "--steps=40",
        "--width=0.05",
        "--data=folder",
        f"--root={folder_of_images}",
        "--checkpoint_every=5",
        "--accelerator=cpu",
        f"--output={output}",
    ]

    def cut_off():
        """Trainings that have begun, and could be resumed."""
        return [path for path in output.glob("*/last.ckpt") if not files.is_finished(path.parent)]

    finished = 0
    for count, whole_group in ((2, False), (1, True)):
        parent = shell(
            *arguments, f"--workers={count}", start_new_session=True, stdout=subprocess.DEVNULL
        )

        def is_caught(group=parent.pid, finished=finished):
            """Stop the processes.

            Let them continue if no further training has finished, or if no training is cut off.
            """
            os.killpg(group, signal.SIGSTOP)
            if len(rows(output)) > finished and cut_off():
                return True
            os.killpg(group, signal.SIGCONT)
            return False

        wait_until(is_caught)
        workers = descendants(parent.pid)
        assert len(workers) >= count
        if whole_group:
            os.killpg(parent.pid, signal.SIGKILL)
        else:
            parent.kill()
            os.killpg(parent.pid, signal.SIGCONT)
        parent.wait()
        # No process is left, whichever processes were killed.
        wait_until(lambda workers=workers: not workers & set(processes()), seconds=60)
        finished = len(rows(output))
        assert finished < 6
        # A worker may have finished its training before it noticed its parent's death.
        assert cut_off() or not whole_group

    monkeypatch.setattr(sys, "argv", ["grid", *arguments, "--workers=1"])
    main()
    assert "6 of 6 trainings finished" in capsys.readouterr().out
    assert len(rows(output)) == 6
    assert len((output / "results.csv").read_text().splitlines()) == 1 + 6
    assert not list(output.glob("*/last.ckpt"))

    for method in ("none", "alrc2", "alrc2+norm"):
        for seed in (0, 1):
            train(
                make_run(
                    method=method,
                    seed=seed,
                    batch_size=2,
                    steps=40,
                    last_steps=16,
                    data="folder",
                    root=folder_of_images,
                ),
                tmp_path / "undisturbed",
            )
    assert rows(output) == rows(tmp_path / "undisturbed")


@needs_weight_averaging
@pytest.mark.usefixtures("few_images")
def test_stacked_trainings_write_the_files_of_a_grid(tmp_path, capsys):
    arguments = {
        "experiments": ["squared"],
        "methods": ["none", "published2"],
        "batch_sizes": [1],
        "repeats": 1,
        "steps": 20,
        "width": 0.05,
        "average": False,
        "accelerator": "cpu",
        "output": tmp_path,
    }
    grid(**arguments, together=2)
    assert [row["method"] for row in files.read_rows(tmp_path)] == ["none", "published2"]
    assert "2 of 2 trainings finished" in capsys.readouterr().out
    (tmp_path / CUT_OFF_TABLE).write_text("a row of a training that was resumed since then")
    grid(**arguments, cut_off=True)
    assert "0 trainings cut off" in capsys.readouterr().out
    assert not (tmp_path / CUT_OFF_TABLE).exists()
    with pytest.raises(ValueError, match="together takes neither workers nor a backend"):
        grid(**arguments, together=2, workers=2)


def test_a_dry_run_shows_every_training_and_the_time(tmp_path, capsys):
    grid(dry_run=True, output=tmp_path / "absent", repeats=1, workers=4, width=0.05)
    printed = capsys.readouterr().out
    assert printed.count("seed0") == 32
    assert "32 trainings, 0 finished" in printed
    assert "hours" in printed
    assert not (tmp_path / "absent").exists()


def test_the_overview_says_which_trainings_are_finished_or_begun(make_run, tmp_path):
    runs = [make_run(seed=seed) for seed in range(3)]
    for run in runs[:2]:
        (tmp_path / run.name).mkdir()
    files.write_json(tmp_path / runs[0].name / files.RESULT, {})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(overview(runs, tmp_path, workers=1))
    lines = {
        seed: line
        for line in capture.get().splitlines()
        for seed in range(3)
        if f"seed{seed}" in line
    }
    assert "finished" in lines[0]
    assert "begun" in lines[1]
    assert "begun" not in lines[2]
    assert "40 steps" in capture.get()


def test_the_expected_time_is_divided_by_the_workers(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(grid_module, "expected_seconds", lambda runs: 7200.0 * len(list(runs)))
    runs = [make_run(seed=seed) for seed in range(2)]
    assert "about 2.0 hours with 2 workers" in overview(runs, tmp_path, 2).caption


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        ({}, os.cpu_count()),
        ({"accelerator": "gpu"}, 1),
        ({"accelerator": "auto"}, 1),
        ({"accelerator": "gpu", "workers": 3}, 3),
        ({"accelerator": "gpu", "backend": "slurm"}, os.cpu_count()),
    ],
)
def test_trainings_share_a_gpu_only_if_asked_to(arguments, workers, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(grid_module, "run_all", lambda *arguments: asked.append(arguments))
    grid(experiments=["outliers"], output=tmp_path, repeats=1, **arguments)
    ((runs, _, found, *_),) = asked
    assert found == workers
    assert {run.accelerator for run in runs} == {arguments.get("accelerator", "cpu")}


def test_nodes_that_work_elsewhere_find_the_folders(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid_module, "run_all", lambda *arguments: asked.append(arguments))
    grid(experiments=["outliers"], root=Path("images"), output=Path("out"), repeats=1)
    ((runs, output, *_),) = asked
    assert output == tmp_path / "out"
    assert {run.root for run in runs} == {tmp_path / "images"}


def test_expected_time_grows_with_the_images(make_run):
    one = expected_seconds([make_run(batch_size=1, steps=10)])
    many = expected_seconds([make_run(batch_size=64, steps=10, seed=seed) for seed in range(2)])
    assert 0 < one < many


def test_a_part_of_a_large_batch_is_timed(monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("examples.cifar10_supersampling.duration.time", clock)
    uncached = seconds_a_step.__wrapped__
    assert [uncached(0.05, images) for images in (1, 4, 64)] == [1, 1, 16]


def test_help_names_every_argument(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grid", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out
    for word in ("--dry-run", "--methods", "--backend", "alrc2+norm", "results.csv"):
        assert word in told


def test_arguments_may_come_from_a_configuration(monkeypatch, capsys, tmp_path):
    path = tmp_path / "part.yaml"
    path.write_text("experiments: [outliers]\nmethods: [alrc2]\nseeds: [4]\n")
    monkeypatch.setattr(sys, "argv", ["grid", "--config", str(path), "--dry-run"])
    main()
    told = capsys.readouterr().out
    assert "alrc2-seed4" in told
    assert "1 trainings" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"experiments": ["cubic"]}, "experiments must be some of"),
        ({"methods": ["none", "zcilp"]}, "methods must be some of"),
        ({"methods": ["none", "none"]}, r"methods must .* each once, got \['none', 'none'\]"),
        ({"methods": []}, r"methods must be some values, each once, got \[\]"),
        ({"seeds": []}, r"seeds must be some values"),
        ({"width": 0.0}, "width must be a number above 0, got 0.0"),
        ({"learning_rates": [0.0]}, "learning_rates must be above 0, got 0.0"),
        ({"outlier_fractions": [1.5]}, "outlier_fractions must be from 0 to 1, got 1.5"),
        ({"batch_sizes": [0]}, "batch_sizes must be at least 1, got 0"),
        ({"seeds": [-1]}, "seeds must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        grid(**({"experiments": ["outliers"], "output": tmp_path / "absent"} | arguments))
    assert not (tmp_path / "absent").exists()


def test_a_missing_folder_raises_before_anything_is_trained(make_run, tmp_path):
    run = make_run(data="folder", root=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_all([run], tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_dry_run_checks_what_the_trainings_need(tmp_path, monkeypatch):
    arguments = {"experiments": ["outliers"], "output": tmp_path / "absent", "dry_run": True}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        grid(**arguments, data="folder", root=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "zclip", None)
    with pytest.raises(ModuleNotFoundError, match=r"'zclip' is not installed.*\[peers\]"):
        grid(**arguments, methods=["none", "alrc2+zclip"])
    with pytest.raises(ValueError, match=r"methods must be .* trained together, got 'huber'"):
        grid(**arguments, methods=["huber"], together=2)


def test_a_cut_off_table_that_is_not_written_is_not_named(tmp_path, capsys):
    grid(experiments=["outliers"], methods=["none"], repeats=1, output=tmp_path, cut_off=True)
    assert capsys.readouterr().out == "0 trainings cut off\n"
    assert not (tmp_path / CUT_OFF_TABLE).exists()


def test_results_of_other_settings_are_refused(make_run, tmp_path):
    run = make_run()
    (tmp_path / run.name).mkdir()
    files.write_json(tmp_path / run.name / files.RUN, run.determinants | {"width": 1.0})
    with pytest.raises(ValueError, match=r"was made with width 1\.0, now it is 0\.05"):
        check([run], tmp_path)


@pytest.mark.parametrize("what", ["dry_run", "cut_off"])
def test_a_dry_run_and_a_cut_off_table_refuse_results_of_other_settings(what, make_run, tmp_path):
    folder = tmp_path / make_run().name
    folder.mkdir()
    files.write_json(folder / files.RUN, {"steps": 7})
    arguments = {"experiments": ["outliers"], "methods": ["none"], "seeds": [0]}
    with pytest.raises(ValueError, match="was made with steps 7"):
        grid(**arguments, output=tmp_path, **{what: True})


def test_a_learning_rate_of_0_is_refused(make_run, tmp_path):
    with pytest.raises(ValueError, match=r"learning_rates must be numbers above 0, got 0\.0"):
        check([make_run(learning_rate=0.0)], tmp_path)


def test_the_error_names_a_lightning_without_averaging(make_run, tmp_path, monkeypatch):
    monkeypatch.delattr(grid_module.callbacks, "EMAWeightAveraging", raising=False)
    check([make_run()], tmp_path)
    with pytest.raises(RuntimeError, match=r"pytorch-lightning must be 2\.6"):
        check([make_run(experiment="quartic")], tmp_path)
