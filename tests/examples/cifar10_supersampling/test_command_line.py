import sys

import pytest
import torch
from pytorch_lightning import callbacks

from examples.cifar10_supersampling.command_line import (
    EXPERIMENTS,
    METHODS,
    CommandLine,
    experiment_config,
    method_configs,
    method_name,
)
from examples.comparison.clippers import (
    AdaptiveGradientClipping,
    AutoClipping,
    ZClipping,
)
from lightning_alrc import ALRCCallback
from tests.examples.cifar10_supersampling.marks import needs_weight_averaging

PEERS = {
    "zclip": ("zclip", ZClipping),
    "autoclip": ("autoclip", AutoClipping),
    "autoclip10": ("autoclip", AutoClipping),
    "agc": ("timm", AdaptiveGradientClipping),
}


def made(experiment, method, *options):
    """The Trainer, module and data that a training's command line makes."""
    cli = CommandLine(
        args=[
            f"--config={experiment_config(experiment)}",
            *(f"--config={path}" for path in method_configs(method)),
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            *options,
        ],
        run=False,
        save_config_callback=None,
    )
    return cli.trainer, cli.model, cli.datamodule


def callback_of(trainer, kind):
    (found,) = [callback for callback in trainer.callbacks if isinstance(callback, kind)]
    return found


def test_every_method_of_the_paper_and_every_peer_has_a_name():
    alrc = {f"{form}{stddevs}" for form in ("alrc", "published") for stddevs in (2, 3, 4)}
    assert set(METHODS) == {"none", "norm", "value", "huber", *alrc, *PEERS}


@pytest.mark.parametrize("stddevs", [2, 3, 4])
def test_alrc_clips_sample_by_sample(stddevs):
    trainer, module, _ = made("outliers", f"alrc{stddevs}")
    assert callback_of(trainer, ALRCCallback).losses.settings["num_stddev"] == stddevs
    assert module.per_sample


def test_none_protects_nothing():
    trainer, module, _ = made("outliers", "none")
    assert trainer.gradient_clip_val is None
    assert not any(isinstance(callback, ALRCCallback) for callback in trainer.callbacks)
    assert not module.per_sample
    assert module.huber_delta is None


@pytest.mark.parametrize(("method", "value"), [("norm", 1.0), ("value", 0.5)])
def test_norm_and_value_clip_gradients_by_lightning(method, value):
    trainer, _, _ = made("outliers", method)
    assert trainer.gradient_clip_val == value
    assert trainer.gradient_clip_algorithm == method


def test_huber_sets_huber_delta():
    _, module, _ = made("outliers", "huber")
    assert module.huber_delta == 1.0


@pytest.mark.parametrize("method", PEERS)
def test_peers_and_alrc_are_callbacks_together(method):
    package, kind = PEERS[method]
    pytest.importorskip(package)
    trainer, module, _ = made("outliers", f"alrc2+{method}")
    assert callback_of(trainer, kind)
    assert callback_of(trainer, ALRCCallback)
    assert module.per_sample


def test_alrc_and_gradient_clipping_are_set_together():
    trainer, _, _ = made("outliers", "alrc2+norm")
    assert trainer.gradient_clip_val == 1.0
    assert callback_of(trainer, ALRCCallback)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_methods_do_not_change_the_experiment(experiment):
    if experiment != "outliers" and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("the configuration averages weights, which Lightning does since 2.6")
    trainer, module, data = made(experiment, "alrc2+norm")
    averaged = [type(callback).__name__ for callback in trainer.callbacks]
    assert ("EMAWeightAveraging" in averaged) == (experiment != "outliers")
    assert module.hparams["width"] == 1.0
    assert module.hparams["loss"] == {"squared": "squared", "unstable": "squared"}.get(
        experiment, "quartic"
    )
    assert module.hparams["learning_rate"] == (0.002 if experiment == "unstable" else 0.1 / 128)
    assert module.hparams["guard"] == (experiment != "outliers")
    assert trainer.max_steps == (2500 if experiment == "outliers" else 100_000)
    assert data.batch_size == (8 if experiment == "outliers" else 1)
    assert data.outlier_fraction == (0.05 if experiment == "outliers" else 0)


@needs_weight_averaging
def test_the_average_of_the_weights_is_on_the_device_of_the_training():
    """The device "meta" stands for a GPU."""
    strategy = "--trainer.strategy=pytorch_lightning.strategies.SingleDeviceStrategy"
    trainer, module, _ = made("squared", "none", strategy, "--trainer.strategy.device=meta")
    averaging = callback_of(trainer, callbacks.EMAWeightAveraging)
    averaging.setup(trainer, module, "fit")
    assert {each.device.type for each in averaging._average_model.parameters()} == {"meta"}


def test_convolutions_are_not_in_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    made("outliers", "none")
    assert not torch.backends.cudnn.allow_tf32


def test_arguments_override_configurations():
    trainer, module, data = made(
        "outliers",
        "norm",
        "--trainer.gradient_clip_val=0.1",
        "--trainer.max_steps=7",
        "--model.loss=squared",
        "--model.width=0.05",
        "--data.outlier_kind=noise",
    )
    assert (trainer.gradient_clip_val, trainer.max_steps) == (0.1, 7)
    assert (module.hparams["loss"], module.hparams["width"]) == ("squared", 0.05)
    assert data.outlier_kind == "noise"


def test_the_seed_is_also_the_seed_of_the_images():
    def first_target(seed):
        _, _, data = made("outliers", "none", f"--seed_everything={seed}")
        assert data.hparams["seed"] == seed
        return next(iter(data.train_dataloader())).target

    assert not first_target(3).equal(first_target(4))


def test_a_path_is_a_method_of_ones_own(tmp_path):
    path = tmp_path / "gentle.yaml"
    path.write_text("trainer: {gradient_clip_val: 5.0}\n")
    trainer, _, _ = made("outliers", f"alrc3+{path}")
    assert trainer.gradient_clip_val == 5.0
    assert method_name(f"alrc3+{path}") == "alrc3+gentle"


@pytest.mark.parametrize("method", ["alrc5", "alrc2+", "norm+zcilp", "absent.yaml", ""])
def test_the_error_names_an_unknown_method(method):
    with pytest.raises(ValueError, match=r"methods must be some of \['agc', .*got '"):
        method_configs(method)


def test_the_error_names_an_unknown_experiment():
    with pytest.raises(ValueError, match=r"experiments must be some of .* got 'cubic'"):
        experiment_config("cubic")


@pytest.mark.parametrize("method", PEERS)
def test_the_error_names_a_missing_package(method, monkeypatch):
    package, kind = PEERS[method]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError, match=rf"'{package}' is not installed: pip install"):
        kind()
