"""A fit warns once of losses that ALRC does not clip, and of no other losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_alrc import ALRCCallback
from tests import nets
from tests.nets import MIXIN_NETS, NAMED_NETS, NETS, SETTINGS, callback_of

Fit = Callable[..., Any]

OF_NAMES = "some training steps call self.alrc and others do not"
OF_BACKWARD = "loss.backward() passes by ALRC"


def warnings_in(fit: Fit, net: Any, *callbacks: Any, **arguments: Any) -> list[str]:
    """ALRC's warnings in a fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, *callbacks, **arguments)
    return [str(each.message) for each in caught if "ALRC" in str(each.message)]


# ---- steps that name their losses, and steps that do not


@pytest.mark.parametrize("explicit", [False, True], ids=["mixin", "both"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_fit_warns_once_if_only_some_steps_name_a_loss(
    fit: Fit, namespace: str, explicit: bool, first: int
) -> None:
    class Sometimes(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.losses(batch).mean()
            if batch_idx % 2 == first:
                loss = loss + self.alrc(0.1 * self.layer.weight.square().sum(), "regulariser")
            return loss

    net, callbacks = Sometimes("vector"), [ALRCCallback(**SETTINGS)] * explicit
    for _ in range(2):
        (message,) = warnings_in(fit, net, *callbacks)
        assert OF_NAMES in message
        assert "under a name of its own" in message


@pytest.mark.parametrize("kind", ["named", "unnamed", "skipping", "several"])
def test_a_fit_does_not_warn_if_all_steps_or_no_step_name_losses(
    fit: Fit, namespace: str, kind: str
) -> None:
    class Several(MIXIN_NETS[namespace]):  # type: ignore[misc]
        """Names all its losses; their number depends on the batch."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = self.losses(batch)
            total = self.alrc(losses, "loss").mean()
            return total + self.alrc(losses, "more").mean() if batch_idx % 2 else total

    made = {
        "named": NAMED_NETS[namespace]("matrix"),
        "unnamed": MIXIN_NETS[namespace]("vector"),
        "skipping": MIXIN_NETS[namespace]("scalar", "none"),
        "several": Several("vector"),
    }
    assert not warnings_in(fit, made[kind])


def test_a_validation_step_that_names_a_loss_gives_no_warning(fit: Fit, namespace: str) -> None:
    class Validating(MIXIN_NETS[namespace]):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.alrc(self.losses(batch), "validated")

        def val_dataloader(self) -> Any:
            return nets.loader()

    assert not warnings_in(fit, Validating("vector"))


# ---- manual optimization


class Twice:
    """Differentiates two losses in a step, each in one of the ways of :meth:`differentiate`."""

    ways: tuple[str, str]

    def differentiate(self, way: str, losses: Tensor, name: str) -> None:
        if way == "manual_backward":
            self.manual_backward(losses)  # type: ignore[attr-defined]
        elif way == "named":
            self.manual_backward(self.alrc(losses, name).mean())  # type: ignore[attr-defined]
        elif way == "named, backward":
            self.alrc(losses, name).mean().backward()  # type: ignore[attr-defined]
        else:
            losses.mean().backward()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()  # type: ignore[attr-defined]
        for index, way in enumerate(self.ways):
            optimizer.zero_grad()
            self.differentiate(way, self.losses(batch), f"loss{index}")  # type: ignore[attr-defined]
            optimizer.step()


@pytest.mark.parametrize(
    ("ways", "warns"),
    [
        (("manual_backward", "manual_backward"), False),
        (("named", "named"), False),
        (("named, backward", "named, backward"), False),
        (("named", "named, backward"), False),
        (("manual_backward", "backward"), True),
        (("backward", "manual_backward"), True),
        (("named", "backward"), True),
        (("named, backward", "backward"), True),
        (("backward", "backward"), True),
    ],
)
def test_a_fit_warns_once_of_losses_that_are_differentiated_without_alrc(
    fit: Fit, namespace: str, ways: tuple[str, str], warns: bool
) -> None:
    net = type("Net", (Twice, MIXIN_NETS[namespace]), {"ways": ways})("vector", "tensor", True)
    for _ in range(2):
        messages = warnings_in(fit, net, max_epochs=3)
        assert len(messages) == warns
        assert all(OF_BACKWARD in each for each in messages)
        assert all("self.manual_backward(loss)" in each for each in messages)


def test_autograd_grad_of_a_part_of_a_loss_gives_no_warning(fit: Fit, namespace: str) -> None:
    """A gradient penalty calls ``autograd.grad``, which fills no parameter's ``grad``."""

    class Penalizing(NETS[namespace]):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.losses(batch).mean()
            slopes = torch.autograd.grad(loss, self.parameters(), create_graph=True)
            self.manual_backward(loss + 0.01 * sum(each.square().sum() for each in slopes))
            optimizer.step()

    assert not warnings_in(fit, Penalizing("vector", "tensor", True), ALRCCallback(**SETTINGS))


def test_backward_in_a_validation_step_gives_no_warning(fit: Fit, namespace: str) -> None:
    class Adapting(NETS[namespace]):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                self.losses(batch).mean().backward()

        def val_dataloader(self) -> Any:
            return nets.loader()

    net = Adapting("vector", "tensor", True)
    assert not warnings_in(fit, net, ALRCCallback(**SETTINGS), inference_mode=False)


def test_a_fit_leaves_no_hook_on_a_parameter(fit: Fit, namespace: str) -> None:
    net = NETS[namespace]("vector", "tensor", True)
    trainer = fit(net, ALRCCallback(**SETTINGS))
    assert not any(each._post_accumulate_grad_hooks for each in net.parameters())
    updates = callback_of(trainer).losses["loss"].updates.item()
    net.losses(next(iter(nets.loader()))).mean().backward()
    assert callback_of(trainer).losses["loss"].updates.item() == updates
