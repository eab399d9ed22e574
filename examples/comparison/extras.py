"""Imports of packages that only some parts of the examples need."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def imported(module: str, extra: str) -> Any:
    """Import a module of a package that one of the project's extras installs.

    Args:
        module: name of the module.
        extra: name of the extra that has the package.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise _not_installed(package, extra) from error


def folder_of(package: str, extra: str) -> Path:
    """The folder of a package, found without importing it.

    Args:
        package: name of the package.
        extra: name of the extra that has it.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise _not_installed(package, extra)
    return Path(found.submodule_search_locations[0])


def _not_installed(package: str, extra: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"the package {package!r} is not installed: pip install -e '.[{extra}]'", name=package
    )
