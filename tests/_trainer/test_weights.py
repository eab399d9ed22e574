"""The fingerprint of a module's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn

from lightning_alrc import ALRCCallback
from lightning_alrc._trainer.weights import fingerprint
from tests.nets import SETTINGS, Net, loader

Fit = Callable[..., Any]


def float4() -> Tensor:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this PyTorch has no float4")
    return torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "COO": lambda: torch.eye(3).to_sparse(),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "float4": float4,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "int8": lambda: torch.ones(3, dtype=torch.int8),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "empty": lambda: torch.ones(0),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR|The PyTorch API of nested")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_fit_with_a_frozen_parameter_of_any_kind_ends_and_the_next_continues(
    fit: Fit, kind: str
) -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.first = nn.Parameter(UNUSUAL[kind](), requires_grad=False)
            self.layer = self._modules.pop("layer")  # after the unusual parameter

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.layer.parameters(), 0.05)

    net, callback = Frozen(), ALRCCallback(**SETTINGS)
    fit(net, callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*moments start afresh")
        fit(net, callback)
    with torch.no_grad():
        net.layer.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="moments start afresh"):
        fit(net, callback)


@pytest.mark.parametrize("between", ["failing", "searching", "ended"])
def test_a_run_that_trains_nothing_does_not_hide_that_the_weights_have_changed(
    fit: Fit, make_trainer: Callable[..., Any], between: str
) -> None:
    class Validated(Net):
        fails, lr = False, 0.05

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.fails:
                raise ValueError("not validated")

        def val_dataloader(self) -> Any:
            return loader()

    net, callback = Validated("vector"), ALRCCallback(**SETTINGS)
    trainer = fit(net, callback)
    with torch.no_grad():
        net.layer.weight.mul_(1.5)
    if between == "failing":
        net.fails = True
        with pytest.raises(ValueError, match="not validated"):
            fit(net, callback)  # in the sanity check
        net.fails = False
    elif between == "searching":
        tuner = Tuner(make_trainer(net, callbacks=[callback]))
        tuner.lr_find(net, num_training=5, update_attr=False)
    else:
        trainer.fit(net)  # has reached max_epochs
    with pytest.warns(UserWarning, match="moments start afresh"):
        fit(net, callback)


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_a_complex_parameter_has_a_norm(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([3.0 + 4.0j], dtype=dtype))
    found = fingerprint(module)
    assert found is not None
    assert found.tolist() == [5.0]


def test_no_parameter_is_left_out_if_the_device_has_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fingerprint without this parameter would make the next fit forget the moments."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Tensor, "float", full)
    with pytest.raises(torch.OutOfMemoryError):
        fingerprint(nn.Linear(3, 3).bfloat16())
