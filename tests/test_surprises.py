"""docs/surprises.md: each surprise as observed, and what this library does about it.

A test of another library's behaviour runs only with the version in which it was observed. To see
the skipped tests: ``python -m pytest tests/test_surprises.py -rs``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback
from tests.nets import SETTINGS, Net, weights_of
from tests.offline_wandb import finished
from tests.scripts import surprising_ranks
from tests.scripts.launching import forked, join
from tests.test_distributed import HAS_FSDP2

Fit = Callable[..., Any]


def seen_with(**versions: str) -> pytest.MarkDecorator:
    """Skip if a package is missing or has another version."""
    for name, seen in versions.items():
        name = name.replace("_", "-")
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if found.partition("+")[0] != seen:
            return pytest.mark.skip(reason=f"seen with {name} {seen}; here it is {found}")
    return pytest.mark.filterwarnings("ignore")


class Noting(torch.optim.SGD):
    """SGD that keeps the gradients before and after it calls its closure."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.before: list[Tensor | None] = []
        self.after: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        weight = self.param_groups[0]["params"][0]
        self.before.append(None if weight.grad is None else weight.grad.clone())

        def noting() -> Any:
            loss = closure()
            self.after.append(weight.grad.clone())
            return loss

        return super().step(noting)


def with_optimizer(make: Callable[[Any], Any], shape: str = "scalar") -> Net:
    class Chosen(Net):
        def configure_optimizers(self) -> Any:
            self.chosen = make(self.parameters())
            return self.chosen

    return Chosen(shape)


@seen_with(pytorch_lightning="2.6.6")
def test_an_optimizer_has_the_last_batchs_gradients_before_its_closure(fit: Fit) -> None:
    net = with_optimizer(lambda parameters: Noting(parameters, lr=0.01))
    fit(net, max_epochs=1)
    assert net.chosen.before[0] is None
    for before, after in zip(net.chosen.before[1:], net.chosen.after, strict=False):
        torch.testing.assert_close(before, after)


@seen_with(pytorch_lightning="2.6.6", autoclip="0.2.1")
def test_autoclip_as_optimizer_clips_no_gradient_that_is_used(fit: Fit) -> None:
    from autoclip.torch import QuantileClip

    def clipped(parameters: Any) -> Any:
        plain = torch.optim.SGD(parameters, lr=0.01)
        optimizer = QuantileClip.as_optimizer(optimizer=plain, quantile=0.01)
        optimizer.__dict__.update(param_groups=plain.param_groups, defaults=plain.defaults)
        optimizer.__dict__.update(state=plain.state, _optimizer_step_pre_hooks={})
        optimizer.__dict__.update(_optimizer_step_post_hooks={})
        return optimizer

    autoclipped = with_optimizer(clipped)
    plain = with_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    fit(autoclipped, max_epochs=1)
    fit(plain, max_epochs=1)
    assert weights_of(autoclipped) == weights_of(plain)


@seen_with(pytorch_lightning="2.6.6", pytorch_optimizer="4.1.0")
def test_sam_climbs_along_the_gradient_of_the_batch_before(fit: Fit) -> None:
    from pytorch_optimizer import SAM

    class Climbing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.start = self.layer.weight.detach().clone()
            self.before = None if batch_idx == 0 else self.layer.weight.grad.clone()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.climb = self.layer.weight.detach() - self.start
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return SAM(self.parameters(), torch.optim.SGD, lr=0.01, rho=0.5)

    net = Climbing()
    fit(net, max_epochs=1, limit_train_batches=2)
    along = torch.cosine_similarity(net.climb.flatten(), net.before.flatten(), dim=0)
    assert along > 0.9999


def test_alrc_scales_the_gradient_that_the_optimizer_uses(fit: Fit) -> None:
    net = with_optimizer(lambda parameters: Noting(parameters, lr=0.0))
    unclipped = with_optimizer(lambda parameters: Noting(parameters, lr=0.0))
    alrc = ALRCCallback(**SETTINGS, record=100)
    fit(net, alrc, max_epochs=1)
    fit(unclipped, max_epochs=1)
    assert alrc.spikes
    for spike in alrc.spikes:
        given, used = unclipped.chosen.after[spike.batch_idx], net.chosen.after[spike.batch_idx]
        torch.testing.assert_close(used, given * spike.scale)


class Normed(pl.LightningModule):
    """A network with BatchNorm, trained with SGD. It keeps its weights at each epoch's start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.starts: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.starts.append(self.layers[0].weight.detach().clone())
        return self.layers(batch).pow(2).mean(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randn(32, 3, generator=generator), batch_size=8)


@seen_with(pytorch_lightning="2.6.6")
def test_weight_averaging_applies_a_stale_gradient_to_the_average(fit: Fit) -> None:
    net = Normed()
    alrc = ALRCCallback()
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1, annealing_epochs=1)
    fit(net, alrc, averaging, max_epochs=3)
    # After 3 epochs, a fourth updates BatchNorm's statistics. It starts with the averaged weights.
    assert len(net.starts) == 4
    average = net.starts[-1]
    assert not torch.equal(net.layers[0].weight, average)
    assert int(alrc.losses["loss"].losses_total) == 3 * 32  # the fourth epoch updates no moments


class Failing(Net):
    """Raises in one batch."""

    at: int | None = 3

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.at:
            raise RuntimeError("an accident")
        return super().training_step(batch, batch_idx)


@seen_with(pytorch_lightning="2.6.6")
def test_a_run_resumed_after_an_exception_logs_steps_1_too_high(fit: Fit, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
    with pytest.raises(RuntimeError, match="an accident"):
        fit(Failing(), ALRCCallback(), saving, max_epochs=1, enable_checkpointing=True)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    net = Failing()
    net.at = None
    logger = CSVLogger(tmp_path / "logs")
    arguments = {"log_every_n_steps": 1, "logger": logger, "max_epochs": 1}
    trainer = fit(net, ALRCCallback(), ckpt_path=str(path), **arguments)
    assert trainer.global_step == 6
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 7
    # The last of 6 steps is step 5. Lightning logs it as 6, and ALRC's rows have Lightning's step.
    assert rows_of(logger)[-1]["step"] == "6"


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    import csv

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@seen_with(pytorch_lightning="2.6.6")
def test_a_metric_logged_once_is_repeated_until_the_epoch_ends(fit: Fit, tmp_path: Path) -> None:
    class Once(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                self.log("once", 7.0)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    alrc = ALRCCallback()
    fit(Once(), alrc, max_epochs=1, logger=logger, log_every_n_steps=2)
    rows = rows_of(logger)
    assert [row["step"] for row in rows if row["once"]] == ["1", "3", "5"]
    assert len({row["alrc/loss"] for row in rows if row.get("alrc/loss")}) == 3


@seen_with(pytorch_lightning="2.6.6")
def test_a_warm_up_overwrites_the_learning_rate_that_was_found(fit: Fit) -> None:
    class WarmingUp(Net):
        lr = 1e-3

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": warm_up, "interval": "step"},
            }

    net = WarmingUp()
    finder = LearningRateFinder(num_training_steps=50, early_stop_threshold=None)
    alrc = ALRCCallback()
    trainer = fit(net, alrc, finder, max_epochs=3, enable_checkpointing=True)
    assert net.lr != 1e-3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert int(alrc.losses["loss"].losses_total) == 18  # without the losses of the search


@seen_with(pytorch_lightning="2.6.6")
def test_spike_detection_lets_nan_pass_against_its_docstring() -> None:
    from lightning_fabric.utilities.spike import SpikeDetection

    detection = SpikeDetection(finite_only=False, warmup=0)
    assert "If set to ``False``, consider non-finite values" in " ".join(
        (SpikeDetection.__doc__ or "").split()
    )
    assert not detection._is_spike(torch.tensor(math.nan))
    assert SpikeDetection(warmup=0)._is_spike(torch.tensor(math.nan))


@seen_with(zclip="1.0.0")
def test_zclip_clips_a_lasting_rise_for_ever() -> None:
    from zclip import ZClip

    generator = torch.Generator().manual_seed(0)
    layer, zclip = nn.Linear(10, 1, bias=False), ZClip(max_grad_norm=None)
    norms: list[float] = []
    for step in range(5000):
        gradient = torch.randn(1, 10, generator=generator)
        size = (1.0 if step < 1000 else 2.0) + 0.05 * torch.randn((), generator=generator)
        layer.weight.grad = size * gradient / gradient.norm()
        zclip.step(layer)
        norms.append(layer.weight.grad.norm().item())
    assert max(norms[-1000:]) < 1.5


def test_alrc_follows_a_lasting_rise() -> None:
    generator, alrc = torch.Generator().manual_seed(0), ALRC()
    clipped = []
    for step in range(3000):
        loss = (1.0 if step < 1000 else 2.0) + 0.05 * torch.randn((), generator=generator)
        clipped.append(bool(alrc(loss.requires_grad_()) < loss))
    assert sum(clipped[1000:1100]) > 30
    assert sum(clipped[2000:]) < 10


@seen_with(autoclip="0.2.1", torch="2.14.1")
def test_autoclip_ends_in_nan_after_an_overflow() -> None:
    from autoclip.torch import QuantileClip

    layer = nn.Linear(3, 1, bias=False)
    clipper = QuantileClip(layer.parameters(), quantile=0.9, global_threshold=True)
    for value in (1.0, 1.0, math.inf, 1.0):
        layer.weight.grad = torch.full((1, 3), value)
        clipper.step()
    assert layer.weight.grad.isnan().all()


def test_alrc_learns_nothing_from_an_overflow() -> None:
    alrc = ALRC()
    for value in (*[1.0] * 12, math.inf, 1.0):
        alrc(torch.tensor(value, requires_grad=True))
    assert alrc.mu1 == 1
    assert alrc.threshold.isfinite()
    assert alrc.nonfinite_total == 1


@seen_with(torch="2.14.1")
def test_adam_in_bfloat16_never_forgets_a_spike() -> None:
    weight = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.0)
    for step in range(3000):
        weight.grad = torch.full_like(weight, 1000.0 if step == 10 else 0.1)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"] > 900  # in float32, exp_avg_sq is 50


def test_alrc_forgets_a_spike_in_bfloat16() -> None:
    alrc = ALRC(num_stddev=math.inf)
    for step in range(8000):
        value = 1000.0 if step == 100 else 1.0
        alrc(torch.tensor(value, dtype=torch.bfloat16, requires_grad=True))
    assert alrc.mu1 < 1.1


@seen_with(schedulefree="1.4.1", pytorch_lightning="2.6.6")
def test_schedulefree_moves_weights_at_a_batch_that_is_skipped(fit: Fit) -> None:
    from schedulefree import SGDScheduleFreeClosure

    class Skipping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return SGDScheduleFreeClosure(self.parameters(), lr=0.05)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.at_start = self.layer.weight.detach().clone()
            if batch_idx == 3:
                self.moved = not torch.equal(self.layer.weight, self.at_start)

    net = Skipping()
    fit(net, max_epochs=1)
    assert net.moved

    class Spoilt(Skipping):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = Net.training_step(self, batch, batch_idx)
            return loss * math.nan if batch_idx == 3 else loss

    spoilt = Spoilt()
    fit(spoilt, ALRCCallback(nonfinite="skip"), max_epochs=1)
    assert not spoilt.moved


@seen_with(torchmetrics="1.9.0", pytorch_lightning="2.6.6")
def test_metrics_under_bf16_true_stop_counting_at_256(fit: Fit) -> None:
    from torchmetrics import SumMetric

    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.count = SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count.update(1.0)
            return super().training_step(batch, batch_idx)

    net = Counting()
    alrc = ALRCCallback()
    fit(net, alrc, max_epochs=50, precision="bf16-true")
    assert net.count.compute() == 256
    assert alrc.losses["loss"].losses_total == 300


@seen_with(torchmetrics="1.9.0", torch="2.14.1")
def test_ssim_under_autocast_is_wrong() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 8, 8, generator=generator)
    images = nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1)
    right = ssim(blurred, images, data_range=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        wrong = ssim(blurred, images, data_range=1.0)
    assert wrong.dtype == right.dtype == torch.float32
    assert abs(wrong - right) > 1e-3


def test_alrc_has_the_moments_of_float32_losses_under_autocast() -> None:
    alrc, loss = ALRC(), torch.tensor(1.001, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        clipped = alrc(loss)
    assert clipped == loss
    assert alrc.mu1 == loss.double()


@pytest.fixture(scope="module")
def rank_reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The reports of two processes on gloo."""
    path = tmp_path_factory.mktemp("ranks")
    join(*[forked(surprising_ranks.main, rank, path) for rank in (0, 1)])
    return [json.loads((path / f"{rank}.json").read_text()) for rank in (0, 1)]


@seen_with(torch="2.14.1")
def test_item_of_a_reduced_dtensor_is_the_ranks_own_share(
    rank_reports: list[dict[str, Any]],
) -> None:
    assert [each["item"] for each in rank_reports] == [1.0, 5.0]
    assert [each["full"] for each in rank_reports] == [6.0, 6.0]


def test_alrc_takes_the_full_value_of_a_dtensor_loss(rank_reports: list[dict[str, Any]]) -> None:
    assert [each["mu1"] for each in rank_reports] == [6.0, 6.0]


@seen_with(torch="2.14.1")
def test_gloos_max_keeps_a_nan_at_some_indices_only(rank_reports: list[dict[str, Any]]) -> None:
    kept = [[value == "nan" for value in each["max"]] for each in rank_reports]
    assert any(map(any, kept))
    assert not all(map(all, kept))


def test_ranks_agree_about_a_nan(rank_reports: list[dict[str, Any]]) -> None:
    assert [each["nonfinite"] for each in rank_reports] == [1, 1]


@pytest.fixture(scope="module")
def updates_after_a_resume(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Of 8 steps, 4 before the resume from a full checkpoint, by what has counted them."""
    path = tmp_path_factory.mktemp("full")
    join(forked(surprising_ranks.resume_full_checkpoint, path))
    updates: dict[str, int] = json.loads((path / "updates.json").read_text())
    return updates


@seen_with(pytorch_lightning="2.6.6", torch="2.14.1")
def test_a_full_checkpoint_of_model_parallel_strategy_loads_without_extra_state(
    updates_after_a_resume: dict[str, int],
) -> None:
    assert updates_after_a_resume["layer"] == 4


@pytest.mark.skipif(not HAS_FSDP2, reason="torch 2.5 has no FSDP2 for the CPU")
def test_the_callback_continues_from_a_full_checkpoint_of_model_parallel_strategy(
    updates_after_a_resume: dict[str, int],
) -> None:
    assert updates_after_a_resume["callback"] == 8


@seen_with(wandb="0.31.0")
def test_one_nan_makes_a_wandb_summary_nan_for_good(wandb_logger: Any, fit: Fit) -> None:
    logger = wandb_logger()
    logger.experiment.define_metric("x", summary="min,max,mean")
    for value in (1.0, math.nan, 3.0):
        logger.experiment.log({"x": value})

    class Spoilt(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 3 else loss

    alrc = ALRCCallback(nonfinite="skip")
    fit(Spoilt(), alrc, logger=logger, log_every_n_steps=1, max_epochs=1)
    summary = finished(logger).summary
    assert {str(value).lower() for value in summary["x"].values()} == {"nan"}
    assert math.isfinite(summary["alrc/loss"]["max"])
    assert summary["alrc/nonfinite_total"]["last"] == 1


@seen_with(dvclive="3.49.1", pytorch_lightning="2.6.6")
def test_dvclive_deletes_other_files_beside_the_checkpoints(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvclive.lightning import DVCLiveLogger

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "root" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    logger = DVCLiveLogger(log_model=True, save_dvc_exp=False, dvcyaml=None)
    alrc = ALRCCallback(**SETTINGS)
    saving = ModelCheckpoint(folder)
    fit(Net("vector"), alrc, saving, max_epochs=1, logger=logger, enable_checkpointing=True)
    assert not (folder / "notes.txt").exists()
    (record,) = tmp_path.rglob("alrc_spikes.jsonl")
    assert record.parent != folder
    assert len(record.read_text().splitlines()) == len(alrc.spikes) > 0


@seen_with(torch="2.14.1")
def test_the_gradient_of_clamp_at_its_bound_is_0() -> None:
    value = torch.tensor(1.0, requires_grad=True)
    value.clamp(max=1.0).backward()
    assert value.grad == 0


def test_a_loss_at_the_threshold_keeps_its_gradient() -> None:
    alrc = ALRC(mu1_start=1.0, mu2_start=2.0)
    loss = alrc.threshold.clone().requires_grad_()
    alrc(loss).backward()
    assert loss.grad == 1


def gradients_by(call: Callable[[Tensor], Tensor]) -> list[float]:
    """The gradients of a weight over a few steps, of which one has a spike."""
    weight, found = torch.tensor(1.0, requires_grad=True), []
    for x in ([1.0, 2.0], [2.0, 3.0], [30.0, 1.0], [3.0, 2.0]):
        losses = (weight * torch.tensor(x)) ** 2
        (gradient,) = torch.autograd.grad(call(losses).mean(), weight)
        found.append(gradient.item())
    return found


@seen_with(torch="2.14.1")
def test_a_compiled_function_that_updates_a_running_mean_in_place_has_wrong_gradients() -> None:
    def scaling() -> Callable[[Tensor], Tensor]:
        mean = torch.tensor(1.0)

        def scaled(loss: Tensor) -> Tensor:
            clipped = loss * (2 * mean / loss.detach()).clamp(max=1.0)
            mean.copy_(0.5 * mean + 0.5 * clipped.detach().mean())
            return clipped

        return scaled

    torch._dynamo.reset()
    found, expected = torch.compile(scaling(), backend="aot_eager"), scaling()
    assert gradients_by(found) != pytest.approx(gradients_by(expected), rel=0.1)


def test_a_compiled_call_of_alrc_has_the_gradients_of_an_eager_call() -> None:
    torch._dynamo.reset()
    settings = {"mu1_start": 1.0, "mu2_start": 2.0, "decay": 0.5}
    compiled = torch.compile(ALRC(**settings), backend="aot_eager")
    assert gradients_by(compiled) == pytest.approx(gradients_by(ALRC(**settings)), rel=1e-6)
