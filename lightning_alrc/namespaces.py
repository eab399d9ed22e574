"""One Callback class for ``pytorch_lightning`` and ``lightning.pytorch`` alike.

The two are the same code under two names, and each checks for its own classes. Importing the second
takes time, so only those in use are made bases; where none is yet, all that are installed.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_utilities.core.rank_zero import rank_zero_warn
    from pytorch_lightning import Callback
else:
    installed = [
        name
        for name in ("lightning.pytorch", "pytorch_lightning")
        if find_spec(name.partition(".")[0])
    ]
    in_use = [name for name in installed if name in sys.modules] or installed
    bases = [importlib.import_module(f"{name}.callbacks").Callback for name in in_use]
    Callback = type("Callback", tuple(bases), {"__module__": __name__})
    rank_zero_warn = importlib.import_module(f"{in_use[0]}.utilities.rank_zero").rank_zero_warn

__all__ = ["Callback", "rank_zero_warn"]
