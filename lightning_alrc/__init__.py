"""Adaptive learning rate clipping (ALRC) for PyTorch Lightning."""

from lightning_alrc import functional
from lightning_alrc.alrc import ALRC
from lightning_alrc.callback import ALRCCallback
from lightning_alrc.mixin import ALRCMixin

__all__ = ["ALRC", "ALRCCallback", "ALRCMixin", "functional"]
__version__ = "0.1.0"
