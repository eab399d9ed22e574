import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from examples.comparison.methods import alrc_of
from examples.partial_stem.datamodule import PartialScans
from examples.partial_stem.module import (
    LOSSES,
    PartialSTEM,
    adversarial_losses,
    crop_errors,
    generator_losses,
)
from examples.partial_stem.network import blurred

WIDTH = 1 / 64


def fit(module, steps=12, **arguments):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": steps,
        "limit_val_batches": 0,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(**(defaults | arguments))
    trainer.fit(module, PartialScans(crop=32, batch_size=2, crops=2 * steps))
    return trainer


@pytest.fixture(autouse=True)
def same_weights():
    pl.seed_everything(0, verbose=False)


def weights(network):
    return torch.cat([each.detach().flatten() for each in network.parameters()]).clone()


@pytest.mark.parametrize("kind", ["least_squares", "wasserstein"])
def test_the_adversarial_losses_are_those_computed_by_hand(kind):
    truth, made = [torch.tensor([3.0, 1.0])] * 2, [torch.tensor([2.0, 0.0])] * 2
    of_discriminators = adversarial_losses(kind, truth, made)
    of_generator = generator_losses(kind, made)
    if kind == "least_squares":
        assert of_discriminators.tolist() == [2 * (4 + 4), 0]
        assert of_generator.tolist() == [2, 2]
    else:
        assert of_discriminators.tolist() == [2 * (2 - 3), 2 * (0 - 1)]
        assert of_generator.tolist() == [-4, 0]


def test_each_crop_has_its_own_error():
    truth = torch.zeros(2, 1, 4, 4)
    completion = torch.stack([truth[0] + 1, truth[1] + 2])
    assert crop_errors(completion, truth).tolist() == [200, 800]


def test_before_the_discriminators_join_there_are_two_losses():
    module = PartialSTEM(WIDTH, adversarial_from=None)
    before = weights(module.discriminators), weights(module.generator)
    alrc = alrc_of(fit(module))
    seen = {name: int(each.losses_total) for name, each in alrc.losses.items()}
    assert seen == {"mse_inner": 24, "mse_outer": 24, "generator": 0, "discriminator": 0}
    assert torch.equal(before[0], weights(module.discriminators))
    assert not torch.equal(before[1], weights(module.generator))


@pytest.mark.parametrize("kind", ["least_squares", "wasserstein"])
def test_each_loss_has_its_own_moments(kind):
    module = PartialSTEM(WIDTH, adversarial_from=5, adversarial=kind)
    before = weights(module.discriminators)
    alrc = alrc_of(fit(module))
    seen = {name: int(each.losses_total) for name, each in alrc.losses.items()}
    assert seen == {"mse_inner": 24, "mse_outer": 24, "generator": 14, "discriminator": 14}
    assert len({each.mu1.item() for each in alrc.losses.values()}) == 4
    assert not torch.equal(before, weights(module.discriminators))


def test_the_metrics_of_each_loss_are_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(PartialSTEM(WIDTH, adversarial_from=2), logger=logger)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in LOSSES:
        assert {f"alrc/{name}/loss", f"alrc/{name}/threshold"} <= set(header)


def test_gradients_of_negative_losses_never_change_sign():
    """Clips of Wasserstein losses at a low threshold: every factor is in [0, 1]."""
    module = PartialSTEM(WIDTH, adversarial_from=0, adversarial="wasserstein", num_stddev=0.1)
    spikes = alrc_of(fit(module, steps=40)).spikes
    assert all(0 <= spike.scale < 1 for spike in spikes)
    negative = [spike for spike in spikes if spike.loss < 0]
    assert {spike.name for spike in negative} <= {"generator", "discriminator"}
    assert negative
    assert weights(module).isfinite().all()


def test_discriminators_are_not_trained_by_the_generators_losses():
    module = PartialSTEM(
        WIDTH, adversarial_from=0, learning_rate=0.1, discriminator_learning_rate=1e-9
    )
    before = weights(module.discriminators)
    fit(module, steps=3)
    assert torch.allclose(before, weights(module.discriminators), atol=1e-6)


def test_gradients_are_clipped_network_by_network():
    module = PartialSTEM(WIDTH, adversarial_from=0, gradient_clip_val=1e-3)
    norms = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            gradients = [each.grad.norm() for each in parameters if each.grad is not None]
            norms.append(torch.stack(gradients).norm().item())

    fit(module, callbacks=[Watch()])
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 24


def test_moments_are_kept_even_without_clipping():
    module = PartialSTEM(WIDTH, adversarial_from=0, num_stddev=math.inf)
    alrc = alrc_of(fit(module))
    assert {name: int(each.clipped_total) for name, each in alrc.losses.items()} == dict.fromkeys(
        LOSSES, 0
    )
    assert all(each.mu1 != 0 for each in alrc.losses.values())


def test_the_test_error_is_in_percent_of_the_range():
    module = PartialSTEM(WIDTH)
    module.forward = lambda scan, mask: torch.ones_like(scan)
    data = PartialScans(crop=96)
    trainer = fit(module, steps=1)
    (found,) = trainer.test(module, data, verbose=False)
    squares = [((1 - blurred(batch.truth)) ** 2).flatten() for batch in data.test_dataloader()]
    assert found["test/rms"] == pytest.approx(
        50 * torch.cat(squares).mean().sqrt().item(), rel=1e-4
    )


def test_a_checkpoint_is_loaded_with_its_arguments(tmp_path):
    module = PartialSTEM(WIDTH, adversarial_from=2)
    fit(module, steps=3).save_checkpoint(tmp_path / "end.ckpt")
    again = PartialSTEM.load_from_checkpoint(tmp_path / "end.ckpt")
    assert again.hparams == module.hparams
    assert torch.equal(weights(again), weights(module))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"adversarial": "hinge"},
            "adversarial must be 'least_squares' or 'wasserstein', got 'hinge'",
        ),
        ({"adversarial_from": -1}, "adversarial_from must be None or not negative, got -1"),
        ({"width": 0}, "width must be a number above 0, got 0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be a number above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a number above 0, got nan"),
    ],
)
def test_the_error_names_the_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        PartialSTEM(**arguments)
