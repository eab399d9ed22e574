import itertools
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from examples.cifar10_supersampling import grid as grid_module
from examples.cifar10_supersampling.command_line import CONFIGS
from examples.cifar10_supersampling.expansion import PAPER_METHODS, expand

COMMON = {
    "width": 1.0,
    "precision": "32-true",
    "average": True,
    "data": "photographs",
    "root": Path("data"),
}


def runs(**arguments):
    defaults = {"experiments": ["outliers"], "methods": ["none"], "seeds": [0]}
    return list(expand(**(defaults | COMMON | arguments)))


def test_the_paper_has_320_trainings():
    paper = runs(experiments=["squared", "quartic"], methods=PAPER_METHODS, seeds=range(10))
    assert len(paper) == len({run.name for run in paper}) == 320
    assert {(run.loss, run.batch_size, run.method, run.seed) for run in paper} == set(
        itertools.product(("squared", "quartic"), (1, 4, 16, 64), PAPER_METHODS, range(10))
    )
    assert {(run.steps, run.last_steps) for run in paper} == {(100_000, 5000)}
    assert {(run.optimizer, run.learning_rate) for run in paper} == {("adam", 0.1 / 128)}


def test_only_batches_of_64_have_the_learning_rate_drop():
    for run in runs(experiments=["squared"]):
        drop = "54687" if run.batch_size == 64 else "null"
        assert f"--model.learning_rate_drop_at={drop}" in run.arguments


def test_unstable_has_the_authors_learning_rates():
    pairs = {(run.optimizer, run.learning_rate) for run in runs(experiments=["unstable"])}
    assert pairs == {("adam", 1e-4), ("adam", 2e-3), ("sgd", 1e-4), ("sgd", 3e-3)}
    (only,) = runs(experiments=["unstable"], optimizers=["sgd"], learning_rates=[0.01])
    assert (only.optimizer, only.learning_rate) == ("sgd", 0.01)


def test_a_training_without_outliers_has_no_kind_of_outlier():
    found = runs(outlier_kinds=["hot_pixels", "noise"], outlier_fractions=[0.0, 0.01, 0.2])
    assert [(run.outlier_kind, run.outlier_fraction) for run in found] == [
        (None, 0.0),
        ("hot_pixels", 0.01),
        ("hot_pixels", 0.2),
        ("noise", 0.01),
        ("noise", 0.2),
    ]
    assert len({run.name for run in found}) == 5
    (own,) = runs()
    assert (own.outlier_kind, own.outlier_fraction) == ("hot_pixels", 0.05)
    (none, *_) = runs(experiments=["squared"])
    assert (none.outlier_kind, none.outlier_fraction) == (None, 0.0)


@pytest.mark.parametrize(
    ("steps", "last_steps"), [(100_000, 5000), (12_500, 5000), (10_000, 4000), (10, 4), (1, 1)]
)
def test_the_training_loss_is_averaged_over_the_last_steps(steps, last_steps):
    (run,) = runs(steps=steps)
    assert (run.steps, run.last_steps) == (steps, last_steps)


def test_a_name_has_the_settings_of_its_training():
    (run,) = runs(methods=["alrc2+norm"], losses=["squared"], seeds=[3])
    assert run.name == ("outliers-squared-batch8-adam0.00078125-hot_pixels0.05-alrc2+norm-seed3")


def test_the_authors_start_depends_on_the_loss():
    for loss, mu1, mu2 in (("squared", 10.0, 400.0), ("quartic", 25.0, 900.0)):
        for method in ("alrc3", "alrc3+zclip"):
            (run,) = runs(losses=[loss], methods=[method], alrc_start="authors")
            at = run.arguments.index(f"--config={CONFIGS / 'methods' / 'alrc3.yaml'}")
            assert run.arguments[at + 1 : at + 3] == [
                f"--trainer.callbacks.mu1_start={mu1}",
                f"--trainer.callbacks.mu2_start={mu2}",
            ]
    (run,) = runs(methods=["norm"], alrc_start="authors")
    assert not any("mu1_start" in argument for argument in run.arguments)


def test_sweep_is_the_grid_of_the_paper():
    sweep = yaml.safe_load((CONFIGS / "sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    assert (Path(grid_module.__file__).parents[2] / sweep["program"]).is_file()
    parameters = {name: each["values"] for name, each in sweep["parameters"].items()}
    parser = ArgumentParser()
    parser.add_function_arguments(grid_module.grid, skip={"dry_run"})
    *_, first, second, args = sweep["command"]
    assert args == "${args}"
    found = []
    for values in itertools.product(*parameters.values()):
        options = [f"--{name}={value}" for name, value in zip(parameters, values, strict=True)]
        parsed = parser.parse_args([first, second, *options])
        assert (parsed.wandb, parsed.workers) == (True, 1)
        found += runs(
            experiments=parsed.experiments,
            methods=parsed.methods,
            batch_sizes=parsed.batch_sizes,
            seeds=parsed.seeds,
        )
    paper = runs(experiments=["squared", "quartic"], methods=PAPER_METHODS, seeds=range(10))
    assert sorted(found, key=str) == sorted(paper, key=str)
