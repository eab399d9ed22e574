import csv
from contextlib import nullcontext

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from skimage.metrics import structural_similarity
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import Metric

from examples.cifar10_supersampling.datamodule import (
    CIFAR10Supersampling,
    TransformedImages,
    whole,
)
from examples.cifar10_supersampling.module import (
    Supersampling,
    guarded,
    image_error,
    to_display_range,
)
from examples.cifar10_supersampling.photographs import cut_images
from examples.cifar10_supersampling.transformation import evaluation_batch
from lightning_alrc import ALRCCallback


@pytest.fixture(scope="module")
def batch():
    return evaluation_batch(cut_images(["coffee"], 6, seed=0))


@pytest.mark.parametrize("power", [2, 4])
def test_error_is_25_times_the_mean_power(batch, power):
    ours = image_error(batch.input, batch.target, power).numpy()
    difference = (batch.input - batch.target).double().numpy()
    np.testing.assert_allclose(ours, 25 * (difference**power).mean(axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("power", [2, 4])
def test_the_huber_loss_continues_as_the_tangent(power):
    target = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    prediction = torch.zeros_like(target)
    prediction[0], prediction[1] = 0.7, -3.0
    prediction.requires_grad_()
    loss = image_error(prediction, target, power, huber_delta=1.0)
    assert loss.tolist() == pytest.approx([25 * 0.7**power, 25 * (1 + power * 2)])
    loss.sum().backward()
    slope = prediction.grad.sum(dim=(1, 2, 3)).tolist()
    assert slope == pytest.approx([25 * power * 0.7 ** (power - 1), -25 * power])


def test_the_huber_loss_of_squares_is_twice_pytorchs(batch):
    ours = image_error(batch.input, batch.target, 2, huber_delta=0.3)
    theirs = functional.huber_loss(batch.input, batch.target, reduction="none", delta=0.3)
    assert torch.allclose(ours, 25 * 2 * theirs.mean(dim=(1, 2, 3)), rtol=1e-5)


def test_huber_is_trained_on_but_the_plain_error_is_returned(batch, monkeypatch):
    torch.manual_seed(0)
    module = Supersampling(width=0.1, huber_delta=0.2, per_sample=True, guard=False)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    outputs = module.training_step(batch, 0)
    prediction = module(batch.input)
    assert torch.allclose(outputs["losses"], image_error(prediction, batch.target, 4))
    assert torch.allclose(outputs["loss"], image_error(prediction, batch.target, 4, 0.2))
    assert not torch.allclose(outputs["loss"], outputs["losses"])


def test_the_error_returned_beside_the_huber_loss_has_no_graph(batch):
    outputs = Supersampling(width=0.1, huber_delta=0.2).training_step(batch, 0)
    assert not outputs["losses"].requires_grad


def test_guard_takes_the_root_above_50():
    losses = torch.tensor([0.0, 49.0, 50.0, 64.0, 5000.0], requires_grad=True)
    result = guarded(losses)
    assert result.tolist() == pytest.approx([0, 49, 50, 8, 5000**0.5])
    result.sum().backward()
    assert losses.grad.tolist() == pytest.approx([1, 1, 1, 1 / 16, 0.5 / 5000**0.5])


def test_the_display_range_is_the_references(batch):
    shown = to_display_range(batch.target, batch.target)
    assert torch.equal(shown.amin(dim=(1, 2, 3)), torch.zeros(6))
    assert torch.allclose(shown.amax(dim=(1, 2, 3)), torch.ones(6))
    assert to_display_range(batch.target * 100, batch.target).max() == 1


def test_a_uniform_image_can_be_displayed():
    images = torch.zeros(1, 3, 4, 4)
    assert to_display_range(images, images).isfinite().all()


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("guard", [True, False])
def test_loss_is_a_vector_or_its_mean(batch, per_sample, guard):
    torch.manual_seed(0)
    module = Supersampling(width=0.1, per_sample=per_sample, guard=guard)
    outputs = module.training_step(batch, 0)
    expected = image_error(module(batch.input), batch.target, 4)
    expected = guarded(expected) if guard else expected
    assert torch.allclose(outputs["losses"], expected.detach())
    assert not outputs["losses"].requires_grad
    assert outputs["loss"].shape == ((6,) if per_sample else ())
    assert torch.allclose(outputs["loss"], expected if per_sample else expected.mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "cubic"}, r"loss must be one of \['squared', 'quartic'\], got 'cubic'"),
        ({"optimizer": "lion"}, r"optimizer must be one of \['adam', 'sgd'\], got 'lion'"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, got 0.0"),
        ({"learning_rate_drop_at": 0}, "learning_rate_drop_at must be None or at least 1, got 0"),
        ({"huber_delta": 0.0}, "huber_delta must be None or a number above 0, got 0.0"),
        ({"width": -1.0}, "width must be a number above 0, got -1.0"),
    ],
)
def test_wrong_arguments_raise_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Supersampling(**arguments)


def quiet_trainer(tmp_path, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"logger": False, "limit_val_batches": 1, "limit_test_batches": 1} | arguments),
    )


def test_learning_rate_drops_to_a_tenth(tmp_path):
    module = Supersampling(width=0.05, optimizer="sgd", learning_rate=1e-5, learning_rate_drop_at=2)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(module, CIFAR10Supersampling(batch_size=2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)


def test_the_loss_is_logged_in_the_steps_in_which_lightning_logs(tmp_path):
    losses = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["losses"].mean().item())

    logger = CSVLogger(tmp_path)
    arguments = {"logger": logger, "log_every_n_steps": 4, "callbacks": [Recorder()]}
    trainer = quiet_trainer(tmp_path, max_steps=10, **arguments)
    trainer.fit(Supersampling(width=0.05, per_sample=False), CIFAR10Supersampling(batch_size=2))
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["3", "7"]
    logged = [float(row["train/loss"]) for row in rows]
    assert logged == pytest.approx([losses[3], losses[7]])


def test_a_module_trains_if_lightning_never_logs(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=2, log_every_n_steps=0, logger=False)
    trainer.fit(Supersampling(width=0.05), CIFAR10Supersampling(batch_size=2))
    assert trainer.global_step == 2


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [
        ("32-true", None, True),
        ("32-true", 1.0, True),
        ("bf16-mixed", None, True),
        ("bf16-mixed", 1.0, False),
        ("16-mixed", None, False),
    ],
)
def test_the_optimizer_is_fused_only_if_lightning_can_clip_its_gradients(
    optimizer, precision, clip, fused, tmp_path
):
    module = Supersampling(width=0.05, optimizer=optimizer, learning_rate=1e-6)
    arguments = {"precision": precision}
    if precision == "16-mixed":  # on a CPU, Lightning replaces 16-mixed by bf16-mixed
        scaler = torch.amp.GradScaler("cpu")
        arguments = {"plugins": MixedPrecision(precision, "cpu", scaler)}
    trainer = quiet_trainer(tmp_path, max_steps=2, gradient_clip_val=clip, **arguments)
    trainer.fit(module, CIFAR10Supersampling(batch_size=2))
    assert trainer.optimizers[0].defaults["fused"] == fused


def test_test_metrics_agree_with_numpy(tmp_path):
    torch.manual_seed(0)
    module = Supersampling(width=0.05)
    datamodule = CIFAR10Supersampling()
    (metrics,) = quiet_trainer(tmp_path).test(module, datamodule, verbose=False)
    batch = next(iter(datamodule.test_dataloader()))
    with torch.no_grad():
        prediction = module(batch.input)
    difference = (prediction - batch.target).double().numpy()
    assert metrics["test/mse"] == pytest.approx((difference**2).mean(), rel=1e-4)
    assert metrics["test/error"] == pytest.approx(25 * (difference**4).mean(), rel=1e-4)
    difference = (batch.input - batch.target).double().numpy()
    assert metrics["test/input_error"] == pytest.approx(25 * (difference**4).mean(), rel=1e-4)
    shown = to_display_range(prediction, batch.target).double().numpy()
    truth = to_display_range(batch.target, batch.target).double().numpy()
    psnr = -10 * np.log10(((shown - truth) ** 2).mean())
    assert metrics["test/psnr"] == pytest.approx(psnr, rel=1e-4)
    # The mean is over the full image, because torchmetrics does not leave out the border. The two
    # libraries continue the image beyond its border in slightly different ways.
    settings = {"gaussian_weights": True, "use_sample_covariance": False, "full": True}
    ssim = [
        structural_similarity(a, b, channel_axis=0, data_range=1, **settings)[1].mean()
        for a, b in zip(shown, truth, strict=True)
    ]
    assert metrics["test/ssim"] == pytest.approx(np.mean(ssim), abs=0.005)


def test_metrics_of_300_batches_in_half_precision_are_those_in_float32(tmp_path):
    """A sum of ones in bfloat16 would stop at 256."""
    # Small images, because only the number of batches matters.
    small = cut_images(["coffee"], 300, seed=0)[..., :16, :16]
    images = TransformedImages(small, evaluation_batch)
    batches = DataLoader(images, batch_size=1, collate_fn=whole)
    found = []
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        module = Supersampling(width=0.05)
        unlimited = {"limit_test_batches": None, "limit_val_batches": None}
        trainer = quiet_trainer(tmp_path, precision=precision, **unlimited)
        (tested,) = trainer.test(module, batches, verbose=False)
        (validated,) = trainer.validate(module, batches, verbose=False)
        found.append(tested | validated)
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_metrics_of_the_same_images_are_the_same_under_autocast(monkeypatch, tmp_path):
    module = Supersampling(width=0.05)
    monkeypatch.setattr(module, "forward", lambda images: images)
    found = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = quiet_trainer(tmp_path, precision=precision)
        found += trainer.test(module, CIFAR10Supersampling(), verbose=False)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("inside", [False, True], ids=["", "made in that precision"])
def test_metrics_sum_in_float32_and_count_in_integers(precision, inside, tmp_path):
    trainer = quiet_trainer(tmp_path, precision=precision)
    with trainer.init_module() if inside else nullcontext():
        module = Supersampling(width=0.05)
    trainer.test(module, CIFAR10Supersampling(), verbose=False)
    dtypes = {
        f"{name} of {metric}": state.dtype
        for metric in module.modules()
        if isinstance(metric, Metric)
        for name, state in metric.metric_state.items()
    }
    counts = {"total of MeanSquaredError()", "total of PeakSignalNoiseRatio()"}
    assert dtypes.keys() > counts
    assert {dtypes.pop(name) for name in counts} == {torch.int64}
    assert set(dtypes.values()) == {torch.float32}


def test_a_nan_image_makes_the_error_nan(batch, monkeypatch):
    module = Supersampling(width=0.05)
    restored = batch.input.clone()
    restored[1] = torch.nan
    monkeypatch.setattr(module, "forward", lambda images: restored)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    module.test_step(batch, 0)
    assert module.error.compute().isnan()


def test_a_vector_of_losses_trains_under_alrc(tmp_path):
    pl.seed_everything(0, verbose=False)
    callback = ALRCCallback(num_stddev=2)
    trainer = quiet_trainer(tmp_path, max_steps=30, callbacks=[callback])
    module = Supersampling(width=0.05, guard=False, per_sample=True)
    trainer.fit(module, CIFAR10Supersampling(batch_size=4, outlier_fraction=0.2))
    assert callback.losses["loss"].clipped_total >= 1
    assert callback.losses["loss"].threshold.isfinite()
