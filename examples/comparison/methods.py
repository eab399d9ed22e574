"""The methods by name, as arguments of a Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl

from lightning_alrc import ALRCCallback

from .clippers import AdaptiveGradientClipping, AutoClipping, StepSkipping, ZClipping
from .progress import Report, Reporter

CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "zclip": ZClipping,
    "autoclip": AutoClipping,
    "autoclip10": lambda: AutoClipping(quantile=0.1, global_threshold=True),
    "agc": AdaptiveGradientClipping,
    "skip": StepSkipping,
}
"""Methods of other packages, with the values of the packages' READMEs; autoclip10 has the values of
its paper."""


def alrc_of(trainer: pl.Trainer) -> ALRCCallback | None:
    """A Trainer's ALRCCallback, if it has one."""
    return next((each for each in trainer.callbacks if isinstance(each, ALRCCallback)), None)


def clipped_by(trainer: pl.Trainer) -> int | None:
    """How many losses ALRC has clipped; None without ALRC."""
    alrc = alrc_of(trainer)
    return None if alrc is None else sum(int(each.clipped_total) for each in alrc.losses.values())


def worst_ids(trainer: pl.Trainer) -> list[str]:
    """The ids of ALRC's worst clips, the worst first; empty without ALRC."""
    alrc = alrc_of(trainer)
    return [] if alrc is None else [str(spike.id) for spike in alrc.spikes]


NUMBER = r"\d+(?:\.\d+)?"


def huber_delta(method: str) -> float | None:
    """The delta of a method's Huber loss, 0.5 for ``huber0.5+norm``; None without Huber loss."""
    huber = re.search(rf"(?:^|\+)huber({NUMBER})(?:\+|$)", method)
    return float(huber[1]) if huber else None


def check_method(method: str, setting: str, own: Iterable[str]) -> None:
    """Raise if a setting does not have a method.

    Args:
        method: the method asked for.
        setting: the setting's name.
        own: the setting's methods. Parts of these are allowed with any number, and the methods that
            need nothing from the module are always allowed.

    Raises:
        ValueError: there is no such method, or it has the same part twice.
    """
    protection(method)
    parts = dict.fromkeys(part for each in own for part in each.split("+"))
    allowed = {"none", "norm", "alrc", *CALLBACKS} | {_without_number(part) for part in parts}
    asked = [_without_number(part) for part in method.split("+")]
    kinds = {part.partition("-")[0] for part in asked}
    if not allowed.issuperset(asked) or len(kinds) < len(asked):
        general = ("none", "norm", *CALLBACKS)
        others = [part for part in parts if part not in general]
        raise ValueError(
            f"methods of {setting!r} must be {', '.join([*general, 'alrc and a number', *others])}"
            f", or several joined by '+', each once, got {method!r}"
        )


def _without_number(part: str) -> str:
    return part if part in CALLBACKS else re.sub(NUMBER, "", part, count=1)


def protection(method: str, record: int = 0) -> dict[str, Any]:
    """A Trainer's arguments for a method: its callbacks, and gradient_clip_val.

    Args:
        method: ``none``, ``norm``, a key of `CALLBACKS`, ``alrc`` followed by a number of standard
            deviations, or ``huber`` and a number, which the module implements; see `huber_delta`.
            ``+`` joins several of these.
            Text after a hyphen, as in ``alrc3-token``, has no effect here: it names the losses
            that the module returns.
        record: number of worst clips that ALRC keeps.

    Raises:
        ValueError: there is no such method.
    """
    callbacks: list[pl.Callback] = []
    arguments: dict[str, Any] = {"callbacks": callbacks}
    for name in method.split("+"):
        alrc = re.fullmatch(rf"alrc({NUMBER})(?:-\w+)?", name)
        if alrc:
            callbacks.append(ALRCCallback(num_stddev=float(alrc[1]), record=record))
        elif name in CALLBACKS:
            callbacks.append(CALLBACKS[name]())
        elif name == "norm":
            arguments["gradient_clip_val"] = 1.0
        elif name != "none" and not huber_delta(name):
            raise ValueError(
                f"methods must be none, norm, {', '.join(CALLBACKS)}, alrc and a number, huber and "
                f"a number, or several joined by '+', got {method!r}"
            )
    return arguments


def trainer(method: str, steps: int, record: int = 0, report: Report | None = None) -> pl.Trainer:
    """A Trainer on the CPU that trains with a method, without logs or checkpoints."""
    arguments = protection(method, record)
    arguments["callbacks"].append(Reporter(report))
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
