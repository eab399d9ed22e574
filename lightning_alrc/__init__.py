"""Adaptive learning rate clipping (ALRC) for PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_alrc import functional
from lightning_alrc.alrc import ALRC
from lightning_alrc.callback import ALRCCallback
from lightning_alrc.mixin import ALRCMixin
from lightning_alrc.replay import replay

if TYPE_CHECKING:
    from lightning_alrc.plotting import plot as plot

# Without plot, which needs matplotlib: `import *` is to work where that is not installed.
__all__ = ["ALRC", "ALRCCallback", "ALRCMixin", "functional", "replay"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``plot``, imported when it is first asked for: training needs no matplotlib."""
    if name == "plot":
        from lightning_alrc.plotting import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "plot"])
