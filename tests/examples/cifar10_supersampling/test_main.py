import sys
from pathlib import Path

import pytest
import pytorch_lightning

import examples.cifar10_supersampling as example
from examples.cifar10_supersampling.__main__ import main

CONFIGS = sorted((Path(example.__file__).parent / "configs").glob("*.yaml"))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["examples.cifar10_supersampling", *arguments])
    main()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.skipif(
    not hasattr(pytorch_lightning.callbacks, "EMAWeightAveraging"),
    reason="the configurations average weights, which Lightning does since 2.6",
)
def test_fit_by_configuration(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(
        monkeypatch,
        "fit",
        f"--config={config}",
        "--trainer.fast_dev_run=true",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--model.width=0.05",
    )


def test_test_without_any_argument_of_data_or_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "test", "--trainer.limit_test_batches=1", "--trainer.logger=false")
    assert "test/error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["fit", "'compare --help'"]),
        (["fit", "--help"], ["--data.outlier_fraction", "--model.per_sample"]),
        (["compare", "--help"], ["--scenario", "--seeds", "at which ALRC"]),
    ],
)
def test_help(arguments, words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, *arguments)
    text = capsys.readouterr().out
    for word in words:
        assert word in text
