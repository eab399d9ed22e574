"""The environment variable ``LIGHTNING_ALRC`` adds ALRC to a training without new code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_alrc import ALRCCallback, replay
from lightning_alrc.environment import VARIABLE, callbacks
from tests.nets import MIXIN_NETS, NAMESPACES, NETS, SETTINGS, callback_of, weights_of

Fit = Callable[..., Any]


@pytest.fixture(scope="session")
def site(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata that pip installs for this checkout."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder, [name for name in wheel.namelist() if ".dist-info/" in name])
    return folder


@pytest.fixture
def set_variable(site: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the variable, with the package's metadata installed."""
    monkeypatch.syspath_prepend(site)
    return lambda value: monkeypatch.setenv(VARIABLE, value)


def test_the_variable_clips_as_a_callback_does(fit: Fit, namespace: str, set_variable: Any) -> None:
    net, guarded = NETS[namespace](), NETS[namespace]()
    fit(net, ALRCCallback(**SETTINGS))
    set_variable(json.dumps(SETTINGS))
    trainer = fit(guarded)
    assert weights_of(net) == weights_of(guarded)
    assert callback_of(trainer).losses["loss"].clipped_total > 0


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_added_if_the_variable_is_unset_empty_or_0(
    fit: Fit, namespace: str, set_variable: Any, value: str | None
) -> None:
    if value is not None:
        set_variable(value)
    trainer = fit(NETS[namespace]())
    assert not any(isinstance(each, ALRCCallback) for each in trainer.callbacks)


def test_the_variable_adds_nothing_beside_a_callback(
    fit: Fit, namespace: str, set_variable: Any
) -> None:
    set_variable("1")
    own = ALRCCallback(**SETTINGS)
    trainer = fit(NETS[namespace](), own)
    assert callback_of(trainer) is own
    assert own.losses["loss"].losses_total == 12


@pytest.mark.parametrize("is_part", [False, True])
def test_the_variable_adds_nothing_beside_a_mixin(
    fit: Fit, namespace: str, set_variable: Any, is_part: bool
) -> None:
    set_variable("1")
    net = own = MIXIN_NETS[namespace]()
    if is_part:
        net = NETS[namespace]()
        net.part = own
    callback = callback_of(fit(net))
    assert callback is own._alrc_callback
    assert callback.losses["loss"].losses_total == 12
    assert callback.losses["loss"].num_stddev == SETTINGS["num_stddev"]


def test_two_trainers_may_share_a_list_of_callbacks(
    make_trainer: Fit, namespace: str, set_variable: Any
) -> None:
    set_variable("1")
    shared: list[Any] = []
    for _ in range(2):
        net = NETS[namespace]()
        trainer = make_trainer(net, callbacks=shared)
        trainer.fit(net)
        assert callback_of(trainer).losses["loss"].losses_total > 0


def test_a_checkpoint_resumes_with_and_without_the_variable(
    fit: Fit, namespace: str, set_variable: Any, tmp_path: Path
) -> None:
    set_variable("1")
    path = tmp_path / "first.ckpt"
    fit(NETS[namespace](), max_epochs=1).save_checkpoint(path)
    again = fit(NETS[namespace](), max_epochs=2, ckpt_path=path)
    assert callback_of(again).losses["loss"].losses_total == 12
    set_variable("0")
    own = ALRCCallback()
    fit(NETS[namespace](), own, max_epochs=2, ckpt_path=path)
    assert own.losses["loss"].losses_total == 12


def test_a_replay_is_not_clipped(
    fit: Fit, namespace: str, set_variable: Any, tmp_path: Path
) -> None:
    logger = NAMESPACES[namespace].loggers.CSVLogger(tmp_path)
    net = NETS[namespace]()
    own = ALRCCallback(**SETTINGS, save_batches=True)
    fit(net, own, logger=logger)
    set_variable(json.dumps(SETTINGS))
    batches = Path(logger.log_dir) / "alrc_batches"
    found = replay(batches / own.spikes[0].batch_file, net)
    assert torch.isfinite(found["loss"]).all()


# ---- the value


def test_the_variable_takes_the_settings_of_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_stddev": float("inf"), "ledger": True, "losses": {"a": {"num_stddev": 2}}}
    monkeypatch.setenv(VARIABLE, json.dumps(settings))
    (callback,) = callbacks()
    assert callback.losses["a"].num_stddev == 2
    assert callback.losses.settings["num_stddev"] == float("inf")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("yes", ValueError, "LIGHTNING_ALRC must be 1, 0 or settings as JSON, like .*, got 'yes'"),
        ("[1]", ValueError, r"LIGHTNING_ALRC must be 1, 0 or settings as JSON, .*, got '\[1\]'"),
        ('{"num_stdev": 2}', ValueError, "LIGHTNING_ALRC must have settings among .*'num_stdev'"),
        ('{"render": 2}', ValueError, "LIGHTNING_ALRC must have settings among .*, got 'render'"),
        ('{"decay": 2}', ValueError, "LIGHTNING_ALRC: decay must be a number in"),
        ('{"decay": "a"}', TypeError, "LIGHTNING_ALRC: decay must be"),
    ],
)
def test_a_wrong_value_raises_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(error, match=message):
        callbacks()
