"""Adaptive learning rate clipping (ALRC) for PyTorch Lightning.

Import the names in ``__all__`` from here, and also :func:`plot`, :func:`cartography` and
:func:`preview_log`. Import :class:`~lightning_alrc.spikes.Spike` from ``spikes``, and
:func:`~lightning_alrc.wandb.workspace`, :func:`~lightning_alrc.wandb.report` and
:func:`~lightning_alrc.wandb.sweep` from ``wandb``. Public names can also be
imported from the other modules without an underscore, such as ``lightning_alrc.callback``; these
paths stay valid. Packages whose names begin with an underscore are private.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_alrc import functional
from lightning_alrc.alrc import ALRC
from lightning_alrc.replay import replay

if TYPE_CHECKING:
    from lightning_alrc.callback import ALRCCallback as ALRCCallback
    from lightning_alrc.ledger import read_ledger as read_ledger
    from lightning_alrc.mixin import ALRCMixin as ALRCMixin
    from lightning_alrc.plotting import cartography as cartography
    from lightning_alrc.plotting import plot as plot
    from lightning_alrc.preview import preview_log as preview_log
    from lightning_alrc.selection import without_spikes as without_spikes
    from lightning_alrc.spikes import read_spikes as read_spikes

# `import *` must work without matplotlib and NumPy. So the functions of modules that import either
# of them are left out.
__all__ = [
    "ALRC",
    "ALRCCallback",
    "ALRCMixin",
    "functional",
    "read_ledger",
    "read_spikes",
    "replay",
    "without_spikes",
]
__version__ = "0.2.0"

_MODULE_OF = {
    "ALRCCallback": "lightning_alrc.callback",
    "ALRCMixin": "lightning_alrc.mixin",
    "cartography": "lightning_alrc.plotting",
    "plot": "lightning_alrc.plotting",
    "preview_log": "lightning_alrc.preview",
    "read_ledger": "lightning_alrc.ledger",
    "read_spikes": "lightning_alrc.spikes",
    "without_spikes": "lightning_alrc.selection",
}


def __getattr__(name: str) -> Any:
    """Import a name of ``_MODULE_OF`` on first use.

    So ``ALRC`` works without Lightning, and the callback works without matplotlib.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
