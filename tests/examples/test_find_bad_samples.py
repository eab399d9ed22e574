import csv
import itertools
import json
import locale
import math
import os
import runpy
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.spike import TrainingSpikeException
from pytorch_lightning.callbacks.spike import SpikeDetection
from rich.console import Console
from torch.utils.data import DataLoader

from examples import find_bad_samples as example
from examples.cifar10_supersampling.datamodule import load_images, whole
from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.transformation import halve_resolution, standardise
from lightning_alrc import ALRCCallback
from lightning_alrc.spikes import Spike, read_spikes

REPOSITORY = Path(__file__).parents[2]
HOT, NOISE, WRONG = range(3)


def dataset(images=600, corrupted=30, seed=0):
    return example.corrupted_images("photographs", Path("data"), images, corrupted, seed)


def train(data, *callbacks):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    per_sample = any(isinstance(callback, ALRCCallback) for callback in callbacks)
    net = Supersampling(loss="squared", guard=False, per_sample=per_sample, width=0.1)
    loader = DataLoader(data, 8, shuffle=True, generator=data.generator, collate_fn=whole)
    trainer.fit(net, loader)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- what is planted


def test_the_seed_draws_the_samples_and_each_corruption_has_a_third():
    planted = dataset().planted
    assert [list(planted.values()).count(each) for each in example.CORRUPTIONS] == [10, 10, 10]
    assert dataset().planted == planted
    assert dataset(seed=1).planted.keys() != planted.keys()


def test_each_name_belongs_to_its_image():
    images, few = load_images("photographs", Path("data"), train=True), dataset()
    for name, image in zip(few.names, few.images, strict=True):
        torch.testing.assert_close(image, images[int(name)])
    assert few[5].id == [few.names[5]]


def test_each_corruption_does_what_it_is_named_for():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4, 3, 32, 32, generator=generator)
    others = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
    corruption = torch.tensor([-1, HOT, NOISE, WRONG])
    given, target = example.corrupt(clean, corruption, others, generator)
    torch.testing.assert_close(target[0], clean[0])
    hot = target[1] != clean[1]
    assert (target[1][hot] == example.HOT_PIXEL_VALUE).all()
    assert hot.float().mean() == pytest.approx(example.HOT_PIXEL_FRACTION, rel=0.5)
    assert (target[2] - clean[2]).std() == pytest.approx(example.NOISE_STDDEV, rel=0.05)
    torch.testing.assert_close(target[3:], standardise(others.float()))
    # Each input is the target at half the resolution, except for a wrong target: its input is the
    # clean image at half the resolution.
    for source, half in zip([*target[:3], clean[3]], given, strict=True):
        torch.testing.assert_close(half, halve_resolution(source[None])[0])


# ---- the finders


def test_lightnings_spike_detection_stops_at_the_first_spike_that_is_noted(tmp_path):
    noted = example.SpikesNoted(rtol=0.3, exclude_batches_path=tmp_path / "noted.json")
    train(dataset(), noted, ALRCCallback(num_stddev=math.inf))
    lightnings = SpikeDetection(rtol=0.3, exclude_batches_path=tmp_path / "lightnings.json")
    with pytest.raises(TrainingSpikeException) as stopped:
        train(dataset(), lightnings)
    assert noted.bad_batches[:2] == lightnings.bad_batches
    assert f"batch {noted.bad_batches[1]}" in str(stopped.value)
    assert len(noted.bad_batches) > 2
    assert json.loads((tmp_path / "noted.json").read_text()) == noted.bad_batches


def spiking(means, rtol):
    """SpikeDetection's rule: the batches that spike, and the batch before each.

    A batch spikes if its loss is above the last ordinary loss and far from the mean.
    """
    window, last, named = deque(maxlen=10), 0.0, []
    for batch, mean in enumerate(means):
        average = sum(window) / max(1, len(window))
        if batch > 0 and mean > last and abs(mean - average) >= rtol * average:
            named += [batch - 1, batch]
        else:
            window.append(mean)
            last = mean
    return named


def test_the_other_finders_get_the_losses_before_clipping(tmp_path):
    losses, alrc = example.LossesNoted(), ALRCCallback(num_stddev=2.0)
    detection = example.SpikesNoted(rtol=0.3, exclude_batches_path=tmp_path / "noted.json")
    data = dataset()
    train(data, losses, alrc, detection)
    means = [float(of_batch.mean()) for of_batch in losses.losses]
    assert detection.bad_batches == spiking(means, 0.3)
    assert len(detection.bad_batches) > 2
    names = itertools.chain(*losses.names)
    noted = dict(zip(names, torch.cat(losses.losses).tolist(), strict=True))
    assert noted.keys() == set(data.names)
    assert len(alrc.spikes) > 10
    for spike in alrc.spikes:
        assert noted[spike.id] == pytest.approx(spike.loss)
        assert noted[spike.id] > spike.threshold
    assert losses.largest(3) == sorted(noted, key=noted.get, reverse=True)[:3]
    assert losses.samples_of([1, 0, 1]) == losses.names[0] + losses.names[1]
    losses.names.append(losses.names[0])  # the next epoch
    assert losses.samples_of([0, len(losses.names) - 1]) == losses.names[0]


def test_the_table_counts_each_finder():
    planted = {"a": "noise", "b": "noise", "c": "hot pixels", "d": "wrong target"}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(example.report({"ALRC": ["b", "c", "x"], "nobody": []}, planted))
    lines = {line.split("  ")[0].strip(): line.split() for line in capture.get().splitlines()}
    assert lines["ALRC"] == ["ALRC", "3", "2", "66.7%", "50.0%", "1", "1", "0"]
    assert lines["nobody"] == ["nobody", "0", "0", "0.0%", "0", "0", "0"]
    assert lines["all there are"][3:] == ["4", "1", "2", "1"]


def test_names_of_any_characters_are_written(tmp_path):
    names = ["cat.png", "кот.png", "caf\udce9.png"]  # the last is of bytes that are not UTF-8
    spikes = [Spike("loss", 1, 0, 1, 0, name, 9.0, 1.0, 1 / 9, rank=0) for name in names]
    regional = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")  # files are then ASCII by default
        example.write_names(tmp_path / "names.csv", spikes, {"кот.png": "noise"})
        example.write_errors(tmp_path / "errors.csv", [("ALRC", "кот", 0.5)])
    finally:
        locale.setlocale(locale.LC_CTYPE, regional)
    found = rows(tmp_path / "names.csv")
    assert [row["name"] for row in found] == ["cat.png", "кот.png", r"caf\udce9.png"]
    assert [row["corruption"] for row in found] == ["", "noise", ""]
    assert [row["left_out"] for row in rows(tmp_path / "errors.csv")] == ["кот"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 1}, "images must be from 2 to 6000, got 1"),
        ({"images": 9999}, "images must be from 2 to 6000, got 9999"),
        ({"images": 100, "corrupted": 81}, "corrupted must be from 1 to 80, .*got 81"),
        ({"corrupted": 0}, "corrupted must be from 1 to 4800, .*got 0"),
        (
            {"images": 20, "corrupted": 16, "retrain": True},
            "corrupted must be below four fifths of the 20 images .* the 20 worst, got 16",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        example.find_bad_samples(output=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


# ---- the whole example


def test_the_command_line_finds_most_corrupted_samples_and_writes_all_files(tmp_path):
    command = [sys.executable, "-m", "examples.find_bad_samples"]
    arguments = ["--images", "1600", "--corrupted", "40", "--output", "вывод"]
    variables = {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        # Windows gives files and pipes this encoding.
        env=os.environ | variables | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        encoding="cp1252",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout  # no cell of the table is cut off
    lines = done.stdout.replace("|", " ").splitlines()
    found = {line[:24].strip(): line.split() for line in lines}
    finders = ("ALRC, 50 worst", "50 largest losses", "SpikeDetection goes on")
    recall = {name: float(found[name][-4].strip("%")) for name in finders}
    # The first bound is far below 100, because the threshold falls during a large part of the 200
    # steps.
    assert recall["ALRC, 50 worst"] > 70
    assert recall["ALRC, 50 worst"] > recall["50 largest losses"] + 10
    assert recall["ALRC, 50 worst"] > recall["SpikeDetection goes on"] + 10

    folder = tmp_path / "вывод" / "version_0"
    names = rows(folder / "bad_samples.csv")
    spikes = read_spikes(folder / "alrc_spikes.jsonl")
    assert [row["name"] for row in names] == [spike.id for spike in spikes]
    assert len(names) == 50
    hits = [row for row in names if row["corruption"]]
    assert f"{len(hits) / 40:.1%}" in found["ALRC, 50 worst"]
    assert {row["corruption"] for row in hits} == set(example.CORRUPTIONS)
    assert (folder / "curves.png").stat().st_size > 10_000


def test_images_in_a_folder_are_named_by_their_path(tmp_path, monkeypatch):
    vision = pytest.importorskip("torchvision.io")
    images = load_images("photographs", Path("data"), train=True)[:20]
    for index, image in enumerate(images):
        path = tmp_path / "data" / "train" / "ab"[index % 2] / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        vision.write_png(image, str(path))
    (tmp_path / "data" / "train" / "a" / "._0000.png").write_text("passed over")
    data = example.corrupted_images("folder", tmp_path / "data", None, 6, 0)
    assert set(data.names) == {f"train/{'ab'[index % 2]}/{index:04}.png" for index in range(20)}
    for name, image in zip(data.names, data.images, strict=True):
        torch.testing.assert_close(image, images[int(Path(name).stem)])
    # Only a retraining is tested, so only it needs test images.
    monkeypatch.setattr(example, "train", lambda *args, **kwargs: (_ for _ in ()).throw(EOFError))
    arguments = {"data": "folder", "root": tmp_path / "data", "output": tmp_path / "output"}
    with pytest.raises(FileNotFoundError, match=r"data/test must hold images"):
        example.find_bad_samples(**arguments, corrupted=6, retrain=True)
    with pytest.raises(EOFError):
        example.find_bad_samples(**arguments, corrupted=6)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["find_bad_samples", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("examples.find_bad_samples", run_name="__main__")
    told = capsys.readouterr().out
    for word in ("--corrupted", "--seed", "SpikeDetection's", "needs no download"):
        assert word in told
