import sys

import pytest
import pytorch_lightning

from examples.cifar10_supersampling.__main__ import main
from examples.cifar10_supersampling.command_line import (
    EXPERIMENTS,
    experiment_config,
    method_configs,
)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["examples.cifar10_supersampling", *arguments])
    main()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("method", ["none", "alrc3+norm"])
def test_fit_takes_a_configuration(experiment, method, monkeypatch, tmp_path):
    averages = experiment != "outliers"
    if averages and not hasattr(pytorch_lightning.callbacks, "EMAWeightAveraging"):
        pytest.skip("the configuration averages weights, which Lightning does since 2.6")
    monkeypatch.chdir(tmp_path)
    run(
        monkeypatch,
        "fit",
        f"--config={experiment_config(experiment)}",
        *(f"--config={path}" for path in method_configs(method)),
        "--trainer.fast_dev_run=true",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--model.width=0.05",
    )


def test_test_needs_no_argument_of_data_or_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "test", "--trainer.limit_test_batches=1", "--trainer.logger=false")
    assert "test/error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["fit", "'compare --help'"]),
        (["fit", "--help"], ["--data.outlier_fraction", "--model.per_sample"]),
        (["compare", "--help"], ["--scenario", "--seeds", "number of seeds"]),
    ],
)
def test_help(arguments, words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, *arguments)
    text = capsys.readouterr().out
    for word in words:
        assert word in text
