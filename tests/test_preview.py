"""A preview of ALRC on a run's log, against a run under ALRC."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

import lightning_alrc
from lightning_alrc import ALRCCallback, preview_log
from lightning_alrc.preview import main
from tests.nets import NETS
from tests.reference import Reference

Fit = Callable[..., Any]
ROOT = Path(__file__).parents[1]


def spiky(count: int = 600, seed: int = 0) -> np.ndarray:
    """Losses that fall, with a spike now and then."""
    random = np.random.default_rng(seed)
    losses = random.lognormal(size=count, sigma=0.4) * np.linspace(5, 1, count)
    losses[random.integers(count // 12, count, count // 50)] *= 8
    return losses


def write(path: Path, columns: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_a_preview_equals_what_alrc_does_in_a_training(fit: Fit, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    settings = {"num_stddev": 0.5, "decay": 0.9}
    net = NETS["pytorch_lightning"]()
    callback = ALRCCallback(**settings)
    fit(net, callback, logger=logger, log_every_n_steps=1, max_epochs=5)
    preview = preview_log(logger.log_dir, **settings)
    assert preview.name == "alrc/loss"
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert preview.losses.tolist() == [float(row["alrc/loss"]) for row in rows]
    assert preview.scales.tolist() == pytest.approx([float(row["alrc/scale"]) for row in rows])
    after = [float(row["alrc/threshold"] or math.inf) for row in rows]
    assert preview.thresholds.tolist() == pytest.approx([math.inf, *after[:-1]])
    assert preview.summary.clipped == callback.losses["loss"].clipped_total > 0
    assert "trained with ALRC" in preview.caveats[0]
    assert "trained with ALRC" in preview.with_num_stddev(1.0).caveats[0]


def test_a_loss_of_the_user_is_preferred_to_the_rows_of_alrc(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train_loss,alrc/loss\n0,1,2\n1,1,2\n2,1,2\n")
    preview = preview_log(tmp_path / "metrics.csv")
    assert preview.name == "train_loss"
    assert "trained with ALRC" in preview.caveats[0]


def test_a_preview_equals_the_reference() -> None:
    settings = {"num_stddev": 2.0, "decay": 0.99, "mu1_start": 5.0, "mu2_start": 30.0}
    for given in (settings, {"num_stddev": 1.0}):
        alrc, scales, thresholds = Reference(**given), [], []
        for loss in spiky():
            thresholds.append(alrc.bounds[1])
            scales.append(float(alrc(loss)[1]))
        preview = preview_log(spiky(), **given)
        assert preview.scales == pytest.approx(scales)
        assert preview.thresholds == pytest.approx(thresholds)


def test_the_summary_by_hand() -> None:
    losses = [1.0, 3.0] * 10 + [8.0, 1.0, 3.0, 20.0]
    preview = preview_log(losses, num_stddev=2)
    at = np.flatnonzero(preview.clipped)
    assert at.tolist() == [20, 23]
    assert preview.thresholds[20] == pytest.approx(4, rel=0.1)  # 2 + 2 * 1
    assert (np.isinf(preview.thresholds) == (np.arange(24) < 10)).all()
    scales = preview.thresholds[at] / preview.losses[at]
    assert preview.summary == (2, 2, 2 / 24, 20, 23, scales.mean(), scales.min())
    assert [row.num_stddev for row in preview.table()] == [1, 2, 3, 4]
    assert preview.table()[1] == preview.summary
    assert [row.num_stddev for row in preview.with_num_stddev(1.5).table()] == [1, 1.5, 2, 3, 4]
    counts = [row.clipped for row in preview.table()]
    assert counts == sorted(counts, reverse=True)


def test_a_preview_needs_no_gradients() -> None:
    with torch.inference_mode():
        assert preview_log(spiky()).summary.clipped > 0


def test_a_preview_has_caveats_about_infinite_and_negative_losses() -> None:
    losses = [-1.0, -3.0] * 10 + [math.inf, 5.0]
    preview = preview_log(losses)
    assert preview.clipped.nonzero()[0].tolist() == [21]
    assert 0 < preview.scales[21] < 1
    assert "largest 5" in str(preview)
    assert any("1 losses are infinite" in caveat for caveat in preview.caveats)
    assert any("negative" in caveat for caveat in preview.caveats)


def test_a_preview_without_finite_losses_says_so() -> None:
    preview = preview_log([math.inf])
    assert preview.summary[:3] == (3, 0, 0.0)
    assert "1 losses, none of them finite" in str(preview)
    assert "0 losses" in str(preview_log([]))


def test_the_report_says_how_many_when_and_how_hard() -> None:
    losses = np.ones(200) + 0.1 * np.sin(np.arange(200))
    losses[150] = 9.0
    preview = preview_log(losses)
    text = str(preview)
    assert text.startswith("loss: 200 losses, steps 0 to 199, median 1.003, largest 9\n")
    (row,) = (line.split() for line in text.splitlines() if re.match(r" +3 ", line))
    scale = preview.scales[150]
    assert row == ["3", "1", "0.50%", "150", "150", f"{scale:.3f}", f"{scale:.3g}"]
    assert "at num_stddev=3: 0 0 0 0 0 0 0 1 0 0" in text
    assert f"step 150: loss 9 to {9 * scale:.4g}, gradient times {scale:.3g}" in text


@pytest.mark.parametrize(("count", "is_short"), [(10, True), (99, True), (100, False)])
def test_a_caveat_says_that_a_log_is_short(count: int, is_short: bool) -> None:
    caveats = " ".join(preview_log(np.random.default_rng(0).random(count)).caveats)
    assert (f"has {count} losses, and ALRC never clips the first 10" in caveats) == is_short


def test_a_preview_that_only_watches_has_no_caveat_of_its_length() -> None:
    assert "never clips" not in " ".join(preview_log([1.0, 2.0], num_stddev=math.inf).caveats)


def test_a_caveat_names_the_steps_between_logged_losses(tmp_path: Path) -> None:
    steps = np.arange(50, 5050, 50)
    path = write(tmp_path / "log.csv", {"step": steps, "loss": spiky(100)})
    caveats = " ".join(preview_log(path).caveats)
    assert "Logged every 50 steps" in caveats
    assert "The decay of 0.999 here (--decay) matches a decay of 0.99998 in the training" in caveats
    assert "For 0.999 in the training, use 0.951" in caveats
    followed = " ".join(preview_log(path, decay=0.951).caveats)
    assert "The decay of 0.951 here (--decay) matches a decay of 0.998996 in the train" in followed
    assert "Logged every" not in " ".join(preview_log(spiky()).caveats)
    assert "trained with ALRC" not in " ".join(preview_log(spiky()).caveats)


def test_losses_are_clipped_in_the_order_of_the_log(tmp_path: Path) -> None:
    losses = np.concatenate([spiky(100, seed) / 10**seed for seed in range(4)])
    columns = {"epoch": np.arange(400) // 100, "step": np.arange(400) % 100, "loss": losses}
    preview, expected = preview_log(write(tmp_path / "log.csv", columns)), preview_log(losses)
    assert preview.losses.tolist() == losses.tolist()
    assert preview.scales.tolist() == expected.scales.tolist()
    assert "step starts again" in " ".join(preview.caveats)
    pytest.importorskip("matplotlib")
    (axes,) = preview.figure().axes
    assert all((np.diff(line.get_xdata()) >= 0).all() for line in axes.lines)
    assert axes.get_xlabel() == "losses in the order of the log"
    assert expected.figure().axes[0].get_xlabel() == "training step"


def test_a_loss_below_the_mean_is_clipped_to_the_lower_bound() -> None:
    losses = [5.0 + 0.1 * (step % 3) for step in range(50)] + [1.0]
    reference = Reference(num_stddev_below=3)
    clipped, scale = [reference(loss) for loss in losses][-1]
    preview = preview_log(losses, num_stddev_below=3)
    assert preview.clipped.nonzero()[0].tolist() == [50]
    assert preview.losses_clipped.tolist() == [*losses[:50], pytest.approx(clipped)]
    assert 4.8 < clipped < 4.9
    assert f"step 50: loss 1 to {clipped:.4g}, gradient times {scale:.3g}" in str(preview)
    pytest.importorskip("matplotlib")
    (axes,) = preview.figure().axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    (after,) = (lines[label] for label in lines if label.startswith("loss after clipping"))
    assert after[-1] == pytest.approx(clipped)


def test_caveats_name_means_over_epochs_and_repeated_steps(tmp_path: Path) -> None:
    columns = {"step": [*range(50), *range(40, 50)], "train_loss_epoch": spiky(60)}
    path = write(tmp_path / "log.csv", columns)
    with pytest.raises(ValueError, match=r"loss \(--loss\) must say which"):
        preview_log(path)
    caveats = " ".join(preview_log(path, "train_loss_epoch").caveats)
    assert "mean over epochs" in caveats
    assert "10 losses share their step" in caveats


@pytest.mark.parametrize("chosen", ["train_loss", "train/loss_step", "alrc/loss", "Loss"])
def test_the_only_training_loss_of_a_log_is_found(tmp_path: Path, chosen: str) -> None:
    others = ("val_loss", "valid/loss", "test_loss", "loss_epoch", "alrc/loss_clipped", "lr")
    columns = {"step": range(20), **{name: range(20) for name in others}, chosen: spiky(20)}
    path = write(tmp_path / "log.csv", columns)
    preview = preview_log(str(path))
    assert preview.name == chosen
    assert preview.losses.tolist() == spiky(20).tolist()


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", {"step": [1], "mse": [1.0], "a_loss": [2.0], "b_loss": [3]})
    with pytest.raises(ValueError, match=r"which of \['a_loss', 'b_loss'\] .* got None"):
        preview_log(path)
    with pytest.raises(ValueError, match=r"one of \['a_loss', 'b_loss', 'mse'\], got 'x'"):
        preview_log(path, "x")
    with pytest.raises(ValueError, match=r"num_stddev .* got -1"):
        preview_log(path, "mse", num_stddev=-1)
    with pytest.raises(TypeError, match="nonsense"):
        preview_log(path, "mse", nonsense=1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        preview_log(tmp_path / "no.csv")
    for wrong in ([[1.0]], [math.nan], ["a"], [[1.0], [2.0, 3.0]], {}, [None, 1j]):
        with pytest.raises(ValueError, match=r"source must be losses, \[steps\], without NaN"):
            preview_log(wrong)


@pytest.mark.parametrize(
    "kind",
    [
        np.array,
        lambda losses: torch.tensor(losses, dtype=torch.bfloat16),
        lambda losses: torch.tensor(losses, requires_grad=True),
        lambda losses: [torch.tensor(each, requires_grad=True) for each in losses],
        lambda losses: [torch.tensor(each, dtype=torch.bfloat16) for each in losses],
    ],
    ids=["array", "bfloat16", "with gradients", "list with gradients", "list of bfloat16"],
)
def test_losses_may_be_arrays_and_tensors(kind: Callable[[list[float]], Any]) -> None:
    losses = [1.0, 1.5, 9.0]
    assert preview_log(kind(losses)).losses.tolist() == losses


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, int])
def test_the_table_has_each_num_stddev_once(kind: Callable[[float], Any]) -> None:
    rows = preview_log(spiky(20), num_stddev=kind(2.0)).table()
    assert [row.num_stddev for row in rows] == [1, 2, 3, 4]


def test_the_figure_has_the_threshold_and_the_clips() -> None:
    pytest.importorskip("matplotlib")
    preview = preview_log(spiky())
    figure = preview.figure(title="a run")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["threshold"].get_ydata().tolist() == preview.thresholds[10:].tolist()
    (points,) = axes.collections
    assert points.get_offsets()[:, 0].tolist() == preview.steps[preview.clipped].tolist()
    assert axes.get_title(loc="right") == f"losses clipped: {preview.summary.clipped}"
    assert figure.get_suptitle() == "a run"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    columns = {"step": range(600), "gan/generator": spiky(), "critic": spiky(seed=1)}
    path = write(tmp_path / "log.csv", columns)
    picture = tmp_path / "preview.png"
    losses = ["--loss", "gan/generator", "critic"]
    main([str(path), *losses, "--num-stddev", "2", "--output", str(picture)])
    printed = capsys.readouterr().out
    for name in ("gan/generator", "critic"):
        assert str(preview_log(path, name, num_stddev=2)) in printed
    assert "Trainer(callbacks=[ALRCCallback(num_stddev=2)])" in printed
    assert 'critic = self.alrc(critic, "critic")' in printed
    assert 'gan_generator = self.alrc(gan_generator, "gan_generator")' in printed
    assert printed.count("the losses of the run as it was") == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", [[], ["--loss", "x"]])
def test_columns_of_steps_and_times_are_not_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    columns = {"Wall time": range(3), "Step": range(3), "Epoch": range(3), "Value": range(3)}
    path = write(tmp_path / "log.csv", columns)
    with pytest.raises(SystemExit):
        main([str(path), *given])
    assert "['Value']" in capsys.readouterr().err


def test_the_command_line_as_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "log.csv", {"step": range(600), "loss": spiky()})
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "lightning_alrc.preview"]
    given = [path, "--output", tmp_path / "a.png"]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loss: 600 losses" in done.stdout
    assert "Trainer(callbacks=[ALRCCallback()])" in done.stdout
    assert f"Drawn: {tmp_path / 'a.png'}" in done.stdout
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "--loss", "x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: loss must be one of ['loss'], got 'x'\n")


def test_names_that_the_output_cannot_encode_are_printed_with_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "log.csv", {"step": range(600), "ł loss": spiky()})
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # as on Windows, in a file
    monkeypatch.setattr(sys, "stdout", output)
    main([str(path), "--output", str(tmp_path / "a.png")])
    output.flush()
    assert "\\u0142 loss: 600 losses" in output.buffer.getvalue().decode("cp1252")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--num-stddev", "inf"], {"num_stddev": math.inf}),
        (
            ["--num-stddev", "2.00000001", "--decay", "0.95"],
            {"num_stddev": 2.00000001, "decay": 0.95},
        ),
    ],
)
def test_the_printed_code_trains_with_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: Any
) -> None:
    path = write(tmp_path / "log.csv", {"step": range(60), "loss": spiky(60)})
    main([str(path), *options, "--output", str(tmp_path / "a.png")])
    (code,) = re.findall(r"trainer = Trainer\(callbacks=\[(.*)\]\)", capsys.readouterr().out)
    settings = eval(code, {"ALRCCallback": dict})
    assert settings == expected
    ALRCCallback(**settings)  # raises for a name that is not one of its settings


def test_the_decay_of_a_thinned_log_is_not_in_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "log.csv", {"step": range(0, 3000, 50), "loss": spiky(60)})
    command = [str(path), "--output", str(tmp_path / "a.png")]
    main([*command, "--decay", "0.951"])
    printed = capsys.readouterr().out
    assert "# with the default decay, because --decay is of the logged losses alone" in printed
    assert "ALRCCallback()" in printed
    main(command)
    assert "default decay" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "written"),
    [(".", "alrc_preview.png"), ("curve", "curve.png"), ("a.svg", "a.svg")],
)
def test_the_file_that_is_named_is_the_one_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, written: str
) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "log.csv", {"step": range(60), "loss": spiky(60)})
    (tmp_path / "figures").mkdir()
    main([str(path), "--output", str(tmp_path / "figures" / given)])
    assert [each.name for each in (tmp_path / "figures").iterdir()] == [written]
    assert f"Drawn: {tmp_path / 'figures' / written}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none/a.png", "a.nothing"])
def test_a_figure_that_cannot_be_saved_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "log.csv", {"step": range(60), "loss": spiky(60)})
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "--output", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_package_exports_preview_log() -> None:
    assert lightning_alrc.preview_log is preview_log
    assert "preview_log" in dir(lightning_alrc)
