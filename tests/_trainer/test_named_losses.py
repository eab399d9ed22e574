"""A checkpoint's state is accepted only if it is valid."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_alrc import ALRCCallback
from lightning_alrc._trainer.named_losses import NamedLosses
from tests.nets import SETTINGS, NamedNet, Net, callback_of, weights_of

Fit = Callable[..., Any]

COUNTS = (
    *("updates", "losses", "row_losses", "row_nonfinite", "row_clipped", "row_scale"),
    *("total_losses", "total_nonfinite", "total_clipped", "total_resets"),
)
FIELDS = ("mu1", "variance", *COUNTS, "row_loss", "row_loss_clipped")


def trained(decay: float = 0.9) -> ALRCCallback:
    callback = ALRCCallback(decay=decay, num_stddev=1.0)
    for name in ("generator", "discriminator"):
        for value in range(30):
            callback.clip(torch.tensor([value, 2.0 * value], requires_grad=True), name)
    return callback


@cache
def valid_state() -> dict[str, Any]:
    return trained(0.5).state_dict()


def changed(*path: str, value: Any) -> dict[str, Any]:
    """A state in which the entry at a path of keys is replaced."""
    state = copy.deepcopy(valid_state())
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def without(*path: str) -> dict[str, Any]:
    state = changed(*path, value=None)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return state


STATE_OF_ONE = ("losses", "generator", "state")


def hostile_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "no state": None,
        "a list": [],
        "a text": "ALRC",
        "a number": 1,
        "a tensor": torch.zeros(3),
        "nothing in it": {},
        "no version": without("version"),
        "no losses": without("losses"),
        "no state of a loss": without(*STATE_OF_ONE),
        "no version of a loss": without("losses", "generator", "version"),
        "losses as a list": changed("losses", value=[("generator", 1)]),
        "a state as a list": changed(*STATE_OF_ONE, value=[1.0] * len(FIELDS)),
        "a state as a tensor": changed(*STATE_OF_ONE, value=torch.ones(len(FIELDS))),
        "a field more": changed(*STATE_OF_ONE, "mu3", value=1.0),
    }
    for version in (0, 2, 99, "1", None, True, 1.5, [1], torch.tensor(1), torch.ones(2), math.nan):
        states[f"version {version!r}"] = changed("version", value=version)
        states[f"version {version!r} of a loss"] = changed(
            "losses", "generator", "version", value=version
        )
    names = ["", "a/b", "../../x", "a b", "a\n", "x" * 101, "x" * 10**6, "\0", 1, None, b"x", ()]
    for name in names:
        label = f"name {name!r:.30} of {len(name) if isinstance(name, str) else type(name)}"
        state = trained().state_dict()
        states[label] = changed("losses", value={name: state["losses"]["generator"]})
    for field in FIELDS:
        states[f"no {field}"] = without(*STATE_OF_ONE, field)
        for value in ("1", True, None, [1.0], torch.tensor(1.0), 1j, b"1", {}):
            states[f"{field} {value!r}"] = changed(*STATE_OF_ONE, field, value=value)
        if not field.startswith("row_loss"):  # a sum of losses may overflow
            for value in (math.nan, math.inf, -math.inf):
                states[f"{field} {value!r}"] = changed(*STATE_OF_ONE, field, value=value)
    for rates in ("0.1", 0.1, {"lr": 0.1}, [1], ["0.1"], [None], [torch.tensor(0.1)], [[0.1]]):
        states[f"learning rates {rates!r}"] = changed("learning_rates", value=rates)
    for field in ("variance", *COUNTS):
        states[f"negative {field}"] = changed(*STATE_OF_ONE, field, value=-1e-9)
    return states


HOSTILE = hostile_states()


@pytest.mark.parametrize("which", HOSTILE)
def test_a_hostile_state_is_refused_and_changes_nothing(which: str) -> None:
    callback = trained()
    before = copy.deepcopy(callback.state_dict())
    with pytest.raises(ValueError, match=r"ALRC|name") as raised:
        callback.load_state_dict(HOSTILE[which])
    assert len(str(raised.value)) < 1000
    assert callback.state_dict() == before
    assert set(callback.losses) == {"generator", "discriminator"}


def test_a_hostile_state_of_one_loss_keeps_all_losses_from_being_loaded() -> None:
    callback = trained()
    before = callback.state_dict()
    with pytest.raises(ValueError, match=r"'discriminator'.*variance"):
        callback.load_state_dict(
            changed("losses", "discriminator", "state", "variance", value=-1.0)
        )
    assert callback.state_dict() == before


@pytest.mark.parametrize(
    "settings",
    [None, [], "x", {"num_stddev": "x" * 10**6}, {"num_stddev": torch.ones(2)}, {1: {}}, {}],
    ids=lambda settings: f"{settings!r:.40}",
)
def test_settings_in_a_state_are_compared_and_never_used(settings: Any) -> None:
    callback, expected = trained(), trained(0.5)
    of_expected = expected.state_dict()["losses"]["generator"]["state"]
    with pytest.warns(UserWarning, match="settings of 'generator' differ") as warned:
        callback.load_state_dict(changed("losses", "generator", "settings", value=settings))
    assert all(len(str(each.message)) < 1000 for each in warned)
    assert callback.losses["generator"].settings == trained().losses["generator"].settings
    assert callback.state_dict()["losses"]["generator"]["state"] == of_expected


@pytest.mark.parametrize("count", [10**4])
def test_a_state_of_many_losses_is_loaded(count: int) -> None:
    one = trained().state_dict()["losses"]["generator"]
    callback = ALRCCallback(decay=0.9, num_stddev=1.0)
    callback.load_state_dict({"version": 1, "losses": {f"loss{i}": one for i in range(count)}})
    assert len(callback.losses) == count


def test_a_state_is_plain_numbers_and_strings_all_the_way_down() -> None:
    def check(thing: Any) -> None:
        if type(thing) is dict:
            assert all(type(key) is str for key in thing)
            for value in thing.values():
                check(value)
        elif type(thing) is list:
            for value in thing:
                check(value)
        else:
            assert type(thing) in (int, float, str, type(None)), thing

    check(trained().state_dict())


@pytest.mark.parametrize("precision", ["32", "bf16-true", "64"])
def test_a_trainers_checkpoint_loads_without_pickle(
    fit: Fit, tmp_path: Path, precision: Any
) -> None:
    trainer = fit(NamedNet("matrix"), precision=precision)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    again = ALRCCallback(**SETTINGS)
    again.load_state_dict(loaded["callbacks"]["ALRCCallback"])
    assert again.state_dict() == callback_of(trainer).state_dict()


def test_a_state_may_be_any_mapping() -> None:
    state = trained().state_dict()
    callback = ALRCCallback(decay=0.9, num_stddev=1.0)
    callback.load_state_dict(OrderedDict(version=1, losses=OrderedDict(state["losses"])))
    assert callback.state_dict() == state


def test_a_loaded_state_shares_nothing_with_the_dict_it_was_loaded_from() -> None:
    state = trained().state_dict()
    callback = ALRCCallback(decay=0.9, num_stddev=1.0)
    callback.load_state_dict(state)
    before = copy.deepcopy(callback.state_dict())
    state["losses"]["generator"]["state"]["mu1"] = -1.0
    assert callback.state_dict() == before


def test_a_fit_from_a_hostile_checkpoint_raises_before_its_first_step(
    fit: Fit, tmp_path: Path
) -> None:
    trainer = fit(Net("vector"), ALRCCallback(**SETTINGS), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    content["callbacks"]["ALRCCallback"]["losses"]["loss"]["state"]["mu1"] = math.nan
    torch.save(content, tmp_path / "hostile.ckpt")
    net, callback = Net("vector"), ALRCCallback(**SETTINGS)
    before = callback.state_dict()
    with pytest.raises(ValueError, match=r"'loss'.*'mu1'.*nan"):
        fit(net, callback, ckpt_path=tmp_path / "hostile.ckpt")
    assert callback.state_dict() == before
    assert not net.seen
    assert weights_of(net) != weights_of(Net("vector"))  # Lightning loads the weights first


def test_a_loss_that_is_not_declared_is_named() -> None:
    losses = NamedLosses({}, {"generator": {}})
    with pytest.raises(ValueError, match=r"\['generator'\], got 'critic'$"):
        losses.get_or_add("critic")
    with pytest.raises(ValueError, match=r"got 'loss', the name of what training_step returns$"):
        losses.get_or_add("loss")


@pytest.mark.parametrize("name", ["loss", "d-2.x", "É", "_", "x" * 100, "1"])
def test_a_name_that_is_allowed_is_kept_by_a_state(name: str) -> None:
    losses = NamedLosses({"decay": 0.9})
    assert losses.get_or_add(name) is losses[name]
    again = NamedLosses({"decay": 0.9})
    again.load_state_dict(losses.state_dict())
    assert list(again) == [name]
