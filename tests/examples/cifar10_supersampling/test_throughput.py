import runpy
import sys

import pytest
import torch

from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.throughput import Loop, Measurement, Training, measure

WIDTH = 0.05


@pytest.fixture
def training(tmp_path):
    training = Training(WIDTH, 4, "32-true", str(tmp_path))
    yield training
    training.end()


def test_all_contestants_change_the_weights_equally(training):
    # ALRC does not clip the first 10 losses.
    plain, fused = Loop(WIDTH, 4), Loop(WIDTH, 4, fused=True)
    start = [weight.clone() for weight in plain.network.parameters()]
    for contestant in (training, plain, fused):
        assert contestant.turn(2) > 0
    ours = list(training.module.network.parameters())
    for loop in (plain, fused):
        theirs = list(loop.network.parameters())
        for before, our, their in zip(start, ours, theirs, strict=True):
            assert torch.allclose(our - before, their - before, atol=1e-6)
            assert not torch.equal(their, before)


def test_a_training_pauses_between_its_turns(training):
    training.turn(3)
    assert training.trainer.global_step == 3
    training.turn(2)
    assert training.trainer.global_step == 5


def test_a_training_that_fails_does_not_hang(tmp_path, monkeypatch):
    def fail(*args):
        raise ArithmeticError("lost")

    monkeypatch.setattr(Supersampling, "training_step", fail)
    training = Training(WIDTH, 4, "32-true", str(tmp_path))
    with pytest.raises(ArithmeticError, match="lost"):
        training.turn(2)
    training.end()


def test_every_contestant_is_measured():
    measurement = measure(WIDTH, 32, rounds=2)
    assert set(measurement.seconds) == {"loop", "loop, fused", "loop, bf16", "ours", "ours, bf16"}
    assert all(len(seconds) == 2 for seconds in measurement.seconds.values())
    assert set(measurement.input_share) == {"ours", "ours, bf16"}
    assert all(0 < share < 1 for share in measurement.input_share.values())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_whole_table_is_printed_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    sizes = ["--widths", "[0.05]", "--batch_sizes", "[32]", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["throughput", *sizes])
    runpy.run_module("examples.cifar10_supersampling.throughput", run_name="__main__")
    printed = capsys.readouterr().out
    assert "÷ loop fused" in printed
    assert "…" not in printed


def test_ratios_compare_turns_of_the_same_round():
    seconds = {"loop": [1.0, 10.0, 2.0], "ours": [2.0, 5.0, 2.0]}
    measurement = Measurement(0.25, 1, seconds, {})
    assert measurement.ratio("ours", "loop") == 1.0
    assert measurement.images_per_second("loop") == 0.5
