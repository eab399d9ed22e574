"""One ``Callback`` class for both ``pytorch_lightning`` and ``lightning.pytorch``.

The two packages are the same code, but each accepts only its own classes. Importing a package takes
time. So the bases of ``Callback`` come from the packages that are already imported. If none is
imported, they come from all packages that are installed. A package that is imported later adds its
base when the next callback is made.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

if TYPE_CHECKING:
    import lightning.pytorch
    import pytorch_lightning
    from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

    class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback): ...  # type: ignore[misc]
else:
    installed = [name for name in PACKAGES if find_spec(name.partition(".")[0])]
    in_use = [name for name in installed if name in sys.modules] or installed
    bases = [importlib.import_module(f"{name}.callbacks").Callback for name in in_use]
    Callback = type("Callback", tuple(bases), {"__module__": __name__})
    rank_zero = importlib.import_module(f"{in_use[0]}.utilities.rank_zero")
    rank_zero_info, rank_zero_warn = rank_zero.rank_zero_info, rank_zero.rank_zero_warn

__all__ = ["Callback", "join_late_packages", "rank_zero_info", "rank_zero_warn"]


def join_late_packages() -> None:
    """Add the bases of packages that were imported after this module to :class:`Callback`."""
    for name in PACKAGES:
        package = sys.modules.get(f"{name}.callbacks")
        if package is not None and not issubclass(Callback, package.Callback):
            Callback.__bases__ += (package.Callback,)
