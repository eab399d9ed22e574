"""Fits on a device: precisions, policies, the record, checkpoints, and that no step waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRC, ALRCCallback, replay
from tests.nets import SETTINGS, NamedNet, Net, callback_of, loader, state_of, weights_of

Fit = Callable[..., Any]


def state_after(seen: list[Tensor], **settings: float) -> dict[str, float]:
    """The moments that a CPU has after the same losses."""
    alrc = ALRC(**settings)
    for loss in seen:
        alrc(loss.cpu().requires_grad_())
    return state_of(alrc)


# ---- fits


@pytest.mark.parametrize("shape", ["scalar", "vector", "matrix"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_fit_has_the_moments_of_its_losses(
    fit: Fit, accelerator: str, precision: str, shape: str
) -> None:
    net = Net(shape)
    if precision == "16-mixed" and accelerator == "cpu":
        pytest.skip("needs a CUDA device: a GradScaler of its own")
    trainer = fit(
        net, ALRCCallback(**SETTINGS), accelerator=accelerator, precision=precision, max_epochs=3
    )
    found = callback_of(trainer).losses["loss"]
    assert state_of(found) == pytest.approx(state_after(net.seen, **SETTINGS), rel=1e-9)
    assert found.clipped_total > 0
    if accelerator == "gpu":
        assert found.mu1.is_cuda
        assert found.mu1.dtype == torch.float64


@pytest.mark.parametrize("way", ["accumulation", "manual", "LBFGS", "named"])
def test_each_way_to_train_equals_a_cpu(fit: Fit, accelerator: str, way: str) -> None:
    class Quadratic(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    def trained(where: str) -> tuple[list[float], dict[str, dict[str, float]]]:
        kind = {"named": NamedNet, "LBFGS": Quadratic}.get(way, Net)
        net = kind("matrix", "tensor", True) if way == "manual" else kind("matrix")
        arguments = {"accumulate_grad_batches": 2} if way == "accumulation" else {}
        callbacks = [] if way == "named" else [ALRCCallback(**SETTINGS)]
        trainer = fit(net, *callbacks, accelerator=where, **arguments)
        losses = callback_of(trainer).losses
        return weights_of(net.cpu()), {name: state_of(alrc) for name, alrc in losses.items()}

    weights, states = trained(accelerator)
    expected_weights, expected_states = trained("cpu")
    assert weights == pytest.approx(expected_weights, rel=1e-3, abs=1e-4)
    assert states.keys() == expected_states.keys()
    for name, state in states.items():
        assert state == pytest.approx(expected_states[name], rel=1e-3)


# ---- losses that are not finite


class Poisoned(pl.LightningModule):
    """The loss of one batch is NaN."""

    def __init__(self, optimizer: str, schedules: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.optimizer, self.schedules = optimizer, schedules
        self.weights: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.weights.append(weights_of(self))
        x, y = batch
        loss = (self.layer(x) - y).square().mean()
        return loss * (float("nan") if batch_idx == 3 else 1.0)

    def configure_optimizers(self) -> Any:
        fused = self.optimizer == "fused Adam"
        optimizer = torch.optim.Adam(self.parameters(), 0.01, fused=fused)
        if not self.schedules:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("schedules", [False, True], ids=["constant", "scheduler"])
@pytest.mark.parametrize("optimizer", ["Adam", "fused Adam"])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_a_nan_is_propagated_skipped_or_raised(
    fit: Fit, accelerator: str, policy: Any, optimizer: str, schedules: bool, precision: str
) -> None:
    if precision == "16-mixed" and (accelerator == "cpu" or policy == "propagate"):
        pytest.skip("a GradScaler skips such a step itself" if accelerator == "gpu" else "no CUDA")
    net = Poisoned(optimizer, schedules)
    arguments = {"accelerator": accelerator, "precision": precision, "max_epochs": 1}
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="loss 'loss' is nan at step 3, batch_idx 3"):
            fit(net, ALRCCallback(nonfinite=policy), batches=loader(), **arguments)
        return
    fit(net, ALRCCallback(nonfinite=policy), batches=loader(), **arguments)
    before, after = net.weights[3], net.weights[4]
    finite = all(weight == weight for weight in after)
    assert finite == (policy == "skip")
    if policy == "skip":
        assert before == after
        if precision != "16-mixed":  # a GradScaler searches for its scale in the first steps
            assert after != net.weights[5]


# ---- no step waits


def test_no_step_that_does_not_log_waits_for_the_device(fit: Fit, cuda: str) -> None:
    """The record is on. The losses are a mean, one for each sample, and named losses."""

    class First(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step >= 20:
                torch.cuda.set_sync_debug_mode("error")

    class Last(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        for net in (Net("scalar"), Net("vector"), NamedNet("matrix")):
            callbacks = [] if isinstance(net, NamedNet) else [ALRCCallback(**SETTINGS)]
            fit(
                net,
                First(),
                *callbacks,
                Last(),
                accelerator="gpu",
                max_epochs=30,
                log_every_n_steps=10_000,
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the record


class WithIds(Net):
    """Its batches have ids, on the device."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses((batch["x"] + 0.1 * torch.randn_like(batch["x"]), batch["y"]))

    def train_dataloader(self) -> Any:
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        y = x[:, :2].clone()
        y[::7] += 40.0
        data: Any = [{"x": a, "y": b, "id": i + 100} for i, (a, b) in enumerate(zip(x, y))]  # noqa: B905
        return DataLoader(data, batch_size=4)


def test_the_record_has_ids_from_the_device(fit: Fit, accelerator: str) -> None:
    callback = ALRCCallback(num_stddev=1.0)
    fit(WithIds("vector"), callback, accelerator=accelerator, max_epochs=8)
    assert {spike.id for spike in callback.spikes} <= set(range(100, 124))
    assert callback.spikes[0].id in range(100, 124, 7)


def test_the_replay_of_a_saved_batch_gives_the_same_losses(
    fit: Fit, accelerator: str, device: str, tmp_path: Path
) -> None:
    """The random numbers come from the device's generator."""
    net = WithIds("vector")
    callback = ALRCCallback(num_stddev=1.0, save_batches=4)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(net, callback, saving, accelerator=accelerator, max_epochs=6, enable_checkpointing=True)
    files = {path.name: path for path in (tmp_path / "alrc_batches").iterdir()}
    spikes = [each for each in callback.spikes if each.batch_file in files and each.step > 0]
    assert spikes
    for spike in spikes:
        checkpoint = torch.load(tmp_path / f"step={spike.step}.ckpt", weights_only=True)
        net.load_state_dict(checkpoint["state_dict"])
        losses = replay(files[spike.batch_file], net.to(device), accelerator=accelerator)["loss"]
        assert losses[spike.sample].item() == spike.loss


# ---- checkpoints


def test_a_fit_with_some_losses_on_the_cpu_resumes(
    fit: Fit, accelerator: str, tmp_path: Path
) -> None:
    class LacksTargets(Net):
        """A batch of each epoch has no targets."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            return torch.tensor(0.0, requires_grad=True) if batch_idx == 3 else loss

    path = None
    for epochs in (2, 20):  # before and after the first spike is judged
        callback = ALRCCallback(**SETTINGS)
        trainer = fit(
            LacksTargets("vector"),
            callback,
            accelerator=accelerator,
            max_epochs=epochs,
            ckpt_path=path,
        )
        path = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
    assert {spike.kind for spike in callback.spikes} & {"data", "divergence"}


def test_a_checkpoint_resumes_on_a_cpu_and_then_on_the_device(
    fit: Fit, accelerator: str, tmp_path: Path
) -> None:
    def moments(trainer: Any) -> Any:
        return callback_of(trainer).state_dict()["losses"]

    def saved(trainer: Any, name: str) -> Path:
        trainer.save_checkpoint(tmp_path / name)
        return tmp_path / name

    first = fit(Net("vector"), ALRCCallback(**SETTINGS), accelerator=accelerator)
    path, before = saved(first, "first.ckpt"), moments(first)
    stored = torch.load(path, weights_only=True)["callbacks"]["ALRCCallback"]["losses"]
    assert stored == before
    fresh = ALRCCallback(**SETTINGS)
    fresh.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["ALRCCallback"])
    assert fresh.state_dict()["losses"] == before
    there = fit(
        Net("vector"), ALRCCallback(**SETTINGS), accelerator="cpu", max_epochs=4, ckpt_path=path
    )
    back = fit(
        Net("vector"),
        ALRCCallback(**SETTINGS),
        accelerator=accelerator,
        max_epochs=6,
        ckpt_path=saved(there, "there.ckpt"),
    )
    undisturbed = fit(Net("vector"), ALRCCallback(**SETTINGS), accelerator="cpu", max_epochs=6)
    found, expected = (callback_of(each).losses["loss"] for each in (back, undisturbed))
    assert state_of(found) == pytest.approx(state_of(expected), rel=1e-4)


def test_memory_is_flat_from_step_500_to_step_2000(fit: Fit, cuda: str) -> None:
    allocated = []

    class Watching(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (500, 2000):
                torch.cuda.synchronize()
                allocated.append(torch.cuda.memory_allocated())

    class Short(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.losses(batch)

    data = TensorDataset(torch.randn(2100 * 4, 3), torch.randn(2100 * 4, 2))
    fit(
        Short("vector"),
        ALRCCallback(),
        Watching(),
        batches=DataLoader(data, batch_size=4),
        accelerator="gpu",
        max_epochs=1,
    )
    assert allocated[1] - allocated[0] < 2**20  # the record holds clips until it reads them
