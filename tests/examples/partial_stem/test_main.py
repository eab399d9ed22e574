import sys

import pytest

from examples.partial_stem.__main__ import main
from examples.partial_stem.command_line import CONFIGS


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["examples.partial_stem", *arguments])
    main()


@pytest.mark.parametrize("config", ["quick", "full"])
def test_fit_takes_a_configuration(config, monkeypatch, tmp_path, folder_of_micrographs):
    monkeypatch.chdir(tmp_path)
    run(
        monkeypatch,
        "fit",
        f"--config={CONFIGS / config}.yaml",
        "--trainer.fast_dev_run=true",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--model.width=0.02",
        "--data.crop=64",
        "--data.workers=0",
        *((f"--data.root={folder_of_micrographs}",) if config == "full" else ()),
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["fit", "'compare --help'"]),
        (["fit", "--help"], ["--data.coverage", "--model.adversarial_from", "Wasserstein"]),
        (["compare", "--help"], ["--adversarial", "--seeds", "number of seeds"]),
    ],
)
def test_help(arguments, words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, *arguments)
    text = capsys.readouterr().out.lower()
    for word in words:
        assert word.lower() in text


def test_the_module_and_the_data_share_a_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seeds = []
    monkeypatch.setattr(
        "examples.partial_stem.datamodule.PartialScans.setup",
        lambda data, stage: seeds.append(data.seed) or (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(
            monkeypatch,
            "fit",
            "--seed_everything=7",
            "--trainer.accelerator=cpu",
            "--model.width=0.02",
        )
    assert seeds == [7]
