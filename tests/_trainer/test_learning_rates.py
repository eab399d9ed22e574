"""Moments that are reset: by a call, or when a learning rate drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_alrc import ALRCCallback
from lightning_alrc._trainer.learning_rates import LearningRateDrop, learning_rates
from tests.nets import NETS, SETTINGS, callback_of

Fit = Callable[..., Any]


def test_a_drop_is_distinguished_from_a_decay() -> None:
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


def test_a_drop_to_exactly_the_fraction_is_seen_despite_rounding() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1 ** (epoch // 2))
    drop, found = LearningRateDrop(0.1), []
    for _ in range(8):
        found.append(drop.happened(learning_rates([optimizer])))
        optimizer.step()
        scheduler.step()
    assert found == [False, False, True, False, True, False, True, False]


def test_any_group_may_drop_and_another_number_of_groups_is_no_drop() -> None:
    drop = LearningRateDrop(0.5)
    calls = [[1.0, 1.0], [1.0, 0.1], [0.1], [0.1]]
    assert [drop.happened(rates) for rates in calls] == [False, True, False, False]


def test_a_rate_that_is_a_tensor_on_a_device_is_not_read() -> None:
    on_device, on_host = torch.tensor(0.1, device="meta"), torch.tensor(0.25)
    groups = [{"lr": 0.5}, {"lr": on_device}, {"lr": on_host}]
    assert learning_rates([SimpleNamespace(param_groups=groups)]) == [0.5, 0.25]


def test_a_group_without_a_rate_is_left_out() -> None:
    groups = [{"lr": 0.5}, {"lr": None}, {}]
    assert learning_rates([SimpleNamespace(param_groups=groups)]) == [0.5]


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


def test_a_drop_between_a_checkpoint_and_the_resumed_run_is_seen(
    fit: Fit, tmp_path: Path, namespace: str
) -> None:
    whole, resumed = (ALRCCallback(**SETTINGS, reset_on_lr_drop=0.5) for _ in range(2))
    trainer = fit(scheduled(namespace), whole, max_steps=4)
    trainer.save_checkpoint(tmp_path / "before_the_drop.ckpt")
    assert whole.losses["loss"].dump()["state"]["total_resets"] == 0
    fit(scheduled(namespace), resumed, ckpt_path=tmp_path / "before_the_drop.ckpt", max_steps=6)
    assert resumed.losses["loss"].dump()["state"]["total_resets"] == 1


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
