"""What users hear of: a guard that has become a step-size limiter, and moments that are reset."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_alrc import ALRCCallback
from lightning_alrc._telemetry.warning_signs import (
    LearningRateDrop,
    StepSizeLimiter,
    learning_rates,
)
from tests.nets import NETS, SETTINGS, callback_of

Fit = Callable[..., Any]


def messages(fractions: list[float], period: int = 50) -> list[int]:
    """Steps of the rows after which something is told."""
    limiter = StepSizeLimiter()
    rows = enumerate(fractions)
    steps = [
        index * period
        for index, fraction in rows
        if limiter.message("loss", index * period, {"clipped_fraction": fraction})
    ]
    return steps


def test_a_fraction_that_stays_high_is_told_of_once() -> None:
    # Rows are taken two at a time, which are 100 steps.
    assert messages([0.1] * 11 + [0.21] * 100) == [1600]
    assert messages([0.2] * 100) == []
    assert messages(([0.3] * 20 + [0.0] * 2) * 5) == []
    assert messages(([0.3] * 23 + [0.0]) * 5) == [1100]


@pytest.mark.parametrize("period", [1, 3, 50, 400])
def test_it_does_not_depend_on_how_often_rows_come(period: int) -> None:
    """Every other loss is clipped; a row of one loss has all of them clipped or none."""
    fractions = [(index % 2 if period == 1 else 0.5) for index in range(3000 // period)]
    (told,) = messages(fractions, period)
    assert 1000 <= told <= 1000 + max(2 * period, 150)


def test_each_loss_is_told_of_by_itself() -> None:
    limiter = StepSizeLimiter()
    told = [
        name
        for step in range(0, 2001, 100)
        for name in ("first", "second")
        if (name == "first" or step > 500)
        and limiter.message(name, step, {"clipped_fraction": 0.5})
    ]
    assert told == ["first", "second"]


def test_a_row_without_losses_says_nothing() -> None:
    limiter = StepSizeLimiter()
    assert all(limiter.message("loss", step, {}) is None for step in range(0, 5000, 50))


def test_a_trainer_warns_of_a_step_size_limiter(fit: Fit, tmp_path: Path, namespace: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1200, size, generator=generator) for size in (3, 2)]
    data = DataLoader(TensorDataset(*tensors), batch_size=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            NETS[namespace](),
            ALRCCallback(num_stddev=0.1),
            batches=data,
            max_epochs=1,
            logger=CSVLogger(tmp_path) if namespace == "pytorch_lightning" else True,
        )
    told = [str(each.message) for each in caught if "limit on the step size" in str(each.message)]
    assert len(told) == 1
    assert "'loss'" in told[0]
    assert "num_stddev" in told[0]


def test_each_fit_is_told_of_its_own(fit: Fit, tmp_path: Path, namespace: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1200, size, generator=generator) for size in (3, 2)]
    data = DataLoader(TensorDataset(*tensors), batch_size=1)
    callback, told = ALRCCallback(num_stddev=0.1), []
    for steps in (1200, 700, 700, 1200):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logger = CSVLogger(tmp_path) if namespace == "pytorch_lightning" else True
            limits = {"max_epochs": 1, "limit_train_batches": steps}
            fit(NETS[namespace](), callback, batches=data, logger=logger, **limits)
        told.append(sum("limit on the step size" in str(each.message) for each in caught))
    assert told == [1, 0, 0, 1]


# ---- reset


def test_a_drop_is_told_from_a_decay() -> None:
    drop = LearningRateDrop(0.5)
    rates = [1.0, 1.0, 0.9, 0.46, 0.2, 0.1, 0.2, 0.0, 0.0]
    assert [drop.happened([rate]) for rate in rates] == [
        False,
        False,
        False,
        False,
        True,
        True,
        False,
        True,
        False,
    ]


def test_any_group_may_drop_and_another_number_of_groups_is_no_drop() -> None:
    drop = LearningRateDrop(0.5)
    calls = [[1.0, 1.0], [1.0, 0.1], [0.1], [0.1]]
    assert [drop.happened(rates) for rates in calls] == [False, True, False, False]


def test_a_rate_that_is_a_tensor_of_a_device_is_not_looked_at() -> None:
    on_device, on_host = torch.tensor(0.1, device="meta"), torch.tensor(0.25)
    groups = [{"lr": 0.5}, {"lr": on_device}, {"lr": on_host}]
    assert learning_rates([SimpleNamespace(param_groups=groups)]) == [0.5, 0.25]


def scheduled(namespace: str) -> Any:
    """A net whose learning rate falls to a tenth after its fourth step."""

    class Scheduled(NETS[namespace]):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Scheduled("vector")


@pytest.mark.parametrize(("ratio", "resets"), [(None, 0.0), (0.5, 2.0), (0.05, 0.0)])
def test_moments_are_reset_when_the_learning_rate_drops(
    fit: Fit, namespace: str, ratio: float | None, resets: float
) -> None:
    callback = ALRCCallback(**SETTINGS, reset_on_lr_drop=ratio)
    fit(scheduled(namespace), callback)
    state = callback.losses["loss"].dump()["state"]
    assert state["total_resets"] == resets
    assert state["updates"] == (12 if resets == 0 else 4)
    assert callback.losses["loss"].losses_total.item() == 48


def test_a_drop_right_after_resuming_is_seen(fit: Fit, tmp_path: Path, namespace: str) -> None:
    whole = ALRCCallback(**SETTINGS, reset_on_lr_drop=0.5)
    fit(scheduled(namespace), whole, max_epochs=1)
    saved = whole.state_dict()
    assert saved["learning_rates"] == pytest.approx([saved["learning_rates"][0]])
    resumed = ALRCCallback(**SETTINGS, reset_on_lr_drop=0.5)
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["learning_rates"] == saved["learning_rates"]


def test_reset_by_call_is_logged(fit: Fit, tmp_path: Path, namespace: str) -> None:
    class Resetting(NETS[namespace]):  # type: ignore[misc]
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                callback_of(self.trainer).reset()

    rows: list[float] = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "alrc/resets" in metrics:
                rows.append(metrics["alrc/resets"])

    fit(Resetting(), ALRCCallback(**SETTINGS), logger=Logger(tmp_path), log_every_n_steps=3)
    assert rows == [0, 0, 1, 1]


def test_a_name_to_reset_must_be_known(fit: Fit, namespace: str) -> None:
    callback = callback_of(fit(NETS[namespace](), ALRCCallback()))
    callback.reset("loss")
    with pytest.raises(KeyError, match=r"name must be one of.*\['loss'\], got 'lost'"):
        callback.reset("lost")


@pytest.mark.parametrize("ratio", [0.0, 1.0, "half", True])
def test_a_wrong_ratio_raises_at_once(ratio: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="reset_on_lr_drop must be a number above 0"):
        ALRCCallback(reset_on_lr_drop=ratio)
