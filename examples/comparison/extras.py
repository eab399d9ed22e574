"""Packages that only a part of the example needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def imported(module: str, extra: str) -> Any:
    """Import a module of a package that is one of the project's extras.

    Args:
        module: its name.
        extra: the name of the extra that has the package.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how it is.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"the package {package!r} is not installed: pip install -e '.[{extra}]'", name=package
        ) from error
