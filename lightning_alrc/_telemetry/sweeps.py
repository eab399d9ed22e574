"""``sweep``: the configuration of a Weights & Biases sweep over ``num_stddev``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lightning_alrc._moments import arguments
from lightning_alrc.environment import VARIABLE

__all__ = ["NUM_STDDEVS", "sweep"]

NUM_STDDEVS = (1.0, 1.5, 2.0, 3.0, 4.0, 1e6)
"""The last value clips nothing. It is finite, because JSON has no infinity."""

BY_ENVIRONMENT = f'{VARIABLE}="$0" exec "$@"'
"""A shell's script that sets the variable to its argument 0, and runs its other arguments."""


def sweep(
    command: Sequence[str | os.PathLike[str]],
    metric: str,
    goal: Literal["minimize", "maximize"] = "minimize",
    values: Iterable[float] = NUM_STDDEVS,
    option: str | None = None,
) -> dict[str, Any]:
    """The configuration of a sweep that runs a program once for each ``num_stddev``.

    The program logs through a WandbLogger. It needs no :class:`ALRCCallback`: the environment
    variable ``LIGHTNING_ALRC`` adds one to each run. If the program has its own ``ALRCCallback``,
    the variable has no effect, and the program must take ``num_stddev`` by an option.

    >>> config = sweep(["python", "train.py"], "val_loss", values=[2.0, 3.0])
    >>> config["parameters"]
    {'num_stddev': {'values': [2.0, 3.0]}}

    Args:
        command: command that runs the program, such as ``["python", "train.py"]``.
        metric: name of the logged metric by which runs are compared, such as ``"val_loss"``.
        goal: ``"minimize"``, the default, or ``"maximize"``.
        values: values of ``num_stddev``, above 0. Default: 1, 1.5, 2, 3, 4 and 1,000,000. The last
            value clips nothing.
        option: option by which the program takes ``num_stddev``, without leading dashes, such as
            ``"model.num_stddev"``. ``None``, the default, sets ``LIGHTNING_ALRC``, which needs a
            POSIX shell.

    Returns:
        The configuration, for ``wandb.sweep``, or in YAML for the command ``wandb sweep``.

    Raises:
        TypeError: if ``values`` is not a list of numbers.
        ValueError: if a value is not positive and finite, ``values`` is empty, or another argument
            is not as described.
    """
    is_list = isinstance(command, Iterable) and not isinstance(command, str)
    given = list(command) if is_list else []
    if not given or not all(isinstance(word, (str, os.PathLike)) for word in given):
        raise ValueError(f"command must be a list of words, got {command!r:.200}")
    words = [os.fspath(word) for word in given]
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"metric must be a name, got {metric!r}")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"goal must be 'minimize' or 'maximize', got {goal!r}")
    if option is not None and (not isinstance(option, str) or option[:1] in ("", "-")):
        raise ValueError(f"option must be a name without leading dashes, got {option!r}")
    try:
        listed = list(values)
    except TypeError:
        raise TypeError(f"values must be a list of numbers, got {values!r:.200}") from None
    if not listed:
        raise ValueError("values must have one number at least, got none")
    parameter = "num_stddev" if option is None else option
    # W&B's agent replaces ${args} or ${args_json} by the values of a run.
    run = ["sh", "-c", BY_ENVIRONMENT, "${args_json}", *words]
    if option is not None:
        run = [*words, "${args}"]
    return {
        "name": f"{parameter} of ALRC",
        "program": next((word for word in words if word.endswith(".py")), words[0]),
        "method": "grid",
        "metric": {"name": metric, "goal": goal},
        "parameters": {parameter: {"values": [_checked(value) for value in listed]}},
        "command": ["${env}", *run],
    }


def _checked(value: Any) -> float:
    allowed = "positive finite numbers"
    number = arguments.number("values", value, allowed)
    if not 0 < number < math.inf:
        raise ValueError(f"values must be {allowed}, got {value!r}")
    return number
