import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from examples.cifar10_supersampling.datamodule import CIFAR10Supersampling
from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.recording import StepRecorder
from lightning_alrc import ALRCCallback


def fit(steps, *callbacks, outlier_fraction=0.2, **module_arguments):
    pl.seed_everything(0, verbose=False)
    module = Supersampling(width=0.05, guard=False, **module_arguments)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CIFAR10Supersampling(batch_size=4, outlier_fraction=outlier_fraction))


def test_each_step_is_recorded():
    reported = []
    recorder = StepRecorder(120, reported.append, every_image=True)
    fit(120, recorder)
    history = recorder.history()
    assert recorder.survived == 120
    assert reported == [0, 50, 100]
    assert history["image_loss"].shape == history["outlier"].shape == (120, 4)
    assert history["outlier"].any()
    assert np.isinf(history["threshold"]).all()
    assert recorder.clipped is None
    losses = np.ma.array(history["image_loss"], mask=history["outlier"])
    clean = losses.mean(axis=1)
    np.testing.assert_allclose(history["loss"], clean.filled(np.nan), rtol=1e-5)
    assert recorder.mean_loss(30) == pytest.approx(losses[-30:].mean(), rel=1e-5)
    assert recorder.seconds > 0


def test_a_step_without_a_clean_image_has_no_loss():
    recorder = StepRecorder(20)
    fit(20, recorder, outlier_fraction=0.9)
    loss = recorder.history()["loss"]
    assert 0 < np.isnan(loss).sum() < 20
    assert recorder.survived == 20
    assert np.isfinite(recorder.mean_loss(20))


@pytest.mark.parametrize("huber_delta", [None, 1.0])
def test_losses_above_the_recorded_threshold_are_clipped(huber_delta):
    alrc = ALRCCallback(num_stddev=2)
    recorder = StepRecorder(60, every_image=True)
    fit(60, alrc, recorder, per_sample=True, huber_delta=huber_delta)
    history = recorder.history()
    above = history["image_loss"] > history["threshold"][:, None]
    assert recorder.clipped == above.sum() > 0
    # Losses are recorded before clipping, so those of images with hot pixels stay high.
    known = np.isfinite(history["threshold"]) & (np.arange(60) >= 20)
    outliers = history["image_loss"][known][history["outlier"][known]]
    assert (outliers > (1000 if huber_delta is None else 20)).all()


def test_with_a_start_the_first_step_has_a_threshold():
    alrc = ALRCCallback(num_stddev=2, mu1_start=25.0, mu2_start=900.0)
    recorder = StepRecorder(3)
    fit(3, alrc, recorder, per_sample=True)
    threshold = recorder.history()["threshold"]
    assert threshold[0] == pytest.approx(25.0 + 2 * 275.0**0.5)
    assert threshold[1] != threshold[0]


def test_a_training_stops_when_its_weights_are_lost():
    recorder = StepRecorder(300, every_image=True)
    fit(300, recorder, optimizer="sgd", learning_rate=1e30)
    assert 0 < recorder.survived < 10
    history = recorder.history()
    assert len(history["image_loss"]) == 50
    assert np.isnan(history["loss"][recorder.survived :]).all()


def test_the_last_step_may_lose_the_weights():
    recorder = StepRecorder(1)
    fit(1, recorder, optimizer="sgd", learning_rate=float("inf"))
    assert np.isfinite(recorder.history()["loss"]).all()
    assert recorder.survived == 0


def test_a_resumed_training_continues_the_record(tmp_path):
    first = StepRecorder(60, every_image=True)
    fit(25, ALRCCallback(), first, per_sample=True)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = StepRecorder(60, every_image=True)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fit(35, ALRCCallback(), second, per_sample=True)
    history = second.history()
    for name, values in first.history().items():
        np.testing.assert_array_equal(history[name][:25], values[:25])
    assert len(history["image_loss"]) == 60
    assert np.isfinite(history["loss"]).all()
    assert second.survived == 60
    assert second.seconds > first.seconds
