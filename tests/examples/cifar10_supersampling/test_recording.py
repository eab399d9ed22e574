import numpy as np
import pytorch_lightning as pl
import torch

from examples.cifar10_supersampling.datamodule import CIFAR10Supersampling
from examples.cifar10_supersampling.module import Supersampling
from examples.cifar10_supersampling.recording import StepRecorder
from lightning_alrc import ALRCCallback


def fit(steps, callbacks, **module_arguments):
    pl.seed_everything(0, verbose=False)
    module = Supersampling(width=0.05, guard=False, **module_arguments)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CIFAR10Supersampling(batch_size=4, outlier_fraction=0.2))


def test_each_step_is_recorded():
    reported = []
    recorder = StepRecorder(reported.append)
    fit(25, [recorder])
    history = recorder.history()
    assert recorder.survived == 25
    assert reported == [10, 20]
    assert history["loss"].shape == history["outlier"].shape == (25, 4)
    assert history["outlier"].any()
    assert np.isinf(history["threshold"]).all()
    assert not history["clipped"].any()


def test_clips_are_where_a_loss_exceeds_the_threshold_recorded():
    alrc = ALRCCallback(num_stddev=2)
    recorder = StepRecorder(alrc=alrc)
    fit(40, [alrc, recorder], per_sample=True)
    history = recorder.history()
    assert history["clipped"].sum() > 0
    above = (history["loss"] >= history["threshold"][:, None]).sum(axis=1)
    np.testing.assert_array_equal(history["clipped"], above)
    # Hot pixels are what is clipped, once the threshold is known.
    known = np.isfinite(history["threshold"]) & (np.arange(40) >= 20)
    outliers = history["loss"][known][history["outlier"][known]]
    assert (outliers > 1000).all()


def test_training_stops_when_its_weights_are_lost():
    recorder = StepRecorder()
    fit(25, [recorder], optimizer="sgd", learning_rate=1e30)
    assert recorder.survived < 25
    assert len(recorder.losses) == recorder.survived + 1
    assert not torch.isfinite(recorder.losses[-1]).all()
